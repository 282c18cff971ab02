"""Attention over a window of rows and compressed entries, whose caches have blocks of different sizes."""

from __future__ import annotations

import paddle
from paddle import Tensor

from cache_manager import CachePool, CacheTensorSpec
from fastdeploy_dsa.attention.backend import AttentionBackend, KVCaches, Support, kernel_support
from fastdeploy_dsa.attention.deepseek_v4.step import CompressedStep
from fastdeploy_dsa.cache_layout import CACHE_FORMATS
from fastdeploy_dsa.compressed_cache_layout import (
    ENTRY_BLOCK_TOKENS,
    WINDOW_BLOCK_TOKENS,
    CompressedSizes,
    compressed_pools,
    compressed_spans,
)
from fastdeploy_dsa.config import CompressedConfig, ModelConfig
from fastdeploy_dsa.ops import CacheFormat, CpuOptions, IndexSelection, compressed_mla, compressed_row_write
from fastdeploy_dsa.step import StepMetadata


class DeepseekV4AttentionBackend(AttentionBackend):
    """Caches by role: `key` (entries), `indexer`, `swa` (window rows), `comp_state` and `idx_comp_state`.

    `forward` takes entries (row,), the token's roped key-value row [num_rows, head_dim], and the query
    [num_rows, num_heads, head_dim]; keys are values, so it returns the query's shape. Entries of the layer, if it has
    any, are written before by its compressor.
    """

    def __init__(
        self,
        *,
        sizes: CompressedSizes,
        softmax_scale: float,
        cache_format: CacheFormat,
        block_size: int = ENTRY_BLOCK_TOKENS,
        cpu: CpuOptions | None = None,
    ) -> None:
        """Keep sizes and formats.

        Args:
            sizes: Widths and layers; see `cache_plan.compressed_sizes`.
            softmax_scale: From `softmax_scale.py`.
            cache_format: Number format of rows, entries and index keys.
            block_size: Tokens of a block of the main pool.
            cpu: Options of the CPU ops; None: the defaults.

        Raises:
            ValueError: An unknown cache format, or a block that does not hold whole windows.
        """
        super().__init__(block_size=block_size)
        if cache_format not in CACHE_FORMATS:
            raise ValueError(f"cache_format: expected one of {', '.join(CACHE_FORMATS)}, got {cache_format!r}")
        self.sizes = sizes
        self.softmax_scale = softmax_scale
        self.cache_format: CacheFormat = cache_format
        self.cpu = cpu or CpuOptions()
        self.cache_spec(tuple(layer for layer, _ in sizes.ratios))  # sizes that do not fit raise here
        self._ratios = dict(sizes.ratios)

    @classmethod
    def supports(cls, config: ModelConfig, device: str) -> Support:
        """Models with compressed entries."""
        if not isinstance(config, CompressedConfig):
            return Support(False, "the model has no compressed entries")
        return kernel_support(device)

    def cache_spec(
        self, layer_ids: tuple[int, ...], cache_dtype: str | None = None, kv_cache_quant_type: str | None = None
    ) -> tuple[CacheTensorSpec, ...]:
        """As compressed_spans, in the backend's own format whatever cache_dtype and quantisation say."""
        spans = compressed_spans(
            self.sizes, cache_format=self.cache_format, layer_ids=layer_ids, block_size=self.block_size
        )
        return tuple(span.spec for span in spans)

    def cache_pools(self) -> tuple[CachePool, ...]:
        """Window rows, and the states of every compression ratio that occurs."""
        return compressed_pools(self.sizes)

    def prepare(self, step: StepMetadata) -> CompressedStep:
        """The step with what all layers share: call it once, before the first layer."""
        return CompressedStep.of(step, self.sizes, self.block_size)

    def forward(
        self,
        query: Tensor,
        entries: tuple[Tensor, ...],
        *,
        layer_id: int,
        step: StepMetadata,
        caches: KVCaches,
        selection: IndexSelection | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As the base says: over the window, and over the selected entries if a selection is given.

        Args:
            query: [num_rows, num_heads, head_dim] float32 or bfloat16.
            entries: (row [num_rows, head_dim] float32,).
            layer_id: Absolute id.
            step: From `prepare`, or one that is not prepared yet.
            caches: Cache tensors by (role, layer id).
            selection: Entry slots of the layer; None: it sees none.
            sinks: [num_heads] float32; None: there are none.
        """
        if not isinstance(step, CompressedStep):
            step = self.prepare(step)
        self.write_rows(entries[0], layer_id=layer_id, step=step, caches=caches)
        if sinks is None:
            sinks = paddle.full([query.shape[1]], float("-inf"), dtype="float32")
        out, _ = compressed_mla(
            query=query,
            window_cache=caches["swa", layer_id],
            window_slots=step.window_slots,
            window_counts=step.window_counts,
            window_block_rows=WINDOW_BLOCK_TOKENS,
            entry_cache=None if selection is None else caches["key", layer_id],
            entry_slots=None if selection is None else selection.slot_ids,
            entry_counts=None if selection is None else selection.counts,
            entry_block_rows=self.block_size // self._ratios[layer_id],
            sinks=sinks,
            rope_dim=self.sizes.qk_rope_head_dim,
            softmax_scale=self.softmax_scale,
            cpu=self.cpu,
        )
        return out

    def write_rows(self, rows: Tensor, *, layer_id: int, step: CompressedStep, caches: KVCaches) -> None:
        """The first half of `forward` alone, for rows that others attend to and that need no result themselves."""
        compressed_row_write(
            rows=rows,
            cache=caches["swa", layer_id],
            slot_mapping=step.window_mapping,
            rope_dim=self.sizes.qk_rope_head_dim,
            block_rows=WINDOW_BLOCK_TOKENS,
            cpu=self.cpu,
        )
