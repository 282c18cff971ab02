"""A token's numbers are the same bits whatever is computed beside it, whatever the environment says of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from fastdeploy_dsa.engine.trace import trace
from fastdeploy_dsa.layers import linear
from fastdeploy_dsa.row_invariance import ROW_MULTIPLE, use_one_math_thread
from tests.kit.tiny_model import write_tiny_model

# No multiples of 4 wherever the architecture allows it, and fewer than 8 columns where real models have few.
ODD_WIDTHS = {
    "moe_intermediate_size": 14,
    "intermediate_size": 54,
    "hidden_size": 42,
    "q_lora_rank": 23,
    "v_head_dim": 9,
    "index_n_heads": 7,
    "n_routed_experts": 6,
}
PROMPT = [(37 * place) % 251 for place in range(70)]
CHUNK_SIZES = (None, 1, 7, 13, 64)
OTHER_PROCESS = """
import sys
from tests.test_row_invariance import assert_chunks_do_not_matter
assert_chunks_do_not_matter(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("inner", [7, 14, 31, 54, 64, 128])
@pytest.mark.parametrize("outer", [3, 6, 7, 9, 84, 576])
def test_a_row_of_a_product_does_not_depend_on_the_others(inner: int, outer: int) -> None:
    use_one_math_thread()
    rng = np.random.default_rng(inner)
    rows = rng.standard_normal((33 * ROW_MULTIPLE, inner)).astype(np.float32)
    weight = paddle.to_tensor(rng.standard_normal((outer, inner)).astype(np.float32))
    together = linear(paddle.to_tensor(rows), weight).numpy()
    for count in (8, 16, 40, 200):
        chosen = rng.permutation(len(rows))[:count]
        assert np.array_equal(linear(paddle.to_tensor(rows[chosen]), weight).numpy(), together[chosen])


@pytest.mark.parametrize(("inner", "outer"), [(32, 512), (512, 32), (20, 52), (7, 9), (14, 33), (31, 16), (128, 8)])
def test_a_row_of_a_product_per_head_does_not_depend_on_the_others(inner: int, outer: int) -> None:
    use_one_math_thread()
    rng = np.random.default_rng(outer)
    rows = rng.standard_normal((3, 33 * ROW_MULTIPLE, inner)).astype(np.float32)
    weight = paddle.to_tensor(rng.standard_normal((3, inner, outer)).astype(np.float32))
    together = paddle.matmul(paddle.to_tensor(rows), weight).numpy()
    for count in (8, 16, 40, 200):
        chosen = rng.permutation(rows.shape[1])[:count]
        part = paddle.matmul(paddle.to_tensor(rows[:, chosen]), weight).numpy()
        assert np.array_equal(part, together[:, chosen])


def assert_chunks_do_not_matter(folder: str, cache_dtype: str) -> None:
    """Logits and selections of a prompt and a few steps, bit for bit, for all chunk sizes and thread counts."""
    whole = trace(folder, PROMPT, cache_dtype=cache_dtype, steps=4).tensors()
    for chunk_size in CHUNK_SIZES:
        for num_threads in (1, 2):
            arguments = {"cache_dtype": cache_dtype, "steps": 4, "chunk_size": chunk_size, "num_threads": num_threads}
            other = trace(folder, PROMPT, **arguments).tensors()
            different = [name for name in whole if not np.array_equal(other[name], whole[name])]
            assert different == [], f"{arguments}: {different}"


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("widths", [{}, ODD_WIDTHS], ids=["even", "odd"])
def test_logits_are_the_same_bits_for_every_chunk_size(
    tmp_path: Path, cache_dtype: str, widths: dict[str, int]
) -> None:
    assert_chunks_do_not_matter(str(write_tiny_model(tmp_path, **widths)), cache_dtype)


@pytest.mark.parametrize("widths", [{}, ODD_WIDTHS], ids=["even", "odd"])
def test_logits_are_the_same_bits_where_the_environment_asks_for_two_threads(
    tmp_path: Path, widths: dict[str, int]
) -> None:
    folder = write_tiny_model(tmp_path, **widths)
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(folder), "fp8"],
        cwd=Path(__file__).resolve().parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
