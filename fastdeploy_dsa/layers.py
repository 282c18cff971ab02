"""Layers that DSA models share, in float32 on Paddle's CPU ops. Weights are [out, in], as checkpoints store them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor
from paddle.incubate.nn.functional import fused_rms_norm

from fastdeploy_dsa.config import DsaConfig
from fastdeploy_dsa.row_invariance import INNER_MULTIPLE, LEAST_COLUMNS, ROW_MULTIPLE


class Weights:
    """A view of a checkpoint's tensors below a common prefix."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        """Look at tensors whose names start with prefix."""
        self._tensors = tensors
        self._prefix = prefix

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called prefix + name."""
        return self._tensors[self._prefix + name]

    def get(self, name: str, default: Tensor) -> Tensor:
        """The tensor called prefix + name, or the default where there is none."""
        return self._tensors.get(self._prefix + name, default)

    def below(self, part: str) -> Weights:
        """The tensors one part deeper, so that `w.below("mlp")["gate.weight"]` is `w["mlp.gate.weight"]`."""
        return Weights(self._tensors, f"{self._prefix}{part}.")


def padded_rows(x: Tensor, fill: int) -> Tensor:
    """x [rows, width] with so many rows of zeros behind."""
    return paddle.concat([x, paddle.zeros([fill, x.shape[1]], dtype=x.dtype)]) if fill else x


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T for x [rows, in] and weight [out, in], see row_invariance.py."""
    rows, columns = x.shape[0], weight.shape[0]
    more_inner = -x.shape[1] % INNER_MULTIPLE
    if more_inner:  # in no published model
        x = paddle.concat([x, paddle.zeros([rows, more_inner], dtype=x.dtype)], axis=1)
        weight = paddle.concat([weight, paddle.zeros([columns, more_inner], dtype=weight.dtype)], axis=1)
    if columns < LEAST_COLUMNS:  # the weights of a few index heads, the router of a few experts
        more_columns = paddle.zeros([LEAST_COLUMNS - columns, weight.shape[1]], dtype=weight.dtype)
        weight = paddle.concat([weight, more_columns])
    product: Tensor = paddle.matmul(x, weight, transpose_y=True)
    return product if columns >= LEAST_COLUMNS else product[:, :columns]


def output_logits(hidden: Tensor, lm_head: Tensor) -> Tensor:
    """hidden [R, hidden_size] to [R, vocab_size]; a row does not depend on the others, however few there are."""
    rows = hidden.shape[0]
    return linear(padded_rows(hidden, -rows % ROW_MULTIPLE), lm_head)[:rows]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis of x [T, width] (rule S8)."""
    normed: Tensor = fused_rms_norm(x, weight, None, eps, 1)[0]
    return normed


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, var the population variance (rule S9)."""
    normed: Tensor = paddle.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return normed


class MLP:
    """Gated feed-forward: down(silu(gate x) * up x)."""

    def __init__(self, weights: Weights) -> None:
        """Take gate_proj, up_proj and down_proj from weights."""
        self._gate = weights["gate_proj.weight"]
        self._up = weights["up_proj.weight"]
        self._down = weights["down_proj.weight"]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden_size] to the same."""
        return linear(paddle.nn.functional.swiglu(linear(x, self._gate), linear(x, self._up)), self._down)

    @staticmethod
    def shapes(hidden_size: int, intermediate_size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        return {
            "gate_proj.weight": (intermediate_size, hidden_size),
            "up_proj.weight": (intermediate_size, hidden_size),
            "down_proj.weight": (hidden_size, intermediate_size),
        }


def route(
    scores: npt.NDArray[np.float32], correction_bias: npt.NDArray[np.float32], config: DsaConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Choose experts: the bias takes part in the choice, not in the weights ("noaux_tc").

    Args:
        scores: [T, n_routed_experts] float32, sigmoid of the router's logits.
        correction_bias: [n_routed_experts] float32.
        config: Groups, counts and scaling.

    Returns:
        Experts [T, num_experts_per_tok] int64, best first, ties to the smaller id, and their weights, float32.

    Source: DeepSeek-V3 technical report, section 2.1.2.
    """
    tokens, experts = scores.shape
    choice = scores + correction_bias
    if config.n_group > 1:
        grouped = choice.reshape(tokens, config.n_group, experts // config.n_group)
        best_two = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
        kept = _largest(best_two, config.topk_group)
        allowed = np.zeros((tokens, config.n_group), bool)
        np.put_along_axis(allowed, kept, True, axis=1)
        choice = np.where(allowed[:, :, None], grouped, np.float32(-np.inf)).reshape(tokens, experts)
    chosen = _largest(choice, config.num_experts_per_tok)
    weights = np.take_along_axis(scores, chosen, axis=1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-20))
    return chosen, weights * np.float32(config.routed_scaling_factor)


def _largest(values: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Ids of the largest values of every row, largest first, ties to the smaller id."""
    return np.argsort(-values, axis=1, kind="stable")[:, :count]


def add_experts(
    x: Tensor,
    experts: Sequence[Callable[[Tensor], Tensor]],
    chosen: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float32],
) -> Tensor:
    """Weighted sum of every row's experts.

    Args:
        x: [T, hidden_size] float32.
        experts: By id.
        chosen: [T, num_experts_per_tok] int64; an expert that a row lists twice counts with both weights.
        weights: [T, num_experts_per_tok] float32.
    """
    combined = np.zeros(x.shape, np.float32)
    # Experts add up in the order of their ids, so that a token's sum does not depend on its neighbours.
    for expert in np.unique(chosen):
        is_chosen = chosen == expert
        rows = np.flatnonzero(is_chosen.any(axis=1))
        shares = np.where(is_chosen[rows], weights[rows], np.float32(0)).sum(axis=1, keepdims=True)
        filled = np.concatenate([rows, np.zeros(-len(rows) % ROW_MULTIPLE, rows.dtype)])
        out = experts[expert](paddle.gather(x, paddle.to_tensor(filled))).numpy()
        combined[rows] += shares * out[: len(rows)]
    return paddle.to_tensor(combined)


class MoE:
    """Routed experts and a shared expert."""

    def __init__(self, weights: Weights, config: DsaConfig) -> None:
        """Take gate, experts and shared_experts from weights."""
        self._config = config
        self._gate = weights["gate.weight"]
        self._correction_bias = weights["gate.e_score_correction_bias"].numpy()
        self._experts = [MLP(weights.below(f"experts.{expert}")) for expert in range(config.n_routed_experts)]
        self._shared = MLP(weights.below("shared_experts")) if config.n_shared_experts else None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden_size] to the same."""
        scores = paddle.nn.functional.sigmoid(linear(x, self._gate)).numpy()
        chosen, weights = route(scores, self._correction_bias, self._config)
        routed = add_experts(x, self._experts, chosen, weights)
        return routed if self._shared is None else routed + self._shared(x)

    @staticmethod
    def shapes(config: DsaConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        shapes: dict[str, tuple[int, ...]] = {
            "gate.weight": (config.n_routed_experts, config.hidden_size),
            "gate.e_score_correction_bias": (config.n_routed_experts,),
        }
        expert = MLP.shapes(config.hidden_size, config.moe_intermediate_size)
        for index in range(config.n_routed_experts):
            shapes |= {f"experts.{index}.{name}": shape for name, shape in expert.items()}
        if config.n_shared_experts:
            shared = MLP.shapes(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            shapes |= {f"shared_experts.{name}": shape for name, shape in shared.items()}
        return shapes
