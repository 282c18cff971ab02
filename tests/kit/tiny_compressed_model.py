"""A small random DeepSeek-V4 checkpoint with every kind of layer, and draft layers if asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.models.deepseek_v4 import weight_shapes
from fastdeploy_dsa.models.deepseek_v4_mtp import v4_mtp_weight_shapes
from tests.kit.byte_tokenizer import BOS_ID, EOS_ID

VOCAB_SIZE = 264
INDEX_TOPK = 6
WINDOW = 12
MAX_POSITIONS = 1024


def tiny_compressed_config(**changes: Any) -> dict[str, Any]:
    """A DeepSeek-V4 shaped config.json: window only, ratio 4, ratio 128, ratio 4."""
    config = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 48,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 24,
        "o_groups": 2,
        "o_lora_rank": 12,
        "sliding_window": WINDOW,
        "compress_ratios": [0, 4, 128, 4, 0],
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": INDEX_TOPK,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_hash_layers": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "swiglu_limit": 3.0,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 6,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "max_position_embeddings": MAX_POSITIONS,
        "num_nextn_predict_layers": 0,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    return config | changes


def write_tiny_compressed_model(folder: Path, *, seed: int = 7, **changes: Any) -> Path:
    """Write config.json and model.safetensors; matrices keep the size of what they are applied to."""
    content = tiny_compressed_config(**changes)
    config = CompressedConfig.from_pretrained(content)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(random_weights(config, seed), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder


def random_weights(config: CompressedConfig, seed: int) -> dict[str, np.ndarray]:
    """Every tensor of the target and its draft layers."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in (weight_shapes(config) | v4_mtp_weight_shapes(config)).items():
        noise = rng.standard_normal(shape)
        if name.endswith("tid2eid"):
            weights[name] = rng.integers(0, config.n_routed_experts, shape)
            continue
        if name.endswith("norm.weight"):
            values = 1.0 + 0.1 * noise
        elif name.endswith(("_scale", "ape")):
            values = 0.5 + 0.5 * noise
        elif len(shape) == 1:  # sinks, biases of routers and streams
            values = 0.5 * noise
        else:
            values = noise if name == "embed.weight" else noise * (2.0 / np.sqrt(shape[1]))
        weights[name] = values.astype(np.float32)
    return weights
