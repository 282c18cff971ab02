"""The C ABI on the CPU, and what it has in common with the C ABI on a GPU."""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from fastdeploy_dsa.ops.reference import IndexSelection
from tests.kit.compressed_c_api import CompressedCApi
from tests.kit.headers import CLibrary
from tests.kit.implementation import Array, Refused
from tests.kit.poison import GuardedMemory
from tests.kit.strides import block_stride, row_stride

ROW_PADDING = 3  # numbers between two rows of logits: their stride is not their width


@dataclass(frozen=True)
class CApi(CompressedCApi):
    """The C ABI: caches with gaps between blocks, outputs with guard bytes."""

    library: CLibrary
    takes_block_gaps = True
    shows_unwritten = True

    @abstractmethod
    def run(self, op: str, memory: GuardedMemory, fields: dict[str, Any]) -> int:
        """Run an op with its workspace and return its status."""

    @abstractmethod
    def workspace_bytes(self, op: str, params: ctypes.Structure) -> int:
        """What an op asks for."""

    @abstractmethod
    def status_of_call(self, op: str, params: ctypes.Structure) -> int:
        """Run an op whose workspace is in params already."""

    def constant(self, prefix: str, name: str) -> int:
        """A constant of the headers, such as ("DSA_SCALE", "ue8m0")."""
        return self.library.headers.constants[f"{prefix}_{name}".upper()]

    def format_of(self, array: Array) -> int:
        """The dsa_format of an array."""
        names = {"uint8": "fp8", "uint16": "bfloat16", "float32": "float32"}
        return self.constant("DSA", names[array.dtype.name])

    def call(self, op: str, memory: GuardedMemory, **fields: Any) -> None:
        """Run an op with every field of its params struct and check the guards.

        Raises:
            Refused: The op returned another status than DSA_OK.
        """
        status = self.run(op, memory, fields)
        memory.check()
        if status != self.library.headers.constants["DSA_OK"]:
            raise Refused(op, status, self.library.status_text(status))

    def params(self, op: str, fields: dict[str, Any], address_of: Callable[[Array], int]) -> ctypes.Structure:
        """The params struct of an op; arrays become pointers, and no field may be left out."""
        name = f"dsa_{op}_params"
        params, kinds = self.library.struct(name)(), self.library.headers.fields(name)
        needed = set(kinds) - {"workspace", "workspace_bytes"}
        assert needed <= set(fields), f"{op}: no value for {sorted(needed - set(fields))}"
        for field, value in fields.items():
            *outer, inner = field.split(".")
            target = reduce(getattr, outer, params)
            setattr(target, inner, address_of(value) if isinstance(value, np.ndarray) else value)
        return params

    def mla_cache_write(
        self, *, latent: Array, rope: Array, cache: Array, slot_mapping: Array, scale_format: str
    ) -> None:
        fields = self._latent_fields(latent, rope, cache, slot_mapping, scale_format)
        self.call("mla_cache_write", GuardedMemory(), **fields)

    def index_key_write(self, *, key: Array, cache: Array, slot_mapping: Array, scale_format: str) -> None:
        fields = self._index_key_fields(key, cache, slot_mapping, scale_format)
        self.call("index_key_write", GuardedMemory(), **fields)

    def index_query_quant(self, *, query: Array, weights: Array, cache_format: str) -> tuple[Array, Array]:
        memory = GuardedMemory()
        fields = self._index_query_fields(memory, query, weights, cache_format)
        self.call("index_query_quant", memory, **fields)
        return fields["quantized"], fields["folded_weights"]

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
        memory = GuardedMemory()
        cache_format = {np.uint8: "fp8", np.uint16: "bfloat16", np.float32: "float32"}[index_cache.dtype.type]
        parts = {
            "latent": self._latent_fields(latent, rope, latent_cache, slot_mapping, scale_format),
            "index_key": self._index_key_fields(key, index_cache, slot_mapping, scale_format),
            "index_query": self._index_query_fields(memory, query, weights, cache_format),
        }
        fields = {f"{part}.{name}": value for part, inner in parts.items() for name, value in inner.items()}
        self.call("layer_write", memory, **fields)
        return parts["index_query"]["quantized"], parts["index_query"]["folded_weights"]

    def _latent_fields(
        self, latent: Array, rope: Array, cache: Array, slot_mapping: Array, scale_format: str
    ) -> dict[str, Any]:
        return {
            "latent": latent,
            "rope": rope,
            "cache": cache,
            "slot_mapping": slot_mapping,
            "latent_stride": row_stride(latent),
            "rope_stride": row_stride(rope),
            "block_stride_bytes": block_stride(cache),
            "num_blocks": cache.shape[0],
            "num_tokens": len(slot_mapping),
            "block_size": cache.shape[2],
            "kv_lora_rank": latent.shape[1],
            "qk_rope_head_dim": rope.shape[1],
            "input_format": self.format_of(latent),
            "cache_format": self.format_of(cache),
            "scale_format": self.constant("DSA_SCALE", scale_format),
        }

    def _index_key_fields(self, key: Array, cache: Array, slot_mapping: Array, scale_format: str) -> dict[str, Any]:
        return {
            "key": key,
            "cache": cache,
            "slot_mapping": slot_mapping,
            "key_stride": row_stride(key),
            "block_stride_bytes": block_stride(cache),
            "num_blocks": cache.shape[0],
            "num_tokens": len(slot_mapping),
            "block_size": cache.shape[1],
            "index_head_dim": key.shape[1],
            "input_format": self.format_of(key),
            "cache_format": self.format_of(cache),
            "scale_format": self.constant("DSA_SCALE", scale_format),
        }

    def _index_query_fields(
        self, memory: GuardedMemory, query: Array, weights: Array, cache_format: str
    ) -> dict[str, Any]:
        dtype = {"fp8": np.uint8, "bfloat16": np.uint16, "float32": np.float32}[cache_format]
        quantized = memory.output(query.shape, dtype)
        return {
            "query": query,
            "weights": weights,
            "quantized": quantized,
            "folded_weights": memory.output(weights.shape, np.float32),
            "query_stride": row_stride(query),
            "weights_stride": row_stride(weights),
            "num_tokens": query.shape[0],
            "index_n_heads": query.shape[1],
            "index_head_dim": query.shape[2],
            "input_format": self.format_of(query),
            "output_format": self.format_of(quantized),
        }

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
        memory = GuardedMemory()
        logits = memory.output((len(query), logits_width), np.float32, row_padding=ROW_PADDING)
        self.call(
            "indexer_logits",
            memory,
            query=query,
            folded_weights=folded_weights,
            index_cache=index_cache,
            block_table=block_table,
            request_ids=request_ids,
            lengths=lengths,
            logits=logits,
            block_stride_bytes=block_stride(index_cache),
            logits_stride=logits_width + ROW_PADDING,
            logits_width=logits_width,
            num_blocks=index_cache.shape[0],
            num_tokens=len(query),
            num_requests=block_table.shape[0],
            max_blocks=block_table.shape[1],
            block_size=index_cache.shape[1],
            index_n_heads=query.shape[1],
            index_head_dim=query.shape[2],
            cache_format=self.format_of(index_cache),
        )
        return logits

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
        memory = GuardedMemory()
        selection = _selection(memory, len(lengths), topk)
        self.call(
            "topk_slots",
            memory,
            logits=logits,
            lengths=lengths,
            block_table=block_table,
            request_ids=request_ids,
            **selection._asdict(),
            logits_stride=row_stride(logits),
            logits_width=logits.shape[1],
            num_blocks=num_blocks,
            num_tokens=len(lengths),
            num_requests=block_table.shape[0],
            max_blocks=block_table.shape[1],
            block_size=block_size,
            topk=topk,
        )
        return selection

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
        memory = GuardedMemory()
        selection = _selection(memory, len(lengths), topk)
        self.call(
            "index_select",
            memory,
            query=query,
            folded_weights=folded_weights,
            index_cache=index_cache,
            block_table=block_table,
            request_ids=request_ids,
            lengths=lengths,
            **selection._asdict(),
            max_logits_bytes=max_logits_bytes,
            max_length=max_length,
            block_stride_bytes=block_stride(index_cache),
            num_blocks=index_cache.shape[0],
            num_tokens=len(lengths),
            num_requests=block_table.shape[0],
            max_blocks=block_table.shape[1],
            block_size=index_cache.shape[1],
            index_n_heads=query.shape[1],
            index_head_dim=query.shape[2],
            topk=topk,
            cache_format=self.format_of(index_cache),
        )
        return selection

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
        memory = GuardedMemory()
        num_tokens, num_heads, width = query.shape
        out = memory.output((num_tokens, num_heads, kv_lora_rank), query.dtype)
        lse = memory.output((num_tokens, num_heads), np.float32)
        self.call(
            "sparse_mla",
            memory,
            query=query,
            latent_cache=latent_cache,
            slot_ids=slot_ids,
            counts=counts,
            out=out,
            lse=lse,
            block_stride_bytes=block_stride(latent_cache),
            num_blocks=latent_cache.shape[0],
            num_tokens=num_tokens,
            block_size=latent_cache.shape[2],
            num_heads=num_heads,
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=width - kv_lora_rank,
            topk=slot_ids.shape[1],
            softmax_scale=softmax_scale,
            batch_invariant=int(batch_invariant),
            query_format=self.format_of(query),
            cache_format=self.format_of(latent_cache),
        )
        return out, lse

    def block_copy(self, *, src: Array, dst: Array, src_block_ids: Array, dst_block_ids: Array) -> None:
        self.call(
            "block_copy",
            GuardedMemory(),
            src=src,
            dst=dst,
            src_block_ids=src_block_ids,
            dst_block_ids=dst_block_ids,
            src_stride_bytes=block_stride(src),
            dst_stride_bytes=block_stride(dst),
            src_num_blocks=len(src),
            dst_num_blocks=len(dst),
            block_bytes=src[:1].size * src.itemsize,
            num_copies=len(src_block_ids),
        )


@dataclass(frozen=True)
class CCpu(CApi):
    """The C ABI on the CPU, at one instruction set level."""

    isa: str = "auto"
    num_threads: int = 0
    device = "cpu"

    @property
    def name(self) -> str:  # type: ignore[override]
        """As in test ids."""
        return f"c_cpu-{self.isa}"

    def on_threads(self, num_threads: int) -> CCpu:
        return replace(self, num_threads=num_threads)

    def options(self) -> ctypes.Structure:
        """The dsa_cpu_options of this implementation."""
        return self.library.struct("dsa_cpu_options")(self.num_threads, self.constant("DSA_ISA", self.isa))

    def run(self, op: str, memory: GuardedMemory, fields: dict[str, Any]) -> int:
        params = self.params(op, fields, _host_address)
        if "workspace_bytes" in dict(params._fields_):
            params.workspace_bytes = self.workspace_bytes(op, params)
            params.workspace = memory.workspace(params.workspace_bytes).ctypes.data
        return self.status_of_call(op, params)

    def workspace_bytes(self, op: str, params: ctypes.Structure) -> int:
        return self.library.workspace_bytes(op, params, self.options())

    def status_of_call(self, op: str, params: ctypes.Structure) -> int:
        return int(str(self.library.call(f"dsa_{op}_cpu", ctypes.byref(params), ctypes.byref(self.options()))))


def _host_address(array: Array) -> int:
    return int(array.ctypes.data)


def _selection(memory: GuardedMemory, num_tokens: int, topk: int) -> IndexSelection:
    return IndexSelection(
        positions=memory.output((num_tokens, topk), np.int32),
        slot_ids=memory.output((num_tokens, topk), np.int32),
        counts=memory.output((num_tokens,), np.int32),
    )
