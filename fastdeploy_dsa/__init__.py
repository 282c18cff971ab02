"""DeepSeek Sparse Attention inference for PaddlePaddle.

Importing the package does not import paddle: the names below arrive with their first use. Its loggers are those below
"fastdeploy_dsa"; they are given warnings only, unless a program sets another level there.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdeploy_dsa.config import ModelConfig
    from fastdeploy_dsa.engine import LLM, SamplingParams

__version__ = "0.1.0"

__all__ = ["LLM", "ModelConfig", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "fastdeploy_dsa.engine",
    "ModelConfig": "fastdeploy_dsa.config",
    "SamplingParams": "fastdeploy_dsa.engine",
}

# Importing paddle makes the root logger print everything from INFO on, whoever imports it.
_LOGGER = logging.getLogger(__name__)
if _LOGGER.level == logging.NOTSET:
    _LOGGER.setLevel(logging.WARNING)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
