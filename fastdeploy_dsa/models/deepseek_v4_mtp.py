"""The draft model of a DeepSeek-V4 checkpoint: one more layer, which sees the window only."""

from __future__ import annotations

from collections.abc import Mapping

import paddle
from paddle import Tensor

from fastdeploy_dsa.attention.backend import KVCaches
from fastdeploy_dsa.attention.deepseek_v4.backend import DeepseekV4AttentionBackend
from fastdeploy_dsa.attention.deepseek_v4.base import DeepseekV4Attention
from fastdeploy_dsa.attention.deepseek_v4.rotations import RotaryTables
from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.layers import Weights, linear, padded_rows, rms_norm
from fastdeploy_dsa.models.deepseek_v4 import DRAFT_PREFIX, EMBEDDING, HEAD, DeepseekV4DecoderLayer, head_logits
from fastdeploy_dsa.models.hyper_connections import HyperHead
from fastdeploy_dsa.ops import IndexSelection
from fastdeploy_dsa.step import StepMetadata


class DeepseekV4MtpModel:
    """The MTP layer of DeepSeek-V4 (rule S5 of multi-token prediction).

    The row of position p joins the target's residual streams after position p with the token at p + 1 and predicts the
    token at p + 2. What it recycles are its own streams.

    Attributes:
        layer_id: Absolute id, from num_hidden_layers on.
        layer: The decoder layer.
        shares_selection: It selects nothing.
    """

    shares_selection = False

    def __init__(
        self,
        config: CompressedConfig,
        tensors: Mapping[str, Tensor],
        attention_cls: type[DeepseekV4Attention],
        index: int = 0,
    ) -> None:
        """Build the model over loaded weights.

        Args:
            config: The target model.
            tensors: Every name of `v4_mtp_weight_shapes(config)`, and the target's embedding and output head.
            attention_cls: As of the target.
            index: Which of the checkpoint's MTP layers.
        """
        self.config = config
        self.layer_id = config.num_hidden_layers + index
        weights = Weights(tensors, f"{DRAFT_PREFIX}.{index}.")
        self._embedding = tensors[EMBEDDING]
        self._lm_head = self._embedding if config.tie_word_embeddings else tensors[HEAD]
        self._enorm = weights["enorm.weight"]
        self._hnorm = weights["hnorm.weight"]
        self._e_proj = weights["e_proj.weight"]
        self._h_proj = weights["h_proj.weight"]
        self._norm = weights["norm.weight"]
        self._head = HyperHead(weights, config)
        self.layer = DeepseekV4DecoderLayer(weights, config, self.layer_id, attention_cls)
        self._rotary = RotaryTables(config, (self.layer_id,))

    def forward(
        self,
        *,
        step: StepMetadata,
        hidden: Tensor,
        attn_backend: DeepseekV4AttentionBackend,
        caches: KVCaches,
        selection: IndexSelection | None = None,
    ) -> tuple[Tensor, IndexSelection | None]:
        """Run one iteration: write the rows' window rows and compute their streams.

        Args:
            step: The rows; token_ids are those of the next position.
            hidden: [step.num_tokens, hc_mult * hidden_size] float32: the target's streams, or this model's.
            attn_backend: Owner of the cache layout.
            caches: Cache tensors by (role, layer id), written in place.
            selection: None: the layer selects nothing.

        Returns:
            [step.num_tokens, hc_mult * hidden_size] float32 and None.
        """
        prepared = attn_backend.prepare(step)
        streams, _ = self.layer(
            self._joined(step, hidden),
            rotations=self._rotary.lookup(prepared),
            step=prepared,
            attn_backend=attn_backend,
            caches=caches,
            selection=selection,
        )
        return streams.reshape([step.num_rows, -1])[: step.num_tokens], None

    def write_entries(
        self, *, step: StepMetadata, hidden: Tensor, attn_backend: DeepseekV4AttentionBackend, caches: KVCaches
    ) -> None:
        """Write what `forward` writes, for rows whose predictions nobody wants. Args as of forward."""
        prepared = attn_backend.prepare(step)
        self.layer.write_rows(
            self._joined(step, hidden),
            rotations=self._rotary.lookup(prepared),
            step=prepared,
            attn_backend=attn_backend,
            caches=caches,
        )

    def _joined(self, step: StepMetadata, hidden: Tensor) -> Tensor:
        """Input of the decoder layer, [step.num_rows, hc_mult, hidden_size]: the embedding goes into every stream."""
        eps, width = self.config.rms_norm_eps, self.config.hidden_size
        embedded = paddle.nn.functional.embedding(step.token_ids, self._embedding)
        filled = padded_rows(hidden, step.num_rows - step.num_tokens).reshape([-1, width])
        projected = linear(rms_norm(filled, self._hnorm, eps), self._h_proj).reshape([step.num_rows, -1, width])
        return projected + linear(rms_norm(embedded, self._enorm, eps), self._e_proj).unsqueeze(1)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the tokens two positions behind.

        Args:
            hidden: [R, hc_mult * hidden_size] float32, rows of `forward`'s result.

        Returns:
            [R, vocab_size] float32; a row does not depend on the others.
        """
        return head_logits(hidden, self._head, self._norm, self._lm_head, self.config)


def v4_mtp_weight_shapes(config: CompressedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors the draft models need from a checkpoint, besides the target's."""
    hidden = config.hidden_size
    named: dict[str, tuple[int, ...]] = {}
    for index in range(config.num_nextn_predict_layers):
        shapes: dict[str, tuple[int, ...]] = {
            "enorm.weight": (hidden,),
            "hnorm.weight": (hidden,),
            "e_proj.weight": (hidden, hidden),
            "h_proj.weight": (hidden, hidden),
            "norm.weight": (hidden,),
            **HyperHead.shapes(config),
            **DeepseekV4DecoderLayer.shapes(config, config.num_hidden_layers + index),
        }
        named |= {f"{DRAFT_PREFIX}.{index}.{name}": shape for name, shape in shapes.items()}
    return named
