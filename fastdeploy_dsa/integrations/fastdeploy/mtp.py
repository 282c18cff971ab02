"""The draft model of DeepSeek-V3.2 and GLM-5 for FastDeploy's MTP proposer, which has none for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import paddle
from fastdeploy.model_executor.graph_optimization.decorator import support_graph_optimization
from fastdeploy.model_executor.layers.mtp_linear import ParallelEHProjection
from fastdeploy.model_executor.layers.normalization import RMSNorm
from fastdeploy.model_executor.models import deepseek_v3
from fastdeploy.model_executor.models.model_base import ModelForCasualLM
from paddle import Tensor, nn

from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError
from fastdeploy_dsa.integrations.fastdeploy.served_model import served_model
from fastdeploy_dsa.integrations.fastdeploy.sparse_layers import recorded, require_indexers, sparse_layers

DRAFT_ARCHITECTURES = {
    "DeepseekV32ForCausalLM": "DeepseekV32ForCausalLM",
    "GlmMoeDsaForCausalLM": "GlmMTPDsaForCausalLM",
}
"""A target's architecture to the name FastDeploy looks its draft model up by: "Moe" becomes "MTP"."""


class DraftLayer(deepseek_v3.DeepSeekV3DecoderLayer):  # type: ignore[misc]
    """A decoder layer that joins the target's hidden state with the next token; names are the checkpoint's."""

    def __init__(self, fd_config: Any, prefix: str) -> None:
        """As FastDeploy's decoder layer; the prefix ends in the absolute layer id."""
        super().__init__(fd_config, prefix=prefix)
        hidden, eps = fd_config.model_config.hidden_size, fd_config.model_config.rms_norm_eps
        self.enorm = RMSNorm(fd_config, hidden_size=hidden, eps=eps, prefix=f"{prefix}.enorm")
        self.hnorm = RMSNorm(fd_config, hidden_size=hidden, eps=eps, prefix=f"{prefix}.hnorm")
        self.eh_proj = ParallelEHProjection(
            fd_config, num_embeddings=hidden, embedding_dim=2 * hidden, prefix=f"{prefix}.eh_proj"
        )
        self.shared_head = nn.Layer()
        self.shared_head.norm = RMSNorm(fd_config, hidden_size=hidden, eps=eps, prefix=f"{prefix}.shared_head.norm")

    def draft(self, embedded: Tensor, previous_hidden: Tensor, forward_meta: Any) -> Tensor:
        """Hidden states after the layer's norm: what predicts, and what the next iteration takes in.

        Args:
            embedded: [T, hidden_size], of the tokens at the next positions.
            previous_hidden: [T, hidden_size], of the target after its final norm, or of the last iteration.
            forward_meta: Of the step.
        """
        joined = paddle.concat([self.enorm(embedded)[0], self.hnorm(previous_hidden)[0]], axis=-1)
        hidden, residual = self.forward(forward_meta, self.eh_proj(joined), None)
        normed: Tensor = self.shared_head.norm(hidden, residual)[0]
        return normed


@support_graph_optimization
class DraftModel(nn.Layer):
    """The draft layer over the target's embedding; the proposer runs it several times if it is told to."""

    def __init__(self, fd_config: Any = None) -> None:
        """Build the layer; FastDeploy's decorator passes the configuration by keyword."""
        super().__init__()
        served = served_model(fd_config)
        if len(served.layer_ids) != 1:
            raise PluginError(f"FastDeploy's proposer runs 1 MTP layer, got {len(served.layer_ids)}")
        self._name = str(served.layer_ids[0])
        self.embed_tokens = fd_config.speculative_config.sharing_model.model.embed_tokens
        with sparse_layers():
            self.layers = nn.LayerDict({self._name: DraftLayer(fd_config, prefix=f"deepseek_v3.layers.{self._name}")})

    def forward(self, ids_remove_padding: Tensor, previous_hidden_states: Tensor, forward_meta: Any) -> Tensor:
        """As DraftLayer.draft, from token ids."""
        embedded = self.embed_tokens(ids_remove_padding=ids_remove_padding, forward_meta=forward_meta)
        hidden: Tensor = self.layers[self._name].draft(embedded, previous_hidden_states, forward_meta)
        return hidden


class SparseMTPForCausalLM(ModelForCasualLM):  # type: ignore[misc]
    """The draft model: one more decoder layer, with embedding and output head of the target."""

    def __init__(self, fd_config: Any) -> None:
        """Build it next to the target, which the proposer names in speculative_config.sharing_model."""
        super().__init__(fd_config)
        self.fd_config = fd_config
        fd_config.model_config.pretrained_config.prefix_name = "deepseek_v3"
        self.model = DraftModel(fd_config=fd_config)
        self.ori_vocab_size = fd_config.model_config.ori_vocab_size
        self._layer_id = served_model(fd_config).layer_ids[0]

    @classmethod
    def name(cls) -> str:
        """The name FastDeploy's rule produces for GLM-5; for DeepSeek-V3.2 it is the target's own."""
        return DRAFT_ARCHITECTURES["GlmMoeDsaForCausalLM"]

    def set_state_dict(self, state_dict: Any) -> None:
        """Weights come through load_weights alone, as for the target."""

    @paddle.no_grad()
    def load_weights(self, weights_iterator: Iterable[tuple[str, Any]]) -> None:
        """Take the draft layer's weights from the checkpoint's.

        Raises:
            PluginError: The layer's indexer weights are missing.
        """
        seen: set[str] = set()
        deepseek_v3.DeepseekV3ForCausalLM.load_weights(self, recorded(self._own(weights_iterator), seen))
        require_indexers(served_model(self.fd_config), seen)

    def compute_logits(self, hidden_states: Tensor, forward_meta: Any = None) -> Tensor:
        """Logits of the tokens two positions behind, [T, vocab_size] float32."""
        logits: Tensor = self.fd_config.speculative_config.sharing_model.lm_head(hidden_states).astype("float32")
        logits[:, self.ori_vocab_size :] = -float("inf")
        return logits

    def empty_input_forward(self, forward_meta: Any) -> None:
        """Take part in the exchange of experts without tokens of one's own."""
        hidden_size = self.fd_config.model_config.hidden_size
        mlp = self.model.layers[str(self._layer_id)].mlp
        mlp.experts(paddle.empty([1, hidden_size], dtype=paddle.get_default_dtype()), mlp.gate, forward_meta)

    def forward(self, ids_remove_padding: Tensor, previous_hidden_states: Tensor, forward_meta: Any) -> Tensor:
        """As DraftModel.forward."""
        hidden: Tensor = self.model(
            ids_remove_padding=ids_remove_padding,
            previous_hidden_states=previous_hidden_states,
            forward_meta=forward_meta,
        )
        return hidden

    def clear_graph_opt_backend(self) -> None:
        """Drop captured graphs."""
        self.model.clear_graph_opt_backend(fd_config=self.fd_config)

    def _own(self, weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """The draft layer's weights; embedding and head of a checkpoint are the target's again and stay out."""
        layer = f"layers.{self._layer_id}."
        for name, weight in weights:
            if layer in name and "embed_tokens" not in name and "shared_head.head" not in name:
                yield name.replace(".eh_proj.", ".eh_proj.linear."), weight
