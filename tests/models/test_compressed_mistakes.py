"""Every wrong DeepSeek-V4 that the goldens list would be noticed: ours, made wrong in that way, fails them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from fastdeploy_dsa.models import load_model
from tests.kit.compressed_mistakes import MISTAKES, SCORE_MISTAKES, Planting
from tests.kit.compressed_serving import CompressedServing
from tests.kit.goldens import SEEN_FACTOR, GoldenCase
from tests.kit.serving import in_one_step

LISTED_SIZE = (0.9, 1.1)  # listed sizes have two digits: the same mistake, to a tenth
SCORES_LISTED = 0.25  # of rows that the cases do not name; one row is stored
LEAST_OVER_NOISE = 100


@lru_cache(maxsize=1)
def model_of(folder: Path) -> object:
    return load_model(folder)


def planted(golden: GoldenCase, mistake: object, patch: pytest.MonkeyPatch) -> CompressedServing:
    (prompt,) = golden.prompts
    serving = CompressedServing(model_of(golden.folder), [prompt.fed_ids])
    mistake(Planting(serving, patch, len(prompt.prompt_ids)))
    return serving


def test_every_listed_mistake_can_be_planted(compressed_golden: GoldenCase) -> None:
    assert set(compressed_golden.mistakes) <= set(MISTAKES)
    assert set(compressed_golden.score_mistakes) <= set(SCORE_MISTAKES)


def test_mistake_is_noticed_in_the_logits(
    compressed_golden: GoldenCase, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = compressed_golden.prompts
    serving = planted(compressed_golden, MISTAKES[mistake], monkeypatch)
    (logits,) = serving.run(in_one_step([len(prompt.fed_ids)]))
    with pytest.raises(AssertionError, match="logits"):
        prompt.assert_logits(logits, compressed_golden.tolerances.logits)
    size, listed = float(np.abs(logits[prompt.stored] - prompt.logits).max()), compressed_golden.mistakes[mistake]
    assert size >= LEAST_OVER_NOISE * compressed_golden.tolerances.seen_logits
    low, high = LISTED_SIZE
    assert low * listed <= size <= high * listed, f"moved {size:.3g}, listed {listed:.3g}"


def test_mistake_is_noticed_in_the_index_scores(compressed_golden: GoldenCase, score_mistake: str) -> None:
    (prompt,) = compressed_golden.prompts
    with pytest.MonkeyPatch.context() as patch:
        serving = planted(compressed_golden, SCORE_MISTAKES[score_mistake], patch)
        (served,) = serving.run_recorded(in_one_step([len(prompt.fed_ids)]))
    prompt.assert_logits(served.logits, compressed_golden.tolerances.logits)
    moved = [
        float(np.abs(served.index_scores[layer][prompt.last, : len(expected)] - expected).max())
        for layer, expected in prompt.by_layer("index_scores").items()
    ]
    assert max(moved) >= LEAST_OVER_NOISE * compressed_golden.tolerances.index_scores / SEEN_FACTOR
    assert max(moved) == pytest.approx(compressed_golden.score_mistakes[score_mistake], rel=SCORES_LISTED)
