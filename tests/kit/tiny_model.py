"""A random checkpoint that is small and has every part: dense and mixture layers, own and shared selections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fastdeploy_dsa.config import ModelConfig
from fastdeploy_dsa.models.deepseek_v32 import weight_shapes
from tests.kit.byte_tokenizer import BOS_ID, EOS_ID

INDEX_TOPK = 8
VOCAB_SIZE = 264
MAX_POSITIONS = 256


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A GLM-5 shaped config.json; selections cover a fifth of a prompt of 40 tokens."""
    config = {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "q_lora_rank": 24,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": INDEX_TOPK,
        "indexer_types": ["full", "full", "shared"],
        "indexer_rope_interleave": True,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "first_k_dense_replace": 1,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    return config | changes


def write_tiny_model(folder: Path, *, seed: int = 7, **changes: Any) -> Path:
    """Write config.json and model.safetensors; matrices keep the size of what they are applied to."""
    content = tiny_config(**changes)
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(ModelConfig.from_pretrained(content)).items():
        noise = rng.standard_normal(shape)
        if name.endswith(("norm.weight", "layernorm.weight")):
            weights[name] = 1.0 + 0.1 * noise
        elif len(shape) == 1:
            weights[name] = 0.1 * noise
        else:
            weights[name] = noise if "embed" in name else noise * (2.0 / np.sqrt(shape[1]))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.astype(np.float32) for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder
