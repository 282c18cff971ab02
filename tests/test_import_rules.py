"""The arrow of docs/architecture.md: who may import whom, in no circle; words that the cache manager may not know."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL_WORDS = {"mla", "dsa", "indexer", "latent", "rope", "lora"}
PACKAGES = ("cache_manager", "fastdeploy_dsa")
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


def modules_of(root: Path) -> dict[str, Path]:
    """Files of the packages by the name they are imported by; a package's name is that of its `__init__`."""
    files = (path for package in PACKAGES for path in sorted((root / package).rglob("*.py")))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports_among(modules: dict[str, Path]) -> dict[str, set[str]]:
    """What every module imports of the others: at the top, for type checkers only, or inside a function.

    `from package import module` is an import of the module, not of what else the package holds; that a package is
    imported before its modules is not counted.
    """
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parts = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                imported.update(part if part in modules else node.module or "" for part in parts.values())
        graph[name] = imported & modules.keys()
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components that hold a circle, the modules of each in order of their names."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [*graph[start]]
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph[name]
        return seen

    reached = {name: reachable(name) for name in graph}
    components = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in graph
        if name in reached[name]
    }
    return [list(component) for component in sorted(components)]


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


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = imports_among(modules_of(ROOT))
    assert graph["fastdeploy_dsa.config"], "no imports are seen"
    assert circles(graph) == []


@pytest.mark.parametrize(
    ("base", "circle"),
    [
        ("from fastdeploy_dsa.reader import read", ["fastdeploy_dsa.base", "fastdeploy_dsa.reader"]),
        ("import fastdeploy_dsa.reader", ["fastdeploy_dsa.base", "fastdeploy_dsa.reader"]),
        ("from fastdeploy_dsa import reader", ["fastdeploy_dsa.base", "fastdeploy_dsa.reader"]),
        ("def f():\n    from fastdeploy_dsa.reader import read", ["fastdeploy_dsa.base", "fastdeploy_dsa.reader"]),
        (
            "if TYPE_CHECKING:\n    from fastdeploy_dsa.reader import R",
            ["fastdeploy_dsa.base", "fastdeploy_dsa.reader"],
        ),
        ("from fastdeploy_dsa import Reader", ["fastdeploy_dsa", "fastdeploy_dsa.base", "fastdeploy_dsa.reader"]),
        ("from fastdeploy_dsa import base", ["fastdeploy_dsa.base"]),
        ("from fastdeploy_dsa import other", None),
    ],
)
def test_a_planted_circle_is_found(tmp_path: Path, base: str, circle: list[str] | None) -> None:
    planted = {
        "__init__": "from fastdeploy_dsa.reader import Reader",
        "reader": "from fastdeploy_dsa.base import Base",
        "base": base,
        "other": "import json",
    }
    (tmp_path / "fastdeploy_dsa").mkdir()
    for name, source in planted.items():
        (tmp_path / "fastdeploy_dsa" / f"{name}.py").write_text(source + "\n", encoding="utf-8")
    assert circles(imports_among(modules_of(tmp_path))) == ([] if circle is None else [circle])


def test_the_cache_manager_has_no_model_word_in_an_identifier() -> None:
    for path in sorted((ROOT / "cache_manager").rglob("*.py")):
        assert model_words(path.read_text(encoding="utf-8")) == [], path.name


def test_planted_model_words_are_found() -> None:
    planted = "class MLACache:\n    def size(self, kv_lora_rank):\n        return indexer.x + self.DsaKind"
    assert set(model_words(planted)) == {"MLACache", "kv_lora_rank", "indexer", "DsaKind"}
    assert model_words("class Property:\n    @property\n    def slots(self): return self.related") == []
