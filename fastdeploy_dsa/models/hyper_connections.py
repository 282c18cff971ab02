"""Residual streams: several copies of the hidden state, mixed around every layer.

Source: manifold-constrained hyper-connections (mHC, arXiv 2512.24880) as DeepSeek-V4 applies them.
"""

from __future__ import annotations

from typing import NamedTuple

import paddle
from paddle import Tensor

from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.layers import Weights, linear, rms_norm


class StreamMixing(NamedTuple):
    """How a sublayer's result and the streams before it make the streams behind it.

    Attributes:
        post: [rows, streams], what every stream takes of the result.
        residual: [rows, streams, streams], doubly stochastic: what a stream (second) takes of those before (first).
    """

    post: Tensor
    residual: Tensor

    def joined(self, streams: Tensor, result: Tensor) -> Tensor:
        """streams [rows, streams, hidden_size] and result [rows, hidden_size] to the streams behind the sublayer."""
        behind = self.post.unsqueeze(-1) * result.unsqueeze(1)
        # One stream after another, so that the order of the sums does not depend on a matrix product's kernel.
        for before in range(streams.shape[1]):
            behind += self.residual[:, before].unsqueeze(-1) * streams[:, before].unsqueeze(1)
        return behind


class HyperConnection:
    """In front of a sublayer: one hidden state from the streams, and how the result goes back into them."""

    def __init__(self, weights: Weights, config: CompressedConfig, name: str) -> None:
        """Take <name>_fn, <name>_base and <name>_scale from weights."""
        self._streams = config.hc_mult
        self._iters = config.hc_sinkhorn_iters
        self._eps = config.hc_eps
        self._norm_eps = config.rms_norm_eps
        self._fn = weights[f"{name}_fn"]
        scale = weights[f"{name}_scale"]
        widths = (self._streams, self._streams, self._streams**2)
        self._scale = paddle.concat([scale[i].expand([width]) for i, width in enumerate(widths)])
        self._base = weights[f"{name}_base"]
        self._unweighted = paddle.ones([self._fn.shape[1]], dtype="float32")

    def __call__(self, streams: Tensor) -> tuple[Tensor, StreamMixing]:
        """From streams [rows, streams, hidden_size]: the sublayer's input [rows, hidden_size], and what follows it."""
        count = self._streams
        mix = normed_mix(streams, self._fn, self._unweighted, self._norm_eps) * self._scale + self._base
        pre = paddle.nn.functional.sigmoid(mix[:, :count]) + self._eps
        post = 2.0 * paddle.nn.functional.sigmoid(mix[:, count : 2 * count])
        residual = self._doubly_stochastic(mix[:, 2 * count :].reshape([-1, count, count]))
        return weighted_sum(streams, pre), StreamMixing(post, residual)

    def _doubly_stochastic(self, logits: Tensor) -> Tensor:
        """Sinkhorn's rounds: rows of the softmax, then columns and rows in turn are made to add up to 1."""
        eps = self._eps
        odds = paddle.exp(logits - logits.max(axis=-1, keepdim=True))
        mixing = odds / odds.sum(axis=-1, keepdim=True) + eps
        mixing = mixing / (mixing.sum(axis=-2, keepdim=True) + eps)
        for _ in range(self._iters - 1):
            mixing = mixing / (mixing.sum(axis=-1, keepdim=True) + eps)
            mixing = mixing / (mixing.sum(axis=-2, keepdim=True) + eps)
        return mixing

    @staticmethod
    def shapes(config: CompressedConfig, name: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        mixed = (2 + config.hc_mult) * config.hc_mult
        return {
            f"{name}_fn": (mixed, config.hc_mult * config.hidden_size),
            f"{name}_base": (mixed,),
            f"{name}_scale": (3,),
        }


class HyperHead:
    """Behind the last layer: one hidden state from the streams."""

    def __init__(self, weights: Weights, config: CompressedConfig) -> None:
        """Take hc_head_fn, hc_head_base and hc_head_scale from weights."""
        self._eps = config.hc_eps
        self._norm_eps = config.rms_norm_eps
        self._fn = weights["hc_head_fn"]
        self._base = weights["hc_head_base"]
        self._scale = weights["hc_head_scale"]
        self._unweighted = paddle.ones([self._fn.shape[1]], dtype="float32")

    def __call__(self, streams: Tensor) -> Tensor:
        """[rows, streams, hidden_size] to [rows, hidden_size]."""
        mix = normed_mix(streams, self._fn, self._unweighted, self._norm_eps) * self._scale + self._base
        return weighted_sum(streams, paddle.nn.functional.sigmoid(mix) + self._eps)

    @staticmethod
    def shapes(config: CompressedConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        return {
            "hc_head_fn": (config.hc_mult, config.hc_mult * config.hidden_size),
            "hc_head_base": (config.hc_mult,),
            "hc_head_scale": (1,),
        }


def normed_mix(streams: Tensor, fn: Tensor, unweighted: Tensor, eps: float) -> Tensor:
    """fn [outputs, streams * hidden_size] of all streams of a row together, normed to a mean square of 1."""
    flat = streams.reshape([streams.shape[0], -1])
    return linear(rms_norm(flat, unweighted, eps), fn)


def weighted_sum(streams: Tensor, weights: Tensor) -> Tensor:
    """[rows, streams, hidden_size] and [rows, streams] to [rows, hidden_size], stream after stream."""
    total = weights[:, :1] * streams[:, 0]
    for stream in range(1, streams.shape[1]):
        total += weights[:, stream : stream + 1] * streams[:, stream]
    return total
