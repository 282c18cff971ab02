"""The ops as users call them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np

from fastdeploy_dsa.ops.reference import IndexSelection
from tests.kit.implementation import Array, Implementation, Unavailable


@dataclass(frozen=True)
class PaddleOps(Implementation):
    """fastdeploy_dsa.ops over Paddle tensors.

    Attributes:
        gpu: Paddle's place of a GPU; None: the CPU.
    """

    num_threads: int = 0
    isa: str = "auto"
    gpu: Any = None
    takes_block_gaps = False
    shows_unwritten = False

    @property
    def device(self) -> Literal["cpu", "gpu"]:  # type: ignore[override]
        """Where the tensors lie."""
        return "cpu" if self.gpu is None else "gpu"

    @property
    def name(self) -> str:  # type: ignore[override]
        """As in test ids."""
        return f"paddle_{self.device}"

    def on_threads(self, num_threads: int) -> PaddleOps:
        return replace(self, num_threads=num_threads)

    def tensor(self, array: Array) -> Any:
        """A Paddle tensor; a view with a row stride stays one."""
        paddle = paddle_module()
        place = self.gpu or paddle.CPUPlace()
        # Paddle reads NumPy's uint16 as bfloat16, and shares no memory: the kernels see only the copy.
        if array.flags.c_contiguous:
            return paddle.to_tensor(array, place=place)
        padding = array.strides[0] // array.itemsize - int(np.prod(array.shape[1:]))
        rows = array.reshape(len(array), -1)
        padded = np.concatenate([rows, np.zeros((len(array), padding), array.dtype)], -1)
        view = paddle.to_tensor(padded, place=place)[:, : rows.shape[1]]
        return view if array.ndim == 2 else paddle.as_strided(
            view, list(array.shape), [padded.shape[1], *(s // array.itemsize for s in array.strides[1:])]
        )  # fmt: skip

    def call(self, op: str, **arguments: Any) -> Any:
        """Run an op; arrays become tensors. Returns its result as arrays."""
        ops, paddle = paddle_ops(), paddle_module()
        tensors = {k: self.tensor(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
        result = getattr(ops, op)(**tensors, cpu=ops.CpuOptions(num_threads=self.num_threads, isa=self.isa))
        for name in ("cache", "latent_cache", "index_cache", "state_cache", "entry_cache", "dst", "x"):
            if isinstance(arguments.get(name), np.ndarray):
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

    def layer_write(self, **arguments: Any) -> tuple[Array, Array]:
        quantized, folded_weights = self.call("layer_write", **arguments)
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

    def compressed_row_write(self, **arguments: Any) -> None:
        self.call("compressed_row_write", **arguments)

    def compressed_row_read(self, **arguments: Any) -> Array:
        rows: Array = self.call("compressed_row_read", **arguments)
        return rows

    def kv_compress(self, **arguments: Any) -> None:
        self.call("kv_compress", **arguments)

    def compressed_mla(self, **arguments: Any) -> tuple[Array, Array]:
        for counts, slots in (("window_counts", "window_slots"), ("entry_counts", "entry_slots")):
            if arguments[counts] is None and arguments[slots] is not None:  # only the C ABI knows the shorthand
                arguments[counts] = np.full(len(arguments[slots]), arguments[slots].shape[1], np.int32)
        out, lse = self.call("compressed_mla", **arguments)
        return out, lse

    def inverse_rope(self, **arguments: Any) -> None:
        self.call("inverse_rope", **arguments)


@cache
def paddle_module() -> Any:
    try:
        import paddle  # noqa: PLC0415 - the C library is tested without paddle, too
    except ImportError as error:
        raise Unavailable(f"paddle does not import: {error}") from error
    return paddle


@cache
def paddle_ops() -> Any:
    paddle_module()
    from fastdeploy_dsa import ops  # noqa: PLC0415

    return ops
