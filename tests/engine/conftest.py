"""Models of the engine's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.byte_tokenizer import save_byte_tokenizer
from tests.kit.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with a tokenizer."""
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    save_byte_tokenizer(folder)
    return folder
