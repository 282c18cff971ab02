"""What importing the package does and offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastdeploy_dsa


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("module", ["fastdeploy_dsa", "fastdeploy_dsa.ops", "fastdeploy_dsa.installation"])
def test_importing_does_not_import_paddle(module: str) -> None:
    assert run_python(f"import sys, {module}; print('paddle' in sys.modules)") == "False"


@pytest.mark.parametrize("name", fastdeploy_dsa.__all__)
def test_every_public_name_arrives(name: str) -> None:
    assert getattr(fastdeploy_dsa, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Llm'"):
        _ = fastdeploy_dsa.Llm  # type: ignore[attr-defined]
