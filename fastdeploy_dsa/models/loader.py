"""From a Hugging Face folder to a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import paddle
from paddle import Tensor

from fastdeploy_dsa.attention.deepseek_v4.base import DeepseekV4Attention
from fastdeploy_dsa.attention.deepseek_v4.select import select_dsv4_attn_cls
from fastdeploy_dsa.config import CompressedConfig, DsaConfig, ModelConfig, UnsupportedConfigError
from fastdeploy_dsa.models import deepseek_v4, deepseek_v32
from fastdeploy_dsa.models.checkpoint import load_weights
from fastdeploy_dsa.models.deepseek_v4 import DeepseekV4ForCausalLM
from fastdeploy_dsa.models.deepseek_v4_mtp import DeepseekV4MtpModel, v4_mtp_weight_shapes
from fastdeploy_dsa.models.deepseek_v32 import DeepseekV32ForCausalLM
from fastdeploy_dsa.models.mtp import MtpModel, mtp_weight_shapes, optional_mtp_weight_shapes
from fastdeploy_dsa.row_invariance import use_one_math_thread

RunnableConfig = DsaConfig | CompressedConfig
TargetModel = DeepseekV32ForCausalLM | DeepseekV4ForCausalLM
DraftModel = MtpModel | DeepseekV4MtpModel

_TABLE_SUFFIX = "gate.tid2eid"  # expert ids; everything else is real numbers


class _Parts(NamedTuple):
    """What a family's checkpoints hold.

    Attributes:
        shapes: Of the target.
        draft_shapes: Of the draft layers, besides.
        optional: Of draft layers, which may be shared with the target.
        leftover_reason: As load_weights.
        weight_block_size: As load_weights.
    """

    shapes: Mapping[str, tuple[int, ...]]
    draft_shapes: Mapping[str, tuple[int, ...]]
    optional: Mapping[str, tuple[int, ...]]
    leftover_reason: Callable[[str], str | None]
    weight_block_size: tuple[int, int] | None


def read_runnable_config(folder: str | Path, overrides: Mapping[str, object] | None = None) -> RunnableConfig:
    """The configuration of a model that the engine can run.

    Raises:
        ValueError: It is malformed, or of a model that cannot be run.
    """
    config = ModelConfig.from_pretrained(folder, overrides)
    if config.generation_obstacle or not isinstance(config, RunnableConfig):
        raise UnsupportedConfigError(f"{config.architecture}: {config.generation_obstacle}")
    return config


def load_model(
    folder: str | Path,
    *,
    config: RunnableConfig | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
    attention_cls: type[DeepseekV4Attention] | None = None,
) -> TargetModel:
    """Read config.json and the safetensors files of a folder and build the model in float32.

    From then on Paddle's matrix products run on one thread in this process, see row_invariance.py.

    Args:
        folder: A Hugging Face checkpoint.
        config: What config.json says, read already; None: it is read here.
        on_tensor: Called with (tensors read, tensors in all).
        attention_cls: Of models with compressed entries; None: that of the CPU.

    Raises:
        ValueError: The configuration is refused, or a tensor is unknown, missing, misshapen, truncated or not finite;
            the message names the file or the tensor.
    """
    config = config or read_runnable_config(folder)
    tensors = _load_tensors(folder, _parts(config), with_drafts=False, on_tensor=on_tensor)
    if isinstance(config, CompressedConfig):
        return DeepseekV4ForCausalLM(config, tensors, attention_cls or select_dsv4_attn_cls(config))
    return DeepseekV32ForCausalLM(config, tensors)


def load_model_with_mtp(
    folder: str | Path,
    *,
    config: RunnableConfig | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
    attention_cls: type[DeepseekV4Attention] | None = None,
) -> tuple[TargetModel, tuple[DraftModel, ...]]:
    """As load_model, with the checkpoint's draft models, which share what tensors they can.

    Raises:
        ValueError: As load_model, and if the checkpoint has no MTP layer.
    """
    config = config or read_runnable_config(folder)
    if config.num_nextn_predict_layers == 0:
        raise ValueError(f"num_nextn_predict_layers: expected 1 or more, the layers that draft, got 0 in {folder}")
    tensors = _load_tensors(folder, _parts(config), with_drafts=True, on_tensor=on_tensor)
    places = range(config.num_nextn_predict_layers)
    if isinstance(config, CompressedConfig):
        attention_cls = attention_cls or select_dsv4_attn_cls(config)
        v4_drafts = tuple(DeepseekV4MtpModel(config, tensors, attention_cls, index) for index in places)
        return DeepseekV4ForCausalLM(config, tensors, attention_cls), v4_drafts
    return DeepseekV32ForCausalLM(config, tensors), tuple(MtpModel(config, tensors, index) for index in places)


def _parts(config: RunnableConfig) -> _Parts:
    if isinstance(config, CompressedConfig):
        return _Parts(
            shapes=deepseek_v4.weight_shapes(config),
            draft_shapes=v4_mtp_weight_shapes(config),
            optional={},
            leftover_reason=lambda name: deepseek_v4.leftover_reason(name, config),
            weight_block_size=config.weight_block_size,
        )
    return _Parts(
        shapes=deepseek_v32.weight_shapes(config),
        draft_shapes=mtp_weight_shapes(config),
        optional=optional_mtp_weight_shapes(config),
        leftover_reason=lambda name: deepseek_v32.leftover_reason(name, config),
        weight_block_size=config.weight_block_size,
    )


def _load_tensors(
    folder: str | Path, parts: _Parts, *, with_drafts: bool, on_tensor: Callable[[int, int], None] | None
) -> dict[str, Tensor]:
    shapes = {**parts.shapes, **parts.draft_shapes} if with_drafts else parts.shapes
    integers: Collection[str] = {name for name in shapes if name.endswith(_TABLE_SUFFIX)}
    arrays = load_weights(
        folder,
        shapes=shapes,
        optional=parts.optional if with_drafts else {},
        leftover_reason=parts.leftover_reason,
        weight_block_size=parts.weight_block_size,
        integers=integers,
        on_tensor=on_tensor,
    )
    use_one_math_thread()
    tensors = {}
    for name in list(arrays):  # an array dies as its tensor is made: two copies of a checkpoint may not fit
        tensors[name] = paddle.to_tensor(arrays.pop(name))
    return tensors
