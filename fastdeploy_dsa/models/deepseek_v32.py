"""DeepSeek-V3.2 and the GLM-5 family: latent attention with an indexer, dense and mixture-of-experts layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import paddle
from paddle import Tensor

from fastdeploy_dsa.attention.backend import KVCaches
from fastdeploy_dsa.attention.dsa import DSAAttentionBackend
from fastdeploy_dsa.config import DsaConfig
from fastdeploy_dsa.indexer import Indexer
from fastdeploy_dsa.layers import MLP, MoE, Weights, linear, output_logits, rms_norm
from fastdeploy_dsa.ops import IndexSelection
from fastdeploy_dsa.rotary import RotaryTable, Rotation, rotate_interleaved
from fastdeploy_dsa.step import StepMetadata

SelectionObserver = Callable[[int, IndexSelection], None]

_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")


class DeepseekV32Attention:
    """Latent attention in its absorbed form over the selected tokens (rules S4 to S12, S87)."""

    def __init__(self, weights: Weights, config: DsaConfig, layer_id: int) -> None:
        """Take the projections, and the indexer's where the layer owns one, from weights."""
        self._config = config
        self._layer_id = layer_id
        self._q_a = weights["q_a_proj.weight"]
        self._q_a_norm = weights["q_a_layernorm.weight"]
        self._q_b = weights["q_b_proj.weight"]
        self._kv_a = weights["kv_a_proj_with_mqa.weight"]
        self._kv_a_norm = weights["kv_a_layernorm.weight"]
        self._o = weights["o_proj.weight"]
        heads = [config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank]
        kv_b = weights["kv_b_proj.weight"].reshape(heads)
        self._w_uk = kv_b[:, : config.qk_nope_head_dim].contiguous()  # [heads, nope, kv_lora_rank]
        self._w_uv = kv_b[:, config.qk_nope_head_dim :].transpose([0, 2, 1]).contiguous()  # [heads, kv_lora_rank, v]
        self.indexer = Indexer(weights.below("indexer"), config) if config.owns_indexer(layer_id) else None

    def __call__(
        self,
        x: Tensor,
        *,
        rotation: Rotation,
        step: StepMetadata,
        attn_backend: DSAAttentionBackend,
        caches: KVCaches,
        selection: IndexSelection | None,
    ) -> tuple[Tensor, IndexSelection]:
        """Attend over the given selection, or over the layer's own if none is given; index keys are written anyway.

        Args:
            x: [num_rows, hidden_size] float32.
            rotation: Of the rows.
            step: The rows.
            attn_backend: Owner of the cache layout.
            caches: Cache tensors by (role, layer id).
            selection: Of the nearest full layer below, or of an earlier iteration of a draft layer; None: the layer's
                indexer selects.

        Returns:
            [num_rows, hidden_size] and the selection used.
        """
        q_c = rms_norm(linear(x, self._q_a), self._q_a_norm, self._config.rms_norm_eps)
        entries, layer_id = self._entries(x, rotation), self._layer_id
        if selection is not None:
            attn_backend.write_entries(entries, layer_id=layer_id, step=step, caches=caches)
        elif self.indexer is not None:
            index_query, folded_weights = attn_backend.write_and_quantise(
                entries, self.indexer.queries(x, q_c, rotation), layer_id=layer_id, step=step, caches=caches
            )
            selection = self.indexer.select(
                query=index_query,
                folded_weights=folded_weights,
                step=step,
                index_cache=caches["indexer", layer_id],
                cpu=attn_backend.cpu,
            )
        else:
            raise ValueError(f"selection: layer {layer_id} owns no indexer and got no selection")
        query = self._queries(q_c, rotation)
        attended = attn_backend.attend(query, layer_id=layer_id, caches=caches, selection=selection)
        return self.output(attended), selection

    def write_entries(
        self,
        x: Tensor,
        *,
        rotation: Rotation,
        step: StepMetadata,
        attn_backend: DSAAttentionBackend,
        caches: KVCaches,
    ) -> None:
        """What a call writes to the caches, without its result. Args as of a call."""
        entries = self._entries(x, rotation)
        attn_backend.write_entries(entries, layer_id=self._layer_id, step=step, caches=caches)

    def output(self, attended: Tensor) -> Tensor:
        """Latent results [num_rows, heads, kv_lora_rank] to values and through the output projection."""
        values = paddle.matmul(attended.transpose([1, 0, 2]), self._w_uv).transpose([1, 0, 2])
        return linear(values.reshape([values.shape[0], -1]), self._o)

    def _queries(self, q_c: Tensor, rotation: Rotation) -> Tensor:
        """Absorbed queries [num_rows, heads, kv_lora_rank + qk_rope_head_dim]."""
        nope = self._config.qk_nope_head_dim
        q = linear(q_c, self._q_b).reshape([-1, self._config.num_attention_heads, self._config.qk_head_dim])
        latent = paddle.matmul(q[..., :nope].transpose([1, 0, 2]), self._w_uk).transpose([1, 0, 2])
        return paddle.concat([latent, rotate_interleaved(q[..., nope:], rotation)], axis=-1)

    def _entries(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, ...]:
        """What the rows add to the layer's caches: normed latent, rotated key, and the index key of an indexer."""
        kv = linear(x, self._kv_a)
        rank = self._config.kv_lora_rank
        latent = rms_norm(kv[:, :rank], self._kv_a_norm, self._config.rms_norm_eps)
        rope = rotate_interleaved(kv[:, rank:], rotation)
        return (latent, rope) if self.indexer is None else (latent, rope, self.indexer.keys(x, rotation))

    @staticmethod
    def shapes(config: DsaConfig, layer_id: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        heads = config.num_attention_heads
        shapes = {
            "q_a_proj.weight": (config.q_lora_rank, config.hidden_size),
            "q_a_layernorm.weight": (config.q_lora_rank,),
            "q_b_proj.weight": (heads * config.qk_head_dim, config.q_lora_rank),
            "kv_a_proj_with_mqa.weight": (config.kv_lora_rank + config.qk_rope_head_dim, config.hidden_size),
            "kv_a_layernorm.weight": (config.kv_lora_rank,),
            "kv_b_proj.weight": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
            "o_proj.weight": (config.hidden_size, heads * config.v_head_dim),
        }
        if config.owns_indexer(layer_id):
            shapes |= {f"indexer.{name}": shape for name, shape in Indexer.shapes(config).items()}
        return shapes


class DecoderLayer:
    """Attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, weights: Weights, config: DsaConfig, layer_id: int) -> None:
        """Take the layer's weights."""
        self._eps = config.rms_norm_eps
        self._input_norm = weights["input_layernorm.weight"]
        self._post_norm = weights["post_attention_layernorm.weight"]
        self.attention = DeepseekV32Attention(weights.below("self_attn"), config, layer_id)
        is_dense = config.mlp_type(layer_id) == "dense"
        self._mlp = MLP(weights.below("mlp")) if is_dense else MoE(weights.below("mlp"), config)

    def __call__(
        self,
        hidden: Tensor,
        *,
        rotation: Rotation,
        step: StepMetadata,
        attn_backend: DSAAttentionBackend,
        caches: KVCaches,
        selection: IndexSelection | None,
    ) -> tuple[Tensor, IndexSelection]:
        """As DeepseekV32Attention, for the whole layer."""
        attended, selection = self.attention(
            rms_norm(hidden, self._input_norm, self._eps),
            rotation=rotation,
            step=step,
            attn_backend=attn_backend,
            caches=caches,
            selection=selection,
        )
        hidden = hidden + attended
        return hidden + self._mlp(rms_norm(hidden, self._post_norm, self._eps)), selection

    def write_entries(
        self,
        hidden: Tensor,
        *,
        rotation: Rotation,
        step: StepMetadata,
        attn_backend: DSAAttentionBackend,
        caches: KVCaches,
    ) -> None:
        """As DeepseekV32Attention.write_entries."""
        normed = rms_norm(hidden, self._input_norm, self._eps)
        self.attention.write_entries(normed, rotation=rotation, step=step, attn_backend=attn_backend, caches=caches)

    @staticmethod
    def shapes(config: DsaConfig, layer_id: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        attention = DeepseekV32Attention.shapes(config, layer_id)
        is_dense = config.mlp_type(layer_id) == "dense"
        mlp = MLP.shapes(config.hidden_size, config.intermediate_size) if is_dense else MoE.shapes(config)
        return {
            "input_layernorm.weight": (config.hidden_size,),
            "post_attention_layernorm.weight": (config.hidden_size,),
            **{f"self_attn.{name}": shape for name, shape in attention.items()},
            **{f"mlp.{name}": shape for name, shape in mlp.items()},
        }


class DeepseekV32ForCausalLM:
    """DeepSeek-V3.2; GLM-5, 5.1 and 5.2 differ in sizes, rotation and schedule only."""

    def __init__(self, config: DsaConfig, tensors: Mapping[str, Tensor]) -> None:
        """Build the model over loaded weights.

        Args:
            config: The model.
            tensors: Every name of `weight_shapes(config)`, float32.
        """
        self.config = config
        self._embed_tokens = tensors["model.embed_tokens.weight"]
        self._norm = tensors["model.norm.weight"]
        self._lm_head = self._embed_tokens if config.tie_word_embeddings else tensors["lm_head.weight"]
        self.layers = [
            DecoderLayer(Weights(tensors, f"model.layers.{layer}."), config, layer)
            for layer in range(config.num_hidden_layers)
        ]
        self._rotary = RotaryTable(config.rope, config.qk_rope_head_dim)

    @property
    def capture_refusal(self) -> str:
        """Why a step cannot be captured as a graph; empty if it can."""
        if any(kind != "dense" for kind in self.config.mlp_layer_types):
            return "the host chooses the experts of mixture-of-experts layers"
        return ""

    def forward(
        self,
        *,
        step: StepMetadata,
        attn_backend: DSAAttentionBackend,
        caches: KVCaches,
        before_layer: Callable[[int], None] | None = None,
        on_selection: SelectionObserver | None = None,
    ) -> Tensor:
        """Run one step: write the rows' cache entries and compute their hidden states.

        Args:
            step: The rows.
            attn_backend: Owner of the cache layout.
            caches: Cache tensors by (role, layer id), written in place.
            before_layer: Called with every layer id before the first access to a cache tensor of that layer.
            on_selection: Called with (layer id, selection of the step's tokens) by every layer that selects.

        Returns:
            [step.num_tokens, hidden_size] float32, after the final norm.
        """
        rotation = self._rotary.lookup(step.positions, step.max_length)
        hidden = paddle.nn.functional.embedding(step.token_ids, self._embed_tokens)
        selection: IndexSelection | None = None
        for layer_id, layer in enumerate(self.layers):
            if before_layer is not None:
                before_layer(layer_id)
            is_full = layer.attention.indexer is not None
            hidden, selection = layer(
                hidden,
                rotation=rotation,
                step=step,
                attn_backend=attn_backend,
                caches=caches,
                selection=None if is_full else selection,
            )
            if on_selection is not None and is_full:
                on_selection(layer_id, IndexSelection(*(rows[: step.num_tokens] for rows in selection)))
        return rms_norm(hidden, self._norm, self.config.rms_norm_eps)[: step.num_tokens]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits.

        Args:
            hidden: [R, hidden_size] float32, rows of `forward`'s result.

        Returns:
            [R, vocab_size] float32; a row does not depend on the others.
        """
        return output_logits(hidden, self._lm_head)


def weight_shapes(config: DsaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor the model needs from a checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        layer_shapes = DecoderLayer.shapes(config, layer)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    return shapes


def leftover_reason(name: str, config: DsaConfig) -> str | None:
    """Why a tensor that the model does not need may stand in a checkpoint; None if it may not."""
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "the output head is tied to the embedding"
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return None
    layer, rest = int(match[1]), match[2]
    draft_layers = max(config.num_nextn_predict_layers, 1)  # converted configs lose the count, not the weights
    if config.num_hidden_layers <= layer < config.num_hidden_layers + draft_layers:
        return "MTP layer, not in use without speculative decoding"
    is_shared = layer < config.num_hidden_layers and not config.index_schedule.is_full(layer)
    if is_shared and rest.startswith("self_attn.indexer."):
        return "indexer of a layer that shares another layer's selection"
    return None
