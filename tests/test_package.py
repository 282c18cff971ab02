"""What importing the package does and offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastdeploy_dsa
from fastdeploy_dsa.installation import DEMO_MODEL


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("module", ["fastdeploy_dsa", "fastdeploy_dsa.ops", "fastdeploy_dsa.installation"])
def test_importing_does_not_import_paddle(module: str) -> None:
    assert run_python(f"import sys, {module}; print('paddle' in sys.modules)") == "False"


PACKAGE_TELLS = "logging.getLogger('fastdeploy_dsa').setLevel(logging.INFO)"
PART_TELLS = "logging.getLogger('fastdeploy_dsa.config').setLevel(logging.INFO)"
IMPORTS = "import fastdeploy_dsa, paddle"


@pytest.mark.parametrize(
    ("lines", "is_told"),
    [
        ((IMPORTS,), False),
        ((PACKAGE_TELLS, IMPORTS), True),
        ((IMPORTS, PACKAGE_TELLS), True),
        ((IMPORTS, PART_TELLS), True),
    ],
    ids=["default", "before", "after", "part"],
)
def test_what_is_read_is_told_to_those_who_ask_for_it(lines: tuple[str, ...], is_told: bool) -> None:
    """Paddle makes the root logger print INFO lines, those of other packages included."""
    read = f"fastdeploy_dsa.ModelConfig.from_pretrained({str(DEMO_MODEL)!r}); logging.getLogger('other').info('root')"
    code = "\n".join(["import logging", *lines, read])
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr
    assert "root" in told, "paddle leaves the root logger alone"
    assert ("softmax scale" in told) == is_told


def test_warnings_are_shown_to_everybody() -> None:
    code = (
        f"import fastdeploy_dsa; fastdeploy_dsa.ModelConfig.from_pretrained({str(DEMO_MODEL)!r}, {{'rope_theta': 3}})"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr
    assert "rope_theta" in told


@pytest.mark.parametrize("name", fastdeploy_dsa.__all__)
def test_every_public_name_arrives(name: str) -> None:
    assert getattr(fastdeploy_dsa, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Llm'"):
        _ = fastdeploy_dsa.Llm  # type: ignore[attr-defined]
