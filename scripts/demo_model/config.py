"""Shape of the demo model; the config.json that ships is written from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from demo_model.vocabulary import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE


@dataclass(frozen=True)
class DemoConfig:
    """Fields as in a deepseek_v32 config.json.

    kv_lora_rank, qk_rope_head_dim and index_head_dim are those of the full-size models, so that the demo runs the same
    kernels; the rest is small.
    """

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 128
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    q_lora_rank: int = 64
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 64
    v_head_dim: int = 32
    index_n_heads: int = 4
    index_head_dim: int = 128
    index_topk: int = 64
    intermediate_size: int = 256
    moe_intermediate_size: int = 64
    n_routed_experts: int = 4
    num_experts_per_tok: int = 2
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 1
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def to_hugging_face(self) -> dict[str, Any]:
        """The content of config.json."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "rope_theta"}
        num_dense = self.first_k_dense_replace
        mlp_types = ["dense"] * num_dense + ["sparse"] * (self.num_hidden_layers - num_dense)
        fixed = {
            "architectures": ["DeepseekV32ForCausalLM"],
            "model_type": "deepseek_v32",
            "dtype": "bfloat16",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
            "head_dim": self.qk_rope_head_dim,
            "qk_head_dim": self.qk_head_dim,
            "num_key_value_heads": self.num_attention_heads,
            "layer_types": ["indexed_attention"] * self.num_hidden_layers,
            "mlp_layer_types": mlp_types,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
            "output_router_logits": False,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": False,
            "use_cache": True,
        }
        return dict(sorted((own | fixed).items()))

    @classmethod
    def from_hugging_face(cls, content: dict[str, Any]) -> DemoConfig:
        """Reads back what `to_hugging_face` wrote."""
        own = {name: content[name] for name in cls.__dataclass_fields__ if name != "rope_theta"}
        return cls(**own, rope_theta=content["rope_parameters"]["rope_theta"])
