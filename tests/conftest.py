"""Options and fixtures of all tests: which implementations of the ops run, and what a skip means."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import fastdeploy_dsa
from fastdeploy_dsa.ops.library import C_LIBRARY
from tests.kit.c_api import CApi
from tests.kit.c_cuda import CCuda
from tests.kit.cuda_driver import DeviceFault
from tests.kit.goldens import default_golden_folder
from tests.kit.implementation import Implementation, Unavailable
from tests.kit.implementations import GPU_NAMES, implementations


def _is_c(name: str) -> bool:
    return name.startswith("c_")


# Fixtures that run a test on several implementations, and on which.
FIXTURES: dict[str, Callable[[str], bool]] = {
    "implementation": lambda name: True,
    "cpu_implementation": lambda name: name not in GPU_NAMES,
    "gpu_implementation": lambda name: name in GPU_NAMES,
    "c_implementation": _is_c,
    "c_cpu_implementation": lambda name: _is_c(name) and name not in GPU_NAMES,
    "c_gpu_implementation": lambda name: _is_c(name) and name in GPU_NAMES,
    "paddle_gpu_implementation": lambda name: not _is_c(name) and name in GPU_NAMES,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail when anything is skipped or no GPU runs the ops")
    parser.addoption("--only-gpu", action="store_true", help="run only the tests of implementations on a GPU")
    parser.addoption("--exact-memory", action="store_true", help="no guards on the GPU: for compute-sanitizer")
    parser.addoption("--goldens", type=Path, default=default_golden_folder(), help="folder of the golden fixtures")
    parser.addoption("--c-library", type=Path, default=C_LIBRARY, help="another build of the plain C library")


@cache
def available(c_library: Path) -> dict[str, str]:
    """Why each implementation on a GPU cannot run; empty if it can."""
    reasons = {}
    for name, make in implementations(c_library).items():
        if name in GPU_NAMES:
            try:
                make()
            except Unavailable as reason:
                reasons[name] = str(reason)
            else:
                reasons[name] = ""
    return reasons


def pytest_report_header(config: pytest.Config) -> list[str]:
    reasons = available(config.getoption("--c-library"))
    return [f"{name}: {reason or 'runs'}" for name, reason in reasons.items()]


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--require-gpu") and not config.getoption("--only-gpu"):
        return
    reasons = available(config.getoption("--c-library"))
    if all(reasons.values()):
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise pytest.UsageError(f"no implementation of the ops runs on a GPU: {told}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    c_library = metafunc.config.getoption("--c-library")
    for fixture in set(FIXTURES) & set(metafunc.fixturenames):
        # A GPU that is not there is said once, in the header, and not by a skip of every test.
        names = [name for name in implementations(c_library) if not available(c_library).get(name)]
        metafunc.parametrize(fixture, [name for name in names if FIXTURES[fixture](name)], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if not _is_chosen(item, only_gpu=config.getoption("--only-gpu"))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def _is_chosen(item: pytest.Item, *, only_gpu: bool) -> bool:
    """Whether the test has an implementation to run on, and one on a GPU if only those are wanted."""
    arguments = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    names = [arguments[name] for name in FIXTURES if name in arguments]
    if not names:
        return not only_gpu
    return all(isinstance(name, str) and (name in GPU_NAMES or not only_gpu) for name in names)


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
    return _found(request)


def _found(request: pytest.FixtureRequest) -> Implementation:
    try:
        found = implementations(request.config.getoption("--c-library"))[request.param]()
    except Unavailable as reason:
        pytest.skip(str(reason))
    if isinstance(found, CCuda):
        return replace(found, has_guards=not request.config.getoption("--exact-memory"))
    return found


@pytest.fixture
def c_implementation(request: pytest.FixtureRequest) -> CApi:
    """Each implementation of the C ABI: caches with gaps between blocks, outputs with guard bytes."""
    found = _found(request)
    assert isinstance(found, CApi)
    return found


# The same, each on one kind of device.
cpu_implementation = gpu_implementation = paddle_gpu_implementation = implementation
c_cpu_implementation = c_gpu_implementation = c_implementation


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.getoption("--require-gpu") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped under --require-gpu: {report.longrepr}"
    if call.excinfo is not None and call.excinfo.errisinstance(DeviceFault):
        _leave_broken_process(item, str(call.excinfo.value))
    return report


def _leave_broken_process(item: pytest.Item, reason: str) -> None:
    """After a fault of a kernel every later call fails; pytest-xdist starts another worker for the rest."""
    if hasattr(item.config, "workerinput"):
        print(f"{item.nodeid}: {reason}", file=sys.__stderr__, flush=True)
        os._exit(1)
    item.session.shouldstop = f"{item.nodeid}: {reason}"
