"""Kinds of the layers of a model with compressed entries, from `layer_types` or `compress_ratios` (rules S2, S3)."""

from __future__ import annotations

from collections.abc import Mapping

from fastdeploy_dsa.config.keys import ConfigError, ConfigKeys, UnsupportedConfigError
from fastdeploy_dsa.config.model_config import LayerKind
from fastdeploy_dsa.wording import shown

RATIO_OF_KIND: Mapping[LayerKind, int] = {"swa": 1, "c4a": 4, "c128a": 128}

_KIND_OF_LAYER_TYPE: Mapping[str, LayerKind] = {
    "sliding_attention": "swa",
    "compressed_sparse_attention": "c4a",
    "heavily_compressed_attention": "c128a",
}
_KIND_OF_RATIO: Mapping[int, LayerKind] = {0: "swa", 4: "c4a", 128: "c128a"}
# Older spellings of the entries of compress_rates; they win.
_RATE_KEYS = {"compressed_sparse_attention": "compress_rate_csa", "heavily_compressed_attention": "compress_rate_hca"}


def read_layer_kinds(keys: ConfigKeys, num_layers: int) -> tuple[LayerKind, ...]:
    """One kind per backbone layer.

    Raises:
        ConfigError: Neither list is given, one is too short or has a foreign entry, or they contradict each other.
        UnsupportedConfigError: Another compression rate.
    """
    _require_rates(keys)
    by_type = _kinds_of_layer_types(keys, num_layers) if "layer_types" in keys else None
    by_ratio = _kinds_of_ratios(keys, num_layers) if "compress_ratios" in keys else None
    if by_type is None and by_ratio is None:
        raise ConfigError("layer_types, compress_ratios: both missing, expected one entry per layer in either")
    for layer, (listed, counted) in enumerate(zip(by_type or (), by_ratio or (), strict=False)):
        if listed != counted:
            raise ConfigError(
                f"layer_types, compress_ratios: layer {layer} is {keys['layer_types'][layer]} in the one"
                f" and has ratio {keys['compress_ratios'][layer]} in the other"
            )
    return by_type or by_ratio or ()


def _kinds_of_layer_types(keys: ConfigKeys, num_layers: int) -> tuple[LayerKind, ...]:
    kinds = [_KIND_OF_LAYER_TYPE[entry] for entry in keys.entries("layer_types", tuple(_KIND_OF_LAYER_TYPE))]
    _require_enough("layer_types", len(kinds), num_layers)
    return tuple(kinds[:num_layers])


def _kinds_of_ratios(keys: ConfigKeys, num_layers: int) -> tuple[LayerKind, ...]:
    """The list is longer than the backbone: what follows stands for draft layers, which see the window only."""
    kinds = [_KIND_OF_RATIO[entry] for entry in keys.entries("compress_ratios", tuple(_KIND_OF_RATIO))]
    _require_enough("compress_ratios", len(kinds), num_layers)
    for position in range(num_layers, len(kinds)):
        if kinds[position] != "swa":
            raise ConfigError(
                f"compress_ratios: position {position}: expected 0 behind the {num_layers} backbone layers,"
                f" got {keys['compress_ratios'][position]}"
            )
    return tuple(kinds[:num_layers])


def _require_enough(key: str, actual: int, num_layers: int) -> None:
    if actual < num_layers:
        raise ConfigError(f"{key}: expected at least {num_layers} entries, one per backbone layer, got {actual}")


def _require_rates(keys: ConfigKeys) -> None:
    rates = keys.mapping("compress_rates") if "compress_rates" in keys else ConfigKeys({})
    for layer_type in rates:
        if layer_type not in _RATE_KEYS:
            raise ConfigError(
                f"compress_rates: expected {' or '.join(map(repr, _RATE_KEYS))}, got key {shown(layer_type)}"
            )
    for layer_type, legacy_key in _RATE_KEYS.items():
        supported = RATIO_OF_KIND[_KIND_OF_LAYER_TYPE[layer_type]]
        key = legacy_key if legacy_key in keys else f"compress_rates.{layer_type}"
        rate = keys.get(legacy_key, rates.get(layer_type, supported))
        if type(rate) is not int or rate != supported:
            raise UnsupportedConfigError(f"{key}: only {supported} is supported, got {shown(rate)}")
