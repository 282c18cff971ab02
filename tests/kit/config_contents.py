"""Contents of config.json that tests change: the published files, and small ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DSA_COLUMNS = ("deepseek_v32.json", "glm_5.json", "glm_52.json")
MLA_COLUMNS = ("deepseek_v2_lite.json", "deepseek_v3.json")
COMPRESSED_COLUMNS = ("deepseek_v4_flash.json", "deepseek_v4_pro.json")
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
SMALL: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 128,
    "index_head_dim": 128,
    "index_n_heads": 8,
    "index_topk": 20,
    "intermediate_size": 96,
    "kv_lora_rank": 512,
    "layer_types": ["indexed_attention"] * 4,
    "max_position_embeddings": 2560,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 24,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "pad_token_id": None,
    "q_lora_rank": 64,
    "qk_head_dim": 192,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rope_type": "yarn",
    },
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "v_head_dim": 32,
    "vocab_size": 256,
}
YARN: dict[str, Any] = SMALL["rope_parameters"]
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def small(**changes: Any) -> dict[str, Any]:
    return {**SMALL, **changes}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def shipped(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CONFIGS / name).read_text())
    return content


def small_v4(**changes: Any) -> dict[str, Any]:
    """Six layers: window, 128, 4, 128, 4, window."""
    content = shipped("deepseek_v4_flash.json")
    content |= {"num_hidden_layers": 6, "compress_ratios": [0, 128, 4, 128, 4, 0, 0]}
    return content | changes
