"""Our library through its C ABI: params structs from the headers, filled with raw device pointers."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.gpu_benchmark import inputs
from scripts.gpu_benchmark.work import Launch, MissingContender
from tests.kit.headers import CLibrary

Fields = dict[str, Any]


def _filled(struct: ctypes.Structure, fields: Mapping[str, Any]) -> None:
    """Set fields; a mapping fills a struct inside the struct."""
    known = {field[0] for field in struct._fields_}
    if unknown := set(fields) - known:
        raise ValueError(f"{type(struct).__name__} has no {', '.join(sorted(unknown))}")
    for name, value in fields.items():
        if isinstance(value, Mapping):
            _filled(getattr(struct, name), value)
        else:
            setattr(struct, name, value.data_ptr() if isinstance(value, Tensor) else value)


class Ours:
    """The CUDA ops of one library."""

    def __init__(self, path: Path | None) -> None:
        self._library = CLibrary(path) if path else None
        self._symbols = ctypes.CDLL(str(path)) if path else None
        self._workspaces: dict[tuple[str, int], Tensor] = {}
        constants = self._library.headers.constants if self._library else {}
        self._bfloat16, self._fp8 = constants.get("DSA_BFLOAT16"), constants.get("DSA_FP8")

    def launch(self, op: str, fields: Fields) -> Launch:
        """A launch of dsa_<op>_cuda on torch's current stream.

        Raises:
            MissingContender: The library lacks the op.
        """
        library, name = self._library, f"dsa_{op}_cuda"
        if library is None:
            raise MissingContender("our library")
        if not hasattr(self._symbols, name):
            raise MissingContender(name)
        params = library.struct(f"dsa_{op}_params")()
        _filled(params, fields)
        pointer = ctypes.byref(params)
        if f"{name}_workspace_bytes" in library.headers.prototypes:
            size = int(str(library.call(f"{name}_workspace_bytes", pointer)))
            key = (op, size)
            if key not in self._workspaces:
                self._workspaces[key] = torch.full((max(size, 64),), 0xFF, dtype=torch.uint8)
            params.workspace, params.workspace_bytes = self._workspaces[key].data_ptr(), size

        def run() -> None:
            status = library.call(name, pointer, torch.cuda.current_stream().cuda_stream)
            if status:
                raise RuntimeError(f"{name}: DSA status {status}, {library.status_text(int(str(status)))}")

        run.inputs = (params, fields)  # type: ignore[attr-defined] # the pointers stay good as long as the launch
        return run

    def sparse_mla(
        self, *, query: Tensor, pool: Tensor, slots: Tensor, counts: Tensor | None, out: Tensor, lse: Tensor
    ) -> Launch:
        """Query [.., heads, QUERY] bfloat16 over slots [.., TOPK]."""
        return self.launch(
            "sparse_mla",
            {
                "query": query,
                "latent_cache": pool,
                "slot_ids": slots,
                "counts": counts,
                "out": out,
                "lse": lse,
                **_blocks(pool),
                "num_tokens": slots.numel() // slots.shape[-1],
                "num_heads": query.shape[-2],
                "kv_lora_rank": inputs.NOPE,
                "qk_rope_head_dim": inputs.ROPE,
                "topk": slots.shape[-1],
                "softmax_scale": inputs.SOFTMAX_SCALE,
                "query_format": self._bfloat16,
                "cache_format": self._fp8,
            },
        )

    def topk_slots(
        self,
        *,
        logits: Tensor,
        lengths: Tensor,
        table: Tensor,
        request_ids: Tensor,
        num_blocks: int,
        **outputs: Tensor,
    ) -> Launch:
        """Logits [rows, width] into positions, slot_ids and counts, named in outputs."""
        return self.launch(
            "topk_slots",
            {
                "logits": logits,
                "lengths": lengths,
                "logits_stride": logits.stride(0),
                "logits_width": logits.shape[1],
                "num_blocks": num_blocks,
                "block_size": inputs.BLOCK,
                "topk": inputs.TOPK,
                "num_tokens": logits.shape[0],
                **_requests(table, request_ids),
                **outputs,
            },
        )

    def indexer_logits(
        self,
        *,
        query: Tensor,
        weights: Tensor,
        pool: Tensor,
        table: Tensor,
        request_ids: Tensor,
        lengths: Tensor,
        logits: Tensor,
    ) -> Launch:
        """Query [rows, INDEX_HEADS, INDEX_DIM] e4m3 into logits [rows, width]."""
        return self.launch(
            "indexer_logits",
            {
                **self._index_query(query, weights, pool),
                **_requests(table, request_ids),
                "lengths": lengths,
                "logits": logits,
                "logits_stride": logits.stride(0),
                "logits_width": logits.shape[1],
                "num_tokens": logits.shape[0],
            },
        )

    def index_select(
        self,
        *,
        query: Tensor,
        weights: Tensor,
        pool: Tensor,
        table: Tensor,
        request_ids: Tensor,
        lengths: Tensor,
        max_length: int,
        **outputs: Tensor,
    ) -> Launch:
        """indexer_logits and topk_slots in one call."""
        rows = lengths.numel()
        return self.launch(
            "index_select",
            {
                **self._index_query(query, weights, pool),
                **_requests(table, request_ids),
                "lengths": lengths,
                "max_length": max_length,
                "max_logits_bytes": rows * max_length * 4,
                "topk": inputs.TOPK,
                "num_tokens": rows,
                **outputs,
            },
        )

    def _index_query(self, query: Tensor, weights: Tensor, pool: Tensor) -> Fields:
        return {
            "query": query,
            "folded_weights": weights,
            "index_cache": pool,
            **_blocks(pool),
            "index_n_heads": inputs.INDEX_HEADS,
            "index_head_dim": inputs.INDEX_DIM,
            "cache_format": self._fp8,
        }

    def mla_cache_write_fields(self, *, latent: Tensor, rope: Tensor, pool: Tensor, slots: Tensor) -> Fields:
        return {
            "latent": latent,
            "rope": rope,
            "cache": pool,
            "slot_mapping": slots,
            "latent_stride": latent.stride(0),
            "rope_stride": rope.stride(0),
            **_blocks(pool),
            "num_tokens": slots.numel(),
            "kv_lora_rank": inputs.NOPE,
            "qk_rope_head_dim": inputs.ROPE,
            "input_format": self._bfloat16,
            "cache_format": self._fp8,
        }

    def index_key_write_fields(self, *, key: Tensor, pool: Tensor, slots: Tensor) -> Fields:
        return {
            "key": key,
            "cache": pool,
            "slot_mapping": slots,
            "key_stride": key.stride(0),
            **_blocks(pool),
            "num_tokens": slots.numel(),
            "index_head_dim": inputs.INDEX_DIM,
            "input_format": self._bfloat16,
            "cache_format": self._fp8,
        }

    def index_query_quant_fields(self, *, query: Tensor, weights: Tensor, quantized: Tensor, folded: Tensor) -> Fields:
        return {
            "query": query,
            "weights": weights,
            "quantized": quantized,
            "folded_weights": folded,
            "query_stride": query.stride(0),
            "weights_stride": weights.stride(0),
            "num_tokens": query.shape[0],
            "index_n_heads": inputs.INDEX_HEADS,
            "index_head_dim": inputs.INDEX_DIM,
            "input_format": self._bfloat16,
            "output_format": self._fp8,
        }


def _blocks(pool: Tensor) -> Fields:
    return {"num_blocks": pool.shape[0], "block_size": inputs.BLOCK, "block_stride_bytes": pool.stride(0)}


def _requests(table: Tensor, request_ids: Tensor) -> Fields:
    return {
        "block_table": table,
        "request_ids": request_ids,
        "num_requests": table.shape[0],
        "max_blocks": table.shape[1],
    }
