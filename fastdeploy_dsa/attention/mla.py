"""Multi-head latent attention over a paged cache of latent rows: every token attends to its whole context."""

from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor

from cache_manager import CacheTensorSpec
from fastdeploy_dsa.attention.backend import AttentionBackend, KVCaches, Support, kernel_support
from fastdeploy_dsa.cache_layout import CACHE_FORMATS, mla_specs
from fastdeploy_dsa.config import DsaConfig, MlaConfig, ModelConfig
from fastdeploy_dsa.ops import CacheFormat, CpuOptions, IndexSelection, mla_cache_write, sparse_mla
from fastdeploy_dsa.step import StepMetadata


class MLAAttentionBackend(AttentionBackend):
    """Latent attention; the cache has one tensor per layer, role `key`.

    `forward` takes entries (latent [num_rows, kv_lora_rank], rope [num_rows, qk_rope_head_dim]), the absorbed query
    [num_rows, num_heads, kv_lora_rank + qk_rope_head_dim], and returns [num_rows, num_heads, kv_lora_rank].
    """

    def __init__(
        self,
        *,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        softmax_scale: float,
        cache_format: CacheFormat,
        block_size: int = 64,
        cpu: CpuOptions | None = None,
    ) -> None:
        """Keep sizes and formats.

        Args:
            kv_lora_rank: Width of the latent part of a cache row.
            qk_rope_head_dim: Width of its rotated part.
            softmax_scale: From `softmax_scale.py`: one number for prefill, decode and verify rows.
            cache_format: Number format of the cache.
            block_size: Tokens of a block.
            cpu: Options of the CPU ops; None: the defaults.

        Raises:
            ValueError: An unknown cache format, or a block size below 1.
        """
        super().__init__(block_size=block_size)
        if cache_format not in CACHE_FORMATS:
            raise ValueError(f"cache_format: expected one of {', '.join(CACHE_FORMATS)}, got {cache_format!r}")
        self.kv_lora_rank = kv_lora_rank
        self.qk_rope_head_dim = qk_rope_head_dim
        self.softmax_scale = softmax_scale
        self.cache_format: CacheFormat = cache_format
        self.cpu = cpu or CpuOptions()

    @classmethod
    def supports(cls, config: ModelConfig, device: str) -> Support:
        """Latent attention without an indexer."""
        if not isinstance(config, MlaConfig):
            return Support(False, "the model has no latent attention")
        if isinstance(config, DsaConfig):
            return Support(False, "the model selects tokens with an indexer")
        return kernel_support(device)

    def cache_spec(
        self, layer_ids: tuple[int, ...], cache_dtype: str | None = None, kv_cache_quant_type: str | None = None
    ) -> tuple[CacheTensorSpec, ...]:
        """Role `key` on every layer, in the backend's own format whatever cache_dtype and quantisation say."""
        return mla_specs(
            cache_format=self.cache_format,
            kv_lora_rank=self.kv_lora_rank,
            qk_rope_head_dim=self.qk_rope_head_dim,
            layer_ids=layer_ids,
            block_size=self.block_size,
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
        """As the base says; without a selection every row attends to its whole context."""
        self.write_entries(entries, layer_id=layer_id, step=step, caches=caches)
        if selection is None:
            selection = whole_context(step, self.block_size)
        return self.attend(query, layer_id=layer_id, caches=caches, selection=selection)

    def write_entries(
        self, entries: tuple[Tensor, ...], *, layer_id: int, step: StepMetadata, caches: KVCaches
    ) -> None:
        """The first half of `forward` alone, for rows that others attend to and that need no result themselves."""
        latent, rope = entries
        cache = caches["key", layer_id]
        mla_cache_write(latent=latent, rope=rope, cache=cache, slot_mapping=step.slot_mapping, cpu=self.cpu)

    def attend(self, query: Tensor, *, layer_id: int, caches: KVCaches, selection: IndexSelection) -> Tensor:
        """The second half of `forward` alone, when the step's entries are written."""
        out, _ = sparse_mla(
            query=query,
            latent_cache=caches["key", layer_id],
            slot_ids=selection.slot_ids,
            counts=selection.counts,
            kv_lora_rank=self.kv_lora_rank,
            softmax_scale=self.softmax_scale,
            cpu=self.cpu,
        )
        return out


def whole_context(step: StepMetadata, block_size: int) -> IndexSelection:
    """Every visible position of every row, as a selection of width step.max_length."""
    positions = np.arange(step.max_length, dtype=np.int32)
    lengths = step.lengths.numpy()
    visible = positions[None, :] < lengths[:, None]
    blocks = step.block_table.numpy()[step.request_ids.numpy()[:, None], positions[None, :] // block_size]
    slots = np.where(visible, blocks * block_size + positions % block_size, -1).astype(np.int32)
    return IndexSelection(
        positions=paddle.to_tensor(np.where(visible, positions, -1).astype(np.int32)),
        slot_ids=paddle.to_tensor(slots),
        counts=paddle.to_tensor(lengths),
    )
