"""Training documents: token ids with a loss weight each, a pure function of (seed, index)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from demo_model.corpus_text import Corpus
from demo_model.recall import Fact, Relation, draw_facts
from demo_model.vocabulary import BOS_ID, EOS_ID

# What cannot be predicted gets little weight, what must be looked up gets much.
_WEIGHT_TEXT, _WEIGHT_FACT, _WEIGHT_QUESTION, _WEIGHT_ANSWER, _WEIGHT_REPEAT = 1.0, 0.4, 0.4, 4.0, 1.0
_WEIGHT_SHUFFLED = 0.1
_QUESTION_BYTES = 52  # typical question and answer, to decide how many fit


@dataclass
class Document:
    """Grows until `num_tokens` are there; begins with bos."""

    num_tokens: int
    relations: tuple[Relation, ...]
    ids: list[int] = field(default_factory=lambda: [BOS_ID])
    weights: list[float] = field(default_factory=lambda: [0.0])

    @property
    def is_full(self) -> bool:
        return len(self.ids) >= self.num_tokens

    def write(self, text: str, weight: float) -> None:
        data = text.encode()
        self.ids.extend(data)
        self.weights.extend([weight] * len(data))

    def end_turn(self, weight: float) -> None:
        self.ids.append(EOS_ID)
        self.weights.append(weight)

    def ask(self, fact: Fact, rng: random.Random) -> None:
        """Question and answer, either as Q: and A: lines or as running text that repeats the fact."""
        question = rng.choice(fact.questions)
        if rng.random() < 0.7:
            self.write(f"\nQ: {question}\nA:", _WEIGHT_QUESTION)
            self.write(f" {fact.answer}", _WEIGHT_ANSWER)
        else:
            self.write(rng.choice((" ", "\n")) + question, _WEIGHT_QUESTION)
            self.write(f" {fact.statement}", _WEIGHT_ANSWER)
        self.end_turn(_WEIGHT_ANSWER)


def compose(
    seed: int, index: int, corpus: Corpus, relations: tuple[Relation, ...], num_tokens: int
) -> tuple[list[int], list[float]]:
    """Document `index` of stream `seed`: exactly `num_tokens` ids and the loss weight of predicting each."""
    rng = random.Random(f"{seed}/{index}")
    document = Document(num_tokens, relations)
    while not document.is_full:
        if len(document.ids) > 1:
            document.write("\n\n", _WEIGHT_TEXT)
        write = rng.choices(_KINDS, _KIND_SHARES)[0]
        write(document, rng, corpus)
    return document.ids[:num_tokens], document.weights[:num_tokens]


def _write_facts_then_questions(document: Document, rng: random.Random, corpus: Corpus) -> None:
    """The shape of an evaluation prompt, with more than one question so that the loss is dense."""
    room = document.num_tokens - len(document.ids)
    num_questions = rng.randint(1, max(1, min(10, room // (3 * _QUESTION_BYTES))))
    body = max(room - num_questions * _QUESTION_BYTES - rng.randrange(40), 60)
    num_facts = rng.randint(1, max(1, body // rng.choice((60, 120, 200, 300))))
    facts = draw_facts(rng, num_facts, document.relations, held_out=False)
    filler = _filler(rng, corpus)
    filler_bytes = max(body - sum(len(fact.statement) + 1 for fact in facts), 0)
    pieces: list[tuple[str, float]] = []
    while filler_bytes > 0:
        pieces.append(next(filler))
        filler_bytes -= len(pieces[-1][0])
    for fact in facts:
        pieces.insert(rng.randint(0, len(pieces)), (fact.statement + " ", _WEIGHT_FACT))
    pieces[-1] = (pieces[-1][0].rstrip(), pieces[-1][1])
    for text, weight in pieces:
        document.write(text, weight)
    for fact in _asked(facts, num_questions, rng):
        document.ask(fact, rng)


def _filler(rng: random.Random, corpus: Corpus) -> Iterator[tuple[str, float]]:
    """Sentences between facts with their weight; at times with shuffled words, so that recall stands any text."""
    is_shuffled = rng.random() < 0.25
    for sentence in corpus.filler(rng):
        if is_shuffled:
            words = sentence.split()
            rng.shuffle(words)
            yield " ".join(words) + " ", _WEIGHT_SHUFFLED
        else:
            yield sentence, _WEIGHT_TEXT


def _asked(facts: list[Fact], count: int, rng: random.Random) -> Iterator[Fact]:
    yield from rng.sample(facts, min(count, len(facts)))


def _write_facts_among_questions(document: Document, rng: random.Random, corpus: Corpus) -> None:
    """Facts, filler and questions about any earlier fact in random order."""
    end = document.num_tokens - rng.randrange(document.num_tokens)
    unused = draw_facts(rng, max(2, document.num_tokens // 60), document.relations, held_out=False)
    told: list[Fact] = []
    filler = _filler(rng, corpus)
    filler_share = rng.random() * 0.5
    while len(document.ids) < end:
        draw = rng.random()
        if draw < filler_share:
            document.write(*next(filler))
        elif unused and (not told or draw < filler_share + 0.25):
            told.append(unused.pop())
            document.write(told[-1].statement + " ", _WEIGHT_FACT)
        elif told:
            document.ask(rng.choice(told[-12:] if rng.random() < 0.5 else told), rng)
            document.write("\n", _WEIGHT_TEXT)


def _write_passage(document: Document, rng: random.Random, corpus: Corpus) -> None:
    filler = corpus.filler(rng)
    for _ in range(rng.randint(2, 12)):
        document.write(next(filler), _WEIGHT_TEXT)
    document.end_turn(0.1)


def _write_corpus_questions(document: Document, rng: random.Random, corpus: Corpus) -> None:
    for number in range(rng.randint(1, 4)):
        question, answer = rng.choice(corpus.questions)
        document.write(("\n" if number else "") + f"Q: {question}\nA:", _WEIGHT_QUESTION)
        document.write(f" {answer}", _WEIGHT_TEXT)
        document.end_turn(_WEIGHT_TEXT)


def _write_repeats(document: Document, rng: random.Random, corpus: Corpus) -> None:
    """Random words told twice or more: the plainest reason to look back."""
    del corpus
    alphabet = rng.choice(("abcdefghijklmnopqrstuvwxyz", "0123456789", "ABCDEFGHKLMNPRSTUVWXYZ0123456789"))
    words = ["".join(rng.choices(alphabet, k=rng.randint(2, 7))) for _ in range(rng.randint(3, 16))]
    document.write(" ".join(words), 0.1)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(words))
        document.write("\n" + words[start], 0.3)
        document.write("".join(f" {word}" for word in words[start + 1 :]), _WEIGHT_REPEAT)


_KINDS: tuple[Callable[[Document, random.Random, Corpus], None], ...] = (
    _write_facts_then_questions,
    _write_facts_among_questions,
    _write_passage,
    _write_corpus_questions,
    _write_repeats,
)
_KIND_SHARES = (0.45, 0.15, 0.12, 0.16, 0.12)
