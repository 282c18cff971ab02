"""DeepSeek Sparse Attention: latent attention over the tokens that an indexer selected."""

from __future__ import annotations

from paddle import Tensor

from cache_manager import CacheTensorSpec
from fastdeploy_dsa.attention.backend import KVCaches, Support, kernel_support
from fastdeploy_dsa.attention.mla import MLAAttentionBackend
from fastdeploy_dsa.cache_layout import dsa_specs, owning_layers
from fastdeploy_dsa.config import DsaConfig, ModelConfig
from fastdeploy_dsa.index_schedule import IndexSchedule
from fastdeploy_dsa.ops import CacheFormat, CpuOptions, IndexSelection, index_key_write, layer_write
from fastdeploy_dsa.step import StepMetadata


class DSAAttentionBackend(MLAAttentionBackend):
    """Latent attention with a second tensor, role `indexer`, on the layers that own an indexer.

    Those are the full layers of the schedule and every draft layer (ids from num_hidden_layers on); their entries have
    a third part, the index key [num_rows, index_head_dim]. A selection needs the step's keys: a layer that selects
    calls `write_and_quantise`, and `attend` with what it selected.
    """

    def __init__(
        self,
        *,
        index_head_dim: int,
        index_schedule: IndexSchedule,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        softmax_scale: float,
        cache_format: CacheFormat,
        block_size: int = 64,
        cpu: CpuOptions | None = None,
    ) -> None:
        """As MLAAttentionBackend, for a model with an indexer.

        Args:
            index_head_dim: Width of an index key.
            index_schedule: Which backbone layers own an indexer.
        """
        super().__init__(
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=qk_rope_head_dim,
            softmax_scale=softmax_scale,
            cache_format=cache_format,
            block_size=block_size,
            cpu=cpu,
        )
        self.index_head_dim = index_head_dim
        self.index_schedule = index_schedule

    @classmethod
    def supports(cls, config: ModelConfig, device: str) -> Support:
        """Latent attention with an indexer."""
        if not isinstance(config, DsaConfig):
            return Support(False, "the model has no indexer over latent attention")
        return kernel_support(device)

    def cache_spec(
        self, layer_ids: tuple[int, ...], cache_dtype: str | None = None, kv_cache_quant_type: str | None = None
    ) -> tuple[CacheTensorSpec, ...]:
        """Role `key` on every layer, role `indexer` on those that own one; the format is the backend's own."""
        return dsa_specs(
            cache_format=self.cache_format,
            kv_lora_rank=self.kv_lora_rank,
            qk_rope_head_dim=self.qk_rope_head_dim,
            index_head_dim=self.index_head_dim,
            layer_ids=layer_ids,
            index_schedule=self.index_schedule,
            block_size=self.block_size,
        )

    def owns_indexer(self, layer_id: int) -> bool:
        """Whether the layer selects by itself: a full layer of the schedule, or a draft layer."""
        return layer_id in owning_layers(self.index_schedule, (layer_id,))

    def forward(
        self,
        query: Tensor,
        entries: tuple[Tensor, ...],
        *,
        layer_id: int,
        step: StepMetadata,
        caches: KVCaches,
        selection: IndexSelection | None = None,
    ) -> Tensor:
        """As the base says, over the selection alone.

        Raises:
            ValueError: No selection: attending to everything would be another model.
        """
        if selection is None:
            raise ValueError(f"selection: layer {layer_id} attends to selected tokens and got None")
        return super().forward(query, entries, layer_id=layer_id, step=step, caches=caches, selection=selection)

    def write_entries(
        self, entries: tuple[Tensor, ...], *, layer_id: int, step: StepMetadata, caches: KVCaches
    ) -> None:
        """As the base says: the index key, too, whether or not the layer selects in this step (rule S23).

        Raises:
            ValueError: An index key and no index cache, or the other way round; nothing was written.
        """
        _check_parts(entries, 3 if ("indexer", layer_id) in caches else 2, layer_id)
        super().write_entries(entries[:2], layer_id=layer_id, step=step, caches=caches)
        for key in entries[2:]:
            index_key_write(key=key, cache=caches["indexer", layer_id], slot_mapping=step.slot_mapping, cpu=self.cpu)

    def write_and_quantise(
        self,
        entries: tuple[Tensor, ...],
        index_query: tuple[Tensor, Tensor],
        *,
        layer_id: int,
        step: StepMetadata,
        caches: KVCaches,
    ) -> tuple[Tensor, Tensor]:
        """What write_entries writes, and the index query in the format of the index cache: one launch on a GPU.

        Args:
            entries: (latent, rope, index key).
            index_query: Rotated queries [num_rows, index_n_heads, index_head_dim] and weights of the heads
                [num_rows, index_n_heads] float32.
            layer_id: Absolute id of a layer with an index cache.
            step: The rows.
            caches: Cache tensors by (role, layer id).

        Returns:
            Query and folded weights, as `index_select` takes them.

        Raises:
            ValueError: No index key, or a layer without an index cache; nothing was written.
        """
        _check_parts(entries, 3, layer_id)
        if ("indexer", layer_id) not in caches:
            raise ValueError(f"caches: layer {layer_id} has no index cache")
        latent, rope, key = entries
        query, weights = index_query
        return layer_write(
            latent=latent,
            rope=rope,
            latent_cache=caches["key", layer_id],
            key=key,
            index_cache=caches["indexer", layer_id],
            query=query,
            weights=weights,
            slot_mapping=step.slot_mapping,
            cpu=self.cpu,
        )


def _check_parts(entries: tuple[Tensor, ...], num_parts: int, layer_id: int) -> None:
    if len(entries) != num_parts:
        raise ValueError(f"entries: expected {num_parts} parts on layer {layer_id}, got {len(entries)}")
