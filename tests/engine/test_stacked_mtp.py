"""Checkpoints with several MTP layers: each looks one token further than the one before."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.speculative.mtp_runner import MtpRunner
from tests.engine.test_mtp_guarantees import NUM_TOKENS, PROMPTS, RANDOM, ScriptedRunner, at_times, drafts_of, make_llm
from tests.kit.reference_model import ReferenceModel
from tests.models.mtp_checkpoint import write_tiny_mtp_model

NUM_LAYERS = 3
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
STACKED = {"num_nextn_predict_layers": NUM_LAYERS}


@pytest.fixture(scope="module")
def stacked_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_mtp_model(tmp_path_factory.mktemp("mtp") / "stacked", **STACKED)


@pytest.fixture(scope="module")
def drafting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_mtp_model(tmp_path_factory.mktemp("mtp") / "drafting", layer_gain=0.05, **STACKED)


def tokens(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(list(prompts), params)]


def reference_drafts(folder: Path, sequence: np.ndarray, known: int) -> list[int]:
    """What the layers propose behind `known` tokens: a float64 pass each over the sequence with the drafts so far."""
    reference = ReferenceModel.load(folder)
    above = reference.forward(sequence[: known - 1])
    drafts: list[int] = []
    for layer in range(NUM_LAYERS):
        deeper = copy(reference)
        deeper.config = reference.config | {"num_hidden_layers": reference.config["num_hidden_layers"] + layer}
        joined = np.concatenate([sequence[:known], np.array(drafts, np.int64)])
        above = deeper.draft(joined[layer:], above)
        drafts.append(int(above.logits[-1].argmax()))
    return drafts


def test_every_layer_is_the_references(stacked_model: Path) -> None:
    """After any rounds, whatever was rejected: proposals depend on all entries of all layers."""
    llm = make_llm(stacked_model, NUM_LAYERS)
    found = drafts_of(llm, PROMPTS[:2])
    continued = tokens(LLM(stacked_model, num_threads=1), PROMPTS[:2])
    compared = 0
    for prompt, output in zip(PROMPTS[:2], continued, strict=True):
        sequence = np.array([*prompt, *output])
        for known in (len(prompt) + 1, len(prompt) + 5, len(prompt) + 12):
            proposed = found.get((len(prompt), known))
            if proposed is not None:
                assert proposed == reference_drafts(stacked_model, sequence, known)[: len(proposed)]
                compared += 1
    assert compared >= 4


@pytest.mark.parametrize("num_drafts", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 4, "max_num_seqs": 1},
        {"max_num_batched_tokens": 64, "block_size": 4},
        {"block_size": 8, "num_blocks": 17},
        {"block_size": 8, "num_blocks": 17, "swap_space": "8MiB"},
        {"enable_prefix_caching": False},
    ],
    ids=str,
)
def test_greedy_tokens_are_those_without_drafts(stacked_model: Path, num_drafts: int, options: dict[str, Any]) -> None:
    expected = tokens(LLM(stacked_model, num_threads=1), PROMPTS)
    llm = make_llm(stacked_model, num_drafts, **options)
    known = [[*prompt, *output, 0, 0, 0, 0] for prompt, output in zip(PROMPTS, expected, strict=True)]
    ScriptedRunner(llm, known, at_times)
    assert tokens(llm, PROMPTS) == expected
    assert tokens(llm, PROMPTS[::-1]) == expected[::-1]
    assert 0.2 < llm.speculative_stats().acceptance_rate < 1.0


def test_drafts_and_random_tokens_do_not_depend_on_what_else_runs_or_is_cached(drafting_model: Path) -> None:
    roomy = make_llm(drafting_model, NUM_LAYERS)
    alone = [tokens(roomy, [prompt], RANDOM)[0] for prompt in PROMPTS]
    proposed: dict[tuple[int, int], list[int]] = {}
    for prompt in PROMPTS:
        proposed |= drafts_of(roomy, [prompt])
    assert sum(roomy.speculative_stats().num_accepted) > 0
    for options in (
        {},
        {"max_num_batched_tokens": 8, "max_num_seqs": 2},
        {"block_size": 8, "num_blocks": 17},
        {"block_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 4},
        {"block_size": 8, "num_blocks": 17, "swap_space": "8MiB", "max_num_batched_tokens": 32},
    ):
        other = make_llm(drafting_model, NUM_LAYERS, **options)
        assert tokens(other, PROMPTS, RANDOM) == alone, options
        assert tokens(other, PROMPTS[::-1], RANDOM) == alone[::-1], options
        assert drafts_of(other, PROMPTS) == proposed, options


def test_requests_that_end_at_different_times_find_their_own_rows(stacked_model: Path) -> None:
    """Towards its end a request gets fewer drafts, so its rows in the deeper layers are fewer than those of others."""
    llm = make_llm(stacked_model, NUM_LAYERS, enable_prefix_caching=False)
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (5, 9, 14, 20)]
    alone: dict[tuple[int, int], list[int]] = {}
    for prompt, own in zip(PROMPTS, params, strict=True):
        alone |= drafts_of(llm, [prompt], [own])
    assert {len(drafts) for drafts in alone.values()} == {1, 2, 3}
    assert drafts_of(llm, PROMPTS, params) == alone


@pytest.mark.parametrize("num_common", [0, 1, 2, 3])
def test_a_block_is_a_hit_only_where_the_tokens_follow_that_its_deepest_entries_are_made_from(
    stacked_model: Path, num_common: int
) -> None:
    begin, rest = PROMPTS[0][:40], PROMPTS[1]
    first = [*begin, *rest[:num_common], *[5] * 9]
    second = [*begin, *rest[:num_common], *[6] * 9]
    expected = drafts_of(make_llm(stacked_model, NUM_LAYERS, block_size=8), [second])
    llm = make_llm(stacked_model, NUM_LAYERS, block_size=8)
    drafts_of(llm, [first])
    assert drafts_of(llm, [second]) == expected
    assert llm.cache_stats().cache.num_device_hit_tokens == (40 if num_common >= NUM_LAYERS else 32)


def entries(llm: LLM, request: Request) -> dict[tuple[str, int], np.ndarray]:
    """Bytes of the draft layers' settled entries of a request."""
    runner = llm._proposer._look_ahead._runner  # type: ignore[union-attr]
    assert isinstance(runner, MtpRunner)
    settled = request.num_computed - request.num_undrafted
    return {
        key: tensor.numpy()
        .reshape(tensor.shape[0], llm._cache.block_size, -1)[request.blocks]
        .reshape(-1, tensor.shape[-1])[:settled]
        for key, tensor in runner._caches.items()
        if key[1] in runner.layer_ids
    }


def test_settled_entries_of_all_layers_are_those_of_a_prefill_of_the_same_tokens(stacked_model: Path) -> None:
    drafted = make_llm(stacked_model, NUM_LAYERS)
    (request,) = drafted._read([PROMPTS[0]], SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
    drafted._core.add(request)
    while request.num_tokens < len(PROMPTS[0]) + 30:
        drafted._core.step()
    prefilled = make_llm(stacked_model, NUM_LAYERS)
    (again,) = prefilled._read([request.known_tokens.tolist()], SamplingParams(max_tokens=20, temperature=0.0))
    prefilled._core.add(again)
    prefilled._core.step()
    assert request.num_undrafted == NUM_LAYERS - 1
    one, other = entries(drafted, request), entries(prefilled, again)
    assert len(one) == 2 * NUM_LAYERS
    for key, rows in one.items():
        assert len(rows) > len(PROMPTS[0]) + 20
        assert np.array_equal(rows, other[key][: len(rows)]), key
    drafted._core.abort(request)
    prefilled._core.abort(again)


def test_a_draft_deeper_than_the_weights_allow_is_refused_by_name(stacked_model: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"speculative_config.num_speculative_tokens: expected at most 3, one per MTP layer .*, got 4",
    ):
        make_llm(stacked_model, NUM_LAYERS + 1)
