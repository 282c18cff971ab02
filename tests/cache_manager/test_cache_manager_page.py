"""docs/cache_manager.md: the worked example happens as its table says, and every module and exception is named."""

from __future__ import annotations

import re
from pathlib import Path

import cache_manager
from cache_manager import BlockId, BlockTable, Tier
from tests.cache_manager.kit import Cache

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "cache_manager.md").read_text(encoding="utf-8")


def example() -> list[tuple[str, str, str]]:
    """(call, device, host) of every row of the worked example."""
    rows = re.findall(r"^\| \d+ \| `(.+?)` \| (.+?) \| (.+?) \|", PAGE, flags=re.MULTILINE)
    return [(call, device.strip("`"), host.strip("`")) for call, device, host in rows]


def picture(cache: Cache, tables: dict[str, BlockTable], tier: Tier) -> str:
    """A tier's blocks in order: owners, * if cached, - if free."""
    manager = cache.manager
    pool = manager._tiers.device if tier is Tier.DEVICE else manager._tiers.host

    def state(block: BlockId) -> str:
        owners = "".join(
            name
            for name, table in tables.items()
            if block in (table.blocks if tier is Tier.DEVICE else table.host_blocks)
        )
        return owners + "*" * pool.is_cached(block) or "-"

    return " ".join(state(BlockId(block)) for block in range(pool.num_blocks))


def play(calls: list[str]) -> list[tuple[str, str, str]]:
    cache = Cache(num_blocks=10, num_host_blocks=6)
    tables: dict[str, BlockTable] = {}
    names: dict[str, object] = {"manager": cache.manager, "start": cache.start, "run": cache.run, "s": [50] * 8}
    shown = []
    for call in calls:
        target, _, expression = call.rpartition(" = ")
        for statement in expression.split("; "):
            result = eval(statement, names | tables)
        if target:
            tables[target] = result
        cache.manager.wait_for_loads()
        cache.manager.drain()
        cache.manager.check_integrity()
        cache.check_cached()
        shown.append((call, picture(cache, tables, Tier.DEVICE), picture(cache, tables, Tier.HOST)))
    return shown


def test_the_worked_example_happens_as_written() -> None:
    rows = example()
    assert len(rows) >= 10
    assert play([call for call, _, _ in rows]) == rows


def test_the_page_names_every_module_and_every_error() -> None:
    modules = {path.name for path in (ROOT / "cache_manager").glob("*.py")} - {"__init__.py"}
    assert modules == {name for name in modules if f"`{name}`" in PAGE}
    errors = {name for name in cache_manager.__all__ if issubclass_of_error(name)} - {"CacheError"}
    assert errors == {name for name in errors if f"`{name}`" in PAGE}


def test_every_test_that_the_page_names_exists() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE)) - {Path(__file__).stem}
    assert len(named) > 20
    assert named == {name for name in named if f"def {name}(" in tests}


def issubclass_of_error(name: str) -> bool:
    value = getattr(cache_manager, name)
    return isinstance(value, type) and issubclass(value, cache_manager.CacheError)
