"""Runs a model with compressed entries step by step over paged, poisoned caches and records what it did on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import paddle
import pytest

import fastdeploy_dsa.attention.deepseek_v4.indexer as indexer_module
import fastdeploy_dsa.attention.deepseek_v4.o_proj as o_proj_module
from fastdeploy_dsa.attention.deepseek_v4.backend import DeepseekV4AttentionBackend
from fastdeploy_dsa.attention.select import create_attention_backend
from fastdeploy_dsa.models import DeepseekV4ForCausalLM
from fastdeploy_dsa.ops import CacheFormat, CpuOptions, IndexSelection, indexer_logits
from fastdeploy_dsa.step import StepMetadata
from tests.kit.serving import SPARE_BLOCKS, Plan, Span, poisoned

BLOCK_SIZE = 256


class ServedEntries(NamedTuple):
    """What the model did for one request of T tokens; dictionaries are by layer id.

    logits [T, vocab]; positions [T, index_topk], entry numbers, -1 tail; index_scores [T, entries], NaN for entries
    that the row does not see; attn_heads [T, heads, head_dim], rotation undone; attn_out [T, hidden].
    """

    logits: np.ndarray
    positions: dict[int, np.ndarray]
    index_scores: dict[int, np.ndarray]
    attn_heads: dict[int, np.ndarray]
    attn_out: dict[int, np.ndarray]


class CompressedServing:
    """A model with a backend and poisoned caches for a fixed set of requests, which keep all their blocks."""

    def __init__(
        self,
        model: DeepseekV4ForCausalLM,
        sequences: Sequence[np.ndarray],
        *,
        cache_format: CacheFormat = "float32",
        block_size: int = BLOCK_SIZE,
        num_layers: int | None = None,
        cpu: CpuOptions | None = None,
    ) -> None:
        """Allocate blocks in random order, with spare ones between; every number of every cache is NaN."""
        self.model = model
        self.sequences = [np.asarray(sequence, np.int64) for sequence in sequences]
        backend = create_attention_backend(model.config, cache_dtype=cache_format, block_size=block_size, cpu=cpu)
        assert isinstance(backend, DeepseekV4AttentionBackend)
        self.backend = backend
        self.block_size = block_size
        lengths = [len(sequence) for sequence in self.sequences]
        self.block_table, num_blocks = _random_blocks(lengths, block_size, seed=0)
        tables = {
            pool.name: _random_blocks(lengths, pool.block_tokens, seed=1 + place)
            for place, pool in enumerate(backend.cache_pools())
        }
        self.window_tables = {name: table for name, (table, _) in tables.items()}
        caches = backend.create_kv_cache(
            num_layers=model.config.num_hidden_layers if num_layers is None else num_layers,
            num_blocks=num_blocks,
            window_blocks={name: count for name, (_, count) in tables.items()},
        )
        self.caches = {key: poisoned(cache) for key, cache in caches.items()}

    def forward(self, step: StepMetadata, on_selection: Callable[[int, IndexSelection], None] | None = None) -> Any:
        return self.model.forward(step=step, attn_backend=self.backend, caches=self.caches, on_selection=on_selection)

    def run(self, plan: Plan) -> list[np.ndarray]:
        """Process the plan's steps, which must cover every token; logits [T, vocab] of every request."""
        logits = [self.model.compute_logits(self.forward(self.step(spans))).numpy() for spans in plan]
        return [np.concatenate(logits)[rows] for rows in self.rows_of_requests(plan)]

    def run_recorded(self, plan: Plan) -> list[ServedEntries]:
        """As run, with everything on the way."""
        recorded: dict[str, dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
        for spans in plan:
            step = self.step(spans)
            with recording(self.model) as records:
                hidden = self.forward(
                    step, lambda layer, chosen: records["positions"].update({layer: chosen.positions.numpy()})
                )
            records["logits"][0] = self.model.compute_logits(hidden).numpy()
            for name, by_layer in records.items():
                for layer, rows in by_layer.items():
                    recorded[name][layer].append(rows[: step.num_tokens])
        gathered = {
            name: {layer: _stacked(parts) for layer, parts in by_layer.items()} for name, by_layer in recorded.items()
        }
        served = []
        for rows in self.rows_of_requests(plan):
            own = defaultdict(dict, {k: {layer: v[rows] for layer, v in by.items()} for k, by in gathered.items()})
            names = ("positions", "index_scores", "attn_heads", "attn_out")
            served.append(ServedEntries(own["logits"][0], *(own[name] for name in names)))
        return served

    def step(self, spans: Sequence[Span]) -> StepMetadata:
        return StepMetadata.build(
            token_ids=np.concatenate([self.sequences[s.request][s.begin : s.end] for s in spans]),
            positions=np.concatenate([np.arange(s.begin, s.end, dtype=np.int32) for s in spans]),
            request_ids=np.concatenate([np.full(s.end - s.begin, s.request, np.int32) for s in spans]),
            block_table=self.block_table,
            block_size=self.block_size,
            window_tables=self.window_tables,
        )

    def rows_of_requests(self, plan: Plan) -> list[np.ndarray]:
        """Where the tokens of every request, in order, stand among the rows of all steps."""
        tokens = np.array([(s.request, at) for spans in plan for s in spans for at in range(s.begin, s.end)])
        found = []
        for request, sequence in enumerate(self.sequences):
            rows = np.flatnonzero(tokens[:, 0] == request)
            rows = rows[np.argsort(tokens[rows, 1])]
            assert np.array_equal(tokens[rows, 1], np.arange(len(sequence))), f"request {request}: tokens missing"
            found.append(rows)
        return found


def _random_blocks(lengths: Sequence[int], block_tokens: int, seed: int) -> tuple[np.ndarray, int]:
    """A block table [requests, most blocks] of blocks in random order, and how many blocks there are."""
    blocks_of = [-(-length // block_tokens) for length in lengths]
    order = np.random.default_rng(seed).permutation(sum(blocks_of) + SPARE_BLOCKS)
    table = np.full((len(blocks_of), max(blocks_of)), -1, np.int32)
    for request, (count, end) in enumerate(zip(blocks_of, np.cumsum(blocks_of), strict=True)):
        table[request, :count] = order[end - count : end]
    return table, len(order)


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Rows of all steps; score rows of earlier steps are narrower and get NaN columns."""
    if parts[0].ndim == 2 and len({part.shape[1] for part in parts}) > 1:
        width = max(part.shape[1] for part in parts)
        parts = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=np.nan) for part in parts]
    return np.concatenate(parts)


@contextmanager
def recording(model: DeepseekV4ForCausalLM) -> Iterator[dict[str, dict[int, Any]]]:
    """Record one step: index scores and attention results of every row, by layer; padding rows included."""
    records: dict[str, dict[int, Any]] = defaultdict(dict)
    selecting = iter([layer for layer, decoder in enumerate(model.layers) if decoder.attention.indexer is not None])
    undone = iter(range(len(model.layers)))
    with pytest.MonkeyPatch.context() as patch:
        select, undo = indexer_module.index_select, o_proj_module.inverse_rope

        def recorded_select(*, topk: int, max_length: int, **rest: Any) -> IndexSelection:
            scores = indexer_logits(logits_width=max_length, **rest).numpy()
            visible = np.arange(max_length)[None, :] < rest["lengths"].numpy()[:, None]
            records["index_scores"][next(selecting)] = np.where(visible, scores, np.nan)
            return select(topk=topk, max_length=max_length, **rest)

        def recorded_undo(*, x: paddle.Tensor, **rest: Any) -> None:
            undo(x=x, **rest)
            records["attn_heads"][next(undone)] = x.numpy()

        patch.setattr(indexer_module, "index_select", recorded_select)
        patch.setattr(o_proj_module, "inverse_rope", recorded_undo)
        for layer, decoder in enumerate(model.layers):
            _record_output(patch, decoder.attention, layer, records)
        yield records


def _record_output(patch: pytest.MonkeyPatch, attention: Any, layer: int, records: Any) -> None:
    project = attention._o_proj

    def recorded(*arguments: Any) -> paddle.Tensor:
        result = project(*arguments)
        records["attn_out"][layer] = result.numpy()
        return result

    patch.setattr(attention, "_o_proj", recorded)
