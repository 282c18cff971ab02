"""Every wrong implementation that the goldens list would be noticed: ours, made wrong in that way, fails them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from fastdeploy_dsa.models import DeepseekV32ForCausalLM, load_model
from tests.kit.goldens import GoldenCase, Prompt
from tests.kit.mistakes import DRAFT_MISTAKES, MISTAKES, SCORE_MISTAKES, Planting
from tests.kit.serving import Serving, in_one_step

# Listed sizes have two digits, and what the mistake leaves undefined (a query that sees no key at all, a tie) may have
# been filled in otherwise: the same mistake, to a tenth.
LISTED_SIZE = (0.9, 1.1)
# What the list promises of every mistake, in units of the float32 noise.
LEAST_OVER_NOISE = 100
# Rows in which no score is positive attend to nothing with us; the list does not say what they did there.
UNDEFINED_ROWS = {"scores <= 0 taken as invalid": (0.75, 1.3)}


@lru_cache(maxsize=1)
def model_of(folder: Path) -> DeepseekV32ForCausalLM:
    return load_model(folder)


def plant(golden: GoldenCase, prompt: Prompt, name: str, patch: pytest.MonkeyPatch) -> Serving:
    serving = Serving(model_of(golden.folder), [prompt.fed_ids])
    (MISTAKES | SCORE_MISTAKES)[name](Planting(serving, patch, len(prompt.prompt_ids)))
    return serving


def test_every_listed_mistake_can_be_planted(golden: GoldenCase) -> None:
    assert not set(golden.mistakes) - set(MISTAKES) - set(DRAFT_MISTAKES)
    assert not set(golden.score_mistakes) - set(SCORE_MISTAKES)


def test_mistake_is_noticed_in_the_logits(golden: GoldenCase, mistake: str) -> None:
    wrong = []
    for prompt in golden.prompts:
        with pytest.MonkeyPatch.context() as patch:
            wrong += plant(golden, prompt, mistake, patch).run(in_one_step([len(prompt.fed_ids)]))
    with pytest.raises(AssertionError, match="logits"):
        golden.assert_logits(wrong, golden.tolerances.logits)
    moved = [np.abs(w[prompt.stored] - prompt.logits).max() for prompt, w in zip(golden.prompts, wrong, strict=True)]
    listed, size = golden.mistakes[mistake], max(moved)
    low, high = UNDEFINED_ROWS.get(mistake, LISTED_SIZE)
    least = low * listed
    if "mtp_logits_prompt" in golden.prompts[0].expected:  # the listed size is the larger of main and draft logits
        least = LEAST_OVER_NOISE * golden.tolerances.logits
    assert least < size < high * listed, f"moved {size:.3g}, listed {listed}"


def test_mistake_is_noticed_in_the_index_scores_only(golden: GoldenCase, score_mistake: str) -> None:
    moved = []
    for prompt in golden.prompts:
        with pytest.MonkeyPatch.context() as patch:
            serving = plant(golden, prompt, score_mistake, patch)
            (served,) = serving.run_recorded(in_one_step([len(prompt.fed_ids)]))
        prompt.assert_logits(served.logits, golden.tolerances.logits)
        with pytest.raises(AssertionError, match="index scores"):
            prompt.assert_index_scores(served.index_scores, golden.tolerances.index_scores)
        stored = prompt.by_layer("index_scores")
        rows = {layer: scores[prompt.last, : prompt.last + 1] for layer, scores in served.index_scores.items()}
        moved += [np.abs(row - stored[layer]).max() for layer, row in rows.items()]
    listed, size = golden.score_mistakes[score_mistake], max(moved)
    least = LISTED_SIZE[0] * listed
    if "mtp_logits_prompt" in golden.prompts[0].expected:  # the draft layer's scores are listed, too
        least = LEAST_OVER_NOISE * golden.tolerances.index_scores
    assert least < size < LISTED_SIZE[1] * listed, f"moved {size:.3g}, listed {listed}"
