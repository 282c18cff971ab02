"""DeepSeek-V4 in float64: the whole model, dense over all positions, without cache, paging or steps.

Written from the published rules; it shares no code with the package. Rules S1.. are those of the attention block.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tests.kit.reference_model.checkpoint import read_checkpoint


class CompressedTrace(NamedTuple):
    """logits [T, vocab]; streams [T, hc, hidden] behind the last layer; selections by layer [T, entries] bool.

    scores by layer [T, entries]; attn_heads by layer [T, heads, d], rotation undone; attn_out by layer [T, hidden].
    """

    logits: np.ndarray
    streams: np.ndarray
    selections: dict[int, np.ndarray]
    scores: dict[int, np.ndarray]
    attn_heads: dict[int, np.ndarray]
    attn_out: dict[int, np.ndarray]


def rms(x, eps, weight=1.0):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def rotated(x, angles, direction=1.0):
    """Pairs (2i, 2i + 1) of the last numbers of x [T, ..., width] by angles [T, R/2]."""
    pairs = angles.shape[-1]
    angles = angles.reshape(len(angles), *[1] * (x.ndim - 2), pairs)
    cos, sin = np.cos(angles), direction * np.sin(angles)
    y = x.copy()
    even, odd = x[..., -2 * pairs :: 2], x[..., 1 - 2 * pairs :: 2]
    y[..., -2 * pairs :: 2], y[..., 1 - 2 * pairs :: 2] = even * cos - odd * sin, odd * cos + even * sin
    return y


class CompressedReferenceModel:
    """A checkpoint and the passes over it."""

    def __init__(self, config, weights):
        self.config, self.weights = config, weights
        layers = config["num_hidden_layers"]
        names = {"sliding_attention": 1, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
        if config.get("layer_types"):
            self.ratios = [names[kind] for kind in config["layer_types"][:layers]]
        else:
            self.ratios = [max(ratio, 1) for ratio in config["compress_ratios"][:layers]]
        hashed = config.get("num_hash_layers")
        types = config.get("mlp_layer_types")
        self.hashed = [t == "hash_moe" for t in types] if types else [layer < hashed for layer in range(layers)]

    @classmethod
    def load(cls, folder):
        return cls(*read_checkpoint(folder))

    def forward(self, token_ids):
        """Every position of a sequence, token_ids [T]."""
        token_ids = np.asarray(token_ids)
        table = self.weights["embed.weight"]
        x = np.repeat(table[token_ids][:, None], self.config["hc_mult"], 1)
        records = ({}, {}, {}, {})
        for layer, ratio in enumerate(self.ratios):
            x = self.layer(x, f"layers.{layer}", layer, ratio, token_ids if self.hashed[layer] else None, records)
        return CompressedTrace(self.head(x, "", "norm.weight"), x, *records)

    def draft(self, token_ids, streams, index=0):
        """First draft step: row p joins streams[p] with the token at p + 1; token_ids [T + 1]. (logits, streams)."""
        prefix, eps = f"mtp.{index}", self.config["rms_norm_eps"]
        w = lambda name: self.weights[f"{prefix}.{name}"]  # noqa: E731 - shorter than a def
        embedded = rms(self.weights["embed.weight"][np.asarray(token_ids)[1:]], eps, w("enorm.weight"))
        x = rms(streams, eps, w("hnorm.weight")) @ w("h_proj.weight").T + (embedded @ w("e_proj.weight").T)[:, None]
        x = self.layer(x, prefix, len(self.ratios) + index, 1, None, ({}, {}, {}, {}))
        return self.head(x, f"{prefix}.", f"{prefix}.norm.weight"), x

    def head(self, x, prefix, norm):
        cfg = self.config
        mix = rms(x.reshape(len(x), -1), cfg["rms_norm_eps"]) @ self.weights[f"{prefix}hc_head_fn"].T
        pre = sigmoid(mix * self.weights[f"{prefix}hc_head_scale"] + self.weights[f"{prefix}hc_head_base"])
        hidden = np.einsum("tk,tkd->td", pre + cfg["hc_eps"], x)
        hidden = rms(hidden, cfg["rms_norm_eps"], self.weights[norm])
        name = "embed.weight" if cfg.get("tie_word_embeddings") else "head.weight"
        return hidden @ self.weights[name].T

    def layer(self, x, prefix, layer, ratio, hash_ids, records):
        eps = self.config["rms_norm_eps"]
        hidden, post, comb = self.mixing(x, f"{prefix}.hc_attn")
        normed = rms(hidden, eps, self.weights[f"{prefix}.attn_norm.weight"])
        out = self.attention(normed, f"{prefix}.attn", layer, ratio, records)
        x = post[:, :, None] * out[:, None] + np.einsum("tjk,tjd->tkd", comb, x)
        hidden, post, comb = self.mixing(x, f"{prefix}.hc_ffn")
        normed = rms(hidden, eps, self.weights[f"{prefix}.ffn_norm.weight"])
        out = self.experts(normed, f"{prefix}.ffn", hash_ids)
        return post[:, :, None] * out[:, None] + np.einsum("tjk,tjd->tkd", comb, x)

    def mixing(self, x, name):
        """The sublayer's input, post [T, n] and comb [T, n, n]: new stream k takes comb[j, k] of old stream j."""
        cfg, n = self.config, self.config["hc_mult"]
        fn, base, scale = (self.weights[f"{name}_{part}"] for part in ("fn", "base", "scale"))
        mix = rms(x.reshape(len(x), -1), cfg["rms_norm_eps"]) @ fn.T
        pre = sigmoid(mix[:, :n] * scale[0] + base[:n]) + cfg["hc_eps"]
        post = 2 * sigmoid(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])
        logits = (mix[:, 2 * n :] * scale[2] + base[2 * n :]).reshape(-1, n, n)
        comb = np.exp(logits - logits.max(-1, keepdims=True))
        comb = comb / comb.sum(-1, keepdims=True) + cfg["hc_eps"]
        for step in range(2 * cfg["hc_sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(-1 if step % 2 else -2, keepdims=True) + cfg["hc_eps"])
        return np.einsum("tk,tkd->td", pre, x), post, comb

    def experts(self, x, prefix, hash_ids):
        cfg = self.config
        scores = np.sqrt(np.logaddexp(0.0, x @ self.weights[f"{prefix}.gate.weight"].T))
        if hash_ids is None:
            biased = scores + self.weights[f"{prefix}.gate.bias"]
            chosen = np.argsort(-biased, -1, kind="stable")[:, : cfg["num_experts_per_tok"]]
        else:
            chosen = self.weights[f"{prefix}.gate.tid2eid"].astype(int)[hash_ids]
        gates = np.take_along_axis(scores, chosen, -1)
        if cfg.get("norm_topk_prob", True):
            gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
        out = np.zeros_like(x)
        for token, (experts, weights) in enumerate(zip(chosen, gates * cfg["routed_scaling_factor"], strict=True)):
            for expert, weight in zip(experts, weights, strict=True):
                out[token] += weight * self.feed_forward(x[token], f"{prefix}.experts.{expert}")
        return out + self.feed_forward(x, f"{prefix}.shared_experts") if cfg["n_shared_experts"] else out

    def feed_forward(self, x, prefix):
        gate, up = (x @ self.weights[f"{prefix}.{name}.weight"].T for name in ("w1", "w3"))
        limit = self.config.get("swiglu_limit") or np.inf
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return (gate * sigmoid(gate) * up) @ self.weights[f"{prefix}.w2.weight"].T

    def attention(self, x, prefix, layer, ratio, records):
        """Section 3: [T, hidden]."""
        cfg, eps, length = self.config, self.config["rms_norm_eps"], len(x)
        heads, width, groups = cfg["num_attention_heads"], cfg["head_dim"], cfg["o_groups"]
        w = lambda name: self.weights[f"{prefix}.{name}"]  # noqa: E731 - shorter than a def
        angles = np.arange(length)[:, None] * self.frequencies(ratio)
        q_c = rms(x @ w("wq_a.weight").T, eps, w("q_norm.weight"))
        kv = self.stored("row", layer, rotated(rms(x @ w("wkv.weight").T, eps, w("kv_norm.weight")), angles))
        q = rotated(rms((q_c @ w("wq_b.weight").T).reshape(length, heads, width), eps), angles)
        position = np.arange(length)
        window = (position[None] <= position[:, None]) & (position[None] > position[:, None] - cfg["sliding_window"])
        rows, seen = kv, window
        if ratio > 1:
            entries = self.stored("entry", layer, self.entries(x, f"{prefix}.compressor", ratio, width))
            visible = np.arange(len(entries))[None] < ((position + 1) // ratio)[:, None]
            if ratio == 4:
                visible = self.selection(x, q_c, prefix, layer, angles, visible, records)
            rows, seen = np.concatenate([kv, entries]), np.concatenate([window, visible], 1)
        z = np.einsum("thd,sd->ths", q, rows) * width**-0.5
        z = np.where(seen[:, None], z, -np.inf)
        sink = np.broadcast_to(w("attn_sink")[None, :, None], (length, heads, 1))
        joined = np.concatenate([z, sink], -1)
        p = np.exp(joined - joined.max(-1, keepdims=True))
        p = (p / p.sum(-1, keepdims=True))[..., :-1]
        out = rotated(p @ rows, angles, -1.0)
        records[2][layer] = out
        wo_a = w("wo_a.weight").reshape(groups, cfg["o_lora_rank"], -1)
        low = np.einsum("tgx,gox->tgo", out.reshape(length, groups, -1), wo_a).reshape(length, -1)
        records[3][layer] = low @ w("wo_b.weight").T
        return records[3][layer]

    def stored(self, kind, layer, rows):
        """What a cache makes of a layer's rows: "row", "entry" or "index_key" [positions or entries, width]."""
        del kind, layer
        return rows

    def selection(self, x, q_c, prefix, layer, angles, visible, records):
        """S21, S22: the index_topk visible entries of best score, or those of the layer whose choice is shared."""
        cfg, name = self.config, f"{prefix}.indexer"
        if f"{name}.wq_b.weight" not in self.weights:
            return records[0][max(records[0])]
        keys = self.stored("index_key", layer, self.entries(x, f"{name}.compressor", 4, cfg["index_head_dim"]))
        query = (q_c @ self.weights[f"{name}.wq_b.weight"].T).reshape(len(x), cfg["index_n_heads"], -1)
        gates = x @ self.weights[f"{name}.weights_proj.weight"].T
        gates = gates * (cfg["index_head_dim"] * cfg["index_n_heads"]) ** -0.5
        dots = np.maximum(np.einsum("thd,sd->ths", rotated(query, angles), keys), 0.0)
        scores = np.where(visible, np.einsum("th,ths->ts", gates, dots), np.nan)
        order = np.argsort(np.where(visible, -scores, np.inf), -1, kind="stable")[:, : cfg["index_topk"]]
        chosen = np.zeros(visible.shape, bool)
        np.put_along_axis(chosen, order, True, 1)
        records[0][layer], records[1][layer] = chosen & visible, scores
        return records[0][layer]

    def entries(self, x, name, ratio, width):
        """S14 to S16: [T // ratio, width], rotated at the window's first position."""
        wkv, wgate, ape, norm = (
            self.weights[f"{name}.{part}"] for part in ("wkv.weight", "wgate.weight", "ape", "norm.weight")
        )
        overlap = 2 if ratio == 4 else 1
        kv, score = x @ wkv.T, x @ wgate.T + ape[np.arange(len(x)) % ratio]
        rows = []
        for j in range(len(x) // ratio):
            own = slice(j * ratio, (j + 1) * ratio)
            k, z = kv[own, (overlap - 1) * width :], score[own, (overlap - 1) * width :]
            if overlap == 2 and j > 0:
                older = slice((j - 1) * ratio, j * ratio)
                k, z = np.concatenate([kv[older, :width], k]), np.concatenate([score[older, :width], z])
            e = np.exp(z - z.max(0))
            rows.append((e * k).sum(0) / e.sum(0))
        normed = rms(np.array(rows).reshape(-1, width), self.config["rms_norm_eps"], norm)
        return rotated(normed, np.arange(len(rows))[:, None] * ratio * self.frequencies(ratio))

    def frequencies(self, ratio):
        """S8 to S10, [R / 2]."""
        cfg = self.config
        settings = cfg.get("rope_parameters") or cfg.get("rope_scaling") or {}
        nested = settings.get("compress") is not None
        part = (settings["compress"] if nested else settings) if ratio > 1 else settings.get("main") or {}
        outer = "compress_rope_theta" if ratio > 1 else "rope_theta"
        theta = part.get("rope_theta", cfg[outer]) if nested else cfg[outer]
        dim = cfg["qk_rope_head_dim"]
        pair = np.arange(dim // 2)
        plain = theta ** (-2.0 * pair / dim)
        if ratio == 1 or (part.get("rope_type") or part.get("type")) != "yarn":
            return plain

        def pair_with_turns(turns):
            original = part["original_max_position_embeddings"]
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_with_turns(part["beta_fast"])), 0)
        high = min(math.ceil(pair_with_turns(part["beta_slow"])), dim - 1)
        ramp = np.clip((pair - low) / (high - low or 0.001), 0.0, 1.0)
        return plain / part["factor"] * ramp + plain * (1 - ramp)
