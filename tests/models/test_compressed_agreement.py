"""What DeepSeek-V4's caches hold is the float64 model's numbers, rounded, and everything else is float32-exact.

Logits alone would prove little for a rounding cache, which moves them by more than many a mistake does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa.models import load_model
from fastdeploy_dsa.ops import CacheFormat
from tests.kit.compressed_agreement import NOISE, Given
from tests.kit.compressed_serving import CompressedServing
from tests.kit.goldens import GoldenCase
from tests.kit.reference_model.compressed import CompressedReferenceModel
from tests.kit.serving import in_chunks
from tests.kit.tiny_compressed_model import VOCAB_SIZE, write_tiny_compressed_model

FORMATS: tuple[CacheFormat, ...] = ("float32", "bfloat16", "fp8")


def check(folder: Path, sequence: np.ndarray, cache_format: CacheFormat) -> Given:
    serving = CompressedServing(load_model(folder), [sequence], cache_format=cache_format)
    (served,) = serving.run_recorded(in_chunks([len(sequence)], 100))
    given = Given(CompressedReferenceModel.load(folder), serving, served)
    trace = given.forward(sequence)
    size = float(np.abs(trace.logits).max())
    assert np.abs(served.logits - trace.logits).max() <= NOISE * size
    for name in ("attn_heads", "attn_out"):
        for layer, rows in getattr(trace, name).items():
            error = np.abs(getattr(served, name)[layer] - rows).max()
            assert error <= NOISE * np.abs(rows).max(), f"{name} of layer {layer}: off by {error:.3g}"
    return given


@pytest.mark.parametrize("cache_format", FORMATS)
def test_goldens(compressed_golden: GoldenCase, cache_format: CacheFormat) -> None:
    (prompt,) = compressed_golden.prompts
    check(compressed_golden.folder, prompt.fed_ids, cache_format)


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("changes", [{}, {"head_dim": 150, "qk_rope_head_dim": 10, "index_head_dim": 36}], ids=str)
def test_random_checkpoints(tmp_path: Path, cache_format: CacheFormat, changes: dict[str, Any]) -> None:
    """The second one has a short last group of numbers that share a scale."""
    folder = write_tiny_compressed_model(tmp_path / "model", seed=21, **changes)
    given = check(folder, np.random.default_rng(22).integers(0, VOCAB_SIZE, 270), cache_format)
    least, most = {"float32": (0, 1e-4), "bfloat16": (1e-3, 0.1), "fp8": (1e-2, 1.0)}[cache_format]
    assert sorted(given.largest_error) == ["entry", "index_key", "row"]
    assert all(least <= error <= most for error in given.largest_error.values()), given.largest_error
