"""JSON in which nothing is guessed: a key given twice, NaN, infinity and bottomless nesting are errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from fastdeploy_dsa.wording import shown

MAX_NESTING = 64  # far above any config, far below what the interpreter can print


def read_json_object(path: Path, error: type[ValueError]) -> dict[str, Any]:
    """The object a file holds.

    Args:
        path: The file.
        error: The caller's error type, raised with the file's name and what is wrong with it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror}") from None
    except UnicodeDecodeError as reason:
        raise error(f"{path}: {reason}") from None
    return parse_json_object(text, str(path), error)


def parse_json_object(text: str, source: str, error: type[ValueError]) -> dict[str, Any]:
    """The object a text holds.

    Args:
        text: The JSON.
        source: Where it comes from, for the message.
        error: The caller's error type.
    """
    try:
        content = json.loads(
            text,
            object_pairs_hook=_object_of_unique_keys,
            parse_constant=_refuse_number,
            parse_float=_finite_float,
        )
        require_shallow(content)
    except RecursionError:
        raise error(f"{source}: nested too deeply, expected at most {MAX_NESTING} levels") from None
    except ValueError as reason:  # also what json raises
        raise error(f"{source}: {reason}") from None
    if not isinstance(content, dict):
        raise error(f"{source}: expected a JSON object, got {type(content).__name__}")
    return content


def require_shallow(content: object) -> None:
    """Refuse what is nested so deeply that comparing or printing it could exhaust the stack.

    Raises:
        ValueError: More than MAX_NESTING levels, or a container that holds itself.
    """
    level: list[object] = [content]
    for _ in range(MAX_NESTING + 1):
        # By identity: one container that is reached on many ways counts once.
        containers = {id(value): value for value in level if isinstance(value, Mapping | list | tuple)}
        if not containers:
            return
        level = [
            inner
            for value in containers.values()
            for inner in (value.values() if isinstance(value, Mapping) else value)
        ]
    raise ValueError(f"nested too deeply, expected at most {MAX_NESTING} levels")


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key}: given twice, as {shown(content[key])} and {shown(value)}")
        content[key] = value
    return content


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{shown(text)[1:-1]} is not a number a config may hold")


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)
