"""Runs the package's model step by step over a paged cache and records what it did on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import paddle
import pytest

import fastdeploy_dsa.models  # before the indexer, which it imports and which imports its layers

# isort: split
import fastdeploy_dsa.layers
from fastdeploy_dsa.attention.dsa import DSAAttentionBackend
from fastdeploy_dsa.attention.select import create_attention_backend
from fastdeploy_dsa.indexer import Indexer
from fastdeploy_dsa.layers import MoE
from fastdeploy_dsa.models import DeepseekV32ForCausalLM
from fastdeploy_dsa.ops import CacheFormat, CpuOptions, index_query_quant, indexer_logits, reference
from fastdeploy_dsa.step import StepMetadata
from tests.kit.reference_model import Numbers, Scaled
from tests.kit.selections import mask_of_positions

BLOCK_SIZE = 8
SPARE_BLOCKS = 3


class Span(NamedTuple):
    """Tokens begin .. end-1 of a request that one step processes."""

    request: int
    begin: int
    end: int


_FORMAT_OF = {paddle.uint8: "fp8", paddle.bfloat16: "bfloat16", paddle.float32: "float32"}

Plan = Sequence[Sequence[Span]]


def in_one_step(lengths: Sequence[int]) -> Plan:
    """Everything of every request at once."""
    return [[Span(request, 0, length) for request, length in enumerate(lengths)]]


def prompts_then_tokens(prompt_lengths: Sequence[int], lengths: Sequence[int]) -> Plan:
    """All prompts in one step, then one token of every unfinished request per step."""
    steps = [[Span(request, 0, length) for request, length in enumerate(prompt_lengths)]]
    for ahead in range(max(np.subtract(lengths, prompt_lengths))):
        places = [(request, prompt_lengths[request] + ahead) for request in range(len(lengths))]
        steps.append([Span(request, at, at + 1) for request, at in places if at < lengths[request]])
    return steps


def in_chunks(lengths: Sequence[int], chunk: int) -> Plan:
    """Chunk tokens of every unfinished request per step."""
    return [
        [Span(request, at, min(at + chunk, length)) for request, length in enumerate(lengths) if at < length]
        for at in range(0, max(lengths), chunk)
    ]


@dataclass(frozen=True)
class Served:
    """What the model did for one request of T tokens; dictionaries are by layer id.

    Attributes:
        logits: [T, vocab].
        positions: [T, index_topk] int, -1 tail; layers that select.
        index_scores: [T, T], NaN after the query; layers that select.
        attn_heads: [T, heads, v].
        attn_out: [T, hidden].
        experts: [T, num_experts_per_tok]; mixture layers.
        numbers: What the caches hold and the index queries are.
    """

    logits: np.ndarray
    positions: dict[int, np.ndarray]
    index_scores: dict[int, np.ndarray]
    attn_heads: dict[int, np.ndarray]
    attn_out: dict[int, np.ndarray]
    experts: dict[int, np.ndarray]
    numbers: dict[int, Numbers]

    def selections(self) -> dict[int, np.ndarray]:
        """[T, T] bool by layer: the positions as a mask."""
        return {layer: mask_of_positions(rows) for layer, rows in self.positions.items()}


class Serving:
    """A model with a backend and a poisoned cache for a fixed set of requests."""

    def __init__(
        self,
        model: DeepseekV32ForCausalLM,
        sequences: Sequence[np.ndarray],
        *,
        cache_format: CacheFormat = "float32",
        cpu: CpuOptions | None = None,
    ) -> None:
        """Allocate blocks in random order, with spare ones between; every number of every cache is NaN."""
        self.model = model
        self.sequences = [np.asarray(sequence, np.int64) for sequence in sequences]
        backend = create_attention_backend(model.config, cache_dtype=cache_format, block_size=BLOCK_SIZE, cpu=cpu)
        assert isinstance(backend, DSAAttentionBackend)
        self.backend = backend
        blocks_of = [-(-len(sequence) // BLOCK_SIZE) for sequence in self.sequences]
        order = np.random.default_rng(len(blocks_of)).permutation(sum(blocks_of) + SPARE_BLOCKS)
        self.block_table = np.full((len(blocks_of), max(blocks_of)), -1, np.int32)
        for request, (count, end) in enumerate(zip(blocks_of, np.cumsum(blocks_of), strict=True)):
            self.block_table[request, :count] = order[end - count : end]
        caches = backend.create_kv_cache(num_layers=model.config.num_hidden_layers, num_blocks=len(order))
        self.caches = {key: poisoned(cache) for key, cache in caches.items()}

    def run(self, plan: Plan) -> list[np.ndarray]:
        """Process the plan's steps, which must cover every token; logits [T, vocab] of every request."""
        logits = []
        for spans in plan:
            hidden = self.model.forward(step=self.step(spans), attn_backend=self.backend, caches=self.caches)
            logits.append(self.model.compute_logits(hidden).numpy())
        return [np.concatenate(logits)[rows] for rows in self._rows_of_requests(plan)]

    def run_recorded(self, plan: Plan) -> list[Served]:
        """As run, with everything on the way."""
        recorded: dict[str, dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
        for spans in plan:
            step = self.step(spans)
            with recording(self.model) as records:
                hidden = self.model.forward(
                    step=step,
                    attn_backend=self.backend,
                    caches=self.caches,
                    on_selection=lambda layer, chosen: records["positions"].update({layer: chosen.positions.numpy()}),
                )
            records["logits"][0] = self.model.compute_logits(hidden).numpy()
            for name, by_layer in records.items():
                for layer, rows in by_layer.items():
                    recorded[name][layer].append(rows[: step.num_tokens])
        gathered = {
            name: {layer: _stacked(parts) for layer, parts in by_layer.items()} for name, by_layer in recorded.items()
        }
        return [self._served(request, rows, gathered) for request, rows in enumerate(self._rows_of_requests(plan))]

    def step(self, spans: Sequence[Span]) -> StepMetadata:
        return StepMetadata.build(
            token_ids=np.concatenate([self.sequences[s.request][s.begin : s.end] for s in spans]),
            positions=np.concatenate([np.arange(s.begin, s.end, dtype=np.int32) for s in spans]),
            request_ids=np.concatenate([np.full(s.end - s.begin, s.request, np.int32) for s in spans]),
            block_table=self.block_table,
            block_size=BLOCK_SIZE,
        )

    def _rows_of_requests(self, plan: Plan) -> list[np.ndarray]:
        """Where the tokens of every request, in order, stand among the rows of all steps."""
        tokens = np.array([(s.request, at) for spans in plan for s in spans for at in range(s.begin, s.end)])
        found = []
        for request, sequence in enumerate(self.sequences):
            rows = np.flatnonzero(tokens[:, 0] == request)
            rows = rows[np.argsort(tokens[rows, 1])]
            assert np.array_equal(tokens[rows, 1], np.arange(len(sequence))), f"request {request}: tokens missing"
            found.append(rows)
        return found

    def _served(self, request: int, rows: np.ndarray, gathered: dict[str, Any]) -> Served:
        own = defaultdict(dict, {name: {k: v[rows] for k, v in layers.items()} for name, layers in gathered.items()})
        query_numbers, query_scale = own["query_numbers"], own["query_scale"]
        queries = {layer: Scaled(query_numbers[layer], query_scale[layer]) for layer in query_numbers}
        return Served(
            logits=own["logits"][0],
            positions=own["positions"],
            index_scores={layer: scores[:, : len(rows)] for layer, scores in own["index_scores"].items()},
            attn_heads=own["attn_heads"],
            attn_out=own["attn_out"],
            experts=own["experts"],
            numbers={
                layer: self._numbers(request, layer, queries.get(layer)) for layer in range(len(self.model.layers))
            },
        )

    def _numbers(self, request: int, layer: int, query: Scaled | None) -> Numbers:
        """Read a request's tokens back from the caches of a layer."""
        config, position = self.model.config, np.arange(len(self.sequences[request]))
        slots = self.block_table[request, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        rank = config.kv_lora_rank
        rows = reference.read_latent_rows(_packed(self.caches["key", layer]), slots, rank, config.qk_rope_head_dim)
        latent, rope = np.split(rows.astype(np.float64), [rank], axis=1)
        if query is None:
            return Numbers(latent, rope)
        keys, scales = reference.read_index_keys(_packed(self.caches["indexer", layer]), slots)
        return Numbers(latent, rope, Scaled(keys.astype(np.float64), scales.astype(np.float64)), query)


def _packed(tensor: paddle.Tensor) -> np.ndarray:
    """As the reference ops take it: bfloat16 as its bits."""
    if tensor.dtype == paddle.bfloat16:
        return tensor.view(paddle.int16).numpy().view(np.uint16)
    return tensor.numpy()


def poisoned(cache: paddle.Tensor) -> paddle.Tensor:
    """NaN in every number: 0xFF is a NaN of e4m3, and four of it are one of float32."""
    if cache.dtype == paddle.uint8:
        return paddle.full_like(cache, 255)
    return paddle.full_like(cache, float("nan"))


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Rows of all steps; score rows of earlier steps are narrower and get NaN columns."""
    if parts[0].ndim == 2 and len({part.shape[1] for part in parts}) > 1:
        width = max(part.shape[1] for part in parts)
        parts = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=np.nan) for part in parts]
    return np.concatenate(parts)


@contextmanager
def recording(model: DeepseekV32ForCausalLM) -> Iterator[dict[str, dict[int, Any]]]:
    """Record one step: index scores, attention results and experts of every row, by layer; padding rows included."""
    records: dict[str, dict[int, Any]] = defaultdict(dict)
    with pytest.MonkeyPatch.context() as patch:
        layer_of_bias = {}
        for layer, decoder in enumerate(model.layers):
            _record_attention(patch, decoder.attention, layer, records)
            if decoder.attention.indexer is not None:
                recorder = _RecordingIndexer(decoder.attention.indexer, records, layer)
                patch.setattr(decoder.attention, "indexer", recorder)
            if isinstance(decoder._mlp, MoE):
                layer_of_bias[id(decoder._mlp._correction_bias)] = layer
        _record_experts(patch, layer_of_bias, records["experts"])
        yield records


def _record_attention(patch: pytest.MonkeyPatch, attention: Any, layer: int, records: Any) -> None:
    output = attention.output

    def recorded_output(attended: paddle.Tensor) -> paddle.Tensor:
        values = paddle.matmul(attended.transpose([1, 0, 2]), attention._w_uv).transpose([1, 0, 2])
        result = output(attended)
        records["attn_heads"][layer] = values.numpy()
        records["attn_out"][layer] = result.numpy()
        return result

    patch.setattr(attention, "output", recorded_output)


def _record_experts(patch: pytest.MonkeyPatch, layer_of_bias: dict[int, int], experts: dict[int, Any]) -> None:
    route = fastdeploy_dsa.layers.route

    def recorded_route(scores: Any, correction_bias: Any, config: Any) -> Any:
        chosen, weights = route(scores, correction_bias, config)
        experts[layer_of_bias[id(correction_bias)]] = chosen
        return chosen, weights

    patch.setattr(fastdeploy_dsa.layers, "route", recorded_route)


class _RecordingIndexer:
    """An indexer that also keeps its queries and computes the whole score rows behind its selection."""

    def __init__(self, indexer: Indexer, records: Any, layer: int) -> None:
        self._indexer = indexer
        self._records = records
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._indexer, name)

    def queries(self, *given: Any) -> Any:
        self._unquantised = self._indexer.queries(*given)
        return self._unquantised

    def select(self, *, query: Any, folded_weights: Any, step: Any, index_cache: Any, cpu: Any) -> Any:
        selection = self._indexer.select(
            query=query, folded_weights=folded_weights, step=step, index_cache=index_cache, cpu=cpu
        )
        scores = indexer_logits(
            query=query,
            folded_weights=folded_weights,
            index_cache=index_cache,
            block_table=step.block_table,
            request_ids=step.request_ids,
            lengths=step.lengths,
            logits_width=step.max_length,
            cpu=cpu,
        ).numpy()
        visible = np.arange(step.max_length)[None, :] < step.lengths.numpy()[:, None]
        self._records["index_scores"][self._layer] = np.where(visible, scores, np.nan)

        # The scale of a query is known only as a factor of its head weight: with weights of 1 it comes out alone.
        unquantised, weights = self._unquantised
        _, scale = index_query_quant(
            query=unquantised, weights=paddle.ones_like(weights), cache_format=_FORMAT_OF[index_cache.dtype], cpu=cpu
        )
        constant = np.float32((query.shape[1] * query.shape[2]) ** -0.5)
        self._records["query_scale"][self._layer] = (scale.numpy() / constant).astype(np.float64)
        self._records["query_numbers"][self._layer] = reference.decode(_packed(query)).astype(np.float64)
        return selection
