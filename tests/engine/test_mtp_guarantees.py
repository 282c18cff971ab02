"""A request's tokens with drafts are those without, bit for bit, however it is drafted, chunked and disturbed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.cache_layout import CACHE_FORMATS
from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.speculative.draft_runner import DraftOutputs
from fastdeploy_dsa.engine.speculative.mtp_runner import MtpRunner, compact_selection
from fastdeploy_dsa.engine.speculative.state import HiddenRows
from fastdeploy_dsa.engine.step_inputs import StepInputs
from fastdeploy_dsa.ops import IndexSelection
from tests.kit.tiny_model import INDEX_TOPK, VOCAB_SIZE
from tests.models.mtp_checkpoint import write_tiny_mtp_model

NUM_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=3)
# Sharp enough for drafts of a model with random weights to be accepted at times.
RANDOM = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, top_p=0.95, seed=5, ignore_eos=True)
LENGTHS = (61, 5 * INDEX_TOPK + 3, 7, 1)
PROMPTS = [np.random.default_rng(length).integers(0, VOCAB_SIZE, length).tolist() for length in LENGTHS]
SCHEDULES = {"FFF": ["full"] * 3, "FSF": ["full", "shared", "full"], "FFS": ["full", "full", "shared"]}
SHARED = {"index_share_for_mtp_iteration": True}

Outputs = list[tuple[list[int], Any]]


@pytest.fixture(scope="module", params=SCHEDULES)
def mtp_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mtp") / request.param
    return write_tiny_mtp_model(folder, indexer_types=SCHEDULES[request.param])


@pytest.fixture(scope="module")
def mtp_model_fsf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_mtp_model(tmp_path_factory.mktemp("mtp") / "FSF", indexer_types=SCHEDULES["FSF"])


@pytest.fixture(scope="module")
def drafting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its own drafts are right at times, because it mostly looks at the newest token."""
    return write_tiny_mtp_model(tmp_path_factory.mktemp("mtp") / "drafting", layer_gain=0.05)


def make_llm(model: Path, num_drafts: int, *, adaptive: bool = False, **options: Any) -> LLM:
    config = {"method": "mtp", "num_speculative_tokens": num_drafts, "adaptive": adaptive}
    return LLM(model, speculative_config=config, **({"num_threads": 1, "check_integrity": True} | options))


def outputs(llm: LLM, prompts: Sequence[list[int]] = PROMPTS, params: Any = GREEDY) -> Outputs:
    return [(output.token_ids, output.logprobs) for output in llm.generate(prompts, params)]


@cache
def reference(model: Path, cache_dtype: str = "float32") -> Outputs:
    """Without drafts."""
    return outputs(LLM(model, cache_dtype=cache_dtype, num_threads=1))


@pytest.mark.parametrize("cache_dtype", ["float32", "fp8"])
@pytest.mark.parametrize("num_drafts", [1, 2, 3, 4, 5])
def test_greedy_tokens_and_logprobs_are_those_without_drafts(
    mtp_model: Path, cache_dtype: str, num_drafts: int
) -> None:
    llm = make_llm(mtp_model, num_drafts, cache_dtype=cache_dtype)
    assert outputs(llm) == reference(mtp_model, cache_dtype)
    assert len(llm.speculative_stats().num_drafts) == num_drafts


class ScriptedRunner:
    """The real draft model, whose drafts are replaced by tokens of known sequences, right or wrong as asked for."""

    def __init__(
        self, llm: LLM, sequences: Sequence[list[int]], is_right: Callable[[int, int], bool] = lambda *_: True
    ) -> None:
        """Take the place of the LLM's runner.

        Args:
            llm: Drafts.
            sequences: Prompts with what follows.
            is_right: Of the draft's position and the token before it.
        """
        assert llm._proposer is not None
        self._runner = llm._proposer._look_ahead._runner
        self._sequences = sequences
        self._is_right = is_right
        self.layer_ids, self.cost = self._runner.layer_ids, self._runner.cost
        llm._proposer._look_ahead._runner = self

    def run(self, inputs: StepInputs, hidden: Sequence[HiddenRows], **sharing: Any) -> DraftOutputs:
        outputs = self._runner.run(inputs, hidden, **sharing)
        logits = np.zeros_like(outputs.logits)
        for line, row in enumerate(inputs.logits_rows):
            place, token = int(inputs.positions[row]) + 2, int(inputs.token_ids[row])
            continued = (known[place] for known in self._sequences if known[place - 1 : -1][:1] == [token])
            guess = next(continued, 0) + (not self._is_right(place, token))
            logits[line, guess % VOCAB_SIZE] = 9.0
        return outputs._replace(logits=logits)


def sequences_of(model: Path, cache_dtype: str = "float32") -> list[list[int]]:
    padding = [0] * 6
    return [
        [*prompt, *tokens, *padding]
        for prompt, (tokens, _) in zip(PROMPTS, reference(model, cache_dtype), strict=True)
    ]


def at_times(place: int, token: int) -> bool:
    return (place + token) % 4 > 0


@pytest.mark.parametrize("cache_dtype", CACHE_FORMATS)
@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 4, "max_num_seqs": 1},
        {"max_num_batched_tokens": 7, "max_num_seqs": 1},
        {"max_num_batched_tokens": 64},
        {"block_size": 8, "num_blocks": 17},
        {"block_size": 8, "num_blocks": 17, "enable_prefix_caching": False},
        {"block_size": 8, "num_blocks": 17, "swap_space": "8MiB"},
        {"block_size": 4},
        {"num_threads": 2},
        {"hf_overrides": SHARED},
        {"adaptive": True},
    ],
    ids=str,
)
def test_greedy_tokens_do_not_depend_on(mtp_model_fsf: Path, cache_dtype: str, options: dict[str, Any]) -> None:
    llm = make_llm(mtp_model_fsf, 3, cache_dtype=cache_dtype, **({"block_size": 16} | options))
    ScriptedRunner(llm, sequences_of(mtp_model_fsf, cache_dtype), at_times)
    for prompts, order in ((PROMPTS, 1), (PROMPTS[::-1], -1)):
        assert outputs(llm, prompts) == reference(mtp_model_fsf, cache_dtype)[::order]
    stats = llm.cache_stats()
    assert (stats.scheduler.num_preemptions > 0) == ("num_blocks" in options)
    assert (stats.cache.num_device_hit_tokens > 0) == options.get("enable_prefix_caching", True)


@pytest.mark.parametrize("num_drafts", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["right", "wrong", "at times"])
def test_greedy_tokens_are_the_same_whoever_drafts(mtp_model: Path, kind: str, num_drafts: int) -> None:
    cache_dtype = CACHE_FORMATS[num_drafts % len(CACHE_FORMATS)]
    llm = make_llm(mtp_model, num_drafts, cache_dtype=cache_dtype)
    is_right = {"right": lambda *_: True, "wrong": lambda *_: False, "at times": at_times}[kind]
    ScriptedRunner(llm, sequences_of(mtp_model, cache_dtype), is_right)
    assert outputs(llm) == reference(mtp_model, cache_dtype)
    rate = llm.speculative_stats().acceptance_rate
    low, high = {"right": (0.9, 1.0), "wrong": (0.0, 0.1), "at times": (0.2, 0.9)}[kind]
    assert low <= rate <= high


@pytest.mark.parametrize("cache_dtype", CACHE_FORMATS)
def test_random_tokens_do_not_depend_on_company_chunks_preemption_or_the_cache(
    drafting_model: Path, cache_dtype: str
) -> None:
    def tokens(llm: LLM, prompts: Sequence[list[int]]) -> list[list[int]]:
        return [output for output, _ in outputs(llm, prompts, RANDOM)]

    roomy = make_llm(drafting_model, 3, cache_dtype=cache_dtype, adaptive=True)
    alone = [tokens(roomy, [prompt])[0] for prompt in PROMPTS]
    accepted = roomy.speculative_stats().num_accepted
    assert sum(accepted) > 0, "no sampled draft was ever accepted: the test would show nothing"
    assert tokens(roomy, PROMPTS * 2) == alone * 2
    for options in (
        {"max_num_batched_tokens": 8, "max_num_seqs": 2},
        {"block_size": 8, "num_blocks": 17},
        {"block_size": 8, "num_blocks": 17, "swap_space": "8MiB", "max_num_batched_tokens": 32},
        {"enable_prefix_caching": False},
    ):
        other = make_llm(drafting_model, 3, cache_dtype=cache_dtype, adaptive=True, **options)
        assert tokens(other, PROMPTS) == alone, options
        assert tokens(other, PROMPTS[::-1]) == alone[::-1], options


def draft_entries(llm: LLM, request: Request) -> list[np.ndarray]:
    """Bytes of the draft layer's entries of a request's computed positions."""
    runner = llm._proposer._look_ahead._runner  # type: ignore[union-attr]
    assert isinstance(runner, MtpRunner)
    found = []
    for (role, layer), tensor in runner._caches.items():
        if layer in runner.layer_ids:
            rows = tensor.numpy().reshape(tensor.shape[0], llm._cache.block_size, -1)[request.blocks]
            assert role in ("key", "indexer")
            found.append(rows.reshape(-1, rows.shape[-1])[: request.num_computed - request.num_undrafted])
    return found


def test_after_rejections_the_draft_cache_is_that_of_a_run_that_never_drafted(
    mtp_model_fsf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = []
    for num_drafts in (3, 0):
        llm = make_llm(mtp_model_fsf, 3)
        (request,) = llm._read([PROMPTS[0]], SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
        llm._core.add(request)
        if num_drafts == 0:
            monkeypatch.setattr("fastdeploy_dsa.engine.speculative.draft_length.DraftLength.choose", lambda _: 0)
        while request.num_tokens < 61 + 50:
            llm._core.step()
        entries.append(draft_entries(llm, request))
        llm._core.abort(request)
        assert (sum(llm.speculative_stats().num_drafts) > 0) == (num_drafts > 0)
    for drafted, never in zip(*entries, strict=True):
        length = min(len(drafted), len(never))
        assert length > 61 + 30
        assert np.array_equal(drafted[:length], never[:length])


def test_shared_selections_are_those_of_the_last_accepted_position_and_change_drafts_only(
    mtp_model_fsf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: dict[str, list[Any]] = {"own": [], "shared": []}
    for name, overrides in (("own", None), ("shared", SHARED)):
        llm = make_llm(mtp_model_fsf, 3, hf_overrides=overrides)
        model = llm._proposer._look_ahead._runner._models[0]  # type: ignore[union-attr]

        def spied(*, step: Any, selection: Any, forward: Any = model.forward, name: str = name, **rest: Any) -> Any:
            hidden, used = forward(step=step, selection=selection, **rest)
            runs[name].append((step, selection, used, hidden.numpy()))
            return hidden, used

        monkeypatch.setattr(model, "forward", spied)
        assert outputs(llm, [PROMPTS[0]]) == reference(mtp_model_fsf)[:1]
    assert all(given is None for _, given, _, _ in runs["own"])
    hidden = {name: [call[3] for call in calls] for name, calls in runs.items()}
    assert np.array_equal(hidden["own"][0], hidden["shared"][0]), "iteration 0 always selects by itself"
    assert not np.array_equal(hidden["own"][1], hidden["shared"][1]), "above index_topk the difference must show"
    first: Any = None
    for step, given, used, _ in runs["shared"]:
        if given is None:
            first = (step, used)
            continue
        last = first[0].num_tokens - 1
        assert first[0].num_tokens == step.num_tokens == 1
        assert np.array_equal(given.positions[0].numpy(), first[1].positions[last].numpy())
        assert np.array_equal(given.slot_ids[0].numpy(), first[1].slot_ids[last].numpy())
        assert given.positions[0].numpy().max() <= int(first[0].positions[last])
        assert given.counts.numpy().tolist() == [INDEX_TOPK] + [0] * (step.num_rows - 1)
    assert any(given is not None for _, given, _, _ in runs["shared"])


def drafts_of(llm: LLM, prompts: list[list[int]], params: Any = GREEDY) -> dict[tuple[int, int], list[int]]:
    """(length of the prompt, tokens known) to the drafts proposed there."""
    assert llm._proposer is not None
    propose, found = llm._proposer.propose, {}

    def spied(chunks: Any, hidden: Any, block_table: Any) -> None:
        propose(chunks, hidden, block_table)
        for chunk in chunks:
            request = chunk.request
            if request.drafts:
                found[request.num_prompt, request.num_tokens] = [draft.token for draft in request.drafts]

    llm._proposer.propose = spied  # type: ignore[method-assign]
    outputs(llm, prompts, params)
    llm._proposer.propose = propose  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("overrides", [None, SHARED], ids=["own selections", "shared selections"])
@pytest.mark.parametrize("cache_dtype", CACHE_FORMATS)
def test_a_requests_drafts_do_not_depend_on_the_batch(
    mtp_model_fsf: Path, cache_dtype: str, overrides: dict[str, Any] | None
) -> None:
    """Requests with uneven acceptance: each must find its own row of a shared selection."""
    llm = make_llm(mtp_model_fsf, 3, cache_dtype=cache_dtype, hf_overrides=overrides, enable_prefix_caching=False)
    alone: dict[tuple[int, int], list[int]] = {}
    for prompt in PROMPTS:
        alone |= drafts_of(llm, [prompt])
    assert drafts_of(llm, PROMPTS) == alone
    assert sum(len(drafts) == 3 for drafts in alone.values()) > 3 * len(PROMPTS)


@pytest.mark.parametrize("last_rows", [[2, 4, 11], [2, 3, 7]], ids=["padded", "flattened"])
def test_selections_are_compacted_by_the_last_accepted_row_into_new_tensors(last_rows: list[int]) -> None:
    """Accepted 2, 0 and 3 of three drafts: rows 0..3, 4..7, 8..11 where padded, else 0..2, 3, 4..7."""
    positions = np.arange(24, dtype=np.int32).reshape(12, 2)
    source = IndexSelection(
        *(paddle.to_tensor(values) for values in (positions, positions + 100, np.full(12, 2, np.int32)))
    )
    compacted = compact_selection(source, np.array(last_rows), num_rows=8)
    assert compacted.positions.numpy().tolist() == positions[last_rows].tolist() + [[-1, -1]] * 5
    assert compacted.slot_ids.numpy().tolist() == (positions[last_rows] + 100).tolist() + [[-1, -1]] * 5
    assert compacted.counts.numpy().tolist() == [2] * 3 + [0] * 5
    compacted.positions[0] = 77
    assert np.array_equal(source.positions.numpy(), positions)


def test_stop_strings_and_end_tokens_end_a_request_as_without_drafts(mtp_model_fsf: Path) -> None:
    expected = reference(mtp_model_fsf)[0][0]
    stop = expected[5]
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, stop_token_ids=[stop], ignore_eos=True)
    (output,) = make_llm(mtp_model_fsf, 5).generate([PROMPTS[0]], params)
    assert output.token_ids == expected[: expected.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_a_stream_hands_out_several_tokens_of_a_step_in_one_delta(mtp_model_fsf: Path) -> None:
    llm = make_llm(mtp_model_fsf, 3)
    expected = reference(mtp_model_fsf)[0]
    ScriptedRunner(llm, sequences_of(mtp_model_fsf))
    deltas = list(llm.stream([PROMPTS[0]], GREEDY))
    assert [len(delta.token_ids) for delta in deltas] == [1, 4, 4, 4, 4, 4, 3]
    assert [token for delta in deltas for token in delta.token_ids] == expected[0]
    assert [entry for delta in deltas for entry in delta.logprobs or ()] == expected[1]


def test_the_longest_request_ends_cleanly_at_max_model_len(mtp_model_fsf: Path) -> None:
    for length in (61, 62, 63):
        prompt = PROMPTS[0][:61] + [3] * (length - 61)
        params = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
        plain = LLM(mtp_model_fsf, num_threads=1, max_model_len=64).generate([prompt], params)
        llm = make_llm(mtp_model_fsf, 3, max_model_len=64)
        assert [output.token_ids for output in llm.generate([prompt], params)] == [plain[0].token_ids]
        assert len(plain[0].token_ids) == 64 - length


def test_time_of_the_draft_model_is_told_apart(mtp_model_fsf: Path) -> None:
    llm = make_llm(mtp_model_fsf, 2)
    outputs(llm)
    times = llm.time_split()
    assert times.draft > 0
    assert times.model > 0
    assert LLM(mtp_model_fsf, num_threads=1, num_blocks=4).speculative_stats().num_rounds == 0
