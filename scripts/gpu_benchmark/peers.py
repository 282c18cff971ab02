"""The published kernels beside ours, as they are called by their owners.

`flashmla` is FlashMLA as vLLM and as SGLang build it; `deepgemm` is DeepGEMM's indexer; the writes, gathers and the
top-k are vLLM's; SGLang's top-k; FlashAttention-3 over a bfloat16 cache is a second opinion on decode.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.gpu_benchmark import inputs
from scripts.gpu_benchmark.work import Launch, MakeLaunch, MissingContender

LIBRARIES = {
    "vllm ops": "vllm_C.so",
    "vllm flashmla": "vllm_flashmla.so",
    "vllm fa3": "vllm_fa3.so",
    "sgl ops": "sgl_common.so",
    "sgl flashmla": "sgl_flashmla.so",
}
WORKSPACE_BYTES = 1 << 20


class Peers:
    """Whatever is in the peers' folder, each loaded at first use."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._loaded: set[str] = set()

    def _load(self, name: str) -> None:
        if name in self._loaded:
            return
        path = self._folder / LIBRARIES[name] if self._folder else None
        if path is None or not path.exists():
            raise MissingContender(name)
        torch.ops.load_library(str(path))
        self._loaded.add(name)

    @property
    def vllm(self) -> Any:
        self._load("vllm ops")
        return torch.ops._C

    @property
    def vllm_cache(self) -> Any:
        self._load("vllm ops")
        return torch.ops._C_cache_ops

    @property
    def sgl(self) -> Any:
        self._load("sgl ops")
        return torch.ops.sgl_kernel

    @property
    def fa3(self) -> Any:
        self._load("vllm fa3")
        return torch.ops._vllm_fa3_C

    @cached_property
    def deepgemm(self) -> Any:
        if self._folder is None or not (self._folder / "deep_gemm").exists():
            raise MissingContender("deepgemm")
        sys.path.insert(0, str(self._folder))
        return importlib.import_module("deep_gemm")

    def _flashmla(self, build: str) -> Any:
        self._load(f"{build} flashmla")
        return torch.ops._flashmla_C if build == "vllm" else torch.ops.sgl_kernel

    # Sparse attention

    def flashmla_decode(self, build: str) -> MakeLaunch:
        """FP8 sparse decode; heads under 64 are padded outside the timed part, as its callers do.

        All launches of what is returned share the plan that the first of them makes, as all layers of a step do.
        """
        schedule: dict[tuple[int, ...], tuple[Any, Any]] = {}
        tail = (None,) if build == "vllm" else ()

        def make(case: Any) -> Launch:
            decode = self._flashmla(build).sparse_decode_fwd
            query, heads = inputs.padded_heads(case.query, 64), case.query.shape[-2]
            shape = tuple(query.shape[:3])

            def run() -> None:
                plan = schedule.get(shape, (None, None))
                out, _, *plan = decode(
                    query,
                    case.pool,
                    case.slots,
                    None,
                    None,
                    *plan,
                    None,
                    None,
                    None,
                    inputs.NOPE,
                    inputs.SOFTMAX_SCALE,
                    *tail,
                )
                schedule[shape] = tuple(plan)
                case.out = out[:, :, :heads]

            return run

        return make

    def flashmla_prefill(self, build: str, *, query: Tensor, keys: Tensor, positions: Tensor) -> Callable[[], Tensor]:
        """Query [rows, heads, QUERY] over keys [n, 1, QUERY] bfloat16, positions [rows, 1, TOPK]; returns the output.

        vLLM's build has a path for few heads; SGLang's callers pad to 64.
        """
        prefill, heads = self._flashmla(build).sparse_prefill_fwd, query.shape[1]
        if build == "sgl":
            query = inputs.padded_heads(query, 64)
        tail = (None, None, None) if build == "vllm" else (None, None)

        def run() -> Tensor:
            out = prefill(query, keys, positions, inputs.SOFTMAX_SCALE, inputs.NOPE, *tail)[0]
            return out[:, :heads]

        return run

    def fa3_latent(self, *, query: Tensor, keys: Tensor, slots: Tensor) -> Callable[[], Tensor]:
        """FlashAttention-3's latent path: slots [rows, TOPK] of keys [n, QUERY] as a page table of page size 1."""
        forward, rows = self.fa3.fwd, query.shape[0]
        nope, rope = query[..., : inputs.NOPE].contiguous(), query[..., inputs.NOPE :].contiguous()
        value, key = keys[:, None, None, : inputs.NOPE], keys[:, None, None, inputs.NOPE :]
        starts = torch.arange(rows + 1, dtype=torch.int32)
        used = torch.full((rows,), inputs.TOPK, dtype=torch.int32)
        nothing = (None,) * 8

        def run() -> Tensor:
            out: Tensor = forward(
                *(rope, key, value, None, None, nope, None, starts, None, None, None, used, 1, inputs.TOPK, slots),
                *nothing,
                *(inputs.SOFTMAX_SCALE, True, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None),
            )[0]
            return out

        return run

    def upconvert(self, *, pool: Tensor, keys: Tensor, table: Tensor, starts: Tensor) -> Launch:
        """vLLM's pass from the FP8 cache to contiguous bfloat16 keys [n, QUERY], for prefill."""
        gather = self.vllm_cache.cp_gather_and_upconvert_fp8_kv_cache
        paged = pool.view(-1, inputs.BLOCK, inputs.LATENT_ROW)
        return lambda: gather(paged, keys, table, starts, 1, None)

    # The indexer

    def schedule(self, lengths: Tensor) -> Tensor:
        """DeepGEMM's plan for paged logits, which its callers make once a step."""
        gemm = self.deepgemm
        plan: Tensor = gemm.get_paged_mqa_logits_metadata(lengths, inputs.BLOCK, gemm.get_num_sms())
        return plan

    def paged_logits(
        self,
        *,
        query: Tensor,
        weights: Tensor,
        pool: Tensor,
        table: Tensor,
        lengths: Tensor,
        plan: Tensor,
        max_length: int,
    ) -> Callable[[], Tensor]:
        """Query [requests, next_n, INDEX_HEADS, INDEX_DIM], lengths [requests, next_n]."""
        logits = self.deepgemm.fp8_fp4_paged_mqa_logits

        def run() -> Tensor:
            out: Tensor = logits((query, None), pool, weights, lengths, table, plan, max_length)
            return out

        return run

    def contiguous_logits(
        self, *, query: Tensor, weights: Tensor, keys: Tensor, scales: Tensor, starts: Tensor, ends: Tensor
    ) -> Callable[[], Tensor]:
        """Query [rows, INDEX_HEADS, INDEX_DIM] over keys [n, INDEX_DIM] e4m3 and scales [n]."""
        logits = self.deepgemm.fp8_fp4_mqa_logits

        def run() -> Tensor:
            out: Tensor = logits((query, None), (keys, scales), weights, starts, ends, keys.shape[0])
            return out

        return run

    def gather_index_keys(
        self, *, pool: Tensor, keys: Tensor, scales: Tensor, table: Tensor, starts: Tensor
    ) -> Launch:
        """vLLM's pass from the index cache to contiguous keys and scales [n, 4] uint8, for prefill."""
        gather = self.vllm_cache.cp_gather_indexer_k_quant_cache
        paged = pool.view(-1, inputs.BLOCK, inputs.INDEX_ROW)
        return lambda: gather(paged, keys, scales, table, starts)

    # Cache writes

    def write_latent(self, *, latent: Tensor, rope: Tensor, pool: Tensor, slots: Tensor) -> Launch:
        write, one = self.vllm_cache.concat_and_cache_mla, torch.ones(1)
        paged = pool.view(-1, inputs.BLOCK, inputs.LATENT_ROW)
        return lambda: write(latent, rope, paged, slots, "fp8_ds_mla", one)

    def write_index_key(self, *, key: Tensor, pool: Tensor, slots: Tensor) -> Launch:
        write = self.vllm_cache.indexer_k_quant_and_cache
        paged = pool.view(-1, inputs.BLOCK, inputs.INDEX_ROW)
        return lambda: write(key, paged, slots, 128, "ue8m0")
