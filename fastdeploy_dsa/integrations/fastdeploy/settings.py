"""The plug-in's switches: one JSON object in the environment, beside the keys of config.json.

FastDeploy passes every key of config.json on but has no option to replace one at start; this variable does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastdeploy_dsa.cache_layout import CACHE_FORMATS
from fastdeploy_dsa.device import CPU
from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError
from fastdeploy_dsa.ops import CacheFormat
from fastdeploy_dsa.strict_json import parse_json_object
from fastdeploy_dsa.wording import shown

VARIABLE = "FD_DSA_CONFIG"

SCHEDULE_KEYS = ("indexer_types", "index_topk_pattern", "index_topk_freq")
OFFSET_KEY = "index_skip_topk_offset"
MODEL_KEYS = ("use_index_cache", *SCHEDULE_KEYS, OFFSET_KEY)
"""Keys of config.json that may be replaced; null removes one."""
OWN_KEYS = ("cache_format",)


@dataclass(frozen=True)
class Settings:
    """What the variable says.

    Attributes:
        overrides: Keys of config.json with the values that replace theirs.
        cache_format: Number format of the caches; None: fp8 on a GPU, float32 on the CPU.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    cache_format: CacheFormat | None = None

    def resolved_cache_format(self, device: str) -> CacheFormat:
        """Number format of the caches on a device by Paddle's name for it."""
        return self.cache_format or ("float32" if device == CPU else "fp8")


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the variable.

    Args:
        environ: None: the process's.

    Raises:
        PluginError: No JSON object, an unknown key or value, or switches that contradict each other.
    """
    text = (os.environ if environ is None else environ).get(VARIABLE, "").strip()
    if not text:
        return Settings()
    try:
        content = parse_json_object(text, VARIABLE, ValueError)
    except ValueError as error:
        raise PluginError(str(error)) from None
    unknown = [key for key in content if key not in MODEL_KEYS + OWN_KEYS]
    if unknown:
        raise PluginError(
            f"{VARIABLE}: unknown key {', '.join(unknown)}; expected some of {', '.join(MODEL_KEYS + OWN_KEYS)}"
        )
    overrides = {key: value for key, value in content.items() if key in MODEL_KEYS}
    _refuse_contradictions(overrides)
    cache_format = content.get("cache_format")
    if cache_format is not None and cache_format not in CACHE_FORMATS:
        raise PluginError(
            f"{VARIABLE}: cache_format: expected one of {', '.join(CACHE_FORMATS)}, got {shown(cache_format)}"
        )
    return Settings(_sole_schedule(overrides), cache_format)


def _refuse_contradictions(overrides: Mapping[str, Any]) -> None:
    """Two ways to say one thing in the same object are a mistake, whatever the precedence in a config.json."""
    schedules = [key for key in SCHEDULE_KEYS if overrides.get(key) is not None]
    if len(schedules) > 1:
        raise PluginError(f"{VARIABLE}: {' and '.join(schedules)} contradict each other: give one of them")
    if overrides.get("use_index_cache") is False and schedules:
        raise PluginError(f"{VARIABLE}: use_index_cache is false, yet {schedules[0]} is given: give one of them")
    if overrides.get(OFFSET_KEY) is not None and schedules not in ([], ["index_topk_freq"]):
        raise PluginError(f"{VARIABLE}: {OFFSET_KEY} goes with index_topk_freq, not with {schedules[0]}")


def _sole_schedule(overrides: dict[str, Any]) -> dict[str, Any]:
    """A schedule that is given replaces whatever schedule config.json has, also one under another key."""
    if any(overrides.get(key) is not None for key in SCHEDULE_KEYS):
        return {**dict.fromkeys(("use_index_cache", *SCHEDULE_KEYS)), **overrides}
    return overrides
