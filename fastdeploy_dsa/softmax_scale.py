"""The one place a softmax scale is computed; prefill, decode, verify and draft kernels all receive this number.

Rules and codes are those of the scale resolver: scale = width ** -0.5 * m ** 2, where the width is that of the
un-absorbed query-key head and m is YaRN's magnitude for `mscale_all_dim` (`mscale` only enters the rotation table).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from fastdeploy_dsa.wording import CodedError, shown

DEFAULT_ROPE_TYPE = "default"
YARN_ROPE_TYPES = ("yarn", "deepseek_yarn")

_ROPE_TYPES_WITHOUT_MAGNITUDE = (DEFAULT_ROPE_TYPE, "deepseek_llama_scaling")
_COMPRESSED_LAYER_TYPES = ("compressed_sparse_attention", "heavily_compressed_attention")
_MAX_WIDTH = 1 << 20  # far above any head; keeps absurd numbers out of the arithmetic


class SoftmaxScaleError(CodedError):
    """A config from which no softmax scale follows; codes are E1 to E6."""


@dataclass(frozen=True)
class SoftmaxScale:
    """A resolved scale and how it came about.

    Attributes:
        value: What the kernels receive.
        width: Numbers in a query-key head.
        magnitude: m, 1.0 unless YaRN asks for it.
        rule: The rule that decided, for the log.
        warnings: Texts that start with a code, "W1: ...".
    """

    value: float
    width: int
    magnitude: float
    rule: str
    warnings: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line for the log."""
        return f"{self.value!r} from width {self.width} and magnitude {self.magnitude!r} ({self.rule})"


def softmax_scale(config: Any) -> float:
    """The number alone; see `resolve_softmax_scale`."""
    return resolve_softmax_scale(config).value


def resolve_softmax_scale(config: Any) -> SoftmaxScale:
    """Resolve the scale of a model config, which is left unchanged.

    Args:
        config: A mapping or an object with attributes; with a `text_config`, that one is read. None is absent. A
            `ModelConfig` has its scale already, and no raw keys to resolve it from.

    Raises:
        SoftmaxScaleError: E1 to E6.
    """
    resolved = _get(config, "scale")
    if isinstance(resolved, SoftmaxScale):
        return resolved
    text = _get(config, "text_config", config)
    if has_compressed_attention(text):
        return compressed_softmax_scale(text)
    width = _width(text, "qk_nope_head_dim", "E2") + _width(text, "qk_rope_head_dim", "E2")
    if width == 0:
        raise SoftmaxScaleError("E2", "qk_nope_head_dim + qk_rope_head_dim: expected at least 1, got 0")
    rope = rope_settings(text)
    kind, warnings = rope_type(rope)
    rule = _rule_without_magnitude(rope, kind)
    if rule is not None:
        return SoftmaxScale(width**-0.5, width, 1.0, rule, warnings)
    magnitude, rule, more_warnings = _yarn_magnitude(rope)
    return SoftmaxScale(width**-0.5 * magnitude * magnitude, width, magnitude, rule, warnings + more_warnings)


def compressed_softmax_scale(text: Any) -> SoftmaxScale:
    """The scale of a text config that is known to be of the DeepSeek-V4 family: YaRN plays no part in it.

    Raises:
        SoftmaxScaleError: E1.
    """
    width = _width(text, "head_dim", "E1")
    if width == 0:
        raise SoftmaxScaleError("E1", "head_dim: expected an int >= 1, got 0")
    return SoftmaxScale(width**-0.5, width, 1.0, "head_dim of compressed attention")


def has_compressed_attention(config: Any) -> bool:
    """Whether a text config is of the DeepSeek-V4 family, by what it holds and not by its name."""
    rope, layer_types = _get(config, "rope_parameters"), _get(config, "layer_types")
    return (
        _get(config, "compress_ratios") is not None
        or _get(config, "compress_rates") is not None
        or (isinstance(rope, Mapping) and all(isinstance(rope.get(part), Mapping) for part in ("main", "compress")))
        or (isinstance(layer_types, list | tuple) and any(kind in _COMPRESSED_LAYER_TYPES for kind in layer_types))
    )


def rope_settings(config: Any) -> Mapping[str, object]:
    """`rope_parameters` if present, else `rope_scaling`, else an empty mapping; entries that are None are left out.

    Raises:
        SoftmaxScaleError: E3, not a mapping.
    """
    for key in ("rope_parameters", "rope_scaling"):
        settings = _get(config, key)
        if settings is None:
            continue
        if not isinstance(settings, Mapping):
            raise SoftmaxScaleError("E3", f"{key}: expected a mapping, got {shown(settings)}")
        return {name: value for name, value in settings.items() if value is not None}
    return {}


def rope_type(rope: Mapping[str, object]) -> tuple[object, tuple[str, ...]]:
    """`rope_type`, else `type`, else what the presence of a factor suggests; and the warnings."""
    kind = rope.get("rope_type", rope.get("type"))
    if kind is not None:
        return kind, ()
    if "factor" in rope:
        return "yarn", ("W1: the rope settings have a factor but no type: treated as yarn",)
    return DEFAULT_ROPE_TYPE, ()


def yarn_magnitude(factor: float, mscale: float) -> float:
    """YaRN's attention magnitude, 1 for factors up to 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def is_finite_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is an int or a finite float and no bool; NaN and ints beyond float64 fail the comparison."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _rule_without_magnitude(rope: Mapping[str, object], kind: object) -> str | None:
    """The rule by which m is 1, or None if YaRN's magnitude counts."""
    if kind in _ROPE_TYPES_WITHOUT_MAGNITUDE:
        return f"rope type {kind}"
    if kind not in YARN_ROPE_TYPES:
        raise SoftmaxScaleError("E4", f"rope type {shown(kind)} is not supported with MLA")
    for key in ("apply_yarn_scaling", "apply_scale"):
        if rope.get(key) is False:
            return f"{key} is false"
    attention_factor = rope.get("attention_factor")
    if is_finite_number(attention_factor) and attention_factor == 1:
        return "attention_factor is 1"
    return None


def _yarn_magnitude(rope: Mapping[str, object]) -> tuple[float, str, tuple[str, ...]]:
    factor = rope.get("factor")
    if factor is None:
        return 1.0, "yarn without factor", ("W2: yarn without a factor: no magnitude correction",)
    if not is_finite_number(factor) or factor <= 0:
        raise SoftmaxScaleError("E5", f"factor: expected a number > 0, got {shown(factor)}")
    if factor <= 1:
        return 1.0, "yarn with a factor up to 1", ()
    mscale = rope.get("mscale_all_dim", 0)
    if mscale is False:
        mscale = 0
    if not is_finite_number(mscale) or mscale < 0:
        raise SoftmaxScaleError("E6", f"mscale_all_dim: expected a number >= 0, got {shown(mscale)}")
    return yarn_magnitude(factor, mscale), f"yarn with factor {factor} and mscale_all_dim {mscale}", ()


def _get(config: Any, key: str, default: Any = None) -> Any:
    value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return default if value is None else value


def _width(config: Any, key: str, code: str) -> int:
    value = _get(config, key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_WIDTH:
        raise SoftmaxScaleError(code, f"{key}: expected an int from 0 to {_MAX_WIDTH}, got {shown(value)}")
    return value
