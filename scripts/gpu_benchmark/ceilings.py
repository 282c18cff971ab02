"""Section ceil: what the device can do at best, for the floors."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from scripts.gpu_benchmark import inputs
from scripts.gpu_benchmark.record import Journal
from scripts.gpu_benchmark.timing import graph_times

_MATMUL = 8192


def _us(run: Callable[[], object], count: int) -> float:
    for _ in range(2):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / count


def measure(journal: Journal, quick: bool) -> None:
    """Write the ceilings to the journal: GB/s, TFLOP/s, us."""
    properties = torch.cuda.get_device_properties(0)
    journal.write("facts", values={"device": properties.name, "torch": torch.__version__, "CUDA": torch.version.cuda})
    found = {"multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
    found |= _bandwidth(quick) | _matmuls(quick)
    zero = torch.zeros(1)
    found["empty_kernel_us"] = graph_times([lambda: zero.add_(1)] * 256, 10).median
    for name, value in found.items():
        print(f"ceil     | {name:24s}| {value:.1f}", flush=True)
    journal.write("ceilings", values=found)


def _bandwidth(quick: bool) -> dict[str, float]:
    count = 1 << 29  # 2 GiB of float32
    source, target = torch.randn(count), torch.empty(count)
    copies = (lambda: target.copy_(source), lambda: torch.mul(source, 1.5, out=target))
    found = {
        "copy_gbs": 8 * count / min(_us(run, 12) for run in copies) / 1e3,
        "read_gbs": 4 * count / _us(source.sum, 8) / 1e3,
    }
    return found if quick else found | _row_fetches(source)


def _row_fetches(source: torch.Tensor) -> dict[str, float]:
    """What fetching the selected rows alone takes, cold: the practical floor of sparse decode."""
    kernels = importlib.import_module("scripts.gpu_benchmark.triton_kernels")
    words = source.view(torch.int64)
    rows = words.numel() // 82
    ids = torch.randperm(rows)[: 1 << 20]
    out = torch.empty(ids.numel(), dtype=torch.int64)
    found: dict[str, float] = {}
    for requests in (1, 8, 64):
        parts = ids.split(requests * inputs.TOPK)[:96]
        for tile in (4, 16):
            launches = [lambda part=part, tile=tile: kernels.row_sums(words, part, out, tile) for part in parts]
            us = graph_times(launches, 8).median
            name = f"fetch_rows_b{requests}_us"
            found[name] = min(us, found.get(name, us))
    return found


def _matmuls(quick: bool) -> dict[str, float]:
    left, right = (torch.randn(_MATMUL, _MATMUL, dtype=torch.bfloat16) for _ in range(2))
    left8, right8 = (left * 2).to(inputs.FP8), (right * 2).to(inputs.FP8).t()
    one = torch.ones(())

    def fp8() -> torch.Tensor:
        return torch._scaled_mm(left8, right8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    flops = 2.0 * _MATMUL**3
    found: dict[str, float] = {}
    for name, run in (("bf16", lambda: left @ right), ("fp8", fp8)):
        found[f"{name}_tflops"] = max(flops / _us(run, 8) / 1e6 for _ in range(3))
        if not quick:
            found[f"{name}_sustained_tflops"] = flops / _us(run, 300) / 1e6
    return found
