"""FastDeploy's switches, set before anything of it is imported, and its logs out of the way."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest

from tests.integrations.fastdeploy_rig.pinned import Pinned
from tests.kit.goldens import GoldenCase

HAS_FASTDEPLOY = importlib.util.find_spec("fastdeploy") is not None

if HAS_FASTDEPLOY:
    os.environ["FD_PLUGINS"] = "fastdeploy_dsa"
    os.environ["FD_ATTENTION_BACKEND"] = "DSA_ATTN"
    os.environ["ENABLE_V1_KVCACHE_MANAGER"] = "1"
    os.environ["FD_LOG_DIR"] = tempfile.mkdtemp(prefix="fastdeploy-log-")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a run that demands a GPU, and counts skips as failures, is not about."""
    if config.getoption("--require-gpu") and not HAS_FASTDEPLOY:
        about = [item for item in items if item.get_closest_marker("needs_fastdeploy")]
        config.hook.pytest_deselected(items=about)
        items[:] = [item for item in items if item not in set(about)]


@pytest.fixture(autouse=True)
def _fastdeploy(request: pytest.FixtureRequest) -> None:
    """Skip what is marked with needs_fastdeploy where there is none."""
    if request.node.get_closest_marker("needs_fastdeploy") and not HAS_FASTDEPLOY:
        pytest.skip("fastdeploy is not importable: put a source tree on PYTHONPATH (docs/serving_with_fastdeploy.md)")
    if request.node.get_closest_marker("needs_cache_controller"):
        pytest.importorskip("fastdeploy.cache_manager.v1", reason="this FastDeploy has no v1 cache manager")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FD_DSA_CONFIG", raising=False)


@pytest.fixture(scope="session")
def goldens(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--goldens")
    if folder is None or not folder.is_dir():
        pytest.skip("no golden fixtures: give their folder with --goldens")
    return Path(folder)


@pytest.fixture(scope="session")
def yarn(goldens: Path) -> GoldenCase:
    return GoldenCase(goldens / "v32_yarn")


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Pinned:
    """In the place of FastDeploy's allocator."""
    from fastdeploy.cache_manager import ops

    memory = Pinned()
    monkeypatch.setattr(ops, "cuda_host_alloc", memory.allocate, raising=False)
    monkeypatch.setattr(ops, "cuda_host_free", memory.free, raising=False)
    return memory
