"""What every section is given: peers, our library, the timer, and pools that cases share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from scripts.gpu_benchmark import inputs
from scripts.gpu_benchmark.ours import Ours
from scripts.gpu_benchmark.peers import Peers
from scripts.gpu_benchmark.timing import Timer

Inputs = SimpleNamespace  # the tensors of one input set by name, and what the last contender left there


@dataclass
class Tools:
    """Of one section's process."""

    peers: Peers
    ours: Ours
    timer: Timer
    quick: bool
    _pools: dict[Callable[[int], Tensor], Tensor] = field(default_factory=dict)

    def pool(self, make: Callable[[int], Tensor], tokens: int) -> Tensor:
        """The pool that `make` made; one for all cases of the section."""
        if make not in self._pools:
            self._pools[make] = make(tokens)
        return self._pools[make]


def bfloat16(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def poisoned(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """An output that no kernel has written: NaN, or a number that is no id."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else -2, dtype=dtype)


def index_queries(*shape: int) -> Tensor:
    """[.., INDEX_HEADS, INDEX_DIM] e4m3."""
    return torch.randn(*shape, inputs.INDEX_HEADS, inputs.INDEX_DIM).to(inputs.FP8)
