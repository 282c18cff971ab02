"""The float64 reference against the goldens, and its number formats against ml_dtypes."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
import pytest

from tests.kit.compare import assert_close, assert_same
from tests.kit.goldens import GoldenCase
from tests.kit.mistakes import DRAFT_MISTAKES
from tests.kit.reference_model import LayerTrace, ReferenceModel, Trace, formats

SEEN_ROUNDING = 1.06  # case.md prints the tolerances seen with two digits


@cache  # a few small arrays per case
def traces(golden: GoldenCase, index: int) -> tuple[Trace, Trace | None]:
    """Of the main model and of the draft layer, if there is one, for one prompt."""
    model, prompt = ReferenceModel.load(golden.folder), golden.prompts[index]
    main = model.forward(prompt.fed_ids)
    if "mtp_logits_prompt" not in prompt.expected:
        return main, None
    return main, model.draft(np.concatenate([prompt.prompt_ids, prompt.decode_ids]), main)


def layers_of(golden: GoldenCase, index: int) -> dict[int, LayerTrace]:
    main, draft = traces(golden, index)
    return main.layers | (draft.layers if draft else {})


def test_reference_gives_the_logits_to_the_float32_error_seen(golden: GoldenCase) -> None:
    bound = SEEN_ROUNDING * golden.tolerances.seen_logits
    for index, prompt in enumerate(golden.prompts):
        main, draft = traces(golden, index)
        prompt.assert_logits(main.logits, bound)
        if draft:
            bounds = np.full(prompt.draft_logits.shape, bound)
            assert_close(draft.logits[prompt.stored], prompt.draft_logits, bounds, "draft logits")


def test_reference_selects_the_stored_sets(golden: GoldenCase) -> None:
    for index, prompt in enumerate(golden.prompts):
        layers = layers_of(golden, index)
        for layer, expected in prompt.by_layer("topk").items():
            for row, chosen in enumerate(layers[layer].selection):
                found = np.flatnonzero(chosen)
                stored = expected[row][expected[row] >= 0]
                assert np.array_equal(found, stored), f"layer {layer} row {row}: {found}, stored {stored}"


def test_reference_gives_the_stored_intermediate_results(golden: GoldenCase) -> None:
    seen = golden.tolerances
    for index, prompt in enumerate(golden.prompts):
        layers = layers_of(golden, index)
        prompt.assert_index_scores(
            {layer: trace.scores for layer, trace in layers.items() if trace.scores is not None}, seen.index_scores
        )
        for name in ("attn_heads", "attn_out"):
            for layer, expected in prompt.by_layer(name).items():
                actual = getattr(layers[layer], name)[prompt.last]
                assert_close(actual, expected, np.full(expected.shape, seen.attention), f"{name} of layer {layer}")


def test_reference_has_the_stored_softmax_scale(golden: GoldenCase) -> None:
    assert ReferenceModel.load(golden.folder).softmax_scale == pytest.approx(golden.softmax_scale, rel=1e-15)


def test_wrong_draft_layers_move_the_draft_logits_as_listed(golden: GoldenCase) -> None:
    # Each list prints its sizes with two digits.
    listed = {name: size for name, size in golden.mistakes.items() if name in DRAFT_MISTAKES}
    for name, size in listed.items():
        model = DRAFT_MISTAKES[name].load(golden.folder)
        for prompt in golden.prompts:
            ids = np.concatenate([prompt.prompt_ids, prompt.decode_ids])
            draft = model.draft(ids, model.forward(prompt.fed_ids))
            moved = np.abs(draft.logits[prompt.stored] - prompt.draft_logits).max()
            assert 0.94 * size < moved < 1.06 * size, f"{name}: moved {moved:.3g}, listed {size}"


def test_bfloat16_rounds_as_ml_dtypes() -> None:
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * np.logspace(
        -30, 30, 1000, dtype=np.float32
    )
    halfway = np.float32(1.0) + np.arange(64, dtype=np.float32) * np.float32(2.0**-8)
    x = np.concatenate([x, halfway, -halfway, [0.0, -0.0]]).astype(np.float32)
    assert_same(formats.bfloat16(x), x.astype(ml_dtypes.bfloat16).astype(np.float64), "bfloat16")


def test_e4m3_rounds_as_ml_dtypes_and_saturates() -> None:
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.sort(codes[np.isfinite(codes)])
    halfway = (codes[1:] + codes[:-1]) / 2
    x = np.concatenate(
        [codes, halfway, np.nextafter(halfway, np.float32(1e9)), np.nextafter(halfway, np.float32(-1e9))]
    )
    assert_same(formats.e4m3(x), x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64), "e4m3")
    assert_same(formats.e4m3(np.array([460.0, 1e9, -1e9])), np.array([448.0, 448.0, -448.0]), "saturation")


@pytest.mark.parametrize(("amax", "expected"), [(0, -22), (1e-4, -22), (0.5, -9), (1, -8), (448, 0), (449, 1)])
def test_index_scales_have_the_published_values(amax: float, expected: int) -> None:
    assert formats.index_scale(np.array(amax)) == 2.0**expected


@pytest.mark.parametrize(("amax", "expected"), [(0, -13), (1, -8), (448, 0)])
def test_latent_scales_have_the_published_values(amax: float, expected: int) -> None:
    assert formats.latent_scale(np.array(amax)) == 2.0**expected
