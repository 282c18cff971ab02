"""Section repeats: whether our ops give the same bits every time, on decode shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scripts.gpu_benchmark import chain, decode
from scripts.gpu_benchmark.record import Journal
from scripts.gpu_benchmark.tools import Inputs, Tools
from scripts.gpu_benchmark.work import Launch, MissingContender

RUNS = 50


def measure(journal: Journal, tools: Tools) -> None:
    """Write an outcome for each op and shape to the journal."""
    for shape in (chain.Shape(1, 1 << 15, 16), chain.Shape(64, 1 << 15, 128)):
        work = chain.work_of(shape, tools)
        _repeat(
            journal, f"decode chain {shape.case}", work.sets[0], lambda case: chain.ours_step(tools, case), chain_out
        )
    for attention in (decode.Shape(1, 1, 128, 1 << 15), decode.Shape(64, 2, 16, 1 << 15)):
        work = decode.work_of(attention, tools)
        _repeat(
            journal, f"sparse_mla {attention.case}", work.sets[0], lambda case: decode.ours(tools, case), decode_out
        )


def chain_out(case: Inputs) -> list[Tensor]:
    return [case.ours_logits, case.positions, case.selected, case.counts, case.ours_out]


def decode_out(case: Inputs) -> list[Tensor]:
    return [case.ours_out]


def _repeat(
    journal: Journal,
    name: str,
    case: Inputs,
    make: Callable[[Inputs], Launch],
    outputs: Callable[[Inputs], list[Tensor]],
) -> None:
    try:
        launch = make(case)
        launch()
        first = [_bits(out).clone() for out in outputs(case)]
        differing = 0
        for _ in range(RUNS):
            for out in outputs(case):
                out.fill_(-2)
            launch()
            differing += any(not torch.equal(_bits(out), bits) for out, bits in zip(outputs(case), first, strict=True))
        outcome = f"{differing} of {RUNS} differ" if differing else f"{RUNS} runs, the same bits"
    except (MissingContender, RuntimeError) as error:
        outcome = str(error).splitlines()[0]
    print(f"repeats  | {name:36s}| {outcome}", flush=True)
    journal.write("repeat", op=name, outcome=outcome)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
