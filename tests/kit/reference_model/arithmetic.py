"""Float64 arithmetic, exact or with the rounding noise that float32 would have at the same place."""

from __future__ import annotations

import numpy as np

FLOAT32_UNIT_ROUNDOFF = 2.0**-24


class ExactArithmetic:
    """Float64 results as they are: its own rounding (2^-53) is out of sight of every comparison here."""

    def dot(self, x, w):
        """Sum over the last axis of both: x [..., n], w [m, n] or broadcastable stacks of such; [..., m]."""
        return _dot(x, w)

    def rounded(self, values, roundings=1):
        """A value that float32 would have rounded that many times."""
        del roundings
        return values

    def cancelled(self, values, magnitude, roundings=1):
        """A sum whose terms have this magnitude, which may exceed the sum's own."""
        del magnitude, roundings
        return values


class Float32Noise(ExactArithmetic):
    """Adds to every result a random error as large as float32 may make it there.

    A float32 sum of n products is off by at most n * u * sum |x_i w_i|, by about sqrt(n) * u * sum |x_i w_i| with high
    probability, and by c * u * sum |x_i w_i| with a small c that does not grow with n if the terms have no common sign
    (Higham and Mary, "Sharper probabilistic backward error analysis for basic linear algebra kernels with random
    data", 2020). All matrices here are of the last kind: one rounding per product and one that stands for the sum,
    c = 2. The factor covers any order of summation: a plain loop over zero-mean terms has a standard deviation of half
    of u * sum |x_i w_i|, SIMD lanes and blocks less. Every result gets an independent error, uniform within the bound.

    Running the model with several seeds shows how far float32 may move its outputs, first through the arithmetic and
    then through everything discontinuous behind it: where a cached number lies next to a rounding boundary of the
    cache's format, some draws round it the other way.
    """

    def __init__(self, seed):
        self._random = np.random.default_rng(seed)

    def dot(self, x, w):
        exact = super().dot(x, w)
        return self.cancelled(exact, _dot(np.abs(x), np.abs(w)), 2)

    def rounded(self, values, roundings=1):
        return self.cancelled(values, np.abs(values), roundings)

    def cancelled(self, values, magnitude, roundings=1):
        amplitude = FLOAT32_UNIT_ROUNDOFF * roundings * magnitude
        return values + amplitude * self._random.uniform(-1.0, 1.0, np.shape(values))


def _dot(x, w):
    if w.ndim > 2:
        return x @ np.swapaxes(w, -1, -2)
    return (x.reshape(-1, x.shape[-1]) @ w.T).reshape(*x.shape[:-1], len(w))  # one large product, not many small ones
