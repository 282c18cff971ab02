"""Feed-forward layers and residual streams of a model with compressed entries."""

from __future__ import annotations

from typing import Any, Literal, get_args

from fastdeploy_dsa.config.keys import MAX_EXPERTS, MAX_LAYERS, ConfigError, ConfigKeys, UnsupportedConfigError
from fastdeploy_dsa.wording import shown

RouterType = Literal["hash", "scores"]
"""Experts by the token's id, experts by the token's scores."""

_ROUTER_OF_MLP_TYPE: dict[str, RouterType] = {"hash_moe": "hash", "moe": "scores"}
_FIXED: dict[str, object] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
}
_EXPERT_DTYPES = ("fp4", "fp8", "bf16")
_MAX_STREAMS = 64
_MAX_SINKHORN_ITERS = 1000


def read_compressed_experts(keys: ConfigKeys, num_layers: int) -> dict[str, Any]:
    """The fields of CompressedConfig about experts and residual streams.

    Raises:
        ConfigError: A key is missing, malformed or contradicts another.
        UnsupportedConfigError: A value that no DeepSeek-V4 model has.
    """
    keys.require_fixed(_FIXED)
    _require_expert_dtype(keys)
    return {
        "moe_intermediate_size": keys.integer("moe_intermediate_size"),
        "router_types": _router_types(keys, num_layers),
        "n_routed_experts": keys.integer("n_routed_experts", MAX_EXPERTS),
        "n_shared_experts": keys.integer("n_shared_experts", MAX_EXPERTS, minimum=0),
        "num_experts_per_tok": keys.integer("num_experts_per_tok", MAX_EXPERTS),
        "norm_topk_prob": keys.boolean("norm_topk_prob", default=True),
        "routed_scaling_factor": keys.number("routed_scaling_factor"),
        "swiglu_limit": _swiglu_limit(keys),
        "hc_mult": keys.integer("hc_mult", _MAX_STREAMS),
        "hc_sinkhorn_iters": keys.integer("hc_sinkhorn_iters", _MAX_SINKHORN_ITERS),
        "hc_eps": keys.number("hc_eps"),
    }


def _router_types(keys: ConfigKeys, num_layers: int) -> tuple[RouterType, ...]:
    """From `mlp_layer_types`, or from `num_hash_layers`, which counts layers from the first on."""
    if "mlp_layer_types" not in keys and "num_hash_layers" not in keys:
        raise ConfigError("mlp_layer_types, num_hash_layers: both missing, expected one of them")
    counted: tuple[RouterType, ...] = ()
    if "num_hash_layers" in keys:
        num_hash = keys.integer("num_hash_layers", MAX_LAYERS, minimum=0)
        hashed, scored = get_args(RouterType)
        counted = tuple(hashed if layer < num_hash else scored for layer in range(num_layers))
    if "mlp_layer_types" not in keys:
        return counted
    entries = keys.entries("mlp_layer_types", tuple(_ROUTER_OF_MLP_TYPE))
    if len(entries) < num_layers:
        raise ConfigError(
            f"mlp_layer_types: expected at least {num_layers} entries, one per backbone layer, got {len(entries)}"
        )
    listed = tuple(_ROUTER_OF_MLP_TYPE[entry] for entry in entries[:num_layers])
    for layer, (router, counted_router) in enumerate(zip(listed, counted or listed, strict=True)):
        if router != counted_router:
            raise ConfigError(
                f"mlp_layer_types, num_hash_layers: layer {layer} is {entries[layer]} in the list,"
                f" with num_hash_layers {keys['num_hash_layers']}"
            )
    return listed


def _swiglu_limit(keys: ConfigKeys) -> float:
    """Absent and 0: there is no limit."""
    limit = keys.get("swiglu_limit")
    return 0.0 if limit is None or (type(limit) in (int, float) and limit == 0) else keys.number("swiglu_limit")


def _require_expert_dtype(keys: ConfigKeys) -> None:
    """`expert_dtype` stands beside the quantisation or in it; the tensors themselves say how they are stored."""
    found = keys.get("expert_dtype")
    if found is None and "quantization_config" in keys:
        found = keys.mapping("quantization_config").get("expert_dtype")
    if found is not None and found not in _EXPERT_DTYPES:
        raise UnsupportedConfigError(f"expert_dtype: expected {' or '.join(_EXPERT_DTYPES)}, got {shown(found)}")
