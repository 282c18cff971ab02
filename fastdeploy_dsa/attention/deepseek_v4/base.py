"""DeepSeek-V4's attention layer: what is the same on every platform, and what a platform has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import paddle
from paddle import Tensor

from fastdeploy_dsa.attention.backend import KVCaches, Support
from fastdeploy_dsa.attention.deepseek_v4.backend import DeepseekV4AttentionBackend
from fastdeploy_dsa.attention.deepseek_v4.compressor import Compressor
from fastdeploy_dsa.attention.deepseek_v4.indexer import EntryIndexer
from fastdeploy_dsa.attention.deepseek_v4.o_proj import grouped_o_proj
from fastdeploy_dsa.attention.deepseek_v4.rotations import LayerRotations
from fastdeploy_dsa.attention.deepseek_v4.step import LISTED_RATIO, SELECTED_RATIO, CompressedStep
from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.layers import Weights, linear, rms_norm
from fastdeploy_dsa.ops import CacheFormat, IndexSelection
from fastdeploy_dsa.rotary import Rotation, rotate_last


class DeepseekV4Attention(ABC):
    """Attention over a window and compressed entries (rules S11 to S13, S25 to S29, S43 to S50).

    A platform subclass says where it serves, how many heads its kernel takes and how rows attend; it overrides nothing
    else without a reason of its own. Source: DeepSeek-V4 technical report.

    Attributes:
        backend_cls: Owner of the cache layout.
        cache_formats: Number formats of the caches that the class serves.
        indexer: None on layers that do not select by themselves.
    """

    backend_cls: ClassVar[type[DeepseekV4AttentionBackend]] = DeepseekV4AttentionBackend
    cache_formats: ClassVar[tuple[CacheFormat, ...]]

    def __init__(self, weights: Weights, config: CompressedConfig, layer_id: int) -> None:
        """Take the projections, and compressor and indexer where the layer has them, from weights."""
        self._config = config
        self._layer_id = layer_id
        self._ratio = config.ratio(layer_id)
        self._wq_a_wkv = paddle.concat([weights["wq_a.weight"], weights["wkv.weight"]])
        self._q_norm = weights["q_norm.weight"]
        self._kv_norm = weights["kv_norm.weight"]
        self._wq_b = weights["wq_b.weight"]
        self._unweighted = paddle.ones([config.head_dim], dtype="float32")
        group_width = config.num_attention_heads // config.o_groups * config.head_dim
        self._wo_a = weights["wo_a.weight"].reshape([config.o_groups, config.o_lora_rank, group_width])
        self._wo_b = weights["wo_b.weight"]
        self._num_padding_heads = self.get_padded_num_q_heads(config.num_attention_heads) - config.num_attention_heads
        no_sinks = paddle.full([self._num_padding_heads], float("-inf"), dtype="float32")
        self._sinks = paddle.concat([weights["attn_sink"], no_sinks])
        self._compressor = None
        if self._ratio > 1:
            self._compressor = Compressor(
                weights.below("compressor"), config, ratio=self._ratio, width=config.head_dim, kind="row"
            )
        self.indexer = None
        if config.owns_indexer(layer_id):
            self.indexer = self._get_indexer_cls()(weights.below("indexer"), config)

    @classmethod
    @abstractmethod
    def supports(cls, config: CompressedConfig, device: str, cache_format: CacheFormat) -> Support:
        """Whether this class serves the model on the device with caches of the format."""

    @classmethod
    @abstractmethod
    def get_padded_num_q_heads(cls, num_heads: int) -> int:
        """Heads that the kernel is given for so many: num_heads or more.

        Raises:
            ValueError: The kernel has no variant for so many.
        """

    @abstractmethod
    def forward_mqa(
        self,
        q: Tensor,
        kv: Tensor,
        *,
        step: CompressedStep,
        attn_backend: DeepseekV4AttentionBackend,
        caches: KVCaches,
        selection: IndexSelection | None,
    ) -> Tensor:
        """Write the rows' window rows, then attend to windows and selected entries, with sinks (rules S25, S26).

        Args:
            q: [num_rows, padded heads, head_dim] float32, rotated.
            kv: [num_rows, head_dim] float32, rotated.
            step: The rows.
            attn_backend: Owner of the cache layout.
            caches: Cache tensors by (role, layer id).
            selection: Entries of the layer; None: it sees none.

        Returns:
            [num_rows, padded heads, head_dim] float32, in memory of its own.
        """

    def forward(
        self,
        x: Tensor,
        *,
        rotations: LayerRotations,
        step: CompressedStep,
        attn_backend: DeepseekV4AttentionBackend,
        caches: KVCaches,
        selection: IndexSelection | None = None,
    ) -> tuple[Tensor, IndexSelection | None]:
        """The layer on the rows of a step, which writes all its caches.

        Args:
            x: [num_rows, hidden_size] float32.
            rotations: Of the layer.
            step: The rows.
            attn_backend: Owner of the cache layout.
            caches: Cache tensors by (role, layer id).
            selection: Of the nearest layer below that selects entries by itself.

        Returns:
            [num_rows, hidden_size] and the selection for layers above: the layer's own, or the one it was given.

        Raises:
            ValueError: The layer shares a selection and got none.
        """
        q_c, kv = self._split_qkv_and_norm(x, rotations.of_rows)
        q = linear(q_c, self._wq_b).reshape([-1, self._config.head_dim])
        q = rms_norm(q, self._unweighted, self._config.rms_norm_eps)
        q = rotate_last(q.reshape([x.shape[0], -1, self._config.head_dim]), rotations.of_rows)
        self._write_entries(x, rotations=rotations, step=step, attn_backend=attn_backend, caches=caches)
        if self.indexer is not None:
            selection = self.indexer(
                x,
                q_c,
                layer_id=self._layer_id,
                rotations=rotations,
                step=step,
                attn_backend=attn_backend,
                caches=caches,
            )
        out = self.forward_mqa(
            self._padded(q),
            kv,
            step=step,
            attn_backend=attn_backend,
            caches=caches,
            selection=self._entries(step, selection),
        )
        live = out[:, : self._config.num_attention_heads].contiguous() if self._num_padding_heads else out
        return self._o_proj(live, rotations.of_rows, attn_backend), selection

    def write_rows(
        self,
        x: Tensor,
        *,
        rotations: LayerRotations,
        step: CompressedStep,
        attn_backend: DeepseekV4AttentionBackend,
        caches: KVCaches,
    ) -> None:
        """What `forward` writes in a layer that sees the window only, without its result. Args as of forward."""
        _, kv = self._split_qkv_and_norm(x, rotations.of_rows)
        attn_backend.write_rows(kv, layer_id=self._layer_id, step=step, caches=caches)

    def _split_qkv_and_norm(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """The normed query latent [num_rows, q_lora_rank] and the rotated row [num_rows, head_dim]."""
        config = self._config
        joined = linear(x, self._wq_a_wkv)
        q_c = rms_norm(joined[:, : config.q_lora_rank], self._q_norm, config.rms_norm_eps)
        kv = rms_norm(joined[:, config.q_lora_rank :], self._kv_norm, config.rms_norm_eps)
        return q_c, rotate_last(kv, rotation)

    def _o_proj(self, o: Tensor, rotation: Rotation, attn_backend: DeepseekV4AttentionBackend) -> Tensor:
        """Undo the rotation of the results of the live heads, and project them: [num_rows, hidden_size].

        Weights are float32 on every platform, so the product is the same on all of them. One with a product of its own
        overrides this.

        Args:
            o: [num_rows, num_heads, head_dim] float32, the method's own to change.
            rotation: Of the rows.
            attn_backend: For its options.
        """
        return grouped_o_proj(o, rotation=rotation, wo_a=self._wo_a, wo_b=self._wo_b, cpu=attn_backend.cpu)

    def _write_entries(
        self,
        x: Tensor,
        *,
        rotations: LayerRotations,
        step: CompressedStep,
        attn_backend: DeepseekV4AttentionBackend,
        caches: KVCaches,
    ) -> None:
        if self._compressor is None:
            return
        assert rotations.of_windows is not None, "layers with a compressor have entries"  # noqa: S101
        self._compressor(
            x,
            rotation=rotations.of_windows,
            step=step,
            state_cache=caches["comp_state", self._layer_id],
            entry_cache=caches["key", self._layer_id],
            block_entries=attn_backend.block_size // self._ratio,
            cpu=attn_backend.cpu,
        )

    def _entries(self, step: CompressedStep, selection: IndexSelection | None) -> IndexSelection | None:
        """What the layer attends to besides the window."""
        if self._ratio == LISTED_RATIO:
            return step.all_entries
        if self._ratio == SELECTED_RATIO:
            if selection is None:
                raise ValueError(f"selection: layer {self._layer_id} owns no indexer and got no selection")
            return selection
        return None

    def _padded(self, q: Tensor) -> Tensor:
        if not self._num_padding_heads:
            return q
        nothing = paddle.zeros([q.shape[0], self._num_padding_heads, q.shape[2]], dtype=q.dtype)
        return paddle.concat([q, nothing], axis=1)

    @classmethod
    def _get_indexer_cls(cls) -> type[EntryIndexer]:
        return EntryIndexer

    @staticmethod
    def shapes(config: CompressedConfig, layer_id: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        heads, hidden, width = config.num_attention_heads, config.hidden_size, config.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "wq_a.weight": (config.q_lora_rank, hidden),
            "q_norm.weight": (config.q_lora_rank,),
            "wq_b.weight": (heads * width, config.q_lora_rank),
            "wkv.weight": (width, hidden),
            "kv_norm.weight": (width,),
            "wo_a.weight": (config.o_groups * config.o_lora_rank, heads // config.o_groups * width),
            "wo_b.weight": (hidden, config.o_groups * config.o_lora_rank),
            "attn_sink": (heads,),
        }
        if config.ratio(layer_id) > 1:
            compressor = Compressor.shapes(config, ratio=config.ratio(layer_id), width=width)
            shapes |= {f"compressor.{name}": shape for name, shape in compressor.items()}
        if config.owns_indexer(layer_id):
            shapes |= {f"indexer.{name}": shape for name, shape in EntryIndexer.shapes(config).items()}
        return shapes
