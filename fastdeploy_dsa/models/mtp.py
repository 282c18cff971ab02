"""The draft model of a V3.2 or GLM-5 checkpoint: one more decoder layer that guesses the token after the next."""

from __future__ import annotations

from collections.abc import Mapping

import paddle
from paddle import Tensor

from fastdeploy_dsa.attention.backend import KVCaches
from fastdeploy_dsa.attention.dsa import DSAAttentionBackend
from fastdeploy_dsa.config import DsaConfig
from fastdeploy_dsa.layers import Weights, linear, output_logits, padded_rows, rms_norm
from fastdeploy_dsa.models.deepseek_v32 import DecoderLayer
from fastdeploy_dsa.ops import IndexSelection
from fastdeploy_dsa.rotary import RotaryTable
from fastdeploy_dsa.step import StepMetadata

_EMBEDDING = "embed_tokens.weight"
_HEAD = "shared_head.head.weight"


class MtpModel:
    """The MTP layer of DeepSeek-V3.2, GLM-5, 5.1 and 5.2 (rules S2 to S4 of multi-token prediction).

    The row of position p joins what the target knows after position p with the token at p + 1 and predicts the token
    at p + 2. Fed with its own hidden states it looks further ahead: the next iteration, at position p + 1, takes the
    hidden state of this one at position p.

    A checkpoint may have several such layers, and each is a model: layer k + 1 takes the hidden states of layer k at
    the same positions, and tokens one further on.

    Source: DeepSeek-V3 technical report, section 2.2.

    Attributes:
        layer_id: Absolute id, from num_hidden_layers on.
        layer: The decoder layer.
        shares_selection: Whether later iterations attend to the selection of the first.
    """

    def __init__(self, config: DsaConfig, tensors: Mapping[str, Tensor], index: int = 0) -> None:
        """Build the model over loaded weights.

        Args:
            config: The target model.
            tensors: Every name of `mtp_weight_shapes(config)` and those of `optional_mtp_weight_shapes` that the
                checkpoint has, float32, and the target's embedding and output head, which stand in for those it has
                not.
            index: Which of the checkpoint's MTP layers.
        """
        self.config = config
        self.layer_id = config.num_hidden_layers + index
        self.shares_selection = config.index_share_for_mtp_iteration
        weights = Weights(tensors, f"model.layers.{self.layer_id}.")
        target_embedding = tensors["model.embed_tokens.weight"]
        target_head = target_embedding if config.tie_word_embeddings else tensors["lm_head.weight"]
        self._embed_tokens = weights.get(_EMBEDDING, target_embedding)
        self._lm_head = weights.get(_HEAD, target_head)
        self._enorm = weights["enorm.weight"]
        self._hnorm = weights["hnorm.weight"]
        self._eh_proj = weights["eh_proj.weight"]
        self._norm = weights["shared_head.norm.weight"]
        self.layer = DecoderLayer(weights, config, self.layer_id)
        self._rotary = RotaryTable(config.rope, config.qk_rope_head_dim)

    def forward(
        self,
        *,
        step: StepMetadata,
        hidden: Tensor,
        attn_backend: DSAAttentionBackend,
        caches: KVCaches,
        selection: IndexSelection | None = None,
    ) -> tuple[Tensor, IndexSelection]:
        """Run one iteration: write the rows' cache entries and compute their hidden states.

        Args:
            step: The rows; token_ids are those of the next position.
            hidden: [step.num_tokens, hidden_size] float32: the target's after its final norm, or this model's.
            attn_backend: Owner of the cache layout.
            caches: Cache tensors by (role, layer id), written in place.
            selection: [step.num_rows, ...] of an earlier iteration, to attend to instead of the layer's own.

        Returns:
            [step.num_tokens, hidden_size] float32, normed, and the rows' selection, padding included.
        """
        hidden, selection = self.layer(
            self._joined(step, hidden),
            rotation=self._rotary.lookup(step.positions, step.max_length),
            step=step,
            attn_backend=attn_backend,
            caches=caches,
            selection=selection,
        )
        return rms_norm(hidden, self._norm, self.config.rms_norm_eps)[: step.num_tokens], selection

    def write_entries(
        self, *, step: StepMetadata, hidden: Tensor, attn_backend: DSAAttentionBackend, caches: KVCaches
    ) -> None:
        """Write what `forward` writes, for rows whose predictions nobody wants: a fraction of its work.

        The entries of a position follow from the layer's input alone. Args as of forward.
        """
        self.layer.write_entries(
            self._joined(step, hidden),
            rotation=self._rotary.lookup(step.positions, step.max_length),
            step=step,
            attn_backend=attn_backend,
            caches=caches,
        )

    def _joined(self, step: StepMetadata, hidden: Tensor) -> Tensor:
        """Input of the decoder layer, [step.num_rows, hidden_size]: the embedding's half first."""
        eps = self.config.rms_norm_eps
        embedded = paddle.nn.functional.embedding(step.token_ids, self._embed_tokens)
        hidden = padded_rows(hidden, step.num_rows - step.num_tokens)
        halves = [rms_norm(embedded, self._enorm, eps), rms_norm(hidden, self._hnorm, eps)]
        return linear(paddle.concat(halves, axis=-1), self._eh_proj)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the tokens two positions behind.

        Args:
            hidden: [R, hidden_size] float32, rows of `forward`'s result.

        Returns:
            [R, vocab_size] float32; a row does not depend on the others.
        """
        return output_logits(hidden, self._lm_head)


def mtp_weight_shapes(config: DsaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors the draft models need from a checkpoint, besides the target's."""
    hidden = config.hidden_size
    named: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_hidden_layers, config.num_layers):
        shapes: dict[str, tuple[int, ...]] = {
            "enorm.weight": (hidden,),
            "hnorm.weight": (hidden,),
            "eh_proj.weight": (hidden, 2 * hidden),
            "shared_head.norm.weight": (hidden,),
            **DecoderLayer.shapes(config, layer),
        }
        named |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    return named


def optional_mtp_weight_shapes(config: DsaConfig) -> dict[str, tuple[int, ...]]:
    """The same of tensors that may be shared with the target instead."""
    layers = range(config.num_hidden_layers, config.num_layers)
    shape = (config.vocab_size, config.hidden_size)
    return {f"model.layers.{layer}.{name}": shape for layer in layers for name in (_EMBEDDING, _HEAD)}
