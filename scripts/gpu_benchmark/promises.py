"""The ratios to the best peer that the project promises, and those it aims for; needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """A kind of work: the cases of a section whose name matches."""

    work: str
    section: str
    cases: str
    must: float
    aim: float

    def covers(self, section: str, case: str) -> bool:
        return section == self.section and re.fullmatch(self.cases, case) is not None


PROMISES = [
    Promise("sparse_mla fp8, 128 heads, 64 requests", "decode", r"b64 s1 h128 32k", 1.0, 0.7),
    Promise("sparse_mla fp8, 64 heads, 64 requests", "decode", r"b64 s1 h64 32k", 1.0, 0.6),
    Promise("sparse_mla fp8, 16 heads, 64 requests", "decode", r"b64 s1 h16 32k", 0.60, 0.45),
    Promise("sparse_mla fp8, 1 request, 16 to 128 heads", "decode", r"b1 s1 h(16|32|64|128) 32k", 0.70, 0.45),
    Promise("sparse_mla fp8 as prefill, 128 heads, 1024 rows", "prefill8", r"1024 rows h128 (8|32|128)k", 1.3, 1.0),
    Promise("topk_slots, 1 row", "topk", r"1 x (32|128)k", 0.80, 0.55),
    Promise("topk_slots, 64 rows", "topk", r"64 x (32|128)k", 0.85, 0.55),
    Promise("indexer_logits, decode, 64 requests", "idxdec", r"b64 n1 (32|64|128)k", 1.05, 1.0),
    Promise("indexer_logits, decode, 1 to 8 requests", "idxdec", r"b[18] n1 \d+k", 1.0, 0.8),
    Promise("indexer_logits, prefill from the cache", "idxpre", r"\d+ x \d+k", 1.1, 0.85),
    Promise("writes of one layer, one launch", "writes", r"layer T(1|8|64|128)", 0.6, 0.5),
    Promise("decode chain of one layer, 1 request", "chain", r"b1 32k h(16|128)", 0.75, 0.45),
    Promise("decode chain of one layer, 8 requests", "chain", r"b8 32k h(16|128)", 0.85, 0.6),
    Promise("decode chain of one layer, 64 requests", "chain", r"b64 32k h(16|128)", 0.95, 0.75),
]


def promise_of(section: str, case: str) -> Promise | None:
    """The promise that covers a case."""
    return next((promise for promise in PROMISES if promise.covers(section, case)), None)
