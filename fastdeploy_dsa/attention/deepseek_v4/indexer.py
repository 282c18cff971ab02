"""The indexer over compressed entries: which of them every row attends to."""

from __future__ import annotations

from paddle import Tensor

from fastdeploy_dsa.attention.backend import KVCaches
from fastdeploy_dsa.attention.deepseek_v4.backend import DeepseekV4AttentionBackend
from fastdeploy_dsa.attention.deepseek_v4.compressor import Compressor
from fastdeploy_dsa.attention.deepseek_v4.rotations import LayerRotations
from fastdeploy_dsa.attention.deepseek_v4.step import SELECTED_RATIO, CompressedStep
from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.layers import Weights, linear
from fastdeploy_dsa.ops import IndexSelection, index_query_quant, index_select
from fastdeploy_dsa.rotary import Rotation, rotate_last


class EntryIndexer:
    """Scores every visible entry of a row and keeps the index_topk best; positions are entry numbers.

    Its keys come from a compressor of its own, without a norm of theirs (rules S13, S22).
    """

    def __init__(self, weights: Weights, config: CompressedConfig) -> None:
        """Take wq_b, weights_proj and the compressor from weights."""
        self._config = config
        self._wq_b = weights["wq_b.weight"]
        self._weights_proj = weights["weights_proj.weight"]
        self._compressor = Compressor(
            weights.below("compressor"), config, ratio=SELECTED_RATIO, width=config.index_head_dim, kind="index_key"
        )

    def write_keys(
        self,
        x: Tensor,
        *,
        layer_id: int,
        rotation: Rotation,
        step: CompressedStep,
        attn_backend: DeepseekV4AttentionBackend,
        caches: KVCaches,
    ) -> None:
        """Write index states, and the index keys of the windows that the rows close. Args as of a Compressor."""
        self._compressor(
            x,
            rotation=rotation,
            step=step,
            state_cache=caches["idx_comp_state", layer_id],
            entry_cache=caches["indexer", layer_id],
            block_entries=attn_backend.block_size // SELECTED_RATIO,
            cpu=attn_backend.cpu,
        )

    def __call__(
        self,
        x: Tensor,
        q_c: Tensor,
        *,
        layer_id: int,
        rotations: LayerRotations,
        step: CompressedStep,
        attn_backend: DeepseekV4AttentionBackend,
        caches: KVCaches,
    ) -> IndexSelection:
        """Write the rows' index keys, then select for every row among the entries it sees.

        Args:
            x: [num_rows, hidden_size] float32, input of the attention layer.
            q_c: [num_rows, q_lora_rank] float32, the normed query latent.
            layer_id: Absolute id.
            rotations: Of the layer.
            step: The rows.
            attn_backend: Owner of the cache layout.
            caches: Cache tensors by (role, layer id).

        Returns:
            Selection of width index_topk; a row that sees no entry selects none.
        """
        assert rotations.of_windows is not None, "layers with an indexer have entries"  # noqa: S101
        self.write_keys(
            x, layer_id=layer_id, rotation=rotations.of_windows, step=step, attn_backend=attn_backend, caches=caches
        )
        query, folded_weights = self.queries(x, q_c, rotations.of_rows, attn_backend)
        return index_select(
            query=query,
            folded_weights=folded_weights,
            index_cache=caches["indexer", layer_id],
            block_table=step.block_table,
            request_ids=step.request_ids,
            lengths=step.entry_counts[SELECTED_RATIO],
            max_length=max(1, step.max_length // SELECTED_RATIO),
            topk=self._config.index_topk,
            block_size=attn_backend.block_size // SELECTED_RATIO,
            cpu=attn_backend.cpu,
        )

    def queries(
        self, x: Tensor, q_c: Tensor, rotation: Rotation, attn_backend: DeepseekV4AttentionBackend
    ) -> tuple[Tensor, Tensor]:
        """Index queries in the cache's number format and the folded head weights."""
        heads = [-1, self._config.index_n_heads, self._config.index_head_dim]
        query = rotate_last(linear(q_c, self._wq_b).reshape(heads), rotation)
        return index_query_quant(
            query=query,
            weights=linear(x, self._weights_proj),
            cache_format=attn_backend.cache_format,
            cpu=attn_backend.cpu,
        )

    @staticmethod
    def shapes(config: CompressedConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        compressor = Compressor.shapes(config, ratio=SELECTED_RATIO, width=config.index_head_dim)
        return {
            "wq_b.weight": (config.index_n_heads * config.index_head_dim, config.q_lora_rank),
            "weights_proj.weight": (config.index_n_heads, config.hidden_size),
            **{f"compressor.{name}": shape for name, shape in compressor.items()},
        }
