"""Where a mistake goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.kit.compressed_serving import CompressedServing


@dataclass(frozen=True)
class Planting:
    """Where a mistake goes."""

    serving: CompressedServing
    patch: pytest.MonkeyPatch
    prompt_length: int

    @property
    def config(self) -> Any:
        return self.serving.model.config

    @property
    def length(self) -> int:
        return len(self.serving.sequences[0])

    @property
    def layers(self) -> list[Any]:
        return self.serving.model.layers

    def attentions(self, ratio: int) -> list[Any]:
        return [layer.attention for layer in self.layers if layer.attention._ratio == ratio]


Mistake = Callable[[Planting], None]


def magnitude(planting: Planting) -> float:
    """What YaRN makes of the scale of other models."""
    return 0.1 * float(np.log(planting.config.compress_rope.factor)) + 1.0
