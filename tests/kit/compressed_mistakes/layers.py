"""Residual streams and experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import fastdeploy_dsa.models.deepseek_v4_experts as experts_module
import fastdeploy_dsa.models.hyper_connections as streams_module
from tests.kit.compressed_mistakes.planting import Planting


def three_sinkhorn_rounds(planting: Planting) -> None:
    for layer in planting.layers:
        for connection in (layer._attn_streams, layer._ffn_streams):
            planting.patch.setattr(connection, "_iters", 3)


def streams_not_transposed(planting: Planting) -> None:
    right = streams_module.StreamMixing.joined
    planting.patch.setattr(
        streams_module.StreamMixing,
        "joined",
        lambda mixing, streams, result: right(
            mixing._replace(residual=mixing.residual.transpose([0, 2, 1])), streams, result
        ),
    )


def hash_ignored(planting: Planting) -> None:
    """Layers that choose by token id choose by scores, without a bias."""
    for layer in planting.layers:
        experts = layer._experts
        if experts._table is not None:
            planting.patch.setattr(experts, "_table", None)
            planting.patch.setattr(experts, "_correction_bias", np.zeros(planting.config.n_routed_experts, np.float32))


def bias_ignored(planting: Planting) -> None:
    for layer in planting.layers:
        if layer._experts._correction_bias is not None:
            planting.patch.setattr(layer._experts, "_correction_bias", np.zeros_like(layer._experts._correction_bias))


def sigmoid_scores(planting: Planting) -> None:
    planting.patch.setattr(
        experts_module, "router_scores", lambda logits: (1.0 / (1.0 + np.exp(-logits))).astype(np.float32)
    )


def without_scaling(planting: Planting) -> None:
    for layer in planting.layers:
        changed = replace(planting.config, routed_scaling_factor=1.0)
        planting.patch.setattr(layer._experts, "_config", changed)


def without_limit(planting: Planting) -> None:
    for layer in planting.layers:
        for expert in (*layer._experts._experts, layer._experts._shared):
            planting.patch.setattr(expert, "_limit", 0.0)
