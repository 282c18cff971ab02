"""Attributes of FastDeploy's objects and modules, replaced while something is constructed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


@contextmanager
def replaced(target: Any, **values: object) -> Iterator[None]:
    """Let attributes have other values inside the block; those the target did not have are gone afterwards."""
    before = {name: target.__dict__.get(name, _ABSENT) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                delattr(target, name)
            else:
                setattr(target, name, value)
