"""Every implementation of the ops behind one interface over NumPy arrays, so that one test runs on all of them.

Arrays mean what they mean in fastdeploy_dsa.ops.reference: uint8 is e4m3 or bytes, uint16 is bfloat16.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops.library import C_LIBRARY
from fastdeploy_dsa.ops.reference import IndexSelection
from tests.kit.headers import CLibrary
from tests.kit.poison import GuardedMemory

Array = NDArray[Any]

GPU_NAMES: tuple[str, ...] = ()  # of implementations that run on a GPU
CPU_ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")
ROW_PADDING = 3  # numbers between two rows of logits: their stride is not their width


class Unavailable(Exception):
    """The machine lacks what an implementation needs; the text says what."""


class Implementation(ABC):
    """The eight ops. Outputs come back as the kernel left them: what it did not write is poison or unspecified."""

    name: str
    device: Literal["cpu", "gpu"]
    takes_block_gaps: bool  # caches whose blocks lie further apart than their size
    shows_unwritten: bool  # what a kernel left alone in its outputs is poison, and guard bytes are checked

    @abstractmethod
    def on_threads(self, num_threads: int) -> Implementation:
        """The same implementation on another number of threads."""

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
    ) -> tuple[Array, Array]:
        """Return out and lse."""

    @abstractmethod
    def block_copy(self, *, src: Array, dst: Array, src_block_ids: Array, dst_block_ids: Array) -> None:
        """Change dst."""


class Refused(ValueError):
    """A status other than DSA_OK."""

    def __init__(self, op: str, status: int, text: str) -> None:
        super().__init__(f"{op}: {text}")
        self.status = status


@dataclass(frozen=True)
class CCpu(Implementation):
    """The C ABI on the CPU, at one instruction set level."""

    library: CLibrary
    isa: str
    num_threads: int = 0
    device = "cpu"
    takes_block_gaps = True
    shows_unwritten = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """As in test ids."""
        return f"c_cpu-{self.isa}"

    def on_threads(self, num_threads: int) -> CCpu:
        return replace(self, num_threads=num_threads)

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
        params, options = self.params(op, **fields), self.options()
        if "workspace_bytes" in dict(params._fields_):
            params.workspace_bytes = self.library.workspace_bytes(op, params, options)
            params.workspace = memory.workspace(params.workspace_bytes).ctypes.data
        status = self.library.call(f"dsa_{op}_cpu", ctypes.byref(params), ctypes.byref(options))
        memory.check()
        if status != self.library.headers.constants["DSA_OK"]:
            raise Refused(op, int(str(status)), self.library.status_text(int(str(status))))

    def options(self) -> ctypes.Structure:
        """The dsa_cpu_options of this implementation."""
        return self.library.struct("dsa_cpu_options")(self.num_threads, self.constant("DSA_ISA", self.isa))

    def params(self, op: str, **fields: Any) -> ctypes.Structure:
        """The params struct of an op; arrays become pointers, and no field may be left out."""
        struct = self.library.struct(f"dsa_{op}_params")
        needed = {name for name, *_ in struct._fields_} - {"workspace", "workspace_bytes"}
        assert needed <= set(fields), f"{op}: no value for {sorted(needed - set(fields))}"
        values = {k: v.ctypes.data if isinstance(v, np.ndarray) else v for k, v in fields.items()}
        return struct(**values)

    def mla_cache_write(
        self, *, latent: Array, rope: Array, cache: Array, slot_mapping: Array, scale_format: str
    ) -> None:
        self.call(
            "mla_cache_write",
            GuardedMemory(),
            latent=latent,
            rope=rope,
            cache=cache,
            slot_mapping=slot_mapping,
            latent_stride=_row_stride(latent),
            rope_stride=_row_stride(rope),
            block_stride_bytes=_block_stride(cache),
            num_blocks=cache.shape[0],
            num_tokens=len(slot_mapping),
            block_size=cache.shape[2],
            kv_lora_rank=latent.shape[1],
            qk_rope_head_dim=rope.shape[1],
            input_format=self.format_of(latent),
            cache_format=self.format_of(cache),
            scale_format=self.constant("DSA_SCALE", scale_format),
        )

    def index_key_write(self, *, key: Array, cache: Array, slot_mapping: Array, scale_format: str) -> None:
        self.call(
            "index_key_write",
            GuardedMemory(),
            key=key,
            cache=cache,
            slot_mapping=slot_mapping,
            key_stride=_row_stride(key),
            block_stride_bytes=_block_stride(cache),
            num_blocks=cache.shape[0],
            num_tokens=len(slot_mapping),
            block_size=cache.shape[1],
            index_head_dim=key.shape[1],
            input_format=self.format_of(key),
            cache_format=self.format_of(cache),
            scale_format=self.constant("DSA_SCALE", scale_format),
        )

    def index_query_quant(self, *, query: Array, weights: Array, cache_format: str) -> tuple[Array, Array]:
        memory = GuardedMemory()
        dtype = {"fp8": np.uint8, "bfloat16": np.uint16, "float32": np.float32}[cache_format]
        quantized = memory.output(query.shape, dtype)
        folded_weights = memory.output(weights.shape, np.float32)
        self.call(
            "index_query_quant",
            memory,
            query=query,
            weights=weights,
            quantized=quantized,
            folded_weights=folded_weights,
            query_stride=_row_stride(query),
            weights_stride=_row_stride(weights),
            num_tokens=query.shape[0],
            index_n_heads=query.shape[1],
            index_head_dim=query.shape[2],
            input_format=self.format_of(query),
            output_format=self.format_of(quantized),
        )
        return quantized, folded_weights

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
            block_stride_bytes=_block_stride(index_cache),
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
            logits_stride=_row_stride(logits),
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
            block_stride_bytes=_block_stride(index_cache),
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
            block_stride_bytes=_block_stride(latent_cache),
            num_blocks=latent_cache.shape[0],
            num_tokens=num_tokens,
            block_size=latent_cache.shape[2],
            num_heads=num_heads,
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=width - kv_lora_rank,
            topk=slot_ids.shape[1],
            softmax_scale=softmax_scale,
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
            src_stride_bytes=_block_stride(src),
            dst_stride_bytes=_block_stride(dst),
            src_num_blocks=len(src),
            dst_num_blocks=len(dst),
            block_bytes=src[:1].size * src.itemsize,
            num_copies=len(src_block_ids),
        )


@dataclass(frozen=True)
class PaddleOps(Implementation):
    """fastdeploy_dsa.ops over Paddle tensors."""

    num_threads: int = 0
    isa: str = "auto"
    name = "paddle_cpu"
    device = "cpu"
    takes_block_gaps = False
    shows_unwritten = False

    def on_threads(self, num_threads: int) -> PaddleOps:
        return replace(self, num_threads=num_threads)

    def tensor(self, array: Array) -> Any:
        """A Paddle tensor; a view with a row stride stays one."""
        paddle = _paddle()
        # Paddle reads NumPy's uint16 as bfloat16, and shares no memory: the kernels see only the copy.
        if array.flags.c_contiguous:
            return paddle.to_tensor(array)
        padding = array.strides[0] // array.itemsize - int(np.prod(array.shape[1:]))
        rows = array.reshape(len(array), -1)
        padded = np.concatenate([rows, np.zeros((len(array), padding), array.dtype)], -1)
        view = paddle.to_tensor(padded)[:, : rows.shape[1]]
        return view if array.ndim == 2 else paddle.as_strided(
            view, list(array.shape), [padded.shape[1], *(s // array.itemsize for s in array.strides[1:])]
        )  # fmt: skip

    def call(self, op: str, **arguments: Any) -> Any:
        """Run an op; arrays become tensors. Returns its result as arrays."""
        ops, paddle = _paddle_ops(), _paddle()
        tensors = {k: self.tensor(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
        result = getattr(ops, op)(**tensors, cpu=ops.CpuOptions(num_threads=self.num_threads, isa=self.isa))
        for name in ("cache", "dst"):
            if name in tensors:
                arguments[name][...] = tensors[name].numpy()
        if result is None or isinstance(result, paddle.Tensor):
            return None if result is None else result.numpy()
        return tuple(tensor.numpy() for tensor in result)

    def mla_cache_write(self, **arguments: Any) -> None:
        self.call("mla_cache_write", **arguments)

    def index_key_write(self, **arguments: Any) -> None:
        self.call("index_key_write", **arguments)

    def index_query_quant(self, **arguments: Any) -> tuple[Array, Array]:
        quantized, folded_weights = self.call("index_query_quant", **arguments)
        return quantized, folded_weights

    def indexer_logits(self, **arguments: Any) -> Array:
        logits: Array = self.call("indexer_logits", **arguments)
        return logits

    def topk_slots(self, **arguments: Any) -> IndexSelection:
        return IndexSelection(*self.call("topk_slots", **arguments))

    def index_select(self, **arguments: Any) -> IndexSelection:
        return IndexSelection(*self.call("index_select", **arguments))

    def sparse_mla(self, **arguments: Any) -> tuple[Array, Array]:
        if arguments["counts"] is None:  # only the C ABI knows the shorthand
            num_tokens, topk = arguments["slot_ids"].shape
            arguments["counts"] = np.full(num_tokens, topk, np.int32)
        out, lse = self.call("sparse_mla", **arguments)
        return out, lse

    def block_copy(self, **arguments: Any) -> None:
        self.call("block_copy", **arguments)


def implementations(c_library: Path = C_LIBRARY) -> dict[str, Callable[[], Implementation]]:
    """Makers of every implementation by name; the levels that this processor lacks are left out.

    A maker raises Unavailable when the machine lacks the device or the framework.
    """
    makers: dict[str, Callable[[], Implementation]] = {}
    for isa in CPU_ISAS[: _best_isa(c_library)]:
        makers[f"c_cpu-{isa}"] = lambda isa=isa: CCpu(_library(c_library), isa)
    makers["paddle_cpu"] = _paddle_cpu
    return makers


@cache
def _library(path: Path) -> CLibrary:
    return CLibrary(path)


def _best_isa(c_library: Path) -> int:
    """DSA_ISA_SCALAR = 1 and up; without a library all levels, whose tests then say that it is missing."""
    if not c_library.exists():
        return len(CPU_ISAS)
    return int(str(_library(c_library).call("dsa_cpu_isa")))


@cache
def _paddle() -> Any:
    try:
        import paddle  # noqa: PLC0415 - the C library is tested without paddle, too
    except ImportError as error:
        raise Unavailable(f"paddle does not import: {error}") from error
    return paddle


@cache
def _paddle_ops() -> Any:
    _paddle()
    from fastdeploy_dsa import ops  # noqa: PLC0415

    return ops


def _paddle_cpu() -> PaddleOps:
    _paddle_ops()
    return PaddleOps()


def _block_stride(array: Array) -> int:
    # NumPy may say anything for a dimension of one.
    return array.strides[0] if len(array) > 1 else int(np.prod(array.shape[1:])) * array.itemsize


def _row_stride(array: Array) -> int:
    return _block_stride(array) // array.itemsize


def _selection(memory: GuardedMemory, num_tokens: int, topk: int) -> IndexSelection:
    return IndexSelection(
        positions=memory.output((num_tokens, topk), np.int32),
        slot_ids=memory.output((num_tokens, topk), np.int32),
        counts=memory.output((num_tokens,), np.int32),
    )
