"""Golden cases as parameters; without their folder there is one parameter, which skips with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.kit.goldens import CASES, COMPRESSED_CASES, GoldenCase
from tests.kit.mistakes import DRAFT_MISTAKES

ABSENT = "no golden fixtures here: pass their folder with --goldens"
LISTS = {"mistake": "mistakes", "score_mistake": "score_mistakes"}  # fixture: list of a case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per case and, where asked for, per planted mistake that the case lists."""
    fixture = next((name for name in ("golden", "compressed_golden") if name in metafunc.fixturenames), None)
    if fixture is None:
        return
    folder = metafunc.config.getoption("--goldens")
    listing = next((name for name in LISTS if name in metafunc.fixturenames), None)
    names = (fixture,) if listing is None else (fixture, listing)
    if folder is None:
        metafunc.parametrize(names, [pytest.param(*names, marks=pytest.mark.skip(reason=ABSENT), id="absent")])
        return
    if not folder.is_dir():
        raise pytest.UsageError(f"--goldens: expected a folder, got {folder}")
    names_of_cases = CASES if fixture == "golden" else sorted(path.name for path in folder.glob(COMPRESSED_CASES))
    metafunc.parametrize(names, list(_parameters(folder, names_of_cases, listing)))


def _parameters(folder: Path, cases: Sequence[str], listing: str | None) -> Iterator[object]:
    for case in (GoldenCase(folder / name) for name in cases):
        if listing is None:
            yield pytest.param(case, id=case.name)
        else:
            for mistake in getattr(case, LISTS[listing]):
                if mistake in DRAFT_MISTAKES:  # planted in the reference, which has a draft layer
                    continue
                yield pytest.param(case, mistake, id=f"{case.name}-{mistake}")
