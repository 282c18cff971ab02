"""Options and fixtures of all tests: which implementations of the ops run, and what a skip means."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

import fastdeploy_dsa
from fastdeploy_dsa.ops.library import C_LIBRARY
from tests.kit.goldens import default_golden_folder
from tests.kit.implementations import GPU_NAMES, CCpu, Implementation, Unavailable, implementations

C_PREFIX = "c_"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail when anything is skipped or no GPU runs the ops")
    parser.addoption("--goldens", type=Path, default=default_golden_folder(), help="folder of the golden fixtures")
    parser.addoption("--c-library", type=Path, default=C_LIBRARY, help="another build of the plain C library")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--require-gpu") and not GPU_NAMES:
        raise pytest.UsageError("--require-gpu: no implementation of the ops runs on a GPU")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = list(implementations(metafunc.config.getoption("--c-library")))
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", names, indirect=True)
    if "c_implementation" in metafunc.fixturenames:
        metafunc.parametrize("c_implementation", [name for name in names if name.startswith(C_PREFIX)], indirect=True)


@pytest.fixture(autouse=True)
def package_log_level() -> Iterator[None]:
    """The command line sets the level for its whole process; a test must not do so for the next one."""
    logger = logging.getLogger(fastdeploy_dsa.__name__)
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Implementation:
    """Each implementation that this machine can run."""
    try:
        return implementations(request.config.getoption("--c-library"))[request.param]()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def c_implementation(request: pytest.FixtureRequest) -> CCpu:
    """Each implementation of the C ABI: caches with gaps between blocks, outputs with guard bytes."""
    found = implementations(request.config.getoption("--c-library"))[request.param]()
    assert isinstance(found, CCpu)
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.getoption("--require-gpu") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped under --require-gpu: {report.longrepr}"
    return report
