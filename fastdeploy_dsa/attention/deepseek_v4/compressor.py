"""From hidden states to compressed entries: one for every closed window of tokens."""

from __future__ import annotations

import paddle
from paddle import Tensor

from fastdeploy_dsa.attention.deepseek_v4.step import CompressedStep
from fastdeploy_dsa.compressed_cache_layout import OVERLAP, STATE_POOL
from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.layers import Weights, linear
from fastdeploy_dsa.ops import CpuOptions, EntryKind, kv_compress
from fastdeploy_dsa.rotary import Rotation


class Compressor:
    """Keeps the state of every token and makes an entry of every window that a token closes (rules S14 to S18)."""

    def __init__(self, weights: Weights, config: CompressedConfig, *, ratio: int, width: int, kind: EntryKind) -> None:
        """Take wkv, wgate, ape and norm from weights.

        Args:
            weights: Of the compressor.
            config: The model.
            ratio: Tokens of a window.
            width: Numbers of an entry.
            kind: How an entry is stored: as a row to attend to, or as an index key.
        """
        self._ratio = ratio
        self._kind: EntryKind = kind
        self._eps = config.rms_norm_eps
        self._rope_dim = config.qk_rope_head_dim
        self._width = width
        self._wkv_wgate = paddle.concat([weights["wkv.weight"], weights["wgate.weight"]])
        self._ape = weights["ape"]
        self._norm = weights["norm.weight"]

    def __call__(
        self,
        x: Tensor,
        *,
        rotation: Rotation,
        step: CompressedStep,
        state_cache: Tensor,
        entry_cache: Tensor,
        block_entries: int,
        cpu: CpuOptions,
    ) -> None:
        """Write the states of all rows, then the entries of the windows that they close.

        Args:
            x: [num_rows, hidden_size] float32, input of the attention layer.
            rotation: Of every row's window.
            step: The rows.
            state_cache: [num_blocks, block_tokens, state] float32, written in place.
            entry_cache: The layer's entries or index keys, written in place.
            block_entries: Entries of a block.
            cpu: Options of the CPU ops.
        """
        kv_compress(
            kv_score=linear(x, self._wkv_wgate),
            ape=self._ape,
            norm_weight=self._norm,
            eps=self._eps,
            cos=rotation.cos,
            sin=rotation.sin,
            state_cache=state_cache,
            state_table=step.window_tables[STATE_POOL[self._ratio]],
            positions=step.positions,
            request_ids=step.request_ids,
            lengths=step.lengths,
            entry_cache=entry_cache,
            entry_slots=step.entry_mapping[self._ratio],
            ratio=self._ratio,
            overlap=OVERLAP[self._ratio],
            rope_dim=self._rope_dim,
            block_rows=block_entries,
            entry_kind=self._kind,
            cpu=cpu,
        )

    @staticmethod
    def shapes(config: CompressedConfig, *, ratio: int, width: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        numbers = OVERLAP[ratio] * width
        return {
            "wkv.weight": (numbers, config.hidden_size),
            "wgate.weight": (numbers, config.hidden_size),
            "ape": (ratio, numbers),
            "norm.weight": (width,),
        }
