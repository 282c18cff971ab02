"""DeepSeek-V4: residual streams around attention to a window and compressed entries, and around experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import paddle
from paddle import Tensor

from fastdeploy_dsa.attention.backend import KVCaches
from fastdeploy_dsa.attention.deepseek_v4.backend import DeepseekV4AttentionBackend
from fastdeploy_dsa.attention.deepseek_v4.base import DeepseekV4Attention
from fastdeploy_dsa.attention.deepseek_v4.rotations import LayerRotations, RotaryTables
from fastdeploy_dsa.attention.deepseek_v4.step import CompressedStep
from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.layers import Weights, output_logits, padded_rows, rms_norm
from fastdeploy_dsa.models.deepseek_v4_experts import DeepseekV4MoE
from fastdeploy_dsa.models.hyper_connections import HyperConnection, HyperHead
from fastdeploy_dsa.ops import IndexSelection
from fastdeploy_dsa.row_invariance import ROW_MULTIPLE
from fastdeploy_dsa.step import StepMetadata

SelectionObserver = Callable[[int, IndexSelection], None]

EMBEDDING = "embed.weight"
HEAD = "head.weight"
DRAFT_PREFIX = "mtp"

_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)")


class DeepseekV4DecoderLayer:
    """Attention and experts, each between hyper-connections and behind a norm."""

    def __init__(
        self, weights: Weights, config: CompressedConfig, layer_id: int, attention_cls: type[DeepseekV4Attention]
    ) -> None:
        """Take the layer's weights."""
        self._eps = config.rms_norm_eps
        self._ratio = config.ratio(layer_id)
        self._attn_streams = HyperConnection(weights, config, "hc_attn")
        self._ffn_streams = HyperConnection(weights, config, "hc_ffn")
        self._attn_norm = weights["attn_norm.weight"]
        self._ffn_norm = weights["ffn_norm.weight"]
        self.attention = attention_cls(weights.below("attn"), config, layer_id)
        self._experts = DeepseekV4MoE(weights.below("ffn"), config, layer_id)

    def __call__(
        self,
        streams: Tensor,
        *,
        rotations: Mapping[int, LayerRotations],
        step: CompressedStep,
        attn_backend: DeepseekV4AttentionBackend,
        caches: KVCaches,
        selection: IndexSelection | None,
    ) -> tuple[Tensor, IndexSelection | None]:
        """As DeepseekV4Attention.forward, for the whole layer.

        Args:
            streams: [num_rows, hc_mult, hidden_size] float32.
            rotations: By compression ratio.
            step: The rows.
            attn_backend: Owner of the cache layout.
            caches: Cache tensors by (role, layer id).
            selection: Of the nearest layer below that selects entries by itself.
        """
        hidden, mixing = self._attn_streams(streams)
        attended, selection = self.attention.forward(
            rms_norm(hidden, self._attn_norm, self._eps),
            rotations=rotations[self._ratio],
            step=step,
            attn_backend=attn_backend,
            caches=caches,
            selection=selection,
        )
        streams = mixing.joined(streams, attended)
        hidden, mixing = self._ffn_streams(streams)
        fed = self._experts(rms_norm(hidden, self._ffn_norm, self._eps), step.token_ids)
        return mixing.joined(streams, fed), selection

    def write_rows(
        self,
        streams: Tensor,
        *,
        rotations: Mapping[int, LayerRotations],
        step: CompressedStep,
        attn_backend: DeepseekV4AttentionBackend,
        caches: KVCaches,
    ) -> None:
        """As DeepseekV4Attention.write_rows."""
        hidden, _ = self._attn_streams(streams)
        self.attention.write_rows(
            rms_norm(hidden, self._attn_norm, self._eps),
            rotations=rotations[self._ratio],
            step=step,
            attn_backend=attn_backend,
            caches=caches,
        )

    @staticmethod
    def shapes(config: CompressedConfig, layer_id: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        return {
            "attn_norm.weight": (config.hidden_size,),
            "ffn_norm.weight": (config.hidden_size,),
            **HyperConnection.shapes(config, "hc_attn"),
            **HyperConnection.shapes(config, "hc_ffn"),
            **{f"attn.{name}": shape for name, shape in DeepseekV4Attention.shapes(config, layer_id).items()},
            **{f"ffn.{name}": shape for name, shape in DeepseekV4MoE.shapes(config, layer_id).items()},
        }


class DeepseekV4ForCausalLM:
    """DeepSeek-V4-Flash and -Pro, which differ in sizes and in the order of their layers only.

    The hidden states it hands over are the residual streams side by side, [rows, hc_mult * hidden_size], before the
    mix of the head: a draft model takes them as they are, and `compute_logits` mixes and norms them.
    """

    def __init__(
        self, config: CompressedConfig, tensors: Mapping[str, Tensor], attention_cls: type[DeepseekV4Attention]
    ) -> None:
        """Build the model over loaded weights.

        Args:
            config: The model.
            tensors: Every name of `weight_shapes(config)`, float32; tables of experts int64.
            attention_cls: From `select_dsv4_attn_cls`.
        """
        self.config = config
        self.attention_cls = attention_cls
        self._embedding = tensors[EMBEDDING]
        self._norm = tensors["norm.weight"]
        self._lm_head = self._embedding if config.tie_word_embeddings else tensors[HEAD]
        self._head = HyperHead(Weights(tensors), config)
        self.layers = [
            DeepseekV4DecoderLayer(Weights(tensors, f"layers.{layer}."), config, layer, attention_cls)
            for layer in range(config.num_hidden_layers)
        ]
        self._rotary = RotaryTables(config, range(config.num_hidden_layers))

    @property
    def capture_refusal(self) -> str:
        """Why a step cannot be captured as a graph; every layer is a mixture of experts."""
        return "the host chooses the experts of mixture-of-experts layers"

    def forward(
        self,
        *,
        step: StepMetadata,
        attn_backend: DeepseekV4AttentionBackend,
        caches: KVCaches,
        before_layer: Callable[[int], None] | None = None,
        on_selection: SelectionObserver | None = None,
    ) -> Tensor:
        """Run one step: write the rows' cache entries and compute their streams.

        Args:
            step: The rows.
            attn_backend: Owner of the cache layout.
            caches: Cache tensors by (role, layer id), written in place.
            before_layer: Called with every layer id before the first access to a cache tensor of that layer.
            on_selection: Called with (layer id, selection of the step's tokens) by every layer that selects; positions
                are entry numbers.

        Returns:
            [step.num_tokens, hc_mult * hidden_size] float32.
        """
        prepared = attn_backend.prepare(step)
        rotations = self._rotary.lookup(prepared)
        embedded = paddle.nn.functional.embedding(step.token_ids, self._embedding)
        streams = embedded.unsqueeze(1).expand([-1, self.config.hc_mult, -1])
        selection: IndexSelection | None = None
        for layer_id, layer in enumerate(self.layers):
            if before_layer is not None:
                before_layer(layer_id)
            streams, selection = layer(
                streams,
                rotations=rotations,
                step=prepared,
                attn_backend=attn_backend,
                caches=caches,
                selection=selection,
            )
            if on_selection is not None and layer.attention.indexer is not None and selection is not None:
                on_selection(layer_id, IndexSelection(*(rows[: step.num_tokens] for rows in selection)))
        return streams.reshape([step.num_rows, -1])[: step.num_tokens]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits.

        Args:
            hidden: [R, hc_mult * hidden_size] float32, rows of `forward`'s result.

        Returns:
            [R, vocab_size] float32; a row does not depend on the others.
        """
        return head_logits(hidden, self._head, self._norm, self._lm_head, self.config)


def head_logits(hidden: Tensor, head: HyperHead, norm: Tensor, lm_head: Tensor, config: CompressedConfig) -> Tensor:
    """Streams side by side [R, hc_mult * hidden_size] through mix, norm and output head, [R, vocab_size]."""
    rows = hidden.shape[0]
    filled = padded_rows(hidden, -rows % ROW_MULTIPLE)
    mixed = head(filled.reshape([filled.shape[0], config.hc_mult, config.hidden_size]))
    return output_logits(rms_norm(mixed, norm, config.rms_norm_eps), lm_head)[:rows]


def weight_shapes(config: CompressedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor the model needs from a checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        "norm.weight": (config.hidden_size,),
        **HyperHead.shapes(config),
    }
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        layer_shapes = DeepseekV4DecoderLayer.shapes(config, layer)
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    return shapes


def leftover_reason(name: str, config: CompressedConfig) -> str | None:
    """Why a tensor that the model does not need may stand in a checkpoint; None if it may not."""
    if name == HEAD and config.tie_word_embeddings:
        return "the output head is tied to the embedding"
    if name.startswith(f"{DRAFT_PREFIX}."):
        return "MTP layer, not in use without speculative decoding"
    match = _LAYER_NAME.fullmatch(name)
    if match is None or int(match[1]) >= config.num_hidden_layers:
        return None
    is_shared = config.layer_kind(int(match[1])) == "c4a" and not config.owns_indexer(int(match[1]))
    if is_shared and match[2].startswith("attn.indexer."):
        return "indexer of a layer that shares another layer's selection"
    return None
