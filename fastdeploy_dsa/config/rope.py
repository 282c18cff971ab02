"""Rotation settings: one table for latent attention, two for compressed attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastdeploy_dsa.config.keys import MAX_POSITIONS, ConfigKeys, UnsupportedConfigError
from fastdeploy_dsa.softmax_scale import (
    DEFAULT_ROPE_TYPE,
    YARN_ROPE_TYPES,
    rope_settings,
    rope_type,
    yarn_magnitude,
)
from fastdeploy_dsa.wording import shown


@dataclass(frozen=True)
class RopeConfig:
    """Rotation of the last `qk_rope_head_dim` numbers of a head.

    Attributes:
        rope_type: "default" reads theta only.
        table_multiplier: What cos and sin are multiplied by; not the magnitude of the softmax scale.
    """

    rope_type: Literal["default", "yarn"]
    theta: float
    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    table_multiplier: float


def read_rope(keys: ConfigKeys) -> tuple[RopeConfig, tuple[str, ...]]:
    """The one table of latent attention, and what its settings leave doubtful."""
    rope = ConfigKeys(rope_settings(keys), "rope settings: ")
    theta, warnings = _theta(keys, rope, "rope_theta")
    return _rope_config(keys, rope, theta), warnings


def read_rope_pair(keys: ConfigKeys) -> tuple[RopeConfig, RopeConfig, tuple[str, ...]]:
    """The tables of window-only and of compressed layers (rule S10), and what their settings leave doubtful.

    Flat settings are those of the compressed layers; nested ones hold both under "main" and "compress".
    """
    settings = rope_settings(keys)
    if "main" in settings or "compress" in settings:
        nested = ConfigKeys(settings, "rope settings: ")
        for part in ("main", "compress"):
            nested.value(part)
        main, compress = nested.mapping("main"), nested.mapping("compress")
        main_theta, main_warnings = _theta(keys, main, "rope_theta")
        compress_theta, compress_warnings = _theta(keys, compress, "compress_rope_theta")
        warnings = main_warnings + compress_warnings
    else:
        main, compress = ConfigKeys({}), ConfigKeys(settings, "rope settings: ")
        main_theta, warnings = _theta(keys, ConfigKeys({}), "rope_theta")
        compress_theta = keys.number("compress_rope_theta", above=1.0)
    main_rope = _rope_config(keys, main, main_theta)
    if main_rope.rope_type != DEFAULT_ROPE_TYPE:
        raise UnsupportedConfigError(
            f"rope settings: main: only type 'default' is supported, got {main_rope.rope_type!r}"
        )
    # Rule S9: neither table is multiplied, whatever mscale and attention_factor say.
    return main_rope, _rope_config(keys, compress, compress_theta, multiplied=False), warnings


def _rope_config(keys: ConfigKeys, rope: ConfigKeys, theta: float, *, multiplied: bool = True) -> RopeConfig:
    kind, _ = rope_type(rope)
    if kind == DEFAULT_ROPE_TYPE:
        max_positions = keys.integer("max_position_embeddings", MAX_POSITIONS)
        return RopeConfig("default", theta, 1.0, max_positions, 32.0, 1.0, 1.0)
    if kind not in YARN_ROPE_TYPES:
        raise UnsupportedConfigError(f"rope settings: rope type {shown(kind)} is not supported")
    rope.require_fixed({"truncate": True})
    factor, beta_slow = rope.number("factor"), rope.number("beta_slow", 1.0)
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=factor,
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", MAX_POSITIONS),
        beta_fast=rope.number("beta_fast", 32.0, above=beta_slow),
        beta_slow=beta_slow,
        table_multiplier=_table_multiplier(rope, factor) if multiplied else 1.0,
    )


def _theta(keys: ConfigKeys, rope: ConfigKeys, outer_key: str) -> tuple[float, tuple[str, ...]]:
    if "rope_theta" not in rope:
        return keys.number(outer_key, above=1.0), ()
    theta = rope.number("rope_theta", above=1.0)
    outer = keys.get(outer_key, theta)
    if outer == theta:
        return theta, ()
    return theta, (f"{outer_key}: {shown(outer)} at the top level is ignored, the rope settings say {theta:g}",)


def _table_multiplier(rope: ConfigKeys, factor: float) -> float:
    """What YaRN multiplies cos and sin by; 1 if mscale and mscale_all_dim agree (rule S15)."""
    if "attention_factor" in rope:
        return rope.number("attention_factor")
    mscale = rope.number("mscale", 1.0)
    mscale_all_dim = rope.number("mscale_all_dim") if rope.get("mscale_all_dim") else 0.0
    return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)
