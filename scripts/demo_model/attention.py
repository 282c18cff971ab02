"""The two attentions of training: over every earlier token, and over the tokens that the indexer selects.

Shapes: B documents, T query tokens, S = T key tokens, H heads, I index heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

E4M3_MAX = 448.0


class Rows(NamedTuple):
    """What one layer computes of every token before attention.

    query, key: [B, T, H, nope + rope]; value: [B, T, H, v]; index_query: [B, T, I, D]; index_key: [B, T, D];
    index_weight: [B, T, I] float32, both score factors included.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    index_query: Tensor
    index_key: Tensor
    index_weight: Tensor


def fake_e4m3(x: Tensor, is_quantised: Tensor) -> Tensor:
    """x as an e4m3 cache with one power-of-two scale per row gives it back, where `is_quantised`; gradient of x."""
    values = x.detach().float()
    scale = torch.exp2(torch.ceil(torch.log2(values.abs().amax(-1, keepdim=True).clamp_min(1e-4) / E4M3_MAX)))
    rounded = (values / scale).to(torch.float8_e4m3fn).float() * scale
    return x + torch.where(is_quantised, rounded - values, 0.0).to(x.dtype)


def attend_all(rows: Rows, scale: float) -> Tensor:
    """Causal attention over every earlier token, without looking at the indexer. Returns [B, T, H, v]."""
    query, key, value = (x.transpose(1, 2) for x in rows[:3])
    padding = query.shape[-1] - value.shape[-1]  # the fused kernels want equal widths
    padded = functional.pad(value, (0, padding))
    out = functional.scaled_dot_product_attention(query, key, padded, is_causal=True, scale=scale)
    return out[..., : value.shape[-1]].transpose(1, 2)


def attend_all_and_teach(rows: Rows, recent: Sequence[Rows], scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention over every earlier token; the indexer learns its head-averaged weights.

    Returns:
        [B, T, H, v] and the mean divergence of the indexer's distribution from the attention's.
    """
    is_visible = _causal_mask(rows).expand(rows.query.shape[0], -1, -1)
    return _attend(rows, recent, is_visible, index_scores(rows, recent), scale)


def attend_selected(rows: Rows, recent: Sequence[Rows], topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the `topk` tokens of highest index score; the indexer learns within them. Returns as above."""
    scores = index_scores(rows, recent)
    return _attend(rows, recent, selected_mask(scores, topk), scores, scale)


def index_scores(rows: Rows, recent: Sequence[Rows]) -> Tensor:
    """[B, T, S] float32 of every pair, the future included."""
    batch, tokens, heads, width = rows.index_query.shape
    dots = rows.index_query.reshape(batch, tokens * heads, width) @ rows.index_key.transpose(1, 2)
    dots = dots.view(batch, tokens, heads, -1).float().relu()
    scores = (dots * rows.index_weight.unsqueeze(-1)).sum(2)
    for age, newer in enumerate(recent):
        own = (rows.index_query[:, age:] * _aged(newer.index_key, age).unsqueeze(2)).float().sum(-1).relu()
        own = (own * rows.index_weight[:, age:]).sum(-1)
        scores = torch.diagonal_scatter(scores, own, offset=-age, dim1=-2, dim2=-1)
    return scores


@torch.no_grad()
def selected_mask(scores: Tensor, topk: int) -> Tensor:
    """[B, T, S] bool: the min(topk, t + 1) best earlier tokens of every row t."""
    tokens = scores.shape[-1]
    is_earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).tril()
    best = scores.masked_fill(~is_earlier, -torch.inf).topk(min(topk, tokens), dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & is_earlier


def _causal_mask(rows: Rows) -> Tensor:
    tokens = rows.query.shape[1]
    return torch.ones(1, tokens, tokens, dtype=torch.bool, device=rows.query.device).tril()


def _aged(x: Tensor, age: int) -> Tensor:
    return x[:, : x.shape[1] - age]


def _attend(
    rows: Rows, recent: Sequence[Rows], is_visible: Tensor, scores: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    query, key, value = (x.transpose(1, 2) for x in rows[:3])
    logits = (query @ key.transpose(-1, -2)) * scale
    for age, newer in enumerate(recent):
        own = (query[:, :, age:] * _aged(newer.key, age).transpose(1, 2)).sum(-1) * scale
        logits = torch.diagonal_scatter(logits, own.to(logits.dtype), offset=-age, dim1=-2, dim2=-1)
    weights = logits.float().masked_fill(~is_visible.unsqueeze(1), -torch.inf).softmax(-1).to(value.dtype)
    out = weights @ value
    for age, newer in enumerate(recent):
        change = (_aged(newer.value, age) - _aged(rows.value, age)).transpose(1, 2)
        own = weights.diagonal(offset=-age, dim1=-2, dim2=-1).unsqueeze(-1) * change
        out = out + functional.pad(own, (0, 0, age, 0))
    return out.transpose(1, 2), _divergence(weights.detach(), is_visible, scores)


def _divergence(weights: Tensor, is_visible: Tensor, scores: Tensor) -> Tensor:
    """Mean over rows of KL(head average of weights || softmax of scores), both over the visible tokens."""
    teacher = weights.float().mean(1)
    student = scores.masked_fill(~is_visible, -torch.inf).log_softmax(-1)
    terms = teacher * (teacher.clamp_min(1e-9).log() - student.masked_fill(~is_visible, 0.0))
    return terms.sum(-1).mean()
