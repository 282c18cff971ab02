"""Experts of DeepSeek-V4: chosen by the token's id in the first layers, by its scores in the others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.layers import Weights, add_experts, linear

_LEAST_SUM = np.float32(1e-20)  # weights of scores that are all 0 are 0


class Expert:
    """Gated feed-forward: w2(silu(min(w1 x, limit)) * clip(w3 x, -limit, limit)); a limit of 0 is none."""

    def __init__(self, weights: Weights, limit: float) -> None:
        """Take w1 (gate), w3 (up) and w2 (down) from weights."""
        self._gate = weights["w1.weight"]
        self._up = weights["w3.weight"]
        self._down = weights["w2.weight"]
        self._limit = limit

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden_size] to the same."""
        gate, up = linear(x, self._gate), linear(x, self._up)
        if self._limit:
            gate = paddle.clip(gate, max=self._limit)
            up = paddle.clip(up, min=-self._limit, max=self._limit)
        return linear(paddle.nn.functional.swiglu(gate, up), self._down)

    @staticmethod
    def shapes(hidden_size: int, intermediate_size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        return {
            "w1.weight": (intermediate_size, hidden_size),
            "w2.weight": (hidden_size, intermediate_size),
            "w3.weight": (intermediate_size, hidden_size),
        }


def router_scores(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """sqrt(ln(1 + exp(logits))), float32."""
    scores: npt.NDArray[np.float32] = np.sqrt(np.logaddexp(np.float32(0), logits))
    return scores


def best_experts(
    scores: npt.NDArray[np.float32], correction_bias: npt.NDArray[np.float32], count: int
) -> npt.NDArray[np.int64]:
    """[T, count] ids of the largest biased scores, largest first, ties to the smaller id."""
    return np.argsort(-(scores + correction_bias), axis=1, kind="stable")[:, :count]


def expert_weights(
    scores: npt.NDArray[np.float32], chosen: npt.NDArray[np.int64], config: CompressedConfig
) -> npt.NDArray[np.float32]:
    """[T, num_experts_per_tok] weights of the chosen experts: their scores without the bias."""
    weights: npt.NDArray[np.float32] = np.take_along_axis(scores, chosen, axis=1)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(axis=1, keepdims=True) + _LEAST_SUM)
    scaled: npt.NDArray[np.float32] = weights * np.float32(config.routed_scaling_factor)
    return scaled


class DeepseekV4MoE:
    """Routed experts and a shared expert."""

    def __init__(self, weights: Weights, config: CompressedConfig, layer_id: int) -> None:
        """Take gate, experts and shared_experts from weights.

        Raises:
            ValueError: The table of experts by token id names one that does not exist.
        """
        self._config = config
        self._gate = weights["gate.weight"]
        self._table: npt.NDArray[np.int64] | None = None
        self._correction_bias: npt.NDArray[np.float32] | None = None
        if config.router_type(layer_id) == "hash":
            self._table = _expert_table(weights["gate.tid2eid"], config.n_routed_experts, layer_id)
        else:
            self._correction_bias = weights["gate.bias"].numpy()
        limit = config.swiglu_limit
        self._experts = [Expert(weights.below(f"experts.{i}"), limit) for i in range(config.n_routed_experts)]
        self._shared = Expert(weights.below("shared_experts"), limit) if config.n_shared_experts else None

    def __call__(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """x [T, hidden_size] of tokens [T] to the same."""
        scores = router_scores(linear(x, self._gate).numpy())
        chosen = self.choose(scores, token_ids)
        routed = add_experts(x, self._experts, chosen, expert_weights(scores, chosen, self._config))
        return routed if self._shared is None else routed + self._shared(x)

    def choose(self, scores: npt.NDArray[np.float32], token_ids: Tensor) -> npt.NDArray[np.int64]:
        """[T, num_experts_per_tok] ids."""
        if self._table is not None:
            chosen: npt.NDArray[np.int64] = self._table[token_ids.numpy()]
            return chosen
        assert self._correction_bias is not None, "a router has a table or a bias"  # noqa: S101
        return best_experts(scores, self._correction_bias, self._config.num_experts_per_tok)

    @staticmethod
    def shapes(config: CompressedConfig, layer_id: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights."""
        shapes: dict[str, tuple[int, ...]] = {"gate.weight": (config.n_routed_experts, config.hidden_size)}
        if config.router_type(layer_id) == "hash":
            shapes["gate.tid2eid"] = (config.vocab_size, config.num_experts_per_tok)
        else:
            shapes["gate.bias"] = (config.n_routed_experts,)
        expert = Expert.shapes(config.hidden_size, config.moe_intermediate_size)
        for index in range(config.n_routed_experts):
            shapes |= {f"experts.{index}.{name}": shape for name, shape in expert.items()}
        if config.n_shared_experts:
            shared = Expert.shapes(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            shapes |= {f"shared_experts.{name}": shape for name, shape in shared.items()}
        return shapes


def _expert_table(table: Tensor, num_experts: int, layer_id: int) -> npt.NDArray[np.int64]:
    """[vocab_size, num_experts_per_tok] expert ids by token id."""
    experts: npt.NDArray[np.int64] = table.numpy().astype(np.int64)
    wrong = (experts < 0) | (experts >= num_experts)
    if wrong.any():
        token, place = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"layers.{layer_id}.ffn.gate.tid2eid: expected experts from 0 to {num_experts - 1},"
            f" got {experts[token, place]} for token {token}"
        )
    return experts
