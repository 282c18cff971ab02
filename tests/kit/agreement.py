"""Whether a run of the package's model is a float32 run of the reference, with bounds derived from the reference.

Three statements, which together say that every number on the way is right:

1. Given what the run's caches hold and what it selected, the reference in float64 gives its index scores, attention
   results and logits up to float32 noise. With a float32 cache nothing is given but the selections.
2. What the caches hold, and the quantised index queries, are the reference's own numbers rounded to the format: the
   rounding is monotone, so each lies between the rounded ends of the interval that float32 noise leaves open.
3. What was selected is the best of the reference's scores, up to pairs that float32 noise cannot tell apart.

Nothing is tuned. Noise is measured on the reference: the largest deviation over DRAWS runs in which every operation
is off by what float32 may be off by (Float32Noise), times SAFETY, because the package's run is one draw more of a
deviation that has thousands of independent causes and whose causes are no larger than the injected ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from tests.kit.compare import assert_close, assert_selects_best
from tests.kit.reference_model import Float32Noise, Numbers, ReferenceModel, Run, Scaled, Trace, Unrounded, formats
from tests.kit.serving import Served

DRAWS = 4
SAFETY = 2.0
# Statement 2 says less about numbers whose interval spans several values of the format, as it does around 0.
LARGEST_OPEN_SHARE = 0.2


class Agreement(NamedTuple):
    """logit_error and its bound; rows: selections of topk keys; identical_rows: those that are the reference's."""

    logit_error: float
    logit_bound: float
    identical_rows: int
    rows: int


class Noise(NamedTuple):
    """Bounds: of logits, and by layer of index scores, attention results and unrounded numbers."""

    logits: float
    scores: dict[int, float]
    attn_heads: dict[int, float]
    attn_out: dict[int, float]
    unrounded: dict[int, Unrounded]


def check_agreement(model: ReferenceModel, token_ids: Any, served: Served, cache_format: str) -> Agreement:
    """Check the three statements.

    Raises:
        AssertionError: One is wrong; the message has the place of the first difference.
        MeaninglessBound: The noise is so large that agreement would say nothing.
    """
    given = {} if cache_format == "float32" else served.numbers
    run = Run(cache_format, selections=served.selections(), numbers=given)
    exact = model.forward(token_ids, run)
    noise = float32_noise(model, token_ids, run, exact)
    for layer, trace in exact.layers.items():
        if trace.scores is not None:
            _close(served.index_scores[layer], trace.scores, noise.scores[layer], f"index scores {layer}")
            for row, positions in enumerate(served.positions[layer]):
                bound = np.full(row + 1, noise.scores[layer])
                assert_selects_best(
                    positions, trace.scores[row, : row + 1], bound, row + 1, f"layer {layer} row {row}"
                )
        _close(served.attn_heads[layer], trace.attn_heads, noise.attn_heads[layer], f"attention {layer}")
        _close(served.attn_out[layer], trace.attn_out, noise.attn_out[layer], f"attention output {layer}")
        if trace.experts is not None:
            chosen, expected = np.sort(served.experts[layer]), np.sort(trace.experts)
            assert np.array_equal(chosen, expected), f"experts {layer}: rows {np.nonzero((chosen != expected).any(1))}"
        if given:
            check_rounding(served.numbers[layer], trace.unrounded, noise.unrounded[layer], cache_format, f"{layer}")
    _close(served.logits, exact.logits, noise.logits, "logits")
    error = float(np.abs(served.logits - exact.logits).max())
    return Agreement(error, noise.logits, *count_rows(exact, served.selections(), model.config["index_topk"]))


def _close(actual: np.ndarray, expected: np.ndarray, bound: float, what: str) -> None:
    assert_close(actual, expected, np.full(expected.shape, bound), what)


def float32_noise(model: ReferenceModel, token_ids: Any, run: Run, exact: Trace) -> Noise:
    """Bounds of what float32 moves in a run."""
    draws = [model.forward(token_ids, replace(run, arithmetic=Float32Noise(seed))) for seed in range(DRAWS)]

    def bound(read: Any) -> float:
        return SAFETY * max(float(np.nanmax(np.abs(read(draw) - read(exact)))) for draw in draws)

    def by_layer(read: Any) -> dict[int, Any]:
        return {layer: bound(lambda t, at=layer: read(t.layers[at])) for layer in exact.layers}

    selecting = [layer for layer, trace in exact.layers.items() if trace.scores is not None]
    return Noise(
        logits=bound(lambda t: t.logits),
        scores={layer: bound(lambda t, at=layer: t.layers[at].scores) for layer in selecting},
        attn_heads=by_layer(lambda t: t.attn_heads),
        attn_out=by_layer(lambda t: t.attn_out),
        unrounded={layer: _unrounded_noise(layer, exact, draws) for layer in exact.layers},
    )


def _unrounded_noise(layer: int, exact: Trace, draws: list[Trace]) -> Unrounded:
    """A bound per token, [T, 1] or [T, 1, 1]: it decides how many roundings are open, and tokens differ much."""
    found = []
    for place, values in enumerate(exact.layers[layer].unrounded):
        moved = None if values is None else [np.abs(draw.layers[layer].unrounded[place] - values) for draw in draws]
        axes = tuple(range(1, np.ndim(values)))
        found.append(None if moved is None else SAFETY * np.max(moved, axis=0).max(axes, keepdims=True))
    return Unrounded(*found)


def count_rows(exact: Trace, selections: dict[int, np.ndarray], topk: int) -> tuple[int, int]:
    """(rows with the same set, rows) over all layers that select and rows that see at least topk keys."""
    same = [
        (trace.own_selection[topk - 1 :] == selections[layer][topk - 1 :]).all(1)
        for layer, trace in exact.layers.items()
        if trace.own_selection is not None
    ]
    return int(np.sum(same)), int(np.size(same))


def check_rounding(numbers: Numbers, unrounded: Unrounded, noise: Unrounded, cache_format: str, what: str) -> None:
    """Statement 2 for one layer."""
    low, high = (formats.bfloat16(unrounded.rope + sign * noise.rope) for sign in (-1, 1))
    _between(numbers.rope, low, high, f"cached rope {what}")
    if cache_format == "bfloat16":
        low, high = (formats.bfloat16(unrounded.latent + sign * noise.latent) for sign in (-1, 1))
        _between(numbers.latent, low, high, f"cached latent {what}")
    else:
        _check_latent_groups(numbers.latent, unrounded.latent, noise.latent, what)
    if unrounded.index_key is not None:
        _check_scaled(numbers.index_key, unrounded.index_key, noise.index_key, cache_format, f"index keys {what}")
        _check_scaled(numbers.index_query, unrounded.index_query, noise.index_query, cache_format, f"queries {what}")


def _check_scaled(actual: Scaled, x: np.ndarray, noise: np.ndarray, cache_format: str, what: str) -> None:
    low, high = (formats.bfloat16(x + sign * noise) for sign in (-1, 1))
    if cache_format == "bfloat16":
        assert (actual.scale == 1).all()
        _between(actual.numbers, low, high, what)
        return
    amax, scale = np.abs(x).max(-1, keepdims=True), actual.scale[..., None]
    least, most = (formats.index_scale(formats.bfloat16(amax + sign * noise)) for sign in (-1, 1))
    _between(scale, least, most, f"{what}, scales")
    _between(actual.numbers, formats.e4m3(low / scale), formats.e4m3(high / scale), what)


def _check_latent_groups(actual: np.ndarray, x: np.ndarray, noise: np.ndarray, what: str) -> None:
    """The scale of a group is not told by its numbers, but noise leaves at most two open."""
    for group, (got, values) in enumerate(zip(*map(formats.latent_groups, (actual, x)), strict=True)):
        amax = np.abs(values).max(-1, keepdims=True)
        low, high = (formats.bfloat16(values + sign * noise) for sign in (-1, 1))
        scales = [formats.latent_scale(formats.bfloat16(amax + sign * noise)) for sign in (-1, 1)]
        ends = [(formats.e4m3(low / scale) * scale, formats.e4m3(high / scale) * scale) for scale in scales]
        fits_least = ((ends[0][0] <= got) & (got <= ends[0][1])).all(-1, keepdims=True)
        lower, upper = (np.where(fits_least, ends[0][side], ends[1][side]) for side in (0, 1))
        _between(got, lower, upper, f"cached latent {what}, group {group}")


def _between(actual: np.ndarray, low: np.ndarray, high: np.ndarray, what: str) -> None:
    wrong = ~((low <= actual) & (actual <= high))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.size} are not the rounded number, first at {at}: "
            f"got {actual[at]!r}, expected {low[at]!r} to {high[at]!r}"
        )
    open_share = float(np.mean(low != high))
    assert open_share <= LARGEST_OPEN_SHARE, f"{what}: noise leaves {open_share:.0%} of the numbers open"
