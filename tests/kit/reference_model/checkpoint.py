"""Reads a checkpoint folder: the raw config.json and its *.safetensors files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

_DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "F16": "<f2", "BF16": "<u2"}


def read_safetensors(path):
    """Every tensor of a file; bfloat16 becomes float32."""
    raw = Path(path).read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + header_bytes])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        values = np.frombuffer(raw[begin:end], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = values
    return tensors


def read_checkpoint(folder):
    """(raw text config, weights in float64) of a folder."""
    config = json.loads((Path(folder) / "config.json").read_text())
    weights = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        if path.name != "expected.safetensors":
            weights.update(read_safetensors(path))
    return config.get("text_config") or config, {name: w.astype(np.float64) for name, w in weights.items()}


class Rope(NamedTuple):
    """frequencies [R/2]; table_multiplier (S15) of cos and sin; scale_multiplier (m^2) of the softmax scale."""

    frequencies: np.ndarray
    table_multiplier: float
    scale_multiplier: float


def rope_of(config):
    """Rules S13 to S15 and the softmax scale's m^2."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rotary_dim = config["qk_rope_head_dim"]
    theta = settings.get("rope_theta") or config["rope_theta"]
    pair = np.arange(rotary_dim // 2)
    frequencies = theta ** (-2.0 * pair / rotary_dim)
    if (settings.get("rope_type") or settings.get("type")) not in ("yarn", "deepseek_yarn"):
        return Rope(frequencies, 1.0, 1.0)
    factor, original = settings["factor"], settings["original_max_position_embeddings"]

    def pair_with_turns(turns):
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(settings.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_with_turns(settings.get("beta_slow") or 1)), rotary_dim - 1)
    ramp = np.clip((pair - low) / (high - low or 0.001), 0.0, 1.0)

    def mscale(a):
        return 1.0 if factor <= 1 else 0.1 * a * math.log(factor) + 1.0

    all_dim = settings.get("mscale_all_dim") or 0
    table = settings.get("attention_factor") or mscale(settings.get("mscale") or 1.0) / mscale(all_dim)
    return Rope(frequencies / factor * ramp + frequencies * (1 - ramp), table, mscale(all_dim) ** 2)


def softmax_scale_of(config):
    """Rules S1 and S2 of the softmax scale: the un-absorbed width, times m^2 under YaRN."""
    width = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    return width**-0.5 * rope_of(config).scale_multiplier


def schedule_of(config):
    """One letter per backbone layer, F or S: rules S10 to S12 of the index schedule."""
    layers = config["num_hidden_layers"]
    types, pattern = config.get("indexer_types"), config.get("index_topk_pattern")
    freq, offset = config.get("index_topk_freq"), config.get("index_skip_topk_offset")
    if config.get("use_index_cache") is False:
        return "F" * layers
    if types is not None or pattern is not None:
        return "".join({"full": "F", "shared": "S"}.get(entry, entry) for entry in types or pattern)
    if freq is None:
        return "F" * layers
    offset = 2 if offset is None else offset
    return "".join("S" if max(layer - offset + 1, 0) % freq else "F" for layer in range(layers))


def is_moe_layer(config, layer):
    """Whether the feed-forward part is a mixture of experts; draft layers always are."""
    types = config.get("mlp_layer_types")
    if types is not None and layer < len(types):
        return types[layer] == "sparse"
    return layer >= config["first_k_dense_replace"] and layer % (config.get("moe_layer_freq") or 1) == 0
