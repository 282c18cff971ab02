"""The draft layer against the golden that has one, against float64, and against itself in other chunks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

import fastdeploy_dsa.models.deepseek_v32
from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.models import DeepseekV32ForCausalLM, MtpModel, load_model_with_mtp
from fastdeploy_dsa.ops import CacheFormat
from tests.kit.compare import assert_close, assert_same
from tests.kit.goldens import GoldenCase, Prompt
from tests.kit.mistakes import DRAFT_MISTAKES
from tests.kit.reference_model import Float32Noise, ReferenceModel, Run
from tests.kit.selections import mask_of_positions, selection_of, token_slots
from tests.kit.serving import BLOCK_SIZE, Span, in_chunks, in_one_step, prompts_then_tokens
from tests.kit.tiny_model import VOCAB_SIZE
from tests.models.draft_serving import Drafted, DraftServing
from tests.models.mtp_checkpoint import write_tiny_mtp_model

FORMATS: tuple[CacheFormat, ...] = ("float32", "bfloat16", "fp8")
CHUNK = 37
LISTED_SIZE = (0.9, 1.1)


@pytest.fixture(scope="module")
def mtp_golden(request: pytest.FixtureRequest) -> GoldenCase:
    folder = request.config.getoption("--goldens")
    if folder is None:
        pytest.skip("no golden fixtures here: pass their folder with --goldens")
    return GoldenCase(folder / "v32_mtp")


@cache
def models_of(folder: Path) -> tuple[DeepseekV32ForCausalLM, MtpModel]:
    target, (draft,) = load_model_with_mtp(folder)
    return target, draft


def fed_and_next(prompt: Prompt) -> np.ndarray:
    return np.concatenate([prompt.prompt_ids, prompt.decode_ids])


def serving_of(golden: GoldenCase, cache_format: CacheFormat = "float32") -> DraftServing:
    sequences = [fed_and_next(prompt) for prompt in golden.prompts]
    return DraftServing(models_of(golden.folder), sequences, cache_format=cache_format)


def plan_of(golden: GoldenCase, name: str) -> Any:
    lengths = [len(prompt.fed_ids) for prompt in golden.prompts]
    if name == "prompts then tokens":
        return prompts_then_tokens([len(prompt.prompt_ids) for prompt in golden.prompts], lengths)
    return in_one_step(lengths) if name == "one step" else in_chunks(lengths, CHUNK)


def check_golden(prompt: Prompt, drafted: Drafted, golden: GoldenCase) -> None:
    """Logits, sets and the intermediate results of the prompt's last position."""
    allowed, layer = golden.tolerances, max(prompt.by_layer("topk"))
    stored = prompt.draft_logits
    assert_close(drafted.logits[prompt.stored], stored, np.full(stored.shape, allowed.logits), "draft logits")
    assert_same(drafted.positions, prompt.by_layer("topk")[layer], "selected sets of the draft layer")
    prompt.assert_index_scores({layer: drafted.index_scores}, allowed.index_scores)
    for name in ("attn_heads", "attn_out"):
        expected = prompt.by_layer(name)[layer]
        rows = getattr(drafted, name)[prompt.last]
        assert_close(rows, expected, np.full(expected.shape, allowed.attention), f"{name} of the draft layer")


@pytest.mark.parametrize("plan", ["prompts then tokens", "one step", "chunks"])
def test_draft_layer_gives_logits_sets_and_attention_of_the_golden(mtp_golden: GoldenCase, plan: str) -> None:
    drafted = serving_of(mtp_golden).run_drafted(plan_of(mtp_golden, plan))
    for prompt, served in zip(mtp_golden.prompts, drafted, strict=True):
        check_golden(prompt, served, mtp_golden)


@pytest.mark.parametrize("cache_format", FORMATS)
def test_draft_layer_is_the_references_given_what_its_caches_hold(
    mtp_golden: GoldenCase, cache_format: CacheFormat
) -> None:
    reference = ReferenceModel.load(mtp_golden.folder)
    layer = reference.config["num_hidden_layers"]
    for prompt, served in zip(
        mtp_golden.prompts,
        serving_of(mtp_golden, cache_format).run_drafted(plan_of(mtp_golden, "prompts then tokens")),
        strict=True,
    ):
        given = {} if cache_format == "float32" else {layer: served.numbers}
        run = Run(cache_format, selections={layer: mask_of_positions(served.positions)}, numbers=given)
        main = reference.forward(prompt.fed_ids)._replace(hidden=served.target_hidden.astype(np.float64))
        exact = reference.draft(fed_and_next(prompt), main, run)
        draws = [
            reference.draft(fed_and_next(prompt), main, replace(run, arithmetic=Float32Noise(seed)))
            for seed in range(4)
        ]
        bound = 2.0 * max(float(np.abs(draw.logits - exact.logits).max()) for draw in draws)
        assert bound < mtp_golden.mistakes["main final norm for MTP logits"] / 100, "the bound would hide a mistake"
        assert_close(served.logits, exact.logits, np.full(exact.logits.shape, bound), "draft logits")
        assert_close(served.hidden, exact.hidden, np.full(exact.hidden.shape, bound), "recycled hidden states")


V32 = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "indexer_rope_interleave": False}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"brings_own": True},
        {"tie_word_embeddings": True},
        V32,
        {"hidden_size": 44, "index_n_heads": 3, "num_attention_heads": 3, "n_shared_experts": 0},
    ],
    ids=str,
)
def test_draft_layers_of_random_checkpoints_are_the_references(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_tiny_mtp_model(tmp_path / "random", **changes)
    token_ids = np.random.default_rng(2).integers(0, VOCAB_SIZE, 70)
    serving = DraftServing(models_of(folder), [token_ids])
    (served,) = serving.run_drafted(in_chunks([69], 30))
    reference = ReferenceModel.load(folder)
    layer = reference.config["num_hidden_layers"]
    run = Run(selections={layer: mask_of_positions(served.positions)})
    main = reference.forward(token_ids[:-1])._replace(hidden=served.target_hidden.astype(np.float64))
    exact = reference.draft(token_ids, main, run)
    draws = [reference.draft(token_ids, main, replace(run, arithmetic=Float32Noise(seed))) for seed in range(4)]
    bound = 2.0 * max(float(np.abs(draw.logits - exact.logits).max()) for draw in draws)
    assert bound < 1e-3
    assert_close(served.logits, exact.logits, np.full(exact.logits.shape, bound), "draft logits")
    own = exact.layers[layer].own_selection
    assert own is not None
    assert (own == mask_of_positions(served.positions)).all(1).mean() > 0.95


@pytest.mark.parametrize("cache_format", FORMATS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_give_the_draft_caches_of_one_step_bit_for_bit(
    mtp_golden: GoldenCase, cache_format: CacheFormat, chunk: int
) -> None:
    whole, chunked = serving_of(mtp_golden, cache_format), serving_of(mtp_golden, cache_format)
    lengths = [len(prompt.fed_ids) for prompt in mtp_golden.prompts]
    whole.draft_logits(in_one_step(lengths))
    chunked.draft_logits(in_chunks(lengths, chunk))
    for key, tensor in whole.caches.items():
        expected, actual = (cache.view("uint8").numpy() for cache in (tensor, chunked.caches[key]))
        assert np.array_equal(expected, actual), key


@pytest.mark.parametrize("cache_format", FORMATS)
def test_rows_that_only_write_their_entries_write_the_same_bytes(
    mtp_golden: GoldenCase, cache_format: CacheFormat
) -> None:
    full, entries = serving_of(mtp_golden, cache_format), serving_of(mtp_golden, cache_format)
    for spans in plan_of(mtp_golden, "chunks"):
        full.iterate(full.draft_step(spans), full.target_hidden(spans))
        step, hidden = entries.draft_step(spans), entries.target_hidden(spans)
        entries.draft.write_entries(step=step, hidden=hidden, attn_backend=entries.backend, caches=entries.caches)
    for key, tensor in full.caches.items():
        expected, actual = (cache.view("uint8").numpy() for cache in (tensor, entries.caches[key]))
        assert np.array_equal(expected, actual), key


def main_norm(serving: DraftServing, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(serving.draft, "_norm", serving.model._norm)


def hidden_before_norm(serving: DraftServing, patch: pytest.MonkeyPatch) -> None:
    right, final = fastdeploy_dsa.models.deepseek_v32.rms_norm, serving.model._norm
    wrong = lambda x, weight, eps: x if weight is final else right(x, weight, eps)  # noqa: E731
    patch.setattr(fastdeploy_dsa.models.deepseek_v32, "rms_norm", wrong)


def last_selection(serving: DraftServing, patch: pytest.MonkeyPatch) -> None:
    chosen = {}
    forward, draft = serving.model.forward, serving.draft.forward
    observe = lambda layer, selection: chosen.update({layer: selection.positions.numpy()})  # noqa: E731
    patch.setattr(serving.model, "forward", lambda **given: forward(**given, on_selection=observe))

    def drafted(**given: Any) -> Any:
        step, mask = given["step"], mask_of_positions(chosen[max(chosen)])
        slots = token_slots(step.block_table, BLOCK_SIZE, len(mask))
        return draft(**given | {"selection": selection_of(mask, slots, step.num_rows)})

    patch.setattr(serving.draft, "forward", drafted)


def same_token(serving: DraftServing, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(serving, "next_tokens", serving.sequences)


def swapped_halves(serving: DraftServing, patch: pytest.MonkeyPatch) -> None:
    weight = serving.draft._eh_proj
    patch.setattr(serving.draft, "_eh_proj", paddle.roll(weight, weight.shape[0], axis=1))


MISTAKES = {
    "main final norm for MTP logits": main_norm,
    "hidden state before the final norm": hidden_before_norm,
    "MTP reuses the last main layer's selection": last_selection,
    "MTP embeds token p, not p+1": same_token,
    "eh_proj input order swapped": swapped_halves,
}


def test_every_mistake_of_the_draft_layer_can_be_planted() -> None:
    assert set(MISTAKES) == set(DRAFT_MISTAKES)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_noticed_by_the_listed_amount(mtp_golden: GoldenCase, mistake: str) -> None:
    (prompt,) = mtp_golden.prompts
    serving = serving_of(mtp_golden)
    with pytest.MonkeyPatch.context() as patch:
        MISTAKES[mistake](serving, patch)
        (logits,) = serving.draft_logits(plan_of(mtp_golden, "one step"))
    moved = float(np.abs(logits[prompt.stored] - prompt.draft_logits).max())
    low, high = (factor * mtp_golden.mistakes[mistake] for factor in LISTED_SIZE)
    assert low < moved < high, f"moved {moved:.3g}, listed {mtp_golden.mistakes[mistake]}"


def test_a_given_selection_is_attended_to_and_keys_are_written_all_the_same(mtp_golden: GoldenCase) -> None:
    (prompt,) = mtp_golden.prompts
    length, spans = len(prompt.fed_ids), [Span(0, 0, len(prompt.fed_ids))]
    own, given = serving_of(mtp_golden), serving_of(mtp_golden)
    hidden = own.target_hidden(spans)
    _, selection = own.iterate(own.draft_step(spans), hidden)
    first_only = selection_of(
        np.eye(length, dtype=bool),
        token_slots(given.draft_step(spans).block_table, BLOCK_SIZE, length),
        selection.positions.shape[0],
    )
    drafted, used = given.iterate(given.draft_step(spans), given.target_hidden(spans), first_only)
    assert used is first_only
    assert not np.array_equal(drafted.numpy(), own.iterate(own.draft_step(spans), hidden)[0].numpy())
    key = ("indexer", own.draft.layer_id)
    assert np.array_equal(own.caches[key].numpy(), given.caches[key].numpy(), equal_nan=True)


def test_target_and_draft_layer_leave_each_others_caches_alone(mtp_golden: GoldenCase) -> None:
    serving = serving_of(mtp_golden)
    spans = [Span(0, 0, len(mtp_golden.prompts[0].fed_ids))]

    def content(is_draft: bool) -> list[np.ndarray]:
        return [
            cache.numpy().view(np.uint8).copy()
            for (_, layer), cache in serving.caches.items()
            if (layer == serving.draft.layer_id) == is_draft
        ]

    before = content(is_draft=True)
    hidden = serving.target_hidden(spans)
    assert all(np.array_equal(a, b) for a, b in zip(before, content(is_draft=True), strict=True))
    before = content(is_draft=False)
    serving.iterate(serving.draft_step(spans), hidden)
    assert all(np.array_equal(a, b) for a, b in zip(before, content(is_draft=False), strict=True))


@pytest.mark.parametrize("num_drafts", [1, 2, 3, 4])
def test_the_engine_with_drafts_gives_the_tokens_of_the_golden(mtp_golden: GoldenCase, num_drafts: int) -> None:
    config = {"method": "mtp", "num_speculative_tokens": num_drafts}
    llm = LLM(mtp_golden.folder, speculative_config=config, num_threads=1, block_size=16, check_integrity=True)
    for prompt in mtp_golden.prompts:
        greedy = SamplingParams(max_tokens=len(prompt.decode_ids), temperature=0.0, ignore_eos=True)
        (output,) = llm.generate([prompt.prompt_ids], greedy)
        assert output.token_ids == prompt.decode_ids.tolist()
    assert sum(llm.speculative_stats().num_drafts) > 0
