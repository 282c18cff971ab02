"""Wrong implementations that the goldens list by name, each as a change of ours (or of the reference, for drafting).

A mistake is planted into one Serving through a MonkeyPatch; leaving the patch's context takes it out again. The
serving must hold one request, whose tokens all run in one step: rows from prompt_length on are then the decode steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import paddle
import pytest

import fastdeploy_dsa.models  # before the indexer, which it imports and which imports its layers

# isort: split
import fastdeploy_dsa.attention.dsa
import fastdeploy_dsa.indexer
import fastdeploy_dsa.layers
import fastdeploy_dsa.models.deepseek_v32
import fastdeploy_dsa.rotary
from fastdeploy_dsa.indexer import Indexer
from fastdeploy_dsa.layers import MoE, linear
from fastdeploy_dsa.models.deepseek_v32 import DecoderLayer
from fastdeploy_dsa.ops import IndexSelection
from fastdeploy_dsa.rotary import RotaryTable, rotate_halves, rotate_interleaved
from tests.kit.reference_model import ReferenceModel, Run, Trace
from tests.kit.reference_model.model import largest
from tests.kit.selections import mask_of, selection_of, token_slots
from tests.kit.serving import Serving, poisoned


@dataclass(frozen=True)
class Planting:
    """Where a mistake goes."""

    serving: Serving
    patch: pytest.MonkeyPatch
    prompt_length: int

    @property
    def attentions(self) -> list[Any]:
        return [layer.attention for layer in self.serving.model.layers]

    @property
    def indexers(self) -> list[Any]:
        return [attention.indexer for attention in self.attentions if attention.indexer is not None]

    @property
    def config(self) -> Any:
        return self.serving.model.config


Mistake = Callable[[Planting], None]


# Selections ----------------------------------------------------------------------------------------------------------


class Scoring(NamedTuple):
    """What a selection is made from, for the T tokens of the request, float64.

    query [T, heads, D]; head_weights [T, heads] with both factors folded in; key [T, D]; topk; prompt_length.
    """

    query: np.ndarray
    head_weights: np.ndarray
    key: np.ndarray
    topk: int
    prompt_length: int

    @property
    def length(self) -> int:
        return len(self.key)

    def scores(self, weights: Callable[[Any], Any] = lambda w: w, relu: Callable[[Any], Any] | None = None) -> Any:
        """[T, T], every key for every query."""
        rectify = relu or (lambda dots: np.maximum(dots, 0.0))
        return np.einsum("th,ths->ts", weights(self.head_weights), rectify(self.query @ self.key.T))


def choosing(choose: Callable[[Scoring], np.ndarray]) -> Mistake:
    """Every indexer selects what choose says: a [T, T] mask, which may break causality."""

    def plant(planting: Planting) -> None:
        def index_select(*, query: Any, folded_weights: Any, index_cache: Any, block_table: Any, **rest: Any) -> Any:
            length = len(planting.serving.sequences[0])
            slots = token_slots(block_table, index_cache.shape[1], length)
            key = index_cache.reshape([-1, index_cache.shape[2]]).numpy()[slots]
            arrays = (a.numpy()[:length].astype(np.float64) for a in (query, folded_weights))
            mask = choose(Scoring(*arrays, key.astype(np.float64), rest["topk"], planting.prompt_length))
            return selection_of(mask, slots, len(query))

        planting.patch.setattr(fastdeploy_dsa.indexer, "index_select", index_select)

    return plant


def best(scores: np.ndarray, allowed: np.ndarray, topk: int) -> np.ndarray:
    """The topk best of the allowed keys of every row, fewer if fewer are allowed."""
    ranked = np.argsort(np.where(allowed, -scores, np.inf), axis=1, kind="stable")[:, :topk]
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, ranked, True, axis=1)
    return mask & allowed


def causal(length: int, ahead: int = 0) -> np.ndarray:
    return np.tri(length, k=ahead, dtype=bool)


def _all_but_itself(s: Scoring) -> np.ndarray:
    allowed = causal(s.length, -1)
    allowed[0, 0] = True  # the first query has nothing else
    return best(s.scores(), allowed, s.topk)


def _first_and_itself(s: Scoring) -> np.ndarray:
    position = np.arange(s.length)
    return causal(s.length) & ((position < s.topk)[None, :] | np.eye(s.length, dtype=bool))


def _last(s: Scoring) -> np.ndarray:
    return causal(s.length) & ~causal(s.length, -s.topk)


def _own_chunk_only(s: Scoring) -> np.ndarray:
    position, start = np.arange(s.length), s.prompt_length // 2
    is_second = (position >= start) & (position < s.prompt_length)
    allowed = causal(s.length) & ~(is_second[:, None] & (position < start)[None, :])
    return best(s.scores(), allowed, s.topk)


def _previous_while_decoding(s: Scoring) -> np.ndarray:
    right = largest(s.scores(), s.topk)
    late = right.copy()
    late[s.prompt_length :] = right[s.prompt_length - 1 : -1]
    return late


# Shared layers -------------------------------------------------------------------------------------------------------


def sharing(share: Callable[[Planting, dict[int, IndexSelection], int, Any], IndexSelection]) -> Mistake:
    """Shared layers attend to what share(planting, selections of full layers so far, layer id, step) returns."""

    def plant(planting: Planting) -> None:
        call = DecoderLayer.__call__
        full: dict[int, IndexSelection] = {}

        def mutated(self: Any, hidden: Any, *, selection: Any, step: Any, **rest: Any) -> Any:
            layer = self.attention._layer_id
            is_full = self.attention.indexer is not None
            given = selection if is_full else share(planting, full, layer, step)
            hidden, used = call(self, hidden, selection=given, step=step, **rest)
            if is_full:
                full[layer] = used
            return hidden, used if is_full else selection

        planting.patch.setattr(DecoderLayer, "__call__", mutated)

    return plant


def _share_everything(planting: Planting, full: Any, layer: int, step: Any) -> IndexSelection:
    return _as_selection(planting, causal(len(planting.serving.sequences[0])), step)


def _share_last_prompt_row(planting: Planting, full: Any, layer: int, step: Any) -> IndexSelection:
    mask = mask_of(full[max(full)], len(planting.serving.sequences[0]))
    mask[planting.prompt_length :] = mask[planting.prompt_length - 1]
    return _as_selection(planting, mask, step)


def _share_first(planting: Planting, full: Any, layer: int, step: Any) -> IndexSelection:
    return full[min(full)]


def _share_the_one_before(planting: Planting, full: Any, layer: int, step: Any) -> IndexSelection:
    return full[sorted(full)[-2]]


def _as_selection(planting: Planting, mask: np.ndarray, step: Any) -> IndexSelection:
    slots = token_slots(step.block_table, planting.serving.backend.block_size, len(mask))
    return selection_of(mask, slots, step.num_rows)


def _own_indexer_on_shared_layers(planting: Planting) -> None:
    _borrow_indexers(planting, [layer for layer, a in enumerate(planting.attentions) if a.indexer is None])


def _schedule_with_offset(offset: int, freq: int = 4) -> Mistake:
    """Letters from another offset; a layer that becomes full without weights borrows those of the full layer below."""

    def plant(planting: Planting) -> None:
        letters = ["S" if max(layer - offset + 1, 0) % freq else "F" for layer in range(len(planting.attentions))]
        _borrow_indexers(planting, [layer for layer, letter in enumerate(letters) if letter == "F"])
        for layer, letter in enumerate(letters):
            if letter == "S":
                planting.patch.setattr(planting.attentions[layer], "indexer", None)
                planting.patch.delitem(planting.serving.caches, ("indexer", layer), raising=False)

    return plant


def _borrow_indexers(planting: Planting, layers: list[int]) -> None:
    """Layers without an indexer get that of the nearest full layer below and index keys of their own."""
    serving, own = planting.serving, [attention.indexer for attention in planting.attentions]
    for layer in layers:
        if own[layer] is None:
            source = max(below for below in range(layer) if own[below] is not None)
            planting.patch.setattr(planting.attentions[layer], "indexer", own[source])
            cache = poisoned(serving.caches["indexer", source])
            planting.patch.setitem(serving.caches, ("indexer", layer), cache)


# The indexer's projections -------------------------------------------------------------------------------------------


def indexer_config(**changes: Callable[[Any], Any]) -> Mistake:
    """The indexers, and nothing else, see other config values, computed from the right config."""

    def plant(planting: Planting) -> None:
        changed = replace(planting.config, **{name: change(planting.config) for name, change in changes.items()})
        for indexer in planting.indexers:
            planting.patch.setattr(indexer, "_config", changed)

    return plant


def k_norm(norm: Callable[..., Any]) -> Mistake:
    """norm(right norm, x, weight, bias, eps) in place of the right one."""

    def plant(planting: Planting) -> None:
        right = fastdeploy_dsa.indexer.layer_norm
        wrong = lambda x, weight, bias, eps: norm(right, x, weight, bias, eps)  # noqa: E731 - shorter than a def
        planting.patch.setattr(fastdeploy_dsa.indexer, "layer_norm", wrong)

    return plant


def _as_rms_norm(right: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight + bias


def index_rotation(rotate: Callable[[Any, Any, Any], Any]) -> Mistake:
    """rotate(indexer, x, rotation) in place of rotating the first numbers."""
    return lambda planting: planting.patch.setattr(Indexer, "_rotate_first", rotate)


def _rotate_last(indexer: Any, x: Any, rotation: Any) -> Any:
    rotate = rotate_interleaved if indexer._config.indexer_rope_interleave else rotate_halves
    kept = x.shape[-1] - indexer._config.qk_rope_head_dim
    return paddle.concat([x[..., :kept], rotate(x[..., kept:], rotation)], axis=-1)


def _raw_index_queries(planting: Planting) -> None:
    for attention in planting.attentions:
        if attention.indexer is not None:
            queries, q_a = attention.indexer.queries, attention._q_a
            wrong = lambda hidden, q_c, *rest, queries=queries, q_a=q_a: queries(hidden, linear(hidden, q_a), *rest)  # noqa: E731
            planting.patch.setattr(attention.indexer, "queries", wrong)


def folded_times(factor: Callable[[Any], float]) -> Mistake:
    """Head weights times a factor computed from the config: a missing constant."""

    def plant(planting: Planting) -> None:
        right = fastdeploy_dsa.attention.dsa.layer_write

        def wrong(**arguments: Any) -> Any:
            quantized, folded = right(**arguments)
            return quantized, folded * factor(planting.config)

        planting.patch.setattr(fastdeploy_dsa.attention.dsa, "layer_write", wrong)

    return plant


# Attention -----------------------------------------------------------------------------------------------------------


def softmax_scale(scale: Callable[[Any, float, float], float]) -> Mistake:
    """scale(config, right scale, m) in place of the right scale; m is 1 without YaRN."""

    def plant(planting: Planting) -> None:
        right = planting.serving.backend.softmax_scale
        m = (right * planting.config.qk_head_dim**0.5) ** 0.5
        planting.patch.setattr(planting.serving.backend, "softmax_scale", scale(planting.config, right, m))

    return plant


def _latent_width_scale(config: Any, right: float, m: float) -> float:
    return (config.kv_lora_rank + config.qk_rope_head_dim) ** -0.5 * m**2


def _pad_reads_token_0(planting: Planting) -> None:
    """On the layers that select by themselves."""
    backend = planting.serving.backend
    right = backend.attend

    def wrong(query: Any, *, layer_id: int, selection: IndexSelection, **rest: Any) -> Any:
        if planting.attentions[layer_id].indexer is not None:
            slot_of_0 = int(planting.serving.block_table[0, 0]) * backend.block_size
            slots = selection.slot_ids.numpy()
            selection = selection._replace(
                slot_ids=paddle.to_tensor(np.where(slots < 0, slot_of_0, slots).astype(np.int32)),
                counts=paddle.full_like(selection.counts, slots.shape[1]),
            )
        return right(query, layer_id=layer_id, selection=selection, **rest)

    planting.patch.setattr(backend, "attend", wrong)


def _rope_before_nope(planting: Planting) -> None:
    rope = planting.config.qk_rope_head_dim
    for attention in planting.attentions:
        by_head = attention._q_b.reshape([planting.config.num_attention_heads, planting.config.qk_head_dim, -1])
        misread = paddle.concat([by_head[:, rope:], by_head[:, :rope]], axis=1)
        planting.patch.setattr(attention, "_q_b", misread.reshape(attention._q_b.shape))


def _attention_rotation(planting: Planting) -> None:
    planting.patch.setattr(fastdeploy_dsa.models.deepseek_v32, "rotate_interleaved", rotate_halves)


# Positions and rotation tables ---------------------------------------------------------------------------------------


def rope(**changes: Callable[[Any, float], Any]) -> Mistake:
    """A table from other settings, each computed from the right ones and from 0.1 ln(factor) + 1."""

    def plant(planting: Planting) -> None:
        right = planting.config.rope
        magnitude = 0.1 * float(np.log(right.factor)) + 1.0
        changed = replace(right, **{name: change(right, magnitude) for name, change in changes.items()})
        table = RotaryTable(changed, planting.config.qk_rope_head_dim)
        planting.patch.setattr(planting.serving.model, "_rotary", table)

    return plant


def _unrounded_ramp(planting: Planting) -> None:
    def wrong_range(rope: Any, rotary_dim: int) -> tuple[float, float]:
        original, period = rope.original_max_position_embeddings, 2 * np.pi
        turns = np.array([rope.beta_fast, rope.beta_slow])
        low, high = rotary_dim * np.log(original / (turns * period)) / (2 * np.log(rope.theta))
        return max(low, 0.0), min(high, rotary_dim - 1.0)

    planting.patch.setattr(fastdeploy_dsa.rotary, "_yarn_range", wrong_range)
    table = RotaryTable(planting.config.rope, planting.config.qk_rope_head_dim)
    planting.patch.setattr(planting.serving.model, "_rotary", table)


def _decode_positions_plus_1(planting: Planting) -> None:
    table = planting.serving.model._rotary
    lookup = table.lookup

    def late(positions: Any, max_length: int) -> Any:
        shifted = positions + (positions >= planting.prompt_length).astype(positions.dtype)
        return lookup(shifted, max_length + 1)

    planting.patch.setattr(table, "lookup", late)


# Experts -------------------------------------------------------------------------------------------------------------


def routing(wrong: Callable[..., Any]) -> Mistake:
    """wrong(right route, scores, correction bias, config) in place of the right router."""

    def plant(planting: Planting) -> None:
        right = fastdeploy_dsa.layers.route
        changed = lambda scores, bias, config: wrong(right, scores, bias, config)  # noqa: E731 - shorter than a def
        planting.patch.setattr(fastdeploy_dsa.layers, "route", changed)

    return plant


def routing_config(**values: Any) -> Mistake:
    return routing(lambda right, scores, bias, config: right(scores, bias, replace(config, **values)))


def _biased_weights(right: Any, scores: Any, bias: Any, config: Any) -> Any:
    chosen, _ = right(scores, bias, config)
    weights = np.take_along_axis(scores + bias, chosen, axis=1)
    return chosen, weights / weights.sum(1, keepdims=True) * np.float32(config.routed_scaling_factor)


def _softmax_scores(right: Any, scores: Any, bias: Any, config: Any) -> Any:
    odds = scores / (1 - scores)  # exp of the router's logits
    return right((odds / odds.sum(1, keepdims=True)).astype(np.float32), bias, config)


def _without_shared_expert(planting: Planting) -> None:
    for layer in planting.serving.model.layers:
        if isinstance(layer._mlp, MoE):
            planting.patch.setattr(layer._mlp, "_shared", None)


MISTAKES: dict[str, Mistake] = {
    # selection
    "k-1 keys": indexer_config(index_topk=lambda config: config.index_topk - 1),
    "k+1 keys": indexer_config(index_topk=lambda config: config.index_topk + 1),
    "dense attention": choosing(lambda s: causal(s.length)),
    "last k keys": choosing(_last),
    "first k keys and itself": choosing(_first_and_itself),
    "query cannot select itself": choosing(_all_but_itself),
    "query may select the next token": choosing(lambda s: best(s.scores(), causal(s.length, 1), s.topk)),
    "the query's own key always added": choosing(lambda s: largest(s.scores(), s.topk) | np.eye(s.length, dtype=bool)),
    "scores <= 0 taken as invalid": choosing(lambda s: largest(s.scores(), s.topk) & (s.scores() > 0)),
    "2nd prefill chunk scores only its own keys": choosing(_own_chunk_only),
    "decode uses the previous step's selection": choosing(_previous_while_decoding),
    "no ReLU": choosing(lambda s: largest(s.scores(relu=lambda dots: dots), s.topk)),
    "head weights ignored": choosing(lambda s: largest(s.scores(weights=np.ones_like), s.topk)),
    "|head weights|": choosing(lambda s: largest(s.scores(weights=np.abs), s.topk)),
    # shared layers
    "shared layer attends densely": sharing(_share_everything),
    "shared layers keep the last prefill row while decoding": sharing(_share_last_prompt_row),
    "shared layer uses the first full layer's selection": sharing(_share_first),
    "shared layer uses the full layer before the right one": sharing(_share_the_one_before),
    "shared layer runs the full layer's indexer on its own hidden state": _own_indexer_on_shared_layers,
    "schedule offset 2 instead of 3": _schedule_with_offset(2),
    # the indexer's projections
    "k_norm eps 0": k_norm(lambda right, x, weight, bias, eps: right(x, weight, bias, 0.0)),
    "k_norm eps 1e-5": k_norm(lambda right, x, weight, bias, eps: right(x, weight, bias, 1e-5)),
    "k_norm bias dropped": k_norm(lambda right, x, weight, bias, eps: right(x, weight, bias * 0, eps)),
    "k_norm as RMSNorm": k_norm(_as_rms_norm),
    "wq_b fed before q_a_layernorm": _raw_index_queries,
    "indexer RoPE in the other style": indexer_config(
        indexer_rope_interleave=lambda config: not config.indexer_rope_interleave
    ),
    "indexer rotates its last dims instead of the first": index_rotation(_rotate_last),
    "indexer without RoPE": index_rotation(lambda indexer, x, rotation: x),
    # attention
    "-1 padding read as token 0": _pad_reads_token_0,
    "attention RoPE in the other style": _attention_rotation,
    "q_b rows read as [rope|nope]": _rope_before_nope,
    "scale from the latent width (kv_lora+rope)": softmax_scale(_latent_width_scale),
    "no mscale^2": softmax_scale(lambda config, right, m: right / m**2),
    "mscale instead of mscale^2": softmax_scale(lambda config, right, m: right / m),
    # positions and tables
    "decode positions one too high": _decode_positions_plus_1,
    "plain RoPE": rope(rope_type=lambda right, magnitude: "default"),
    "ramp bounds not rounded": _unrounded_ramp,
    "cos/sin times 0.1 ln(factor)+1": rope(table_multiplier=lambda right, magnitude: magnitude),
    # experts
    "bias kept in expert weights": routing(_biased_weights),
    "correction bias ignored": routing(lambda right, scores, bias, config: right(scores, bias * 0, config)),
    "softmax router": routing(_softmax_scores),
    "group limit ignored": routing_config(n_group=1, topk_group=1),
    "weights not normalised": routing_config(norm_topk_prob=False),
    "routed scaling dropped": routing_config(routed_scaling_factor=1.0),
    "shared expert dropped": _without_shared_expert,
}

SCORE_MISTAKES: dict[str, Mistake] = {
    "no index_n_heads^-0.5": folded_times(lambda config: config.index_n_heads**0.5),
    "no index_head_dim^-0.5": folded_times(lambda config: config.index_head_dim**0.5),
}


# The draft layer, in the reference -----------------------------------------------------------------------------------


class _MainNorm(ReferenceModel):
    def draft_norm(self, prefix: str) -> str:
        return "model.norm"


class _HiddenBeforeNorm(ReferenceModel):
    def draft_input(self, token_ids: Any, trace: Trace, prefix: str, run: Run) -> Any:
        return super().draft_input(token_ids, trace._replace(hidden=trace.before_norm), prefix, run)


class _LastSelection(ReferenceModel):
    def draft_selection(self, trace: Trace) -> Any:
        return trace.layers[max(trace.layers)].selection


class _SameToken(ReferenceModel):
    def draft_input(self, token_ids: Any, trace: Trace, prefix: str, run: Run) -> Any:
        return super().draft_input(np.concatenate([[0], token_ids[:-1]]), trace, prefix, run)


class _SwappedHalves(ReferenceModel):
    def linear(self, x: Any, name: str, run: Run) -> Any:
        return super().linear(np.roll(x, x.shape[-1] // 2, -1) if name.endswith("eh_proj") else x, name, run)


DRAFT_MISTAKES: dict[str, type[ReferenceModel]] = {
    "main final norm for MTP logits": _MainNorm,
    "hidden state before the final norm": _HiddenBeforeNorm,
    "MTP reuses the last main layer's selection": _LastSelection,
    "MTP embeds token p, not p+1": _SameToken,
    "eh_proj input order swapped": _SwappedHalves,
}
