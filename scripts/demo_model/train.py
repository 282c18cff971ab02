"""Training of the demo model: dense, then teaching the indexer, then reading only what the indexer selects."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from demo_model.corpus_text import Corpus, load_corpus
from demo_model.documents import compose
from demo_model.model import DemoModel, LayerOutput, Reading
from demo_model.recall import ALL_RELATIONS, BASIC_RELATIONS, Relation

_IGNORED = 0.0
_DRAFT_LOSS_SHARES = (0.3, 0.2, 0.1)  # of the target's loss, by draft iteration
_BALANCE_RATE = 1e-3  # change of a router's correction bias per step


@dataclass(frozen=True)
class Stage:
    """One part of the training.

    num_tokens: length of every document. quantised_share: share of documents that see 8-bit caches.
    relations: kinds of facts in the documents.
    is_compiled: whether torch.compile earns more than the one to two minutes that it takes.
    """

    name: str
    reading: Reading
    num_tokens: int
    batch: int
    steps: int
    draft_iterations: int
    quantised_share: float = 0.0
    is_compiled: bool = False
    relations: tuple[Relation, ...] = BASIC_RELATIONS


@dataclass(frozen=True)
class Recipe:
    """One run of the training: its stages and everything else that decides the result."""

    stages: tuple[Stage, ...]
    learning_rate: float
    decay_begins: float  # share of all steps
    seed: int = 20250929
    final_share: float = 0.03  # of learning_rate, at the last step
    warmup_steps: int = 100
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def rate_at(self, step: int) -> float:
        """Learning rate: warm-up, plateau, linear decay."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        decayed = max(0.0, step / self.total_steps - self.decay_begins) / (1 - self.decay_begins)
        return self.learning_rate * (1 - (1 - self.final_share) * decayed)


# Lengths are those of the recall prompts plus room for question and answer.
FROM_SCRATCH = Recipe(
    stages=(
        Stage("dense 320", Reading.ALL, 320, 256, 1000, 1),
        Stage("dense 1088", Reading.ALL, 1088, 64, 400, 1),
        Stage("teach 1088", Reading.ALL_TEACHING, 1088, 32, 250, 2),
        Stage("selected 1088", Reading.SELECTED, 1088, 32, 1500, 3, 0.5, is_compiled=True),
        Stage("selected 2112", Reading.SELECTED, 2112, 12, 150, 3, 0.5),
    ),
    learning_rate=2e-3,
    decay_begins=0.5,
)
# Goes on with every kind of fact and more ways to ask.
REFINING = Recipe(
    stages=(
        Stage("refine 1088", Reading.SELECTED, 1088, 32, 2400, 3, 0.5, is_compiled=True, relations=ALL_RELATIONS),
        Stage("refine 2112", Reading.SELECTED, 2112, 12, 150, 3, 0.5, relations=ALL_RELATIONS),
    ),
    learning_rate=1.2e-3,
    decay_begins=0.25,
    seed=FROM_SCRATCH.seed + 1000,
)


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batch i of a stage: ids [B, T + 2] int16 and loss weights [B, T + 2] float16, a function of the seed and i."""

    def __init__(self, corpus: Corpus, stage: Stage, seed: int):
        self.corpus, self.stage, self.seed = corpus, stage, seed

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        first = index * self.stage.batch
        documents = [
            compose(self.seed, first + row, self.corpus, self.stage.relations, self.stage.num_tokens + 2)
            for row in range(self.stage.batch)
        ]
        ids = np.asarray([ids for ids, _ in documents], np.int16)
        weights = np.asarray([weights for _, weights in documents], np.float16)
        return torch.from_numpy(ids), torch.from_numpy(weights)


@dataclass
class Losses:
    """Scalars of one step; `total` is what is minimised."""

    target: Tensor
    drafts: list[Tensor]
    divergence: Tensor

    @property
    def total(self) -> Tensor:
        drafts = sum(share * loss for share, loss in zip(_DRAFT_LOSS_SHARES, self.drafts, strict=False))
        return self.target + drafts + self.divergence


def compute_losses(model: DemoModel, ids: Tensor, weights: Tensor, stage: Stage) -> tuple[Losses, list[LayerOutput]]:
    """ids, weights: [B, T + 2]."""
    inputs = ids[:, :-2]
    step = model.pass_over(inputs, stage.reading, stage.quantised_share)
    hidden, outputs = model(inputs, step)
    drafts = model.draft(hidden, ids[:, 1:-1], step, stage.draft_iterations)
    draft_losses = []
    for iteration, output in enumerate(drafts):
        row_weights = weights[:, 2:].clone()
        row_weights[:, :iteration] = _IGNORED
        draft_losses.append(_token_loss(model, output.hidden, ids[:, 2:], row_weights))
    target = _token_loss(model, hidden, ids[:, 1:-1], weights[:, 1:-1])
    divergence = torch.stack([output.divergence for output in (*outputs, *drafts)]).sum()
    return Losses(target, draft_losses, divergence), [*outputs, drafts[0]]


def _token_loss(model: DemoModel, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits = model.lm_head(hidden).float().flatten(0, 1)
    losses = functional.cross_entropy(logits, targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def balance_experts(model: DemoModel, outputs: list[LayerOutput]) -> None:
    """Moves each router's correction bias against the load that its experts had."""
    for layer, output in zip(model.layers, outputs, strict=True):
        if output.load.numel() > 1:
            layer.mlp.correction_bias += _BALANCE_RATE * torch.sign(output.load.mean() - output.load)


class Trainer:
    """Runs a recipe's stages on one device and logs a line every `log_every` steps."""

    def __init__(self, model: DemoModel, recipe: Recipe, workers: int, log_every: int = 100):
        self.model, self.recipe = model, recipe
        self.workers, self.log_every = workers, log_every
        self.corpus = load_corpus()
        self.device = next(model.parameters()).device
        named = list(model.named_parameters())
        self.indexer_parameters = [value for name, value in named if ".indexer." in name]
        self.other_parameters = [value for name, value in named if ".indexer." not in name]
        matrices = [value for name, value in named if value.ndim == 2 and "embed_tokens" not in name]
        vectors = [value for name, value in named if value.ndim != 2 or "embed_tokens" in name]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            betas=recipe.betas,
            fused=self.device.type == "cuda",
        )
        self.step = 0
        self.history: list[dict[str, object]] = []

    def run_stage(self, number: int) -> None:
        """Trains stage `number` of the recipe; its documents depend on the seed and the number only."""
        stage = self.recipe.stages[number]
        started = time.perf_counter()
        with torch.compiler.set_stance("default" if stage.is_compiled else "force_eager"):
            for index, (ids, weights) in enumerate(self._batches(stage, number)):
                losses = self.run_step(ids, weights, stage)
                if index % self.log_every == 0 or index == stage.steps - 1:
                    self._log(stage, index, losses, time.perf_counter() - started)

    def run_step(self, ids: Tensor, weights: Tensor, stage: Stage) -> Losses:
        """One update; ids and weights as `Batches` yields them."""
        ids = ids.to(self.device, non_blocking=True).long()
        weights = weights.to(self.device, non_blocking=True).float()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        with torch.autocast(self.device.type, torch.bfloat16):
            losses, outputs = compute_losses(self.model, ids, weights, stage)
        losses.total.backward()
        # Clipped apart: the indexers' loss says nothing about the size of the model's gradient.
        torch.nn.utils.clip_grad_norm_(self.other_parameters, self.recipe.clip_norm)
        torch.nn.utils.clip_grad_norm_(self.indexer_parameters, self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        balance_experts(self.model, outputs)
        self.step += 1
        return losses

    def _batches(self, stage: Stage, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        batches = Batches(self.corpus, stage, self.recipe.seed + number)
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    def _log(self, stage: Stage, index: int, losses: Losses, seconds: float) -> None:
        line = {
            "stage": stage.name,
            "step": index,
            "target": round(losses.target.item(), 4),
            "drafts": [round(loss.item(), 4) for loss in losses.drafts],
            "divergence": round(losses.divergence.item(), 4),
            "tokens_per_second": round((index + 1) * stage.batch * stage.num_tokens / seconds),
            "seconds": round(seconds, 1),
        }
        self.history.append(line)
        print(json.dumps(line), flush=True)

    def save(self, path: Path) -> None:
        """Weights in float32, for going on later; the optimizer's state is not kept."""
        torch.save(self.model.state_dict(), path)
