"""The lightning indexer: which tokens of its context every row attends to."""

from __future__ import annotations

import paddle
from paddle import Tensor

from fastdeploy_dsa.config import DsaConfig
from fastdeploy_dsa.layers import Weights, layer_norm, linear
from fastdeploy_dsa.ops import CpuOptions, IndexSelection, index_select
from fastdeploy_dsa.rotary import Rotation, rotate_halves, rotate_interleaved
from fastdeploy_dsa.step import StepMetadata

# Fixed by the published models, whatever their rms_norm_eps says (rule S9).
K_NORM_EPS = 1e-6


class Indexer:
    """Scores every visible token of a row and keeps the index_topk best.

    Source: DeepSeek-V3.2 technical report, section 2; rules S18 to S23.
    """

    def __init__(self, weights: Weights, config: DsaConfig) -> None:
        """Take wq_b, wk, k_norm and weights_proj from weights."""
        self._config = config
        self._wq_b = weights["wq_b.weight"]
        self._wk = weights["wk.weight"]
        self._k_norm_weight = weights["k_norm.weight"]
        self._k_norm_bias = weights["k_norm.bias"]
        self._weights_proj = weights["weights_proj.weight"]

    def keys(self, hidden: Tensor, rotation: Rotation) -> Tensor:
        """Index keys of the rows, [num_rows, index_head_dim] float32, from the input of the attention layer."""
        normed = layer_norm(linear(hidden, self._wk), self._k_norm_weight, self._k_norm_bias, K_NORM_EPS)
        return self._rotate_first(normed, rotation)

    def queries(self, hidden: Tensor, q_c: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Index queries of the rows, and the weights of their heads.

        Args:
            hidden: [num_rows, hidden_size] float32, input of the attention layer.
            q_c: [num_rows, q_lora_rank] float32, the normed query latent.
            rotation: Of the rows.

        Returns:
            [num_rows, index_n_heads, index_head_dim] and [num_rows, index_n_heads], float32.
        """
        heads = [-1, self._config.index_n_heads, self._config.index_head_dim]
        query = self._rotate_first(linear(q_c, self._wq_b).reshape(heads), rotation)
        return query, linear(hidden, self._weights_proj)

    def select(
        self, *, query: Tensor, folded_weights: Tensor, step: StepMetadata, index_cache: Tensor, cpu: CpuOptions
    ) -> IndexSelection:
        """Select for every row among everything it sees, the step's own keys included.

        Args:
            query: The rows' queries in the number format of the cache.
            folded_weights: [num_rows, index_n_heads] float32, from `layer_write`, as the query.
            step: The rows.
            index_cache: The layer's index keys, with those of the step.
            cpu: Options of the CPU ops.

        Returns:
            Selection of width index_topk.
        """
        return index_select(
            query=query,
            folded_weights=folded_weights,
            index_cache=index_cache,
            block_table=step.block_table,
            request_ids=step.request_ids,
            lengths=step.lengths,
            max_length=step.max_length,
            topk=self._config.index_topk,
            cpu=cpu,
        )

    def _rotate_first(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Rotate the first qk_rope_head_dim numbers (latent attention rotates the last ones)."""
        rotary_dim = self._config.qk_rope_head_dim
        rotate = rotate_interleaved if self._config.indexer_rope_interleave else rotate_halves
        rotated = rotate(x[..., :rotary_dim], rotation)
        return rotated if rotary_dim == x.shape[-1] else paddle.concat([rotated, x[..., rotary_dim:]], axis=-1)

    @staticmethod
    def shapes(config: DsaConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        return {
            "wq_b.weight": (config.index_n_heads * config.index_head_dim, config.q_lora_rank),
            "wk.weight": (config.index_head_dim, config.hidden_size),
            "k_norm.weight": (config.index_head_dim,),
            "k_norm.bias": (config.index_head_dim,),
            "weights_proj.weight": (config.index_n_heads, config.hidden_size),
        }
