"""Figures of the demo model in PyTorch: recall, loss on corpus text, acceptance of MTP drafts."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from demo_model.corpus_text import Corpus
from demo_model.model import DemoModel, Pass, Reading
from demo_model.recall import ALL_RELATIONS, RecallPrompt, draw_facts
from demo_model.vocabulary import EOS_ID, PAD_ID, encode_prompt

NUM_DEPTHS = 10


@dataclass(frozen=True)
class RecallScore:
    """Share of exactly answered prompts of one length; by_depth: the same by tenth of the prompt, None: no prompt."""

    num_tokens: int
    correct: float
    by_depth: tuple[float | None, ...]
    misses: tuple[RecallPrompt, ...]


@torch.no_grad()
def recall(
    model: DemoModel, prompts: Sequence[RecallPrompt], num_tokens: int, reading: Reading = Reading.SELECTED
) -> RecallScore:
    """Counts prompts whose whole reply and eos are the first choice byte by byte: greedy decoding writes just that."""
    outcomes: dict[int, list[bool]] = defaultdict(list)
    misses = []
    for begin in range(0, len(prompts), 32):
        chunk = prompts[begin : begin + 32]
        for prompt, is_right in zip(chunk, _are_answered(model, chunk, reading), strict=True):
            outcomes[min(int(prompt.depth * NUM_DEPTHS), NUM_DEPTHS - 1)].append(is_right)
            if not is_right:
                misses.append(prompt)
    by_depth = tuple(
        sum(outcomes[depth]) / len(outcomes[depth]) if outcomes[depth] else None for depth in range(NUM_DEPTHS)
    )
    return RecallScore(num_tokens, 1 - len(misses) / len(prompts), by_depth, tuple(misses))


def _are_answered(model: DemoModel, prompts: Sequence[RecallPrompt], reading: Reading) -> list[bool]:
    questions = [encode_prompt(prompt.text) for prompt in prompts]
    answers = [[*prompt.reply.encode(), EOS_ID] for prompt in prompts]
    ids = _padded([question + answer for question, answer in zip(questions, answers, strict=True)], model)
    hidden, _ = model(ids, model.pass_over(ids, reading))
    choices = model.lm_head(hidden).argmax(-1).tolist()
    return [
        row[len(question) - 1 : len(question) - 1 + len(answer)] == answer
        for row, question, answer in zip(choices, questions, answers, strict=True)
    ]


def _padded(rows: Sequence[Sequence[int]], model: DemoModel) -> Tensor:
    width = max(map(len, rows))
    padded = [[*row, *[PAD_ID] * (width - len(row))] for row in rows]
    return torch.tensor(padded, device=model.lm_head.weight.device)


@torch.no_grad()
def corpus_loss(model: DemoModel, corpus: Corpus, num_tokens: int = 1024) -> float:
    """Nats per byte on the corpus itself, which is training text: how well it is remembered, no more."""
    rows = [encode_prompt(passage)[:num_tokens] for passage in corpus.passages]
    ids = _padded(rows, model)
    hidden, _ = model(ids, model.pass_over(ids, Reading.SELECTED))
    logits = model.lm_head(hidden)[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD_ID).item()


@torch.no_grad()
def generate(model: DemoModel, prompts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Greedy continuation of prompts by full recomputation; ids after the prompt, eos included."""
    rows = [encode_prompt(prompt) for prompt in prompts]
    lengths = [len(row) for row in rows]
    is_done = [False] * len(rows)
    for _ in range(max_tokens):
        ids = _padded(rows, model)
        hidden, _ = model(ids, model.pass_over(ids, Reading.SELECTED))
        last = hidden[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
        for index, token in enumerate(model.lm_head(last).argmax(-1).tolist()):
            if not is_done[index]:
                rows[index].append(token)
                is_done[index] = token == EOS_ID
        if all(is_done):
            break
    return [row[length:] for row, length in zip(rows, lengths, strict=True)]


@dataclass(frozen=True)
class Acceptance:
    """by_draft: share of rounds that reach and accept draft j. tokens_per_round: for 1, 2, .. drafts."""

    by_draft: tuple[float, ...]
    tokens_per_round: tuple[float, ...]


@torch.no_grad()
def acceptance(model: DemoModel, prompts: Sequence[str], max_tokens: int, drafts: int = 3) -> Acceptance:
    """Greedy speculative decoding replayed on greedy text: a draft counts if it is the token the target wrote."""
    continuations = generate(model, prompts, max_tokens)
    texts = [encode_prompt(prompt) + ids for prompt, ids in zip(prompts, continuations, strict=True)]
    ids = _padded(texts, model)
    step = model.pass_over(ids, Reading.SELECTED)
    choices = _draft_choices(model, ids, step, drafts)
    per_round = tuple(
        _tokens_per_round(choices[:limit], texts, [len(encode_prompt(prompt)) for prompt in prompts])
        for limit in range(1, drafts + 1)
    )
    gains = tuple(now - before for now, before in zip(per_round, (1.0, *per_round), strict=False))
    return Acceptance(gains, per_round)


def _draft_choices(model: DemoModel, ids: Tensor, step: Pass, drafts: int) -> list[list[list[int]]]:
    """[iteration][row of ids][position p] -> drafted token p + 2."""
    hidden, _ = model(ids, step)
    next_ids = functional.pad(ids[:, 1:], (0, 1), value=PAD_ID)
    return [model.lm_head(output.hidden).argmax(-1).tolist() for output in model.draft(hidden, next_ids, step, drafts)]


def _tokens_per_round(choices: list[list[list[int]]], texts: list[list[int]], prompt_lengths: list[int]) -> float:
    """Walks every text from its first generated token, taking as many right drafts per round as there are."""
    rounds = tokens = 0
    for row, (text, begin) in enumerate(zip(texts, prompt_lengths, strict=True)):
        position = begin  # of the pending token
        while position + len(choices) < len(text):
            accepted = 0
            while accepted < len(choices):
                if choices[accepted][row][position - 1 + accepted] != text[position + 1 + accepted]:
                    break
                accepted += 1
            rounds += 1
            tokens += 1 + accepted
            position += 1 + accepted
    return tokens / max(rounds, 1)


def acceptance_prompts(corpus: Corpus, count: int, seed: int) -> list[str]:
    """A third each: beginnings of corpus sentences, corpus questions, running text that asks for a held-out fact."""
    rng = random.Random(f"acceptance/{seed}")
    prompts = []
    for index in range(count):
        if index % 3 == 0:
            filler = corpus.filler(rng)
            prompts.append((next(filler) + next(filler)).rstrip())
        elif index % 3 == 1:
            prompts.append(f"Q: {rng.choice(corpus.questions)[0]}\nA:")
        else:
            filler = corpus.filler(rng)
            fact = draw_facts(rng, 1, ALL_RELATIONS, held_out=True)[0]
            before = "".join(next(filler) for _ in range(4))
            after = "".join(next(filler) for _ in range(4)).rstrip()
            prompts.append(f"{before}{fact.statement} {after} {fact.question}")
    return prompts
