"""Devices that hold no large clusters and drivers that make no tensor maps: environment variables stand for them.

The library reads a variable once in a process, so that each value needs one of its own: this file is its program, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeploy_dsa.ops import reference
from tests.kit.c_api import CApi
from tests.kit.cases import IndexerCase, SparseMlaCase, TopkCase
from tests.kit.checks import check_indexer_logits, check_sparse_mla, check_topk_slots
from tests.kit.compare import assert_close
from tests.kit.implementation import Implementation
from tests.kit.implementations import implementations
from tests.kit.tolerances import indexer_logits_bound

ROOT = Path(__file__).resolve().parents[2]


def check_rows_shared_by_clusters(implementation: Implementation) -> None:
    """Calls that on Hopper would have clusters of 2 to 16 CTAs."""
    for num_heads, num_tokens in ((16, 1), (16, 8), (16, 40), (64, 8)):
        case = SparseMlaCase(num_heads=num_heads, num_tokens=num_tokens, topk=2048, query_format="bfloat16")
        check_sparse_mla(implementation, case)
    for length, rows in ((140000, 1), (40000, 1), (20000, 8), (9000, 40)):
        check_topk_slots(implementation, TopkCase(lengths=(length,) * rows, topk=2048))


def check_scores_in_float32(implementation: Implementation) -> None:
    """Scores of fp8 keys without what Hopper's tensor cores, which the kernel with tensor maps uses, cut off."""
    for lengths, requests in (((1000, 129, 0), None), ((500,) * 40, (0,) * 40)):
        case = IndexerCase(lengths=lengths, requests=requests)
        logits, arguments = check_indexer_logits(implementation, case), case.arguments()
        expected, bound = reference.indexer_logits(**arguments), indexer_logits_bound(arguments)
        for row, length in enumerate(lengths):
            assert_close(logits[row, :length], expected[row, :length], bound[row, :length], f"row {row}")


CHECKS = {"clusters": check_rows_shared_by_clusters, "scores": check_scores_in_float32}


def run_under(variable: str, value: str, check: str, request: pytest.FixtureRequest) -> None:
    """Run a check in a process with a variable set."""
    program = [sys.executable, "-m", __name__, check, str(request.config.getoption("--c-library"))]
    ran = subprocess.run(
        program, cwd=ROOT, env=os.environ | {variable: value}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.parametrize("largest", ["1", "2", "7"])
def test_plans_keep_to_the_clusters_that_the_device_holds(
    c_gpu_implementation: CApi, request: pytest.FixtureRequest, largest: str
) -> None:
    assert c_gpu_implementation.device == "gpu"
    run_under("FASTDEPLOY_DSA_CUDA_MAX_CLUSTER", largest, "clusters", request)


def test_scores_without_tensor_maps(c_gpu_implementation: CApi, request: pytest.FixtureRequest) -> None:
    assert c_gpu_implementation.device == "gpu"
    run_under("FASTDEPLOY_DSA_CUDA_TENSOR_MAPS", "0", "scores", request)


if __name__ == "__main__":
    CHECKS[sys.argv[1]](implementations(Path(sys.argv[2]))["c_cuda"]())
