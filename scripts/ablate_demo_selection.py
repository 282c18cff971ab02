"""Shows that the demo model lives on its indexers: recall with other selections of the same size, in PyTorch.

python scripts/ablate_demo_selection.py --length 512 --prompts 24

A schedule such as FFSFFFFF is the model with one layer that takes over the selection of the layer before it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from demo_model import attention
from demo_model.checkpoint import load_model
from demo_model.corpus_text import load_corpus
from demo_model.evaluate import recall
from demo_model.recall import recall_prompts
from torch import Tensor

_SHIPPED_MODEL = Path(__file__).parents[1] / "fastdeploy_dsa" / "demo_model"

Selection = Callable[[Tensor, int], Tensor]
_by_indexer = attention.selected_mask


def _newest(scores: Tensor, topk: int) -> Tensor:
    tokens = torch.arange(scores.shape[-1])
    age = tokens.unsqueeze(1) - tokens
    return ((age >= 0) & (age < topk)).expand_as(scores)


def _random(scores: Tensor, topk: int) -> Tensor:
    return _by_indexer(torch.rand_like(scores), topk)


class Shared:
    """The layers marked S take the selection of the layer before them, the layers marked F select."""

    def __init__(self, schedule: str):
        self.schedule = schedule
        self.calls = 0
        self.selected: Tensor | None = None

    def __call__(self, scores: Tensor, topk: int) -> Tensor:
        is_full = self.schedule[self.calls % len(self.schedule)] == "F"
        self.calls += 1
        if is_full or self.selected is None:
            self.selected = _by_indexer(scores, topk)
        return self.selected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    model = load_model(_SHIPPED_MODEL)
    prompts = recall_prompts(load_corpus(), options.length, options.prompts, options.seed)
    num_layers = model.config.num_hidden_layers
    selections: dict[str, Selection] = {"by the indexers": _by_indexer, "newest": _newest, "random": _random}
    for layer in range(1, num_layers):
        schedule = "F" * layer + "S" + "F" * (num_layers - layer - 1)
        selections[schedule] = Shared(schedule)
    print(f"| selection of {model.config.index_topk} | recall |\n| --- | --- |")
    for name, selection in selections.items():
        with patch.object(attention, "selected_mask", selection):
            score = recall(model, prompts, options.length)
        print(f"| {name} | {score.correct:.1%} |", flush=True)


if __name__ == "__main__":
    main()
