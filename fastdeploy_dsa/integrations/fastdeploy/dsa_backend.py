"""FastDeploy's DSA_ATTN backend over this package's: FastDeploy imports this module when the backend is chosen."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import paddle
from fastdeploy import envs
from fastdeploy.model_executor.layers.attention import dsa_attention_backend
from paddle import Tensor

from cache_manager import ordered_keys
from fastdeploy_dsa.attention.dsa import DSAAttentionBackend
from fastdeploy_dsa.device import CPU, refusal
from fastdeploy_dsa.index_schedule import IndexSchedule
from fastdeploy_dsa.integrations.fastdeploy.cache_methods import CacheMethods
from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError
from fastdeploy_dsa.integrations.fastdeploy.hiding import replaced
from fastdeploy_dsa.integrations.fastdeploy.served_model import ServedModel, served_model
from fastdeploy_dsa.integrations.fastdeploy.step_rows import (
    LONGEST_CONTEXT,
    StepRows,
    cache_tensors,
    step_metadata,
    write_max_lengths,
)
from fastdeploy_dsa.ops import CacheFormat, IndexSelection
from fastdeploy_dsa.rotary import RotaryTable

ROLES = ("key", "indexer")


class FastDeployDSABackend(CacheMethods, dsa_attention_backend.DSAAttentionBackend):  # type: ignore[misc]
    """A subclass of FastDeploy's, because its runner asks for the type before it sets up the step.

    Attributes:
        served: The model, or the draft model.
    """

    # FastDeploy's tests make backends without a constructor and set the sizes alone.
    index_schedule: IndexSchedule = IndexSchedule("")
    cache_format: CacheFormat = "fp8"
    attn_softmax_scale: float = 1.0

    enable_ids_reorder: ClassVar[bool] = False

    def __init__(
        self,
        fd_config: Any,
        kv_num_heads: int,
        num_heads: int,
        head_dim: int,
        encoder_block_shape_q: int = -1,
        decoder_block_shape_q: int = -1,
    ) -> None:
        """As every backend of FastDeploy.

        Raises:
            PluginError: The model or a setting beside it is not served.
        """
        self.served = served_model(fd_config)
        _refuse_settings(fd_config, self.served)
        # FastDeploy's constructor reads keys of rope_scaling that only some rope types have; the scale is ours.
        with replaced(fd_config.model_config, rope_scaling=None):
            super().__init__(
                fd_config, kv_num_heads, num_heads, head_dim, encoder_block_shape_q, decoder_block_shape_q
            )
        config = self.served.config
        self.attn_softmax_scale = config.softmax_scale
        self.index_schedule = config.index_schedule
        self.cache_format = self.served.settings.resolved_cache_format(_device())
        self._rotary = RotaryTable(config.rope, config.qk_rope_head_dim)
        self._rotary.lookup(paddle.zeros([1], "int32"), self.max_seq_len)  # it does not grow, or move, in a graph
        self._keys = ordered_keys(self.cache_spec(self.served.layer_ids))
        self._rows: StepRows | None = None

    @cached_property
    def owner(self) -> DSAAttentionBackend:
        """This package's backend of the same sizes."""
        return DSAAttentionBackend(
            index_head_dim=self.index_head_dim,
            index_schedule=self.index_schedule,
            kv_lora_rank=self.kv_lora_rank,
            qk_rope_head_dim=self.qk_rope_head_dim,
            softmax_scale=self.attn_softmax_scale,
            cache_format=self.cache_format,
            block_size=self.block_size,
        )

    def init_attention_metadata(self, forward_meta: Any) -> None:
        """Begin a step: FastDeploy calls it once per step, before any layer."""
        self._rows = None
        if _device() == CPU:
            write_max_lengths(forward_meta)
            self.attention_metadata = dsa_attention_backend.DSAAttentionMetadata()
        else:
            super().init_attention_metadata(forward_meta)

    def begin_rows(self, forward_meta: Any) -> StepRows:
        """Make the rows of a run of the model; its first layer calls it.

        FastDeploy decides whether a draft step is captured after it began the step, and runs a model several times
        before it captures it. Made inside the model, the rows are part of the graph and right at every replay.
        """
        step = step_metadata(forward_meta, block_size=self.block_size, max_length=self._longest_context(forward_meta))
        self._rows = StepRows(
            step=step,
            rotation=self._rotary.lookup(step.positions, step.max_length),
            counts=paddle.clip(step.lengths, max=self.index_topk),
            caches=cache_tensors(forward_meta.caches, self._keys, ROLES),
        )
        return self._rows

    @property
    def rows(self) -> StepRows:
        """What the first layer made, for all others.

        Raises:
            RuntimeError: No layer has made it since the step began.
        """
        if self._rows is None:
            raise RuntimeError("the first layer of the model did not run in this step: it makes the rows")
        return self._rows

    def forward_mixed(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        qkv: Tensor | None,
        compressed_kv: Tensor | None,
        k_pe: Tensor | None,
        layer: Any,
        forward_meta: Any,
    ) -> Tensor:
        """Attend to the selected slots; the layer has written the step's rows, because its selection needed them.

        Args:
            q: [T, heads, kv_lora_rank + qk_rope_head_dim], absorbed and rotated; any number of heads.
            k: Not read.
            v: [T, 1, index_topk] int32, slots of this package's indexer.
            qkv: Not read.
            compressed_kv: Not read.
            k_pe: Not read.
            layer: FastDeploy's Attention layer.
            forward_meta: Of the step.

        Returns:
            [T, heads, kv_lora_rank].

        Raises:
            PluginError: The layer belongs to FastDeploy's own model, whose indices are no slots.
        """
        if not getattr(layer, "selects_slots", False):
            raise PluginError(
                f"layer {layer.layer_id} is FastDeploy's own, not the plug-in's: the model class was registered "
                "after the plug-in, or FD_PLUGINS differs between processes"
            )
        rows = self.rows
        slot_ids = v.reshape([v.shape[0], v.shape[-1]])
        return self.owner.attend(
            q,
            layer_id=self.served.absolute_id(layer.layer_id),
            caches=rows.caches,
            selection=IndexSelection(positions=slot_ids, slot_ids=slot_ids, counts=rows.counts),
        )

    def _longest_context(self, forward_meta: Any) -> int:
        """A host number that bounds the contexts; a graph is captured for the longest there may be."""
        if forward_meta.step_use_cudagraph:
            return int(self.max_seq_len)
        return max(1, int(forward_meta.max_len_tensor_cpu[LONGEST_CONTEXT]))


def _device() -> str:
    return str(paddle.device.get_device())


def _refuse_settings(fd_config: Any, served: ServedModel) -> None:
    """Settings of FastDeploy that this backend cannot keep its promises with."""
    reason = refusal(_device())
    if reason:
        raise PluginError(reason)
    role = getattr(fd_config.scheduler_config, "splitwise_role", "mixed")
    if role != "mixed" or fd_config.parallel_config.pd_disaggregation_mode not in ("None", None):
        raise PluginError(
            "disaggregated prefill and decoding does not move the index cache: expected --splitwise-role mixed, "
            f"got {role}"
        )
    if str(fd_config.model_config.dtype) not in ("bfloat16", "float32"):
        raise PluginError(f"--dtype: expected bfloat16 or float32, got {fd_config.model_config.dtype}")
    if _device() == CPU or envs.ENABLE_V1_KVCACHE_MANAGER:
        return
    if served.is_draft:
        raise PluginError(
            "--speculative-config mtp needs ENABLE_V1_KVCACHE_MANAGER=1: the v0 manager gives it no index cache"
        )
    if served.settings.cache_format not in (None, "fp8"):
        raise PluginError(
            f"cache_format {served.settings.cache_format} needs ENABLE_V1_KVCACHE_MANAGER=1: the v0 manager makes fp8"
        )
