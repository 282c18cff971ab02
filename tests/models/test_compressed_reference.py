"""DeepSeek-V4 against a float64 model of its own: the goldens' cases, and random checkpoints of every shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from fastdeploy_dsa.models import load_model_with_mtp
from tests.kit.compare import assert_same
from tests.kit.compressed_serving import CompressedServing
from tests.kit.goldens import GoldenCase
from tests.kit.reference_model.compressed import CompressedReferenceModel
from tests.kit.serving import in_chunks, poisoned
from tests.kit.tiny_compressed_model import VOCAB_SIZE, write_tiny_compressed_model

LENGTH = 270
SHARE = 2e-5  # of the logits' size: float32 noise of these sizes; the goldens' own is 5e-6
YARN = {"factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
NESTED = {
    "main": {"rope_type": "default", "rope_theta": 500.0},
    "compress": {"rope_type": "yarn", "rope_theta": 4e4, **YARN, "attention_factor": 1.0},
}
TYPES = {"c": "compressed_sparse_attention", "h": "heavily_compressed_attention", "s": "sliding_attention"}


def by_types(letters: str) -> dict[str, Any]:
    return {"num_hidden_layers": len(letters), "layer_types": [TYPES[one] for one in letters], "compress_ratios": None}


SHAPES: dict[str, dict[str, Any]] = {
    "as the tiny model": {},
    "window of one, no hash layers": {"sliding_window": 1, "num_hash_layers": 0},
    "window beyond a block": {"sliding_window": 100},
    "longest window": {"sliding_window": 400},
    "compressed layers alone": by_types("hcch"),
    "window only": by_types("sss"),
    "nested rotation settings": {**by_types("csh"), "rope_parameters": NESTED, "rope_scaling": None},
    "flat rotation without YaRN": {"rope_scaling": None},
    "one group of odd heads": {"num_attention_heads": 3, "o_groups": 1, "o_lora_rank": 7},
    "a group per head": {"num_attention_heads": 6, "o_groups": 6, "o_lora_rank": 3},
    "narrow heads, wide rotation": {"head_dim": 20, "qk_rope_head_dim": 16, "index_head_dim": 18, "index_n_heads": 3},
    "one stream": {"hc_mult": 1, "hc_sinkhorn_iters": 1},
    "many streams": {"hc_mult": 5, "hc_sinkhorn_iters": 20},
    "every layer hashes": {"num_hash_layers": 9},
    "listed routers": {"num_hash_layers": None, "mlp_layer_types": ["moe", "hash_moe", "moe", "hash_moe"]},
    "no shared expert, no limit": {"n_shared_experts": 0, "swiglu_limit": None},
    "two shared experts": {"n_shared_experts": 2, "num_experts_per_tok": 3, "swiglu_limit": 0.5},
    "weights not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "one entry at a time": {"index_topk": 1},
    "every entry": {"index_topk": 80},
    "tied head": {"tie_word_embeddings": True},
    "odd widths": {"hidden_size": 33, "q_lora_rank": 23, "moe_intermediate_size": 9, "n_routed_experts": 5},
}


def test_the_reference_gives_the_golden(compressed_golden: GoldenCase) -> None:
    reference = CompressedReferenceModel.load(compressed_golden.folder)
    for prompt in compressed_golden.prompts:
        trace = reference.forward(prompt.fed_ids)
        prompt.assert_logits(trace.logits, 2 * compressed_golden.tolerances.seen_logits)
        for layer, expected in prompt.by_layer("topk").items():
            for row, chosen in zip(expected, trace.selections[layer], strict=True):
                assert row[row >= 0].tolist() == np.flatnonzero(chosen).tolist()
        for name in ("attn_heads", "attn_out"):
            for layer, expected in prompt.by_layer(name).items():
                error = np.abs(getattr(trace, name)[layer][prompt.last] - expected).max()
                assert error <= compressed_golden.tolerances.attention / 2
        for layer, expected in prompt.by_layer("index_scores").items():
            scores = trace.scores[layer][prompt.last, : len(expected)]
            assert np.abs(scores - expected).max() <= compressed_golden.tolerances.index_scores / 10


@pytest.mark.parametrize("shape", SHAPES)
def test_target_and_draft_layer_agree_with_float64(tmp_path: Path, shape: str) -> None:
    folder = write_tiny_compressed_model(tmp_path / "model", seed=11, num_nextn_predict_layers=1, **SHAPES[shape])
    sequence = np.random.default_rng(12).integers(0, VOCAB_SIZE, LENGTH + 1)
    reference = CompressedReferenceModel.load(folder)
    trace = reference.forward(sequence[:-1])
    model, (draft,) = load_model_with_mtp(folder)
    serving = CompressedServing(model, [sequence[:-1]])
    (served,) = serving.run_recorded(in_chunks([LENGTH], 100))
    for layer, positions in served.positions.items():
        chosen = np.zeros(trace.selections[layer].shape, bool)
        row, place = np.nonzero(positions >= 0)
        chosen[row, positions[row, place]] = True
        assert_same(chosen, trace.selections[layer], f"selected sets of layer {layer}")
    assert_close_to(served.logits, trace.logits, "logits")

    caches = serving.backend.create_kv_cache(
        num_layers=1, num_blocks=1, layer_offset=draft.layer_id, window_blocks=window_blocks(serving)
    )
    serving.caches |= {key: poisoned(cache) for key, cache in caches.items()}
    assert [role for role, _ in caches] == ["swa"]
    logits, streams = reference.draft(sequence, trace.streams)
    # The second iteration starts from the draft layer's own streams, at the positions behind.
    again, _ = reference.draft(sequence[1:], streams[:-1])
    got, hidden = drafted(serving, draft, sequence, paddle.to_tensor(trace.streams.reshape(LENGTH, -1), "float32"))
    assert_close_to(got, logits, "draft logits")
    assert_close_to(hidden.numpy(), streams.reshape(LENGTH, -1), "draft streams")
    recycled, _ = drafted(serving, draft, sequence[1:], hidden[:-1])
    assert_close_to(recycled, again, "draft logits of the second iteration")


def window_blocks(serving: CompressedServing) -> dict[str, int]:
    return {name: int(table.max()) + 1 for name, table in serving.window_tables.items()}


def drafted(serving: CompressedServing, draft: Any, sequence: np.ndarray, hidden: Any) -> tuple[np.ndarray, Any]:
    """Logits and streams of the draft layer in chunks of 100 rows; token_ids are those of the next position."""
    logits, streams = [], []
    for spans in in_chunks([len(sequence) - 1], 100):
        (span,) = spans
        step = serving.step(spans)
        tokens = paddle.zeros_like(step.token_ids)
        tokens[: span.end - span.begin] = paddle.to_tensor(sequence[span.begin + 1 : span.end + 1])
        object.__setattr__(step, "token_ids", tokens)
        out, selection = draft.forward(
            step=step, hidden=hidden[span.begin : span.end], attn_backend=serving.backend, caches=serving.caches
        )
        assert selection is None
        logits.append(draft.compute_logits(out).numpy())
        streams.append(out)
    return np.concatenate(logits), paddle.concat(streams)


def assert_close_to(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    size = float(np.abs(expected).max())
    error = float(np.abs(actual - expected).max())
    assert error <= SHARE * size, f"{what}: off by {error:.3g} of {size:.3g}"
