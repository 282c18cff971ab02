"""A random checkpoint with an MTP layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from fastdeploy_dsa.config import DsaConfig
from fastdeploy_dsa.models.mtp import mtp_weight_shapes, optional_mtp_weight_shapes
from tests.kit.tiny_model import write_tiny_model

WEIGHTS = "model.safetensors"


def write_tiny_mtp_model(
    folder: Path, *, seed: int = 7, brings_own: bool = False, layer_gain: float | None = None, **changes: Any
) -> Path:
    """tests/kit/tiny_model.py's checkpoint and one MTP layer, or as many as the changes say.

    Args:
        folder: Written to.
        seed: Of the weights.
        brings_own: Whether the layer has an embedding and an output head of its own, other than the target's.
        layer_gain: Makes drafts right at times, which they are not by chance: what every layer adds is scaled by this,
            and the MTP layer starts from the next token alone, so that both models mostly continue the newest token.
        changes: Of the config.
    """
    write_tiny_model(folder, seed=seed, **({"num_nextn_predict_layers": 1} | changes))
    config = DsaConfig.from_pretrained(folder)
    shapes = mtp_weight_shapes(config) | (optional_mtp_weight_shapes(config) if brings_own else {})
    rng = np.random.default_rng(seed + 1)
    weights = load_file(folder / WEIGHTS)
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape)
        if len(shape) == 1:
            noise = 0.1 * noise + ("norm.weight" in name)
        elif "embed" not in name:
            noise = noise * (2.0 / np.sqrt(shape[1]))
        weights[name] = noise.astype(np.float32)
    if layer_gain is not None:
        for name in weights:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weights[name] *= np.float32(layer_gain)
        for name in (f"model.layers.{layer}.eh_proj.weight" for layer in range(3, config.num_layers)):
            weights[name] = np.eye(*weights[name].shape, dtype=np.float32)
    save_file(weights, folder / WEIGHTS)
    return folder
