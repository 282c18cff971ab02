"""Token ids for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def random_tokens(lengths: Sequence[int], vocab_size: int, seed: int) -> list[np.ndarray]:
    """One [length] int64 array per length, uniform over the vocabulary."""
    rng = np.random.default_rng(seed)
    return [rng.integers(vocab_size, size=length) for length in lengths]
