"""FastDeploy's ForwardMeta as the rows of a step: built once per step, on the device, for any number of requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from cache_manager import TensorKey
from fastdeploy_dsa.ops import IndexSelection
from fastdeploy_dsa.rotary import Rotation
from fastdeploy_dsa.step import StepMetadata

NUM_MAX_LENGTHS = 9
LONGEST_CONTEXT = 3
"""Place in max_len_tensor_cpu of the longest context after the step."""


@dataclass
class StepRows:
    """What the layers of one step share.

    Attributes:
        step: The rows; nothing is added to FastDeploy's.
        rotation: Of the rows.
        counts: [T] int32, tokens that a selection of each row holds.
        caches: Cache tensors by (role, absolute layer id).
        selections: By layer id, of the layers that selected so far: layers that share an indexer look here.
    """

    step: StepMetadata
    rotation: Rotation
    counts: Tensor
    caches: Mapping[TensorKey, Tensor]
    selections: dict[int, IndexSelection] = field(default_factory=dict)


def step_metadata(forward_meta: Any, *, block_size: int, max_length: int) -> StepMetadata:
    """The rows of a ForwardMeta.

    Positions and slots are computed here, because FastDeploy fills its own after the backend was asked, for a draft
    model not at all, and leaves rows behind the last token of a captured step as they were. Everything is read from
    the runner's buffers by ops that a graph can capture: a replayed step has its own rows.

    Args:
        forward_meta: A ForwardMeta.
        block_size: Tokens of a block.
        max_length: No context is longer.

    Raises:
        ValueError: A field is None; ForwardMeta has no other way to say that it is missing.
    """
    ids, batch_ids, starts, this_time, cached, block_table = (
        _field(forward_meta, name)
        for name in (
            "ids_remove_padding",
            "batch_id_per_token",
            "cu_seqlens_q",
            "seq_lens_this_time",
            "seq_lens_decoder",
            "block_tables",
        )
    )
    num_rows = ids.shape[0]
    rows = paddle.arange(num_rows, dtype="int32")
    named = batch_ids.reshape([-1])[:num_rows].astype("int32")
    request_ids = paddle.clip(named, min=0)
    ahead = rows - _of_rows(starts, request_ids)
    is_token = (named >= 0) & (ahead >= 0) & (ahead < _of_rows(this_time, request_ids))
    positions = paddle.where(is_token, ahead + _of_rows(cached, request_ids), paddle.zeros_like(rows))
    places = paddle.clip(positions // block_size, max=block_table.shape[1] - 1)
    blocks = paddle.gather_nd(block_table, paddle.stack([request_ids, places], axis=-1)).astype("int64")
    slots = blocks * block_size + (positions % block_size).astype("int64")
    none = paddle.full_like(slots, -1)
    return StepMetadata(
        token_ids=ids,
        positions=positions,
        request_ids=request_ids,
        lengths=paddle.where(is_token, positions + 1, paddle.zeros_like(rows)),
        slot_mapping=paddle.where(is_token & (blocks >= 0), slots, none),
        block_table=block_table.astype("int32"),
        num_tokens=num_rows,
        max_length=max_length,
    )


def cache_tensors(caches: object, keys: Sequence[TensorKey], roles: Sequence[str]) -> dict[TensorKey, Tensor]:
    """FastDeploy's flat list of cache tensors by (role, layer id).

    Args:
        caches: forward_meta.caches.
        keys: What the backend declares, in its order: the list of a controller that allocates what is declared.
        roles: Every role, in order: FastDeploy's inline allocation gives each layer all of them.

    Raises:
        ValueError: No list, or one of another length.
    """
    if caches is None:
        raise ValueError("forward_meta.caches: expected the cache tensors, got None")
    tensors = list(caches)  # type: ignore[call-overload]
    layers = sorted({layer for _, layer in keys})
    if len(tensors) == len(keys):
        return dict(zip(keys, tensors, strict=True))
    if len(tensors) == len(layers) * len(roles):
        everything = [(role, layer) for layer in layers for role in roles]
        return {key: tensor for key, tensor in zip(everything, tensors, strict=True) if key in set(keys)}
    raise ValueError(
        f"forward_meta.caches: expected {len(keys)} tensors, or {len(layers) * len(roles)} with every role on every "
        f"layer, got {len(tensors)}"
    )


def write_max_lengths(forward_meta: Any) -> None:
    """Fill max_len_tensor_cpu as FastDeploy's split op does on a GPU; the op has no CPU version."""
    this_time, prompt, cached = (
        _field(forward_meta, name).numpy().reshape(-1).astype(np.int64)
        for name in ("seq_lens_this_time", "seq_lens_encoder", "seq_lens_decoder")
    )
    is_active = this_time > 0
    context = cached + this_time

    def largest(values: np.ndarray[Any, Any], among: np.ndarray[Any, Any] | None = None) -> int:
        chosen = values if among is None else values[among]
        return int(chosen.max()) if chosen.size else 0

    lengths = np.zeros(NUM_MAX_LENGTHS, np.int32)
    lengths[:6] = [
        largest(this_time),
        largest(prompt),
        largest(cached),
        largest(context, is_active),
        largest(cached, is_active & (prompt == 0)),
        largest(context, is_active & (cached > 0)),
    ]
    forward_meta.max_len_tensor_cpu = paddle.to_tensor(lengths, place=paddle.CPUPlace())


def _field(forward_meta: Any, name: str) -> Tensor:
    value = getattr(forward_meta, name, None)
    if value is None:
        raise ValueError(f"forward_meta.{name}: expected a tensor, got None")
    tensor: Tensor = value
    return tensor


def _of_rows(per_request: Tensor, request_ids: Tensor) -> Tensor:
    return paddle.gather(per_request.reshape([-1]).astype("int32"), request_ids)
