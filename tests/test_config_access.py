"""Raw keys of a config.json are read in one place; everything else takes the frozen object."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdeploy_dsa.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "tests" / "configs"
# The reader, and the two resolvers it calls.
READERS = ("fastdeploy_dsa/config/", "fastdeploy_dsa/index_schedule.py", "fastdeploy_dsa/softmax_scale.py")
KEYS = {key for path in CONFIGS.glob("*.json") for key in json.loads(path.read_text())}
KEYS -= {"dtype"}  # tensors have one, too
KEYS |= {"rope_parameters", "factor", "mscale_all_dim", "rope_type", "weight_block_size", "layer_types", "text_config"}


def raw_accesses(source: str) -> Iterator[str]:
    """Config keys that a source looks up in a mapping: config["key"], config.get("key")."""
    for node in ast.walk(ast.parse(source)):
        key: ast.expr | None = None
        if isinstance(node, ast.Subscript):
            key = node.slice
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and node.args
        ):
            key = node.args[0]
        if isinstance(key, ast.Constant) and key.value in KEYS:
            yield f"line {node.lineno}: {key.value}"


def test_no_other_module_reads_raw_keys() -> None:
    found = [
        f"{name}: {access}"
        for path in sorted((ROOT / "fastdeploy_dsa").rglob("*.py"))
        if not (name := path.relative_to(ROOT).as_posix()).startswith(READERS)
        for access in raw_accesses(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "planted", ['config["hidden_size"]', 'rope.get("factor", 1)', 'x = content["rope_scaling"]["type"]']
)
def test_a_planted_access_is_found(planted: str) -> None:
    assert list(raw_accesses(planted))


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.json")))
def test_the_object_is_frozen_and_hashable(name: str) -> None:
    config = ModelConfig.from_pretrained(CONFIGS / name)
    assert isinstance(hash(config), int)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1  # type: ignore[misc]
