"""The arrow of docs/architecture.md: who may import whom, and which words the cache manager may not know."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL_WORDS = {"mla", "dsa", "indexer", "latent", "rope", "lora"}
RULES = [
    # folder, what it may not import
    ("cache_manager", re.compile(r"fastdeploy_dsa|paddle")),
    ("fastdeploy_dsa/ops", re.compile(r"cache_manager|fastdeploy_dsa\.(?!ops)\w+")),
    ("fastdeploy_dsa", re.compile(r"fastdeploy_dsa\.(cli|integrations)")),
    ("fastdeploy_dsa", re.compile(r"(tests|scripts|torch|paddlenlp)\b")),
    ("fastdeploy_dsa/engine", re.compile(r"fastdeploy_dsa\.server")),
]
# What a file, or the files of a folder, may import nevertheless.
EXEMPT = {
    "fastdeploy_dsa/integrations/": re.compile(r"fastdeploy_dsa\.integrations"),  # their own parts
    "fastdeploy_dsa/engine/tokenizer.py": re.compile(r"paddlenlp"),
    "fastdeploy_dsa/__main__.py": re.compile(r".*cli"),
}


def imported_modules(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def identifiers(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "arg", "name", "asname"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value


def model_words(source: str) -> list[str]:
    """Identifiers that contain a model word, in snake_case or CamelCase."""
    words_of = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
    return [name for name in identifiers(source) if MODEL_WORDS & {word.lower() for word in words_of.findall(name)}]


def violations(folder: str, forbidden: re.Pattern[str], root: Path) -> list[str]:
    found = []
    for path in sorted((root / folder).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        for module in imported_modules(path.read_text(encoding="utf-8")):
            exempt = next((allowed for place, allowed in EXEMPT.items() if name.startswith(place)), None)
            if forbidden.match(module) and not (exempt and exempt.match(module)):
                found.append(f"{name} imports {module}")
    return found


@pytest.mark.parametrize(("folder", "forbidden"), RULES, ids=lambda value: getattr(value, "pattern", value))
def test_modules_import_only_what_the_arrow_allows(folder: str, forbidden: re.Pattern[str]) -> None:
    assert violations(folder, forbidden, ROOT) == []


@pytest.mark.parametrize(
    ("folder", "planted", "forbidden"),
    [
        ("cache_manager", "from fastdeploy_dsa import ops", RULES[0][1]),
        ("fastdeploy_dsa/ops", "import cache_manager.spec", RULES[1][1]),
        ("fastdeploy_dsa/ops", "from fastdeploy_dsa.config import ModelConfig", RULES[1][1]),
        ("fastdeploy_dsa/engine", "import fastdeploy_dsa.cli", RULES[2][1]),
        ("fastdeploy_dsa/models", "from torch import nn", RULES[3][1]),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, folder: str, planted: str, forbidden: re.Pattern[str]) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "module.py").write_text(planted + "\n", encoding="utf-8")
    assert violations(folder, forbidden, tmp_path)


def test_the_cache_manager_has_no_model_word_in_an_identifier() -> None:
    for path in sorted((ROOT / "cache_manager").rglob("*.py")):
        assert model_words(path.read_text(encoding="utf-8")) == [], path.name


def test_planted_model_words_are_found() -> None:
    planted = "class MLACache:\n    def size(self, kv_lora_rank):\n        return indexer.x + self.DsaKind"
    assert set(model_words(planted)) == {"MLACache", "kv_lora_rank", "indexer", "DsaKind"}
    assert model_words("class Property:\n    @property\n    def slots(self): return self.related") == []
