"""What every implementation of the ops looks like to a test: functions over NumPy arrays.

Arrays mean what they mean in fastdeploy_dsa.ops.reference: uint8 is e4m3 or bytes, uint16 is bfloat16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops.reference import IndexSelection

Array = NDArray[Any]


class Unavailable(Exception):
    """The machine lacks what an implementation needs; the text says what."""


class Refused(ValueError):
    """A status other than DSA_OK."""

    def __init__(self, op: str, status: int, text: str) -> None:
        super().__init__(f"{op}: {text}")
        self.status = status


class Implementation(ABC):
    """The ops. Outputs come back as the kernel left them: what it did not write is poison or unspecified.

    Some things differ by device. Wrong values inside arrays (lengths, counts, block ids) are refused on the CPU; on a
    GPU they do what the headers say. The order of sparse_mla's sums follows from a row's valid ids on the CPU; on a
    GPU also from num_tokens, num_heads and topk. And a GPU computes with fewer bits (rounds_weights, truncates_sums).
    """

    name: str
    device: Literal["cpu", "gpu"]
    takes_block_gaps: bool  # caches whose blocks lie further apart than their size
    shows_unwritten: bool  # what a kernel left alone in its outputs is poison, and guard bytes are checked

    @abstractmethod
    def on_threads(self, num_threads: int) -> Implementation:
        """The same implementation on another number of threads."""

    def rounds_weights(self, arguments: dict[str, Any]) -> bool:
        """Whether sparse_mla rounds exp(z - max) to bfloat16 and not the keys: bfloat16 queries over fp8 on a GPU."""
        formats = (arguments["query"].dtype, arguments["latent_cache"].dtype)
        return self.device == "gpu" and formats == (np.uint16, np.uint8)

    def rounds_compressed_weights(self, arguments: dict[str, Any]) -> bool:
        """Whether compressed_mla rounds exp(z - max) to bfloat16: bfloat16 queries over bfloat16 or fp8 on a GPU."""
        is_narrow = arguments["query"].dtype == np.uint16 and arguments["window_cache"].dtype != np.float32
        return self.device == "gpu" and is_narrow

    def truncates_sums(self, arguments: dict[str, Any]) -> bool:
        """Whether indexer_logits adds e4m3 products with 13 fractional bits: fp8 on the tensor cores of a GPU."""
        return self.device == "gpu" and arguments["index_cache"].dtype == np.uint8

    @abstractmethod
    def mla_cache_write(
        self, *, latent: Array, rope: Array, cache: Array, slot_mapping: Array, scale_format: str
    ) -> None:
        """Change cache."""

    @abstractmethod
    def index_key_write(self, *, key: Array, cache: Array, slot_mapping: Array, scale_format: str) -> None:
        """Change cache."""

    @abstractmethod
    def index_query_quant(self, *, query: Array, weights: Array, cache_format: str) -> tuple[Array, Array]:
        """Return quantized and folded_weights."""

    @abstractmethod
    def layer_write(
        self,
        *,
        latent: Array,
        rope: Array,
        latent_cache: Array,
        key: Array,
        index_cache: Array,
        query: Array,
        weights: Array,
        slot_mapping: Array,
        scale_format: str,
    ) -> tuple[Array, Array]:
        """Change both caches; return quantized and folded_weights."""

    @abstractmethod
    def indexer_logits(
        self,
        *,
        query: Array,
        folded_weights: Array,
        index_cache: Array,
        block_table: Array,
        request_ids: Array,
        lengths: Array,
        logits_width: int,
    ) -> Array:
        """Return logits; columns from lengths[t] on hold anything."""

    @abstractmethod
    def topk_slots(
        self,
        *,
        logits: Array,
        lengths: Array,
        block_table: Array,
        request_ids: Array,
        topk: int,
        num_blocks: int,
        block_size: int,
    ) -> IndexSelection:
        """Return positions, slot_ids and counts."""

    @abstractmethod
    def index_select(
        self,
        *,
        query: Array,
        folded_weights: Array,
        index_cache: Array,
        block_table: Array,
        request_ids: Array,
        lengths: Array,
        max_length: int,
        topk: int,
        max_logits_bytes: int,
    ) -> IndexSelection:
        """Return positions, slot_ids and counts."""

    @abstractmethod
    def sparse_mla(
        self,
        *,
        query: Array,
        latent_cache: Array,
        slot_ids: Array,
        counts: Array | None,
        kv_lora_rank: int,
        softmax_scale: float,
        batch_invariant: bool = False,
    ) -> tuple[Array, Array]:
        """Return out and lse."""

    @abstractmethod
    def block_copy(self, *, src: Array, dst: Array, src_block_ids: Array, dst_block_ids: Array) -> None:
        """Change dst."""

    @abstractmethod
    def compressed_row_write(
        self, *, rows: Array, cache: Array, slot_mapping: Array, rope_dim: int, block_rows: int
    ) -> None:
        """Change cache."""

    @abstractmethod
    def compressed_row_read(
        self, *, cache: Array, slot_ids: Array, head_dim: int, rope_dim: int, block_rows: int
    ) -> Array:
        """Return the rows."""

    @abstractmethod
    def kv_compress(
        self,
        *,
        kv_score: Array,
        ape: Array,
        norm_weight: Array,
        cos: Array,
        sin: Array,
        state_cache: Array,
        state_table: Array,
        positions: Array,
        request_ids: Array,
        lengths: Array,
        entry_cache: Array,
        entry_slots: Array,
        eps: float,
        ratio: int,
        overlap: int,
        rope_dim: int,
        block_rows: int,
        entry_kind: str,
        scale_format: str,
    ) -> None:
        """Change state_cache and entry_cache."""

    @abstractmethod
    def compressed_mla(
        self,
        *,
        query: Array,
        window_cache: Array,
        window_slots: Array,
        window_counts: Array | None,
        window_block_rows: int,
        entry_cache: Array | None,
        entry_slots: Array | None,
        entry_counts: Array | None,
        entry_block_rows: int,
        sinks: Array,
        rope_dim: int,
        softmax_scale: float,
        batch_invariant: bool = False,
    ) -> tuple[Array, Array]:
        """Return out and lse."""

    @abstractmethod
    def inverse_rope(self, *, x: Array, cos: Array, sin: Array) -> None:
        """Change x."""
