"""Inputs in the shapes of DeepSeek-V3.2, and float64 references over sampled rows.

Tensors are made on torch's default device, which the runner sets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOPK = 2048
NOPE, ROPE = 512, 64  # the latent part of a key, which is its value too, and the rotary part
QUERY = NOPE + ROPE
SOFTMAX_SCALE = QUERY**-0.5  # the time does not depend on it
BLOCK = 64
LATENT_ROW = 656  # bytes: 512 e4m3, 4 float32 scales, 64 bfloat16
INDEX_HEADS, INDEX_DIM = 64, 128
INDEX_ROW = 132  # bytes: 128 e4m3, 1 float32 scale
LATENT_WRITE = QUERY * 2 + LATENT_ROW + 8  # bytes that writing one token moves: its bfloat16 key, the row, the slot
INDEX_WRITE = INDEX_DIM * 2 + INDEX_ROW + 8
FP8 = torch.float8_e4m3fn


def e4m3_bytes(count: int) -> Tensor:
    """[count] uint8: finite e4m3 numbers, distributed like a scaled normal."""
    return (torch.randn(count, dtype=torch.float16) * 60).clamp(-440, 440).to(FP8).view(torch.uint8)


def _repeated(tile: Tensor, rows: int) -> Tensor:
    """The tile again and again: addresses differ, contents need not."""
    pool = torch.empty((rows, *tile.shape[1:]), dtype=tile.dtype)
    for start in range(0, rows, tile.shape[0]):
        pool[start : start + tile.shape[0]] = tile[: rows - start]
    return pool


def latent_pool(tokens: int) -> Tensor:
    """[tokens / BLOCK, BLOCK, 1, LATENT_ROW] uint8."""
    count = min(tokens, 1 << 18)
    tile = torch.empty((count, LATENT_ROW), dtype=torch.uint8)
    tile[:, :NOPE] = e4m3_bytes(count * NOPE).view(count, NOPE)
    scales = torch.exp2(torch.randint(-7, -4, (count, 4)).float())
    tile[:, NOPE : NOPE + 16] = scales.view(torch.uint8).view(count, 16)
    tile[:, NOPE + 16 :] = torch.randn(count, ROPE).bfloat16().view(torch.uint8).view(count, 128)
    return _repeated(tile, tokens).view(tokens // BLOCK, BLOCK, 1, LATENT_ROW)


def index_pool(tokens: int) -> Tensor:
    """[tokens / BLOCK, BLOCK, 1, INDEX_ROW] uint8; a block holds all its numbers, then all its scales."""
    blocks = tokens // BLOCK
    count = min(blocks, 1 << 12)
    tile = torch.empty((count, BLOCK * INDEX_ROW), dtype=torch.uint8)
    tile[:, : BLOCK * INDEX_DIM] = e4m3_bytes(count * BLOCK * INDEX_DIM).view(count, -1)
    scales = torch.rand(count, BLOCK) * 0.01 + 0.01
    tile[:, BLOCK * INDEX_DIM :] = scales.view(torch.uint8).view(count, -1)
    return _repeated(tile, blocks).view(blocks, BLOCK, 1, INDEX_ROW)


def block_tables(pool_blocks: int, requests: int, blocks: int) -> Tensor:
    """[requests, blocks] int32, drawn without order from the pool; distinct while the pool lasts."""
    missing, parts = requests * blocks, []
    while missing > 0:
        part = torch.randperm(pool_blocks, dtype=torch.int32)[:missing]
        parts.append(part)
        missing -= part.numel()
    return torch.cat(parts).view(requests, blocks)


def chosen_positions(limits: Tensor, width: int) -> Tensor:
    """[rows, TOPK] int32: distinct positions below each row's limit (at least TOPK), in random order."""
    parts = []
    step = max(1, (1 << 27) // width)
    for part in limits.split(step):
        scores = torch.rand(part.numel(), width)
        scores.masked_fill_(torch.arange(width)[None] >= part[:, None], -1.0)
        ids = scores.topk(TOPK, dim=1).indices.int()
        parts.append(ids.gather(1, torch.rand(ids.shape).argsort(1)))
    return torch.cat(parts)


def slots_of(positions: Tensor, table: Tensor) -> Tensor:
    """[rows, k] positions through table [rows or 1, blocks]; -1 stays."""
    blocks = table.expand(positions.shape[0], -1).gather(1, (positions.clamp(min=0) // BLOCK).long())
    return torch.where(positions >= 0, blocks * BLOCK + positions % BLOCK, -1).int()


def slots_of_blocks(table: Tensor) -> Tensor:
    """All slots of a table row [blocks], int64."""
    return (table.long()[:, None] * BLOCK + torch.arange(BLOCK)).view(-1)


def padded_heads(query: Tensor, heads: int) -> Tensor:
    """[.., heads, width], zeros behind; the query itself where it is wide enough."""
    if query.shape[-2] >= heads:
        return query
    out = torch.zeros((*query.shape[:-2], heads, query.shape[-1]), dtype=query.dtype)
    out[..., : query.shape[-2], :] = query
    return out


def latent_rows(pool: Tensor, slots: Tensor) -> Tensor:
    """[n, QUERY] float64: the cache rows of slots."""
    rows = pool.view(-1, LATENT_ROW)[slots.long()]
    scales = rows[:, NOPE : NOPE + 16].contiguous().view(torch.float32).double()
    nope = rows[:, :NOPE].contiguous().view(FP8).float().double().view(-1, 4, 128) * scales[:, :, None]
    rope = rows[:, NOPE + 16 :].contiguous().view(torch.bfloat16).double()
    return torch.cat([nope.view(-1, NOPE), rope], 1)


def index_keys(pool: Tensor, blocks: Tensor) -> Tensor:
    """[n * BLOCK, INDEX_DIM] float64: the keys of whole blocks."""
    found = pool.view(-1, BLOCK * INDEX_ROW)[blocks.long()]
    numbers = found[:, : BLOCK * INDEX_DIM].contiguous().view(FP8).float().double().view(-1, INDEX_DIM)
    return numbers * found[:, BLOCK * INDEX_DIM :].contiguous().view(torch.float32).double().view(-1, 1)


def attention(query: Tensor, keys: Tensor) -> Tensor:
    """[heads, NOPE] of query [heads, QUERY] over keys [n, QUERY], all float64."""
    return torch.softmax((query @ keys.T) * SOFTMAX_SCALE, 1) @ keys[:, :NOPE]


def index_scores(query: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """[n] of query [heads, INDEX_DIM], weights [heads], keys [n, INDEX_DIM], all float64."""
    return (torch.relu(query @ keys.T) * weights[:, None]).sum(0)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Of the whole, so that a row that happens to cancel does not mislead; NaN is infinitely wrong."""
    found, wanted = found.double(), wanted.double()
    norm = wanted.norm().item()
    error = (found - wanted).norm().item()
    if math.isnan(error):
        return math.inf
    return float(error / norm if norm > 0 else error)
