"""The attention layers of DeepSeek-V3.2 and GLM-5 in FastDeploy with this package's indexer and attention.

FastDeploy's linear layers, with their quantisation and tensor parallelism, stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import paddle
from fastdeploy.model_executor.models import deepseek_v3
from paddle import Tensor, nn

from fastdeploy_dsa.indexer import K_NORM_EPS, Indexer
from fastdeploy_dsa.integrations.fastdeploy.dsa_backend import FastDeployDSABackend
from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError
from fastdeploy_dsa.integrations.fastdeploy.hiding import replaced
from fastdeploy_dsa.integrations.fastdeploy.served_model import ServedModel, served_model
from fastdeploy_dsa.layers import layer_norm
from fastdeploy_dsa.ops import IndexSelection, index_select
from fastdeploy_dsa.rotary import Rotation, rotate_halves, rotate_interleaved
from fastdeploy_dsa.step import StepMetadata


class KeyNorm(nn.Layer):
    """The index keys' layer norm, with a bias: up to 2.6 FastDeploy has an RMS norm in its place, another model."""

    def __init__(self, index_head_dim: int) -> None:
        """Make weight and bias, under the checkpoint's names."""
        super().__init__()
        ones = nn.initializer.Constant(1.0)
        self.weight = self.create_parameter([index_head_dim], dtype="float32", default_initializer=ones)
        self.bias = self.create_parameter([index_head_dim], dtype="float32", is_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """[T, index_head_dim] to the same, computed in float32."""
        return layer_norm(x.astype("float32"), self.weight, self.bias, K_NORM_EPS).astype(x.dtype)


class SparseIndexer(deepseek_v3.Indexer):  # type: ignore[misc]
    """FastDeploy's indexer layers, which hold the weights, with this package's rotation, scores and selection."""

    def __init__(self, fd_config: Any, layer_id: int, prefix: str = "") -> None:
        """As FastDeploy's, without the buffers that only its own kernels read."""
        super().__init__(fd_config=fd_config, layer_id=layer_id, prefix=prefix)
        for name in ("offsets", "lengths"):
            if hasattr(self, name):
                delattr(self, name)
        self.k_norm = KeyNorm(self.index_head_dim)
        self._rotate = rotate_interleaved if served_model(fd_config).config.indexer_rope_interleave else rotate_halves

    def keys(self, hidden: Tensor, rotation: Rotation) -> Tensor:
        """Index keys of the rows, [T, index_head_dim], from the input of the attention layer."""
        return self._rotate_first(self.k_norm(self.wk(hidden)), rotation)

    def queries(self, hidden: Tensor, q_c: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Index queries [T, index_n_heads, index_head_dim], and the weights of their heads, float32.

        Args:
            hidden: [T, hidden_size], input of the attention layer.
            q_c: [T, q_lora_rank], the normed query latent.
            rotation: Of the rows.
        """
        query = self.wq_b(q_c).reshape([-1, self.index_n_heads, self.index_head_dim])
        return self._rotate_first(query, rotation), self.weights_proj(hidden).astype("float32")

    def select(
        self, *, query: Tensor, folded_weights: Tensor, step: StepMetadata, index_cache: Tensor
    ) -> IndexSelection:
        """Select for every row among everything it sees; the step's keys are written.

        Args:
            query: In the number format of the cache.
            folded_weights: [T, index_n_heads] float32.
            step: The rows.
            index_cache: The layer's index keys.

        Returns:
            Selection of width index_topk: the same on every rank of a tensor-parallel group, because its inputs are.
        """
        return index_select(
            query=query,
            folded_weights=folded_weights,
            index_cache=index_cache,
            block_table=step.block_table,
            request_ids=step.request_ids,
            lengths=step.lengths,
            max_length=step.max_length,
            topk=self.index_topk,
        )

    def _rotate_first(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Rotate the first rope_dim numbers (latent attention rotates the last ones)."""
        rotated = rotate_in_float32(self._rotate, x[..., : self.rope_dim], rotation)
        return rotated if self.rope_dim == x.shape[-1] else paddle.concat([rotated, x[..., self.rope_dim :]], axis=-1)


class SparseAttention(deepseek_v3.DeepseekV32DSAAttention):  # type: ignore[misc]
    """FastDeploy's projections around this package's indexer and attention.

    A layer that shares another's selection has no indexer, no weights for one and no index cache.
    """

    def __init__(self, fd_config: Any, layer_id: int, prefix: str = "") -> None:
        """As FastDeploy's, without its rotation tables: two for every layer, rounded to the model's dtype."""
        served = served_model(fd_config)
        absolute_id = served.absolute_id(layer_id)
        indexer = SparseIndexer if served.config.owns_indexer(absolute_id) else no_indexer
        # rope_scaling: as in the backend. layer_types: FastDeploy reads an entry for every layer, also for a draft's.
        with ExitStack() as stack:
            stack.enter_context(replaced(deepseek_v3, Indexer=indexer))
            stack.enter_context(replaced(fd_config.model_config, rope_scaling=None))
            if hasattr(fd_config.model_config, "layer_types"):
                stack.enter_context(replaced(fd_config.model_config, layer_types=["full_attention"] * (layer_id + 1)))
            super().__init__(fd_config, layer_id, prefix)
        self.rotary_emb = self.indexer_rotary_emb = None
        self.dsa_attn.selects_slots = True
        self._layer_id = absolute_id
        self._is_first = absolute_id == served.layer_ids[0]
        self._selecting_layer = (
            absolute_id if indexer is SparseIndexer else served.config.index_schedule.source(absolute_id)
        )

    def forward(self, forward_meta: Any, hidden_states: Tensor, *_positions: Any) -> Tensor:
        """As FastDeploy's: [T, hidden_size] to the same; versions up to 2.6 also pass positions, which rows has."""
        backend: FastDeployDSABackend = forward_meta.attn_backend
        rows = backend.begin_rows(forward_meta) if self._is_first else backend.rows
        counter = getattr(forward_meta, "layer_done_counter", None)
        if counter is not None:  # before the first access to any cache tensor of the layer
            counter.wait_for_layer(self._layer_id)
        projected = self.qkv_a_proj_with_mqa(hidden_states)
        q_c, latent, rope = projected.split([self.q_lora_rank, self.kv_lora_rank, self.qk_rope_head_dim], axis=-1)
        q_c = self.q_a_layernorm(q_c)[0]
        latent = self.kv_a_layernorm(latent.contiguous())[0]
        rope = rotate_in_float32(rotate_interleaved, rope, rows.rotation)
        selection = self._write_and_select(hidden_states, q_c, (latent, rope), backend)
        attended = self.dsa_attn(
            q=self._queries(q_c, rows.rotation),
            k=None,
            v=selection.slot_ids.unsqueeze(1),
            qkv=None,
            compressed_kv=None,  # written already, with the index key
            k_pe=None,
            forward_meta=forward_meta,
        )
        values = self.kv_b_proj_bmm(attended.transpose([1, 0, 2]).contiguous(), proj_type="v").transpose([1, 0, 2])
        out: Tensor = self.o_proj(values.reshape([-1, self.num_attention_heads_tp * self.v_head_dim]))
        return out

    def _write_and_select(
        self, hidden_states: Tensor, q_c: Tensor, latent_row: tuple[Tensor, Tensor], backend: FastDeployDSABackend
    ) -> IndexSelection:
        """Write what the rows add to the layer's caches; the selection is the layer's own or the one it shares."""
        rows, layer_id = backend.rows, self._layer_id
        step, caches = rows.step, rows.caches
        if self.indexer is None:
            backend.owner.write_entries(latent_row, layer_id=layer_id, step=step, caches=caches)
        else:
            query, folded_weights = backend.owner.write_and_quantise(
                (*latent_row, self.indexer.keys(hidden_states, rows.rotation)),
                self.indexer.queries(hidden_states, q_c, rows.rotation),
                layer_id=layer_id,
                step=step,
                caches=caches,
            )
            rows.selections[layer_id] = self.indexer.select(
                query=query, folded_weights=folded_weights, step=step, index_cache=caches["indexer", layer_id]
            )
        return rows.selections[self._selecting_layer]

    def _queries(self, q_c: Tensor, rotation: Rotation) -> Tensor:
        """Absorbed queries [T, heads of this rank, kv_lora_rank + qk_rope_head_dim]."""
        query = self.q_b_proj(q_c).reshape([-1, self.num_attention_heads_tp, self.qk_head_dim])
        nope, rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], axis=-1)
        latent = self.kv_b_proj_bmm(nope.transpose([1, 0, 2]).contiguous(), proj_type="k").transpose([1, 0, 2])
        return paddle.concat([latent, rotate_in_float32(rotate_interleaved, rope, rotation)], axis=-1)


def no_indexer(**_arguments: Any) -> None:
    """Stands in for the indexer class where a layer has none."""


@contextmanager
def sparse_layers() -> Iterator[None]:
    """Let decoder layers that are constructed inside the block have this package's attention."""
    with replaced(deepseek_v3, DeepseekV32DSAAttention=SparseAttention):
        yield


def require_indexers(served: ServedModel, names: set[str]) -> None:
    """Refuse a checkpoint without the indexer weights of a layer that selects.

    Raises:
        PluginError: Names the first such layer (E13).
    """
    for layer in served.layer_ids:
        if not served.config.owns_indexer(layer):
            continue
        missing = [
            name
            for name in Indexer.shapes(served.config)
            if not any(found.endswith(f"layers.{layer}.self_attn.indexer.{name}") for found in names)
        ]
        if missing:
            raise PluginError(
                f"E13: layer {layer} selects by itself, but the checkpoint has no {missing[0]} of its indexer: "
                "the schedule belongs to another checkpoint"
            )


def rotate_in_float32(rotate: Callable[[Tensor, Rotation], Tensor], x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate with float32 tables and round once, to the dtype of x."""
    return rotate(x.astype("float32"), rotation).astype(x.dtype)


def recorded(weights: Iterable[tuple[str, Any]], seen: set[str]) -> Iterator[tuple[str, Any]]:
    """The same weights; their names are in seen afterwards."""
    for name, weight in weights:
        seen.add(name)
        yield name, weight
