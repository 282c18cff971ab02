"""The plain-English text of corpus/, cut into the pieces that documents and recall prompts are made of."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CORPUS_FOLDER = Path(__file__).parent / "corpus"
QUESTIONS_FILE = "questions.txt"
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")


@dataclass(frozen=True)
class Corpus:
    """Text written for this model.

    passages: whole files of prose and dialogue.
    sentences: the same text cut after sentence ends; each keeps the white space that followed it.
    questions: (question, answer) pairs.
    """

    passages: tuple[str, ...]
    sentences: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]

    def filler(self, rng: random.Random) -> Iterator[str]:
        """Sentences in reading order from a random start, around the corpus without end."""
        start = rng.randrange(len(self.sentences))
        while True:
            yield from self.sentences[start:]
            start = 0


def load_corpus(folder: Path = CORPUS_FOLDER) -> Corpus:
    """Reads every .txt file of the folder."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
    passages = tuple(text for name, text in texts.items() if name != QUESTIONS_FILE)
    sentences = tuple(sentence for passage in passages for sentence in _sentences(passage))
    return Corpus(passages, sentences, tuple(_question_pairs(texts[QUESTIONS_FILE])))


def _sentences(passage: str) -> Iterator[str]:
    start = 0
    for gap in _SENTENCE_END.finditer(passage):
        yield passage[start : gap.end()]
        start = gap.end()
    if start < len(passage):
        yield passage[start:]


def _question_pairs(text: str) -> Iterator[tuple[str, str]]:
    for entry in text.strip().split("\n\n"):
        question, answer = entry.split("\n")
        yield question.removeprefix("Q: "), answer.removeprefix("A: ")
