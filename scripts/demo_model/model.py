"""The demo model in PyTorch: DeepSeek-V3.2 decoder layers and one MTP layer, written for training.

Attention is computed per head from expanded keys and values and nothing is cached. Parameter names are those of the
checkpoint except for the experts, which are stacked (checkpoint.py splits them).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from demo_model import attention
from demo_model.attention import Rows, fake_e4m3
from demo_model.config import DemoConfig

LATENT_GROUP = 128  # values per scale in an 8-bit latent cache
_KEY_NORM_EPS = 1e-6


class Reading(enum.Enum):
    """What attention reads and what the indexer learns from it."""

    ALL = "all"  # every token; the indexer does not run
    ALL_TEACHING = "all, teaching the indexer"
    SELECTED = "selected"  # only what the indexer selects


@dataclass(frozen=True)
class Pass:
    """Per-call choices and tables.

    cos, sin: [T, rope / 2] float32. is_quantised: [B, 1, 1] bool, documents whose caches are rounded to 8 bits.
    """

    reading: Reading
    cos: Tensor
    sin: Tensor
    is_quantised: Tensor


class LayerOutput(NamedTuple):
    """hidden: [B, T, hidden]; divergence: indexer's loss, scalar; load: [experts] tokens routed to each."""

    hidden: Tensor
    divergence: Tensor
    load: Tensor
    rows: Rows


def rope_table(num_tokens: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [num_tokens, width / 2], float32 from float64 angles."""
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angle = torch.arange(num_tokens, dtype=torch.float64, device=device).outer(frequency)
    return angle.cos().float(), angle.sin().float()


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of the last axis; x [B, T, heads, R]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + R/2) of the last axis; x [B, T, heads, R] float32."""
    low, high = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)
        device = x.device.type  # one cast here instead of one in each linear layer that follows
        return normed.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else normed


def linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """Bias-free layer whose outputs start with about `gain` times the spread of its inputs."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=gain * inputs**-0.5)
    return layer


class Indexer(nn.Module):
    def __init__(self, config: DemoConfig):
        super().__init__()
        self.config = config
        self.wq_b = linear(config.q_lora_rank, config.index_n_heads * config.index_head_dim)
        self.wk = linear(config.hidden_size, config.index_head_dim)
        self.k_norm = nn.LayerNorm(config.index_head_dim, eps=_KEY_NORM_EPS)
        self.weights_proj = linear(config.hidden_size, config.index_n_heads)

    def forward(self, x: Tensor, query_latent: Tensor, step: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """Index queries, keys and weights as in `Rows`."""
        config = self.config
        width, heads, rope = config.index_head_dim, config.index_n_heads, config.qk_rope_head_dim
        query = self.wq_b(query_latent).unflatten(-1, (heads, width))
        key = self.k_norm(self.wk(x).float()).unsqueeze(2)
        query, key = (self._rotate_first(v.float(), rope, step).to(query.dtype) for v in (query, key))
        query = fake_e4m3(query, step.is_quantised.unsqueeze(-1))
        key = fake_e4m3(key.squeeze(2), step.is_quantised)
        return query, key, self.weights_proj(x).float() * (width * heads) ** -0.5

    @staticmethod
    def _rotate_first(x: Tensor, rope: int, step: Pass) -> Tensor:
        return torch.cat((rotate_halves(x[..., :rope], step.cos, step.sin), x[..., rope:]), -1)


class SelfAttention(nn.Module):
    def __init__(self, config: DemoConfig, out_gain: float):
        super().__init__()
        self.config = config
        heads = config.num_attention_heads
        self.q_a_proj = linear(config.hidden_size, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = linear(config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = linear(heads * config.v_head_dim, config.hidden_size, out_gain)
        self.indexer = Indexer(config)
        self.scale = config.qk_head_dim**-0.5

    def rows(self, x: Tensor, step: Pass) -> Rows:
        """x [B, T, hidden], normed. The indexer's inputs are cut off: it learns from attention alone."""
        config = self.config
        heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        query_latent = self.q_a_layernorm(self.q_a_proj(x))
        query = self.q_b_proj(query_latent).unflatten(-1, (heads, nope + rope))
        latent, key_rope = self.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, rope), -1)
        latent = self.kv_a_layernorm(latent).unflatten(-1, (-1, min(LATENT_GROUP, config.kv_lora_rank)))
        latent = fake_e4m3(latent, step.is_quantised.unsqueeze(-1)).flatten(-2)
        key_nope, value = self.kv_b_proj(latent).unflatten(-1, (heads, -1)).split((nope, config.v_head_dim), -1)
        key_rope = rotate_interleaved(key_rope.unsqueeze(2), step.cos, step.sin).expand(-1, -1, heads, -1)
        query_rope = rotate_interleaved(query[..., nope:], step.cos, step.sin)
        return Rows(
            torch.cat((query[..., :nope], query_rope), -1),
            torch.cat((key_nope, key_rope), -1),
            value,
            *self.indexer(x.detach(), query_latent.detach(), step),
        )

    def forward(self, x: Tensor, step: Pass, history: list[Rows]) -> tuple[Tensor, Tensor, Rows]:
        """history: rows of this layer's earlier MTP iterations, first iteration first; empty in the target model."""
        own = self.rows(x, step)
        base, recent = own, []
        if history:
            base = own._replace(key=history[0].key, value=history[0].value, index_key=history[0].index_key)
            recent = [own, *reversed(history[1:])]
        if step.reading is Reading.ALL:
            out, divergence = attention.attend_all(base, self.scale), x.new_zeros(())
        elif step.reading is Reading.ALL_TEACHING:
            out, divergence = attention.attend_all_and_teach(base, recent, self.scale)
        else:
            out, divergence = attention.attend_selected(base, recent, self.config.index_topk, self.scale)
        return self.o_proj(out.flatten(-2)), divergence, own


class DenseMLP(nn.Module):
    def __init__(self, config: DemoConfig, out_gain: float):
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, out_gain)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x)), x.new_zeros(1)


class MixtureOfExperts(nn.Module):
    """Every expert sees every token and the unchosen get weight zero: four small experts are cheaper so than sorted.

    The shared expert is the last one of the stack and always has weight one.
    """

    def __init__(self, config: DemoConfig, out_gain: float):
        super().__init__()
        self.config = config
        experts, width = config.n_routed_experts + 1, config.moe_intermediate_size
        self.gate = linear(config.hidden_size, config.n_routed_experts)
        self.gate_up = linear(config.hidden_size, experts * 2 * width)
        self.down = linear(experts * width, config.hidden_size, out_gain * 1.5)
        self.register_buffer("correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum of the experts and how many tokens each routed expert got."""
        config = self.config
        weights = self.router_weights(x)
        hidden = self.gate_up(x).unflatten(-1, (config.n_routed_experts + 1, 2, -1))
        hidden = functional.silu(hidden[..., 0, :]) * hidden[..., 1, :]
        weighted = hidden * functional.pad(weights, (0, 1), value=1.0).unsqueeze(-1).to(hidden.dtype)
        return self.down(weighted.flatten(-2)), (weights > 0).float().sum((0, 1))

    def router_weights(self, x: Tensor) -> Tensor:
        """[B, T, experts] float32, zero where not chosen."""
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            scores = functional.linear(x.float(), self.gate.weight.float()).sigmoid()
        ranked = (scores + self.correction_bias).detach()
        groups = ranked.unflatten(-1, (config.n_group, -1))
        group_scores = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
        kept = torch.zeros_like(group_scores).scatter_(-1, group_scores.topk(config.topk_group, -1).indices, 1.0)
        ranked = groups.masked_fill(kept.unsqueeze(-1) == 0, 0.0).flatten(-2)
        chosen = ranked.topk(config.num_experts_per_tok, -1).indices
        weights = scores.gather(-1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
        return torch.zeros_like(scores).scatter(-1, chosen, weights)


class DecoderLayer(nn.Module):
    def __init__(self, config: DemoConfig, is_dense: bool):
        super().__init__()
        out_gain = (2 * config.num_hidden_layers) ** -0.5
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, out_gain)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DenseMLP(config, out_gain) if is_dense else MixtureOfExperts(config, out_gain)

    def forward(self, x: Tensor, step: Pass, history: list[Rows]) -> LayerOutput:
        out, divergence, rows = self.self_attn(self.input_layernorm(x), step, history)
        x = x + out
        out, load = self.mlp(self.post_attention_layernorm(x))
        return LayerOutput(x + out, divergence, load, rows)


class MTPLayer(DecoderLayer):
    """Row p joins the hidden state of position p with the embedding of token p + 1 and predicts token p + 2."""

    def __init__(self, config: DemoConfig):
        super().__init__(config, is_dense=False)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def iterate(self, next_embedding: Tensor, hidden: Tensor, step: Pass, history: list[Rows]) -> LayerOutput:
        """One draft iteration over all rows; the returned hidden state is normed and may be recycled."""
        joined = torch.cat((self.enorm(next_embedding), self.hnorm(hidden)), -1)
        output = self(self.eh_proj(joined).float(), step, history)
        return output._replace(hidden=self.shared_head["norm"](output.hidden))


class DemoModel(nn.Module):
    """The target's layers and, as the last entry of `layers`, the MTP layer."""

    def __init__(self, config: DemoConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        num_dense = config.first_k_dense_replace
        target = [DecoderLayer(config, layer < num_dense) for layer in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList([*target, MTPLayer(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = linear(config.hidden_size, config.vocab_size)

    def pass_over(self, ids: Tensor, reading: Reading, quantised_share: float = 0.0) -> Pass:
        """Tables for ids [B, T]; the first `quantised_share` of the documents gets 8-bit caches."""
        config = self.config
        cos, sin = rope_table(ids.shape[1], config.qk_rope_head_dim, config.rope_theta, ids.device)
        order = torch.arange(ids.shape[0], device=ids.device).view(-1, 1, 1)
        return Pass(reading, cos, sin, order < round(quantised_share * ids.shape[0]))

    def forward(self, ids: Tensor, step: Pass) -> tuple[Tensor, list[LayerOutput]]:
        """ids [B, T]. Returns the final normed hidden states [B, T, hidden] and every layer's output."""
        x = self.embed_tokens(ids)
        outputs: list[LayerOutput] = []
        for layer in self.layers[:-1]:
            outputs.append(layer(x, step, []))
            x = outputs[-1].hidden
        return self.norm(x), outputs

    def draft(self, hidden: Tensor, next_ids: Tensor, step: Pass, iterations: int) -> list[LayerOutput]:
        """MTP iterations with the true tokens; row p of every iteration predicts token p + 2.

        Iteration j reads iteration j - 1's hidden state one row earlier, so its first j rows mean nothing.

        Args:
            hidden: [B, T, hidden], the target's.
            next_ids: [B, T], token p + 1 for row p.
        """
        embedding = self.embed_tokens(next_ids)
        outputs: list[LayerOutput] = []
        for iteration in range(iterations):
            if iteration:
                hidden = functional.pad(outputs[-1].hidden, (0, 0, 1, 0))[:, :-1]
            outputs.append(self.layers[-1].iterate(embedding, hidden, step, [output.rows for output in outputs]))
        return outputs
