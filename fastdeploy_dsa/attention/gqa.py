"""Grouped-query and multi-head attention over a paged cache of keys and values, from Paddle's own ops."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from cache_manager import CacheTensorSpec
from fastdeploy_dsa.attention.backend import AttentionBackend, KVCaches, Support
from fastdeploy_dsa.cache_layout import head_specs
from fastdeploy_dsa.config import ModelConfig
from fastdeploy_dsa.ops import IndexSelection
from fastdeploy_dsa.step import StepMetadata

QUANTISED_WITH_SCALES = "block_wise_fp8"


class GQAAttentionBackend(AttentionBackend):
    """Per-head keys and values; MHA is the case kv_num_heads == num_heads.

    `forward` takes entries (key, value), each [num_rows, kv_num_heads, head_dim], and attends causally to the whole
    context. A quantised cache is declared and allocated as FastDeploy expects it, for a worker that brings its own
    kernels; `forward` here computes in float32 and refuses it.
    """

    def __init__(
        self, *, num_heads: int, kv_num_heads: int, head_dim: int, softmax_scale: float, block_size: int = 64
    ) -> None:
        """Keep the sizes.

        Raises:
            ValueError: num_heads is no multiple of kv_num_heads.
        """
        super().__init__(block_size=block_size)
        if kv_num_heads < 1 or num_heads % kv_num_heads:
            raise ValueError(f"num_heads: expected a multiple of kv_num_heads {kv_num_heads}, got {num_heads}")
        self.num_heads = num_heads
        self.kv_num_heads = kv_num_heads
        self.head_dim = head_dim
        self.softmax_scale = softmax_scale

    @classmethod
    def supports(cls, config: ModelConfig, device: str) -> Support:
        """No model of this package has plain key-value heads; a host framework makes this backend itself."""
        return Support(False, f"{config.architecture} has latent attention, not key-value heads")

    def cache_spec(
        self, layer_ids: tuple[int, ...], cache_dtype: str | None = None, kv_cache_quant_type: str | None = None
    ) -> tuple[CacheTensorSpec, ...]:
        """Roles `key`, `value`; with "block_wise_fp8" also `key_scale`, `value_scale` in the default dtype."""
        if kv_cache_quant_type not in (None, QUANTISED_WITH_SCALES):
            raise ValueError(
                f"kv_cache_quant_type: expected None or {QUANTISED_WITH_SCALES!r}, got {kv_cache_quant_type!r}"
            )
        quantised = kv_cache_quant_type is not None
        return head_specs(
            layer_ids=layer_ids,
            kv_num_heads=self.kv_num_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            dtype="uint8" if quantised else cache_dtype or "float32",
            scale_dtype=paddle.get_default_dtype() if quantised else None,
        )

    def forward(
        self,
        query: Tensor,
        entries: tuple[Tensor, ...],
        *,
        layer_id: int,
        step: StepMetadata,
        caches: KVCaches,
        selection: IndexSelection | None = None,
    ) -> Tensor:
        """As the base says.

        Raises:
            ValueError: The cache is not float32, or a selection was given.
        """
        if selection is not None:
            raise ValueError("selection: key-value heads attend to the whole context, expected None")
        for role, numbers in zip(("key", "value"), entries, strict=True):
            self._write(caches[role, layer_id], numbers, step)
        out = paddle.zeros(query.shape, dtype=query.dtype)
        request_ids, lengths = step.request_ids.numpy(), step.lengths.numpy()
        for request in np.unique(request_ids[lengths > 0]):
            rows = np.flatnonzero((request_ids == request) & (lengths > 0))
            context = self._context(caches, layer_id, step, int(request), int(lengths[rows].max()))
            out[paddle.to_tensor(rows)] = self._attend(query[paddle.to_tensor(rows)], *context, lengths[rows])
        return out

    def _write(self, cache: Tensor, rows: Tensor, step: StepMetadata) -> None:
        if cache.dtype != paddle.float32:
            raise ValueError(f"caches: expected float32 keys and values, got {cache.dtype}")
        slots = step.slot_mapping.numpy()
        written = np.flatnonzero(slots >= 0)
        heads = np.arange(self.kv_num_heads)[None, :]
        blocks, offsets = slots[written, None] // self.block_size, slots[written, None] % self.block_size
        places = [
            paddle.to_tensor(np.broadcast_to(ids, (len(written), self.kv_num_heads)).copy())
            for ids in (blocks, heads, offsets)
        ]
        paddle.index_put_(cache, tuple(places), rows[paddle.to_tensor(written)])

    def _context(
        self, caches: KVCaches, layer_id: int, step: StepMetadata, request: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a request's first `length` tokens, [kv_num_heads, length, head_dim] each."""
        blocks = step.block_table[request, : -(-length // self.block_size)]

        def gathered(role: str) -> Tensor:
            tokens = paddle.gather(caches[role, layer_id], blocks).transpose([1, 0, 2, 3])
            return tokens.reshape([self.kv_num_heads, -1, self.head_dim])[:, :length]

        return gathered("key"), gathered("value")

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, lengths: npt.NDArray[np.int32]) -> Tensor:
        groups = self.num_heads // self.kv_num_heads
        grouped = query.reshape([-1, self.kv_num_heads, groups, self.head_dim]).transpose([1, 2, 0, 3])
        logits = paddle.matmul(grouped * self.softmax_scale, key.unsqueeze(1), transpose_y=True)
        visible = np.arange(key.shape[1])[None, :] < lengths[:, None]
        masked = logits + paddle.to_tensor(np.where(visible, 0.0, -np.inf).astype(np.float32))
        attended = paddle.matmul(paddle.nn.functional.softmax(masked, axis=-1), value.unsqueeze(1))
        rows: Tensor = attended.transpose([2, 0, 1, 3])
        return rows.reshape([-1, self.num_heads, self.head_dim])
