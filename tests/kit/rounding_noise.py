"""How far the rounding of a cache may move logits: every cached number is off by up to half a step of the format."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.kit.reference_model import Numbers, ReferenceModel, Run, Unrounded, formats

DRAWS = 8
SAFETY = 2.0  # a run's own rounding is one draw more, of an error with thousands of independent causes


class _Dithered(ReferenceModel):
    """Latent rows carry a uniform random error of half a step of the format, in place of its rounding."""

    def __init__(self, model: ReferenceModel, seed: int) -> None:
        super().__init__(model.config, model.weights)
        self._random = np.random.default_rng(seed)

    def stored(self, unrounded: Unrounded, run: Run) -> Numbers:
        def dithered(values: Any, half_step: Any) -> Any:
            return values + half_step * self._random.uniform(-1.0, 1.0, values.shape)

        exact = super().stored(unrounded, Run())
        latent = dithered(exact.latent, half_step_of_bfloat16(exact.latent))
        if run.cache_format == "fp8":
            groups = formats.latent_groups(latent)
            latent = np.concatenate([dithered(group, half_step_of_fp8(group)) for group in groups], axis=-1)
        return exact._replace(latent=latent, rope=dithered(exact.rope, half_step_of_bfloat16(exact.rope)))


def half_step_of_bfloat16(x: np.ndarray) -> np.ndarray:
    """8 significant bits."""
    return np.ldexp(1.0, np.frexp(x)[1] - 9)


def half_step_of_fp8(group: np.ndarray) -> np.ndarray:
    """4 significant bits of the scaled number; no finer than 2^-9 times the scale."""
    scale = formats.latent_scale(np.abs(group).max(-1, keepdims=True))
    exponent = np.maximum(np.frexp(group / scale)[1] - 1, -6)
    return np.ldexp(scale, exponent - 4)


def logit_bound(model: ReferenceModel, token_ids: Any, selections: dict[int, np.ndarray], cache_format: str) -> float:
    """Largest logit deviation over the draws, times SAFETY.

    Selections are the given ones and experts those of the exact run: another choice moves logits by as much as a
    mistake does, and no bound holds for it.
    """
    exact = model.forward(token_ids, Run(selections=selections))
    experts = {layer: trace.experts for layer, trace in exact.layers.items() if trace.experts is not None}
    moved = []
    for seed in range(DRAWS):
        logits = _Dithered(model, seed).forward(token_ids, Run(cache_format, selections, experts)).logits
        moved.append(float(np.abs(logits - exact.logits).max()))
    return SAFETY * max(moved)
