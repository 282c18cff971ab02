"""The ops of compressed attention through the C ABI."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from tests.kit.implementation import Array, Implementation
from tests.kit.poison import GuardedMemory
from tests.kit.strides import block_stride, row_stride


class CompressedCApi(Implementation):
    """Params of the ops; how a call is made is told by a subclass."""

    @abstractmethod
    def call(self, op: str, memory: GuardedMemory, **fields: Any) -> None:
        """Run an op with every field of its params struct and check the guards."""

    @abstractmethod
    def constant(self, prefix: str, name: str) -> int:
        """A constant of the headers."""

    @abstractmethod
    def format_of(self, array: Array) -> int:
        """The dsa_format of an array."""

    def compressed_row_write(
        self, *, rows: Array, cache: Array, slot_mapping: Array, rope_dim: int, block_rows: int
    ) -> None:
        self.call(
            "compressed_row_write",
            GuardedMemory(),
            rows=rows,
            cache=cache,
            slot_mapping=slot_mapping,
            row_stride=row_stride(rows),
            block_stride_bytes=block_stride(cache),
            num_blocks=len(cache),
            num_tokens=len(slot_mapping),
            block_rows=block_rows,
            head_dim=rows.shape[1],
            qk_rope_head_dim=rope_dim,
            input_format=self.format_of(rows),
            cache_format=self.format_of(cache),
        )

    def compressed_row_read(
        self, *, cache: Array, slot_ids: Array, head_dim: int, rope_dim: int, block_rows: int
    ) -> Array:
        memory = GuardedMemory()
        out = memory.output((len(slot_ids), head_dim), np.float32)
        self.call(
            "compressed_row_read",
            memory,
            cache=cache,
            slot_ids=slot_ids,
            out=out,
            block_stride_bytes=block_stride(cache),
            num_blocks=len(cache),
            num_rows=len(slot_ids),
            block_rows=block_rows,
            head_dim=head_dim,
            qk_rope_head_dim=rope_dim,
            cache_format=self.format_of(cache),
        )
        return out

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
        self.call(
            "kv_compress",
            GuardedMemory(),
            kv_score=kv_score,
            ape=ape,
            norm_weight=norm_weight,
            cos=cos,
            sin=sin,
            state_cache=state_cache,
            state_table=state_table,
            positions=positions,
            request_ids=request_ids,
            lengths=lengths,
            entry_slots=entry_slots,
            entry_cache=entry_cache,
            kv_score_stride=row_stride(kv_score),
            state_block_stride_bytes=block_stride(state_cache),
            entry_block_stride_bytes=block_stride(entry_cache),
            state_num_blocks=len(state_cache),
            entry_num_blocks=len(entry_cache),
            num_tokens=len(positions),
            num_requests=state_table.shape[0],
            state_table_width=state_table.shape[1],
            state_block_tokens=state_cache.shape[1],
            entry_block_rows=block_rows,
            ratio=ratio,
            overlap=overlap,
            head_dim=len(norm_weight),
            qk_rope_head_dim=rope_dim,
            eps=eps,
            entry_kind=self.constant("DSA_ENTRY", entry_kind),
            entry_format=self.format_of(entry_cache),
            scale_format=self.constant("DSA_SCALE", scale_format),
        )

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
        memory = GuardedMemory()
        num_tokens, num_heads, head_dim = query.shape
        out = memory.output(query.shape, query.dtype)
        lse = memory.output((num_tokens, num_heads), np.float32)
        self.call(
            "compressed_mla",
            memory,
            query=query,
            window_cache=window_cache,
            window_slots=window_slots,
            window_counts=window_counts,
            entry_cache=entry_cache,
            entry_slots=entry_slots,
            entry_counts=entry_counts,
            sinks=sinks,
            out=out,
            lse=lse,
            window_block_stride_bytes=block_stride(window_cache),
            entry_block_stride_bytes=0 if entry_cache is None else block_stride(entry_cache),
            window_num_blocks=len(window_cache),
            entry_num_blocks=0 if entry_cache is None else len(entry_cache),
            num_tokens=num_tokens,
            window_block_rows=window_block_rows,
            entry_block_rows=entry_block_rows,
            window_width=window_slots.shape[1],
            entry_width=0 if entry_slots is None else entry_slots.shape[1],
            num_heads=num_heads,
            head_dim=head_dim,
            qk_rope_head_dim=rope_dim,
            softmax_scale=softmax_scale,
            batch_invariant=int(batch_invariant),
            query_format=self.format_of(query),
            cache_format=self.format_of(window_cache),
        )
        return out, lse

    def inverse_rope(self, *, x: Array, cos: Array, sin: Array) -> None:
        self.call(
            "inverse_rope",
            GuardedMemory(),
            x=x,
            cos=cos,
            sin=sin,
            num_tokens=x.shape[0],
            num_heads=x.shape[1],
            head_dim=x.shape[2],
            qk_rope_head_dim=2 * cos.shape[1],
            x_format=self.format_of(x),
        )
