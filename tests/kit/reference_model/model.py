"""The model of DeepSeek-V3.2 and GLM-5.x in float64: one request, whole sequence at once, no cache, no paging.

Written from the rules of the DSA data flow (S1 to S38, S67) and of the draft layer (mtp S1 to S4), not from the
package. Attention is dense with everything outside the selection masked out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tests.kit.reference_model import formats
from tests.kit.reference_model.arithmetic import ExactArithmetic
from tests.kit.reference_model.checkpoint import (
    is_moe_layer,
    read_checkpoint,
    rope_of,
    schedule_of,
    softmax_scale_of,
)

K_NORM_EPS = 1e-6  # S9: not rms_norm_eps


class Numbers(NamedTuple):
    """A layer's numbers in a cache format, dequantised but for the factors of index vectors.

    latent [T, C]; rope [T, R]; index_key ([T, D], [T]) and index_query ([T, heads, D], [T, heads]), None without an
    indexer.
    """

    latent: np.ndarray
    rope: np.ndarray
    index_key: formats.Scaled | None = None
    index_query: formats.Scaled | None = None


class Unrounded(NamedTuple):
    """The same before any rounding, without scales."""

    latent: np.ndarray
    rope: np.ndarray
    index_key: np.ndarray | None = None
    index_query: np.ndarray | None = None


def in_format(unrounded: Unrounded, cache_format: str) -> Numbers:
    """What caches of the format make of a layer's numbers."""
    return Numbers(
        formats.latent_rows(unrounded.latent, cache_format),
        formats.rope_rows(unrounded.rope, cache_format),
        *(v if v is None else formats.index_vectors(v, cache_format) for v in unrounded[2:]),
    )


@dataclass(frozen=True)
class Run:
    """How a pass is computed.

    Attributes:
        cache_format: "float32" rounds nothing; "bfloat16" and "fp8" round what the caches hold and the index queries.
        selections: Per layer that selects, [T, T] bool: taken in place of the layer's own choice.
        experts: Per mixture layer, [T, num_experts_per_tok] ids: taken in place of the router's own choice.
        numbers: Per layer, what caches and index queries hold: taken in place of rounding the layer's own.
        arithmetic: Exact, or with noise.
    """

    cache_format: str = "float32"
    selections: dict[int, np.ndarray] = field(default_factory=dict)
    experts: dict[int, np.ndarray] = field(default_factory=dict)
    numbers: dict[int, Numbers] = field(default_factory=dict)
    arithmetic: ExactArithmetic = field(default_factory=ExactArithmetic)


class LayerTrace(NamedTuple):
    """scores [T, T], NaN for keys after the query; own_selection [T, T] bool; both None on shared layers.

    selection [T, T] bool: what attention read. attn_heads [T, heads, v]; attn_out [T, hidden].
    experts [T, num_experts_per_tok] ids, None on dense layers. unrounded: what the caches are written from.
    """

    scores: np.ndarray | None
    own_selection: np.ndarray | None
    selection: np.ndarray
    attn_heads: np.ndarray
    attn_out: np.ndarray
    unrounded: Unrounded
    experts: np.ndarray | None = None


class Trace(NamedTuple):
    """hidden [T, hidden] after the final norm; before_norm [T, hidden]; logits [T, vocab]; layers by id."""

    hidden: np.ndarray
    before_norm: np.ndarray
    logits: np.ndarray
    layers: dict[int, LayerTrace]


def largest(scores, count):
    """[T, T] bool: the min(count, t + 1) largest scores of keys 0..t of every row t, ties to the smaller key (S34)."""
    chosen = np.zeros(scores.shape, bool)
    for t, row in enumerate(scores):
        order = np.argsort(-row[: t + 1], kind="stable")
        chosen[t, order[:count]] = True
    return chosen


def rotate(x, cos, sin, is_interleaved):
    """S11: pairs (2i, 2i+1) in place, or (i, i + R/2); x [..., R], cos and sin [..., R/2]."""
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if is_interleaved else (x[..., :half], x[..., half:])
    rotated = np.stack([first * cos - second * sin, second * cos + first * sin], -1 if is_interleaved else -2)
    return rotated.reshape(x.shape)


def silu(x):
    return x / (1.0 + np.exp(-x))


class ReferenceModel:
    """A checkpoint and the passes over it."""

    def __init__(self, config, weights):
        self.config = config
        self.weights = weights
        self.rope = rope_of(config)
        self.softmax_scale = softmax_scale_of(config)
        self.schedule = schedule_of(config)

    @classmethod
    def load(cls, folder):
        return cls(*read_checkpoint(folder))

    def forward(self, token_ids, run=None):
        """Every position of a sequence.

        Args:
            token_ids: [T] int, positions 0 .. T-1.
            run: How; None: exactly.

        Returns:
            The trace of all rows.
        """
        run = run or Run()
        x = self.weights["model.embed_tokens.weight"][np.asarray(token_ids)]
        layers, selection = {}, None
        for layer, letter in enumerate(self.schedule):
            x, layers[layer] = self.decoder_layer(x, layer, None if letter == "F" else selection, run)
            selection = layers[layer].selection
        hidden = self.rms_norm(x, "model.norm", run)
        return Trace(hidden, x, self.logits(hidden, self._head(), run), layers)

    def draft(self, token_ids, trace, run=None):
        """First draft step of every position that has a next token (mtp S2): row p embeds token p + 1.

        Args:
            token_ids: [T + 1] int.
            trace: Of token_ids[:T].
            run: How; None: exactly.
        """
        run = run or Run()
        layer = self.config["num_hidden_layers"]
        prefix = f"model.layers.{layer}"
        x = self.draft_input(np.asarray(token_ids), trace, prefix, run)
        x, layer_trace = self.decoder_layer(x, layer, self.draft_selection(trace), run)
        hidden = self.rms_norm(x, self.draft_norm(prefix), run)
        head = self.weights.get(f"{prefix}.shared_head.head.weight", self._head())
        return Trace(hidden, x, self.logits(hidden, head, run), {layer: layer_trace})

    def draft_input(self, token_ids, trace, prefix, run):
        """[T, hidden]: embedding half first."""
        table = self.weights.get(f"{prefix}.embed_tokens.weight", self.weights["model.embed_tokens.weight"])
        embedding = self.rms_norm(table[token_ids[1:]], f"{prefix}.enorm", run)
        hidden = self.rms_norm(trace.hidden, f"{prefix}.hnorm", run)
        return self.linear(np.concatenate([embedding, hidden], -1), f"{prefix}.eh_proj", run)

    def draft_selection(self, trace):
        """The draft layer always selects by itself (mtp S4)."""
        del trace

    def draft_norm(self, prefix):
        return f"{prefix}.shared_head.norm"

    def decoder_layer(self, x, layer, shared_selection, run):
        """x [T, hidden] through one layer; shared_selection [T, T] bool on shared layers, else None."""
        prefix = f"model.layers.{layer}"
        normed = self.rms_norm(x, f"{prefix}.input_layernorm", run)
        attended, partial = self.attention(normed, layer, shared_selection, run)
        x = run.arithmetic.rounded(x + attended)
        normed = self.rms_norm(x, f"{prefix}.post_attention_layernorm", run)
        experts = None
        if is_moe_layer(self.config, layer):
            fed, experts = self.mixture(normed, layer, run)
        else:
            fed = self.feed_forward(normed, f"{prefix}.mlp", run)
        return run.arithmetic.rounded(x + fed), partial._replace(experts=experts)

    def attention(self, x, layer, shared_selection, run):
        """Section 2: attn_out [T, hidden] and the trace, experts aside."""
        cfg, arithmetic, prefix = self.config, run.arithmetic, f"model.layers.{layer}.self_attn"
        nope, rope, rank = cfg["qk_nope_head_dim"], cfg["qk_rope_head_dim"], cfg["kv_lora_rank"]
        heads, length = cfg["num_attention_heads"], len(x)
        cos, sin = self.table(length, run)

        q_c = self.rms_norm(self.linear(x, f"{prefix}.q_a_proj", run), f"{prefix}.q_a_layernorm", run)
        kv = self.linear(x, f"{prefix}.kv_a_proj_with_mqa", run)
        unrounded = Unrounded(
            self.rms_norm(kv[:, :rank], f"{prefix}.kv_a_layernorm", run),
            arithmetic.rounded(rotate(kv[:, rank:], cos, sin, True), 3),
            *(self.index_vectors(x, q_c, prefix, (cos, sin), run) if shared_selection is None else ()),
        )
        numbers = run.numbers.get(layer) or self.stored(unrounded, run)

        q = self.linear(q_c, f"{prefix}.q_b_proj", run).reshape(length, heads, nope + rope)
        q_rope = arithmetic.rounded(rotate(q[..., nope:], cos[:, None], sin[:, None], True), 3)
        w_uk, w_uv = self.kv_b(prefix)
        absorbed = np.swapaxes(arithmetic.dot(np.swapaxes(q[..., :nope], 0, 1), np.swapaxes(w_uk, 1, 2)), 0, 1)
        query = np.concatenate([absorbed, q_rope], -1)

        scores = own = None
        selection = shared_selection
        if shared_selection is None:
            scores = self.scores(x, numbers, prefix, run)
            own = largest(scores, cfg["index_topk"])
            selection = run.selections.get(layer, own)

        rows = np.concatenate([numbers.latent, numbers.rope], -1)
        z = arithmetic.rounded(arithmetic.dot(query, rows) * self.softmax_scale, 2)  # [T, heads, T]
        z = np.where(selection[:, None, :], z, -np.inf)
        p = np.exp(z - z.max(-1, keepdims=True))
        p = arithmetic.rounded(p / p.sum(-1, keepdims=True), 8)
        out = arithmetic.dot(p, numbers.latent.T)  # [T, heads, C]
        by_head = np.swapaxes(arithmetic.dot(np.swapaxes(out, 0, 1), w_uv), 0, 1)
        attended = self.linear(by_head.reshape(length, -1), f"{prefix}.o_proj", run)
        return attended, LayerTrace(scores, own, selection, by_head, attended, unrounded)

    def stored(self, unrounded, run):
        """What caches and index queries make of a layer's numbers."""
        return in_format(unrounded, run.cache_format)

    def kv_b(self, prefix):
        """S5: W_UK [heads, nope, C] and W_UV [heads, v, C]."""
        cfg = self.config
        nope, v = cfg["qk_nope_head_dim"], cfg["v_head_dim"]
        w = self.weights[f"{prefix}.kv_b_proj.weight"].reshape(cfg["num_attention_heads"], nope + v, -1)
        return w[:, :nope], w[:, nope:]

    def index_vectors(self, x, q_c, prefix, table, run):
        """Section 4: keys [T, D] and queries [T, heads, D]; the first R numbers are rotated."""
        cfg, (cos, sin) = self.config, table
        rope, is_interleaved = cfg["qk_rope_head_dim"], bool(cfg.get("indexer_rope_interleave"))
        key = self.layer_norm(self.linear(x, f"{prefix}.indexer.wk", run), f"{prefix}.indexer.k_norm", run)
        rotated = run.arithmetic.rounded(rotate(key[:, :rope], cos, sin, is_interleaved), 3)
        key = np.concatenate([rotated, key[:, rope:]], -1)
        query = self.linear(q_c, f"{prefix}.indexer.wq_b", run)
        query = query.reshape(len(x), cfg["index_n_heads"], cfg["index_head_dim"])
        rotated = run.arithmetic.rounded(rotate(query[..., :rope], cos[:, None], sin[:, None], is_interleaved), 3)
        return key, np.concatenate([rotated, query[..., rope:]], -1)

    def scores(self, x, numbers, prefix, run):
        """Section 6: [T, T], NaN where the key comes after the query."""
        cfg, arithmetic, query, key = self.config, run.arithmetic, numbers.index_query, numbers.index_key
        constant = (cfg["index_head_dim"] * cfg["index_n_heads"]) ** -0.5
        head_weights = self.linear(x, f"{prefix}.indexer.weights_proj", run)
        folded = arithmetic.rounded(head_weights * query.scale * constant, 2)
        dots = np.maximum(arithmetic.dot(query.numbers, key.numbers), 0.0)  # [T, heads, T]
        scores = arithmetic.dot(folded[:, None, :], np.swapaxes(dots, 1, 2))[:, 0, :] * key.scale
        return np.where(np.tri(len(x), dtype=bool), scores, np.nan)

    def mixture(self, x, layer, run):
        """Routed experts plus the shared one: ([T, hidden], experts [T, num_experts_per_tok])."""
        cfg, prefix = self.config, f"model.layers.{layer}.mlp"
        scores = run.arithmetic.rounded(1.0 / (1.0 + np.exp(-self.linear(x, f"{prefix}.gate", run))), 4)
        chosen = run.experts.get(layer)
        if chosen is None:
            chosen = self.route(scores + self.weights[f"{prefix}.gate.e_score_correction_bias"])
        gates = np.take_along_axis(scores, chosen, -1)
        if cfg.get("norm_topk_prob", True):
            gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
        gates = run.arithmetic.rounded(gates * cfg["routed_scaling_factor"], 4)
        out = np.zeros_like(x)
        for expert in np.unique(chosen):
            token, slot = np.nonzero(chosen == expert)
            out[token] += gates[token, slot, None] * self.feed_forward(x[token], f"{prefix}.experts.{expert}", run)
        if cfg.get("n_shared_experts"):
            out += self.feed_forward(x, f"{prefix}.shared_experts", run)
        return run.arithmetic.rounded(out, 4), chosen

    def route(self, choice):
        """The largest biased scores inside the topk_group groups whose two largest add up to most; [T, k] ids."""
        cfg = self.config
        groups = cfg.get("n_group") or 1
        grouped = choice.reshape(len(choice), groups, -1)
        of_group = np.sort(grouped, -1)[..., -2:].sum(-1)
        kept = np.argsort(-of_group, -1, kind="stable")[:, : cfg.get("topk_group") or 1]
        allowed = np.zeros(of_group.shape, bool)
        np.put_along_axis(allowed, kept, True, -1)
        masked = np.where(allowed[..., None], grouped, -np.inf).reshape(choice.shape)
        return np.argsort(-masked, -1, kind="stable")[:, : cfg["num_experts_per_tok"]]

    def feed_forward(self, x, prefix, run):
        gate = run.arithmetic.rounded(silu(self.linear(x, f"{prefix}.gate_proj", run)), 4)
        return self.linear(gate * self.linear(x, f"{prefix}.up_proj", run), f"{prefix}.down_proj", run)

    def linear(self, x, name, run):
        y = run.arithmetic.dot(x, self.weights[f"{name}.weight"])
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else run.arithmetic.rounded(y + bias)

    def logits(self, hidden, head, run):
        return run.arithmetic.dot(hidden, head)

    def rms_norm(self, x, name, run):
        scale = 1.0 / np.sqrt(np.mean(x * x, -1, keepdims=True) + self.config["rms_norm_eps"])
        return run.arithmetic.rounded(x * scale * self.weights[f"{name}.weight"], 4)

    def layer_norm(self, x, name, run):
        """S9."""
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        mean = x.mean(-1, keepdims=True)
        scale = 1.0 / np.sqrt(x.var(-1, keepdims=True) + K_NORM_EPS) * weight
        magnitude = (np.abs(x) + np.abs(mean)) * np.abs(scale) + np.abs(bias)
        return run.arithmetic.cancelled((x - mean) * scale + bias, magnitude, 4)

    def table(self, length, run):
        """cos and sin [length, R/2] of positions 0 .. length-1."""
        angles = np.arange(length)[:, None] * self.rope.frequencies
        cos, sin = (f(angles) * self.rope.table_multiplier for f in (np.cos, np.sin))
        return run.arithmetic.rounded(cos), run.arithmetic.rounded(sin)

    def _head(self):
        name = "model.embed_tokens" if self.config.get("tie_word_embeddings") else "lm_head"
        return self.weights[f"{name}.weight"]
