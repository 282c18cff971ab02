"""Our model against the outputs of another implementation, and against float64 where a cache rounds."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from fastdeploy_dsa.engine.trace import trace
from fastdeploy_dsa.models import load_model
from fastdeploy_dsa.ops import CacheFormat
from tests.kit.agreement import check_agreement
from tests.kit.compare import assert_close, assert_same
from tests.kit.goldens import CASES, REPOSITORY, GoldenCase
from tests.kit.reference_model import ReferenceModel
from tests.kit.rounding_noise import logit_bound
from tests.kit.selections import forced, mask_of_positions
from tests.kit.serving import Plan, Served, Serving, in_chunks, in_one_step, prompts_then_tokens

CHUNK = 37
FORMATS: tuple[CacheFormat, ...] = ("float32", "bfloat16", "fp8")


def plan_of(golden: GoldenCase, name: str) -> Plan:
    lengths = [len(prompt.fed_ids) for prompt in golden.prompts]
    if name == "prompts then tokens":
        return prompts_then_tokens([len(prompt.prompt_ids) for prompt in golden.prompts], lengths)
    return in_one_step(lengths) if name == "one step" else in_chunks(lengths, CHUNK)


@cache  # a few small arrays per case
def serve(golden: GoldenCase, plan: str, cache_format: CacheFormat = "float32") -> list[Served]:
    """All prompts of the case as one batch."""
    sequences = [prompt.fed_ids for prompt in golden.prompts]
    return Serving(load_model(golden.folder), sequences, cache_format=cache_format).run_recorded(plan_of(golden, plan))


@pytest.mark.parametrize("chunk_size", [None, CHUNK])
def test_logits_command_gives_logits_sets_and_tokens_of_the_golden(golden: GoldenCase, chunk_size: int | None) -> None:
    for prompt in golden.prompts:
        steps = len(prompt.decode_ids) - 1
        traced = trace(
            golden.folder, prompt.prompt_ids.tolist(), cache_dtype="float32", chunk_size=chunk_size, steps=steps
        )
        prompt.assert_logits(np.concatenate([traced.logits_prompt, traced.logits_decode]), golden.tolerances.logits)
        assert_same(traced.decode_ids, prompt.decode_ids, "decode ids")
        for layer, positions in traced.topk.items():
            assert_same(positions, prompt.by_layer("topk")[layer], f"selected sets of layer {layer}")


@pytest.mark.parametrize("plan", ["prompts then tokens", "one step", "chunks"])
def test_all_prompts_as_one_batch_give_the_golden(golden: GoldenCase, plan: str) -> None:
    for prompt, served in zip(golden.prompts, serve(golden, plan), strict=True):
        prompt.assert_logits(served.logits, golden.tolerances.logits)
        assert_same(served.logits[prompt.last :].argmax(-1), prompt.decode_ids, "decode ids")
        for layer, positions in served.positions.items():
            assert_same(positions, prompt.by_layer("topk")[layer], f"selected sets of layer {layer}")


def test_intermediate_results_of_the_last_prompt_position_are_the_golden_ones(golden: GoldenCase) -> None:
    for prompt, served in zip(golden.prompts, serve(golden, "prompts then tokens"), strict=True):
        prompt.assert_index_scores(served.index_scores, golden.tolerances.index_scores)
        for name in ("attn_heads", "attn_out"):
            for layer, rows in getattr(served, name).items():
                expected = prompt.by_layer(name)[layer]
                bound = np.full(expected.shape, golden.tolerances.attention)
                assert_close(rows[prompt.last], expected, bound, f"{name} of layer {layer}")


def test_softmax_scale_is_the_golden_one(golden: GoldenCase) -> None:
    assert load_model(golden.folder).config.softmax_scale == pytest.approx(golden.softmax_scale, rel=1e-15)


@pytest.mark.parametrize("cache_format", FORMATS)
def test_every_number_on_the_way_is_the_references(golden: GoldenCase, cache_format: CacheFormat) -> None:
    """See agreement.py: what caches hold is correctly rounded, and everything computed from it is float32-exact."""
    reference = ReferenceModel.load(golden.folder)
    for prompt, served in zip(golden.prompts, serve(golden, "prompts then tokens", cache_format), strict=True):
        agreement = check_agreement(reference, prompt.fed_ids, served, cache_format)
        assert agreement.logit_bound < min(golden.mistakes.values()) / 100, "the bound would hide a listed mistake"


@pytest.mark.parametrize("cache_format", ["bfloat16", "fp8"])
def test_a_rounding_cache_moves_logits_by_no_more_than_rounding_explains(
    golden: GoldenCase, cache_format: CacheFormat
) -> None:
    """With the stored selections forced, for an fp8 index cache may select otherwise."""
    model, reference = load_model(golden.folder), ReferenceModel.load(golden.folder)
    # The smallest mistake of one case, 0.026 through a few early rows, is below any rounding; the next one is not.
    visible = sorted(golden.mistakes.values())[1]
    for prompt in golden.prompts:
        masks = {layer: mask_of_positions(rows) for layer, rows in prompt.by_layer("topk").items()}
        with forced(list(masks.values())):
            (logits,) = Serving(model, [prompt.fed_ids], cache_format=cache_format).run(
                in_one_step([len(prompt.fed_ids)])
            )
        bound = logit_bound(reference, prompt.fed_ids, masks, cache_format)
        assert bound < visible, "the bound would hide a listed mistake"
        error = float(np.abs(logits[prompt.stored] - prompt.logits).max())
        assert error <= bound, f"moved {error:.3g}, rounding explains {bound:.3g}"


def test_page_lists_every_case_and_format_within_its_bounds() -> None:
    page = (REPOSITORY / "docs" / "goldens.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.count("|") == 9
    ]
    results = [row for row in rows if row[1] in FORMATS]
    assert [tuple(row[:2]) for row in results] == [(case, cache_format) for case in CASES for cache_format in FORMATS]
    for row in results:
        assert float(row[2]) <= float(row[3]), row
        assert float(row[5]) <= float(row[6]), row
        same, rows_of_all = row[7].split(" / ")
        assert same == rows_of_all, row
