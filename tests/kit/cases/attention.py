"""Cases of sparse_mla."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastdeploy_dsa.ops import reference
from tests.kit.cases.common import SPARE_BLOCKS, Arguments, Format, latent_cache, numbers_as
from tests.kit.poison import fill_with_invalid_ids


@dataclass(frozen=True)
class SparseMlaCase:
    """Query rows over selected slots of a latent cache in which only selected slots are written.

    Attributes:
        counts: Leading ids of every row; ids behind it name poisoned slots. None: all ids count.
        invalid_every: Every so manieth id lies outside the cache; 0: none.
        logit_size: Standard deviation of the attention logits; large ones make one key dominate.
    """

    num_tokens: int = 3
    num_heads: int = 16
    topk: int = 70
    counts: tuple[int, ...] | None = None
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    block_size: int = 64
    query_format: Literal["bfloat16", "float32"] = "float32"
    cache_format: Format = "fp8"
    scale_format: Literal["ue8m0", "plain"] = "ue8m0"
    gap_bytes: int = 0
    invalid_every: int = 7
    logit_size: float = 1.0
    num_slots: int | None = None
    seed: int = 0

    def arguments(self) -> Arguments:
        """Of sparse_mla."""
        rng = np.random.default_rng(self.seed)
        width = self.kv_lora_rank + self.qk_rope_head_dim
        num_slots = 2 * self.topk if self.num_slots is None else self.num_slots
        num_blocks = -(-num_slots // self.block_size) + SPARE_BLOCKS
        cache = latent_cache(
            num_blocks, self.block_size, self.kv_lora_rank, self.qk_rope_head_dim, self.cache_format, self.gap_bytes
        )
        slot_ids, readable = self._slot_ids(rng, num_blocks * self.block_size)
        values = rng.standard_normal((len(readable), width)).astype(np.float32)
        reference.mla_cache_write(
            latent=values[:, : self.kv_lora_rank],
            rope=values[:, self.kv_lora_rank :],
            cache=cache,
            slot_mapping=readable,
            scale_format=self.scale_format,
        )
        query = rng.standard_normal((self.num_tokens, self.num_heads, width)).astype(np.float32)
        return {
            "query": numbers_as(query, self.query_format),
            "latent_cache": cache,
            "slot_ids": slot_ids,
            "counts": None if self.counts is None else np.array(self.counts, np.int32),
            "kv_lora_rank": self.kv_lora_rank,
            "softmax_scale": self.logit_size * width**-0.5,
        }

    def _slot_ids(self, rng: np.random.Generator, num_slots: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Ids [num_tokens, topk] and the slots that may be read."""
        order = rng.permutation(num_slots)
        readable, poisoned = order[: num_slots // 2], order[num_slots // 2 :]
        picks = rng.integers(0, len(readable), (self.num_tokens, self.topk))
        slot_ids = readable[picks].astype(np.int32)
        if self.invalid_every:
            is_invalid = np.broadcast_to(np.arange(self.topk) % self.invalid_every == 2, slot_ids.shape)
            fill_with_invalid_ids(slot_ids, is_invalid, num_slots)
        if self.counts is not None:
            behind = np.arange(self.topk) >= np.array(self.counts)[:, None]
            slot_ids[behind] = np.resize(poisoned, int(behind.sum()))
        return slot_ids, readable.astype(np.int64)
