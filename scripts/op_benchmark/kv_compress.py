"""kv_compress beside a scatter, gathers, softmax, weighted sums, norm, rotation and a scatter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import paddle

from fastdeploy_dsa import ops
from fastdeploy_dsa.ops.reference.compressed import state_place
from scripts.op_benchmark.arguments import Arguments, tensors
from scripts.op_benchmark.timing import Work
from tests.kit.compare import assert_same
from tests.kit.compressed_cases import KvCompressCase
from tests.kit.compressed_checks import check_kv_compress, closing_rows
from tests.kit.paddle_ops import PaddleOps

ENTRY_BYTES = {"fp8": 584, "bfloat16": 1024}


def kv_compress_works() -> Iterator[Work]:
    """A prefill step of one request, and a decode step in which every request closes a window."""
    ratio_4 = KvCompressCase(has_padding=False, entry_format="bfloat16")
    ratio_128 = replace(ratio_4, ratio=128, overlap=1, state_block_tokens=8, block_rows=2)
    keys = replace(ratio_4, head_dim=128, entry_kind="index_key")
    for name, case in (("ratio 4", ratio_4), ("ratio 128", ratio_128), ("ratio 4, index keys", keys)):
        yield kv_compress_work(f"prefill of 1024 tokens, {name}", replace(case, spans=((0, 1024),)))
        closing = tuple((256 + case.ratio - 1, 1) for _ in range(32))
        yield kv_compress_work(f"32 requests close a window, {name}", replace(case, spans=closing))
    yield kv_compress_work("prefill of 1024 tokens, ratio 4, fp8", replace(ratio_4, spans=((0, 1024),)), "fp8")


def kv_compress_work(name: str, case: KvCompressCase, entry_format: Any = "bfloat16") -> Work:
    """One row of the table. The peer's entries are bfloat16 in any case: quantising would cost it more."""
    ours = replace(case, entry_format=entry_format)
    arguments = ours.arguments()
    inputs = tensors(arguments)
    num_entries = len(closing_rows(arguments))

    def run() -> Any:
        ops.kv_compress(**inputs)
        return inputs["state_cache"], inputs["entry_cache"]

    def check(result: Any) -> None:
        check_kv_compress(PaddleOps(), ours)
        expected = ours.arguments()
        PaddleOps().kv_compress(**expected)
        assert_same(result[0].numpy(), expected["state_cache"], "state_cache")
        assert_same(result[1].numpy(), expected["entry_cache"], "entry_cache")

    peer_case = case.arguments()
    num_tokens, width = arguments["kv_score"].shape
    members = num_entries * case.overlap * case.ratio
    reread = 0 if len(case.spans) == 1 else members * 2 * case.head_dim * 4  # a prefill step has written them itself
    return Work(
        op="kv_compress",
        name=name,
        run=run,
        check=check,
        peers={"gather": partial(compress_by_paddle, tensors(peer_case), PeerPlaces(peer_case))},
        num_bytes=num_tokens * width * 4 * 2 + reread + num_entries * ENTRY_BYTES[entry_format] * case.head_dim // 512,
        num_flops=members * case.head_dim * 4,
        required=4.0,
    )


class PeerPlaces:
    """Where states and entries lie, worked out beforehand."""

    def __init__(self, arguments: Arguments) -> None:
        self.closing = closing_rows(arguments)
        self.overlap, self.ratio = arguments["overlap"], arguments["ratio"]
        slots = [self._slot(arguments, t, int(p)) for t, p in enumerate(arguments["positions"])]
        self.states = paddle.to_tensor(np.array(slots))
        self.phases = paddle.to_tensor(arguments["positions"] % self.ratio)
        first = 1 - self.overlap * self.ratio
        members = [
            # A member before position 0 is any other, whose score is then masked.
            [self._slot(arguments, t, max(int(arguments["positions"][t]) + at, 0)) for at in range(first, 1)]
            for t in self.closing
        ]
        self.members = paddle.to_tensor(np.array(members))
        starts = arguments["positions"][self.closing][:, None] + np.arange(first, 1) < 0
        self.mask = paddle.to_tensor(np.where(starts, -np.inf, 0.0).astype(np.float32)[:, :, None])
        self.rows = paddle.to_tensor(np.array(self.closing))
        self.entries = paddle.to_tensor(arguments["entry_slots"][self.closing])

    @staticmethod
    def _slot(arguments: Arguments, row: int, position: int) -> int:
        cache = arguments["state_cache"]
        block, offset = state_place(position, arguments["state_table"][arguments["request_ids"][row]], cache)
        return block * cache.shape[1] + offset


def compress_by_paddle(inputs: Arguments, places: PeerPlaces) -> Any:
    """Scatter the states, gather the members, softmax over them, a weighted sum, norm, rotation, scatter."""
    width = inputs["ape"].shape[1]
    head_dim = width // places.overlap
    kv, score = paddle.split(inputs["kv_score"], 2, axis=-1)
    states = paddle.concat([kv, score + paddle.gather(inputs["ape"], places.phases)], axis=-1)
    flat = inputs["state_cache"].reshape([-1, 2 * width])
    paddle.scatter_(flat, places.states, states)
    found = paddle.gather(flat, places.members.flatten()).reshape([*places.members.shape, 2, width])
    if places.overlap == 2:
        found = paddle.concat([found[:, : places.ratio, :, :head_dim], found[:, places.ratio :, :, head_dim:]], axis=1)
    weights = paddle.nn.functional.softmax(found[:, :, 1] + places.mask, axis=1)
    pooled = (weights * found[:, :, 0]).sum(axis=1)
    normed = pooled * paddle.rsqrt(pooled.square().mean(axis=-1, keepdim=True) + inputs["eps"]) * inputs["norm_weight"]
    cos, sin = (paddle.gather(inputs[name], places.rows) for name in ("cos", "sin"))
    kept, turned = normed[:, : -inputs["rope_dim"]], normed[:, -inputs["rope_dim"] :]
    even, odd = turned[:, ::2], turned[:, 1::2]
    turned = paddle.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).flatten(1)
    entries = paddle.concat([kept, turned], axis=-1).astype("bfloat16")
    # There is no scatter of bfloat16.
    pairs = inputs["entry_cache"].view("int32").reshape([-1, head_dim // 2])
    return paddle.scatter_(pairs, places.entries, entries.view("int32"))
