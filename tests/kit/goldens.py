"""Golden cases: outputs of another implementation for tiny random checkpoints, read from a folder of fixtures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tests.kit.compare import assert_close
from tests.kit.reference_model import read_safetensors

CASES = ("v32_yarn", "glm5", "glm52_shared", "v32_odd_batch", "v32_mtp")
COMPRESSED_CASES = "v4_*"  # models with compressed entries: every folder of that form
SEEN_FACTOR = 20  # "20 times the tolerance is generous; every planted mistake is at least 100 times above it"

REPOSITORY = Path(__file__).resolve().parents[2]

_TOLERANCES = re.compile(r"logits (\S+), attention output (\S+), index scores ([\d.e+-]*\d)")
_ALL_MISTAKES = re.compile(r"^Planted mistakes,[^\n]*:\n(.*?)\.\n", re.DOTALL | re.MULTILINE)
_SCORE_MISTAKES = re.compile(r"^Cannot move logits [^\n]*:((?:.|\n)*?)\.\n", re.MULTILINE)


def default_golden_folder() -> Path | None:
    """A folder goldens near the repository, if there is one."""
    parent = REPOSITORY.parent
    return next((folder for folder in (parent / "goldens", parent / "shared" / "goldens") if folder.is_dir()), None)


@dataclass(frozen=True)
class Prompt:
    """One prompt of a case.

    Attributes:
        prompt_ids: [T] int64.
        decode_ids: [N + 1] int64, greedy; the last one is not fed.
        expected: Tensors of this prompt by name, without the prompt's prefix.
    """

    prompt_ids: np.ndarray
    decode_ids: np.ndarray
    expected: dict[str, np.ndarray]

    @property
    def fed_ids(self) -> np.ndarray:
        """[T + N] int64: everything the model sees."""
        return np.concatenate([self.prompt_ids, self.decode_ids[:-1]])

    @property
    def last(self) -> int:
        """The prompt's last position, whose intermediate results are stored."""
        return len(self.prompt_ids) - 1

    @property
    def stored(self) -> slice:
        """Rows of a [T + N, vocab] array for which logits are stored."""
        return slice(len(self.prompt_ids) - len(self.expected["logits_prompt"]), len(self.fed_ids))

    @property
    def logits(self) -> np.ndarray:
        """[K + N, vocab]: the last K prompt positions and the decode steps, all consecutive."""
        return np.concatenate([self.expected["logits_prompt"], self.expected["logits_decode"]])

    @property
    def draft_logits(self) -> np.ndarray:
        """[K + N, vocab], as logits, of the draft layer."""
        return np.concatenate([self.expected["mtp_logits_prompt"], self.expected["mtp_logits_decode"]])

    def assert_logits(self, logits: np.ndarray, bound: float) -> None:
        """Logits [T + N, vocab] agree where they are stored."""
        assert_close(logits[self.stored], self.logits, np.full(self.logits.shape, bound), "logits")

    def assert_index_scores(self, scores: dict[int, np.ndarray], bound: float) -> None:
        """Index scores [T + N, T + N] of some layers agree in the row of the prompt's last position."""
        stored = self.by_layer("index_scores")
        for layer, rows in scores.items():
            row = rows[self.last, : self.last + 1]
            assert_close(row, stored[layer], np.full(row.shape, bound), f"index scores of layer {layer}")

    def by_layer(self, name: str) -> dict[int, np.ndarray]:
        """Tensors called name.<layer>, by layer id."""
        prefix = f"{name}."
        return {int(k.removeprefix(prefix)): v for k, v in self.expected.items() if k.startswith(prefix)}


@dataclass(frozen=True)
class Tolerances:
    """What eager float32 was seen to differ by from float64, and what is allowed: SEEN_FACTOR times that."""

    logits: float
    attention: float
    index_scores: float

    @classmethod
    def parse(cls, case_text: str) -> Tolerances:
        """Read the line "Tolerances seen" of case.md."""
        found = _TOLERANCES.search(case_text)
        if found is None:
            raise ValueError("case.md: no line with the tolerances seen")
        return cls(*(SEEN_FACTOR * float(number) for number in found.groups()))

    @property
    def seen_logits(self) -> float:
        return self.logits / SEEN_FACTOR


@dataclass(frozen=True)
class GoldenCase:
    """A folder of the fixtures."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def text(self) -> str:
        return (self.folder / "case.md").read_text()

    @cached_property
    def tolerances(self) -> Tolerances:
        return Tolerances.parse(self.text)

    @cached_property
    def mistakes(self) -> dict[str, float]:
        """Planted mistakes and the largest logit difference each made."""
        return _named_sizes(_ALL_MISTAKES, self.text)

    @cached_property
    def score_mistakes(self) -> dict[str, float]:
        """Planted mistakes that move index scores only, and the largest difference each made there."""
        return _named_sizes(_SCORE_MISTAKES, self.text)

    @cached_property
    def softmax_scale(self) -> float:
        return float(self._expected["softmax_scale"][0])

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        count = sum(name.endswith(".prompt_ids") for name in self._expected)
        return tuple(self._prompt(f"p{index}.") for index in range(count))

    def assert_logits(self, logits: Sequence[np.ndarray], bound: float) -> None:
        """Logits of every prompt agree."""
        for prompt, rows in zip(self.prompts, logits, strict=True):
            prompt.assert_logits(rows, bound)

    @cached_property
    def _expected(self) -> dict[str, np.ndarray]:
        return read_safetensors(self.folder / "expected.safetensors")

    def _prompt(self, prefix: str) -> Prompt:
        own = {name.removeprefix(prefix): v for name, v in self._expected.items() if name.startswith(prefix)}
        return Prompt(own["prompt_ids"], own["decode_ids"], own)


def _named_sizes(pattern: re.Pattern[str], text: str) -> dict[str, float]:
    found = pattern.search(text)
    if found is None:
        raise ValueError("case.md: no list of planted mistakes")
    entries = [entry.strip() for entry in found[1].replace("\n", " ").split(";")]
    pairs = [entry.rsplit(" ", 1) for entry in entries if entry]
    return {name: float(size) for name, size in pairs}
