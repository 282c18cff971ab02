"""FastDeploy's own model classes through the plug-in, step by step, against goldens and this package's engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle")
pytestmark = pytest.mark.needs_fastdeploy

from fastdeploy_dsa.engine.trace import trace  # noqa: E402
from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError  # noqa: E402
from fastdeploy_dsa.integrations.fastdeploy.settings import VARIABLE  # noqa: E402
from tests.integrations.fastdeploy_rig.rig import Chunk, DraftRig, Rig, make_backend, make_config, make_forward_meta  # noqa: E402
from tests.kit.compare import assert_same  # noqa: E402
from tests.kit.goldens import CASES, GoldenCase  # noqa: E402

CHUNK = 37
REQUEST = 2  # of 4: idle rows before and behind it


@cache
def rig_of(folder: Path) -> Rig:
    """One model per checkpoint; every test writes the blocks it reads."""
    return Rig(folder)


def poison(rig: Rig) -> None:
    """NaN in every cache tensor."""
    for tensor in rig.controller.cache_kvs_map.values():
        tensor.set_value(paddle.full_like(tensor, float("nan")))


def bits(tensor: Any) -> np.ndarray:
    """The content of a float32 tensor, NaN included."""
    return tensor.numpy().view(np.int32)


def serve(
    step: Callable[[list[Chunk]], np.ndarray], prompt: Sequence[int], fed: Sequence[int], chunk: int
) -> np.ndarray:
    """Prompt in chunks, then token by token; logits of everything that was fed."""
    logits, begin = [], 0
    while begin < len(fed):
        is_prompt = begin < len(prompt)
        end = min(begin + chunk, len(prompt)) if is_prompt else begin + 1
        logits.append(step([Chunk(REQUEST, fed, begin, end, is_prompt)]))
        begin = end
    return np.concatenate(logits)


@pytest.mark.parametrize("chunk", [CHUNK, 1000])
@pytest.mark.parametrize("name", CASES)
def test_chunked_prefill_and_decode_give_the_goldens_logits(goldens: Path, name: str, chunk: int) -> None:
    """Contexts are several times index_topk; a prefill that scores only its own chunk fails (defects 44, 46, 60)."""
    golden = GoldenCase(goldens / name)
    rig = rig_of(golden.folder)
    for prompt in golden.prompts:
        poison(rig)
        logits = serve(rig.step, prompt.prompt_ids, prompt.fed_ids, chunk)
        print(f"{name}: {np.abs(logits[prompt.stored] - prompt.logits).max():.1e} from the golden")
        prompt.assert_logits(logits, golden.tolerances.logits)
        assert_same(logits[prompt.last :].argmax(-1), prompt.decode_ids, "decode ids")


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_this_packages_engine(goldens: Path, name: str) -> None:
    """Both compute in float32; products of other shapes round differently."""
    golden = GoldenCase(goldens / name)
    (prompt, *_) = golden.prompts
    rig = rig_of(golden.folder)
    steps = len(prompt.decode_ids) - 1
    traced = trace(golden.folder, prompt.prompt_ids.tolist(), cache_dtype="float32", chunk_size=CHUNK, steps=steps)
    ours = np.concatenate([traced.logits_prompt, traced.logits_decode])
    theirs = serve(rig.step, prompt.prompt_ids, prompt.fed_ids, CHUNK)
    difference = float(np.abs(theirs[-len(ours) :] - ours).max())
    print(f"{name}: {difference:.1e} from the engine")
    assert difference <= golden.tolerances.logits


@pytest.mark.needs_cache_controller
@pytest.mark.parametrize("cache_format", ["fp8", "bfloat16"])
@pytest.mark.parametrize("name", ["v32_yarn", "glm5"])
def test_rounding_caches_give_this_packages_logits_too(
    goldens: Path, monkeypatch: pytest.MonkeyPatch, name: str, cache_format: str
) -> None:
    """Numbers that lie on the edge between two steps of the format may round apart; they are few and move little."""
    golden = GoldenCase(goldens / name)
    monkeypatch.setenv(VARIABLE, json.dumps({"cache_format": cache_format}))
    rig, (prompt, *_) = Rig(golden.folder), golden.prompts
    steps = len(prompt.decode_ids) - 1
    traced = trace(golden.folder, prompt.prompt_ids.tolist(), cache_dtype=cache_format, chunk_size=CHUNK, steps=steps)
    ours = np.concatenate([traced.logits_prompt, traced.logits_decode])
    fed = [*prompt.prompt_ids, *traced.decode_ids[:-1]]
    differences = np.abs(serve(rig.step, prompt.prompt_ids, fed, CHUNK) - ours).max(-1)
    print(f"{name}, {cache_format}: {differences.max():.1e} from the engine, median {np.median(differences):.1e}")
    assert np.median(differences) <= golden.tolerances.logits
    assert differences.max() <= min(golden.mistakes.values()) / 100


def test_a_mixed_step_gives_every_request_what_it_gets_alone(yarn: GoldenCase) -> None:
    """Prefill, cached prefill and decode rows in one step (defects 49 and 50)."""
    rig, ids = rig_of(yarn.folder), yarn.prompts[0].fed_ids
    poison(rig)
    for request, begin in ((0, 40), (1, 60)):
        rig.step([Chunk(request, ids, 0, begin, True)])
    together = [Chunk(0, ids, 40, 75, True), Chunk(1, ids, 60, 61, False), Chunk(3, ids, 0, 30, True)]
    mixed = rig.step(together)
    alone = np.concatenate([rig.step([chunk]) for chunk in together])
    assert np.isfinite(mixed).all()
    assert float(np.abs(mixed - alone).max()) <= yarn.tolerances.logits


def test_several_tokens_of_a_decoding_request_are_scored_each(yarn: GoldenCase) -> None:
    """Verify rows (defect 42)."""
    rig, ids = rig_of(yarn.folder), yarn.prompts[0].fed_ids
    rig.step([Chunk(1, ids, 0, 60, True)])
    verified = rig.step([Chunk(1, ids, 60, 64, False)])
    single = np.concatenate([rig.step([Chunk(1, ids, at, at + 1, False)]) for at in range(60, 64)])
    assert float(np.abs(verified - single).max()) <= yarn.tolerances.logits


def test_rows_behind_the_last_token_write_nothing(yarn: GoldenCase) -> None:
    """A captured step is padded; its tail keeps what an earlier step left there (defect 58)."""
    rig, ids = rig_of(yarn.folder), yarn.prompts[0].fed_ids
    poison(rig)
    rig.step([Chunk(1, ids, 0, 40, True)])
    before = {name: bits(tensor) for name, tensor in rig.controller.cache_kvs_map.items()}
    meta = rig.forward_meta([Chunk(1, ids, 40, 45, False)])
    meta.ids_remove_padding = paddle.to_tensor(np.concatenate([ids[40:45], ids[:3]]).astype(np.int64))
    meta.batch_id_per_token = paddle.to_tensor(np.array([1] * 5 + [-1, 1, 0], np.int32))
    rig.backend.init_attention_metadata(meta)
    with paddle.no_grad():
        rig.run(meta)
    blocks, bs = rig.block_tables[1], rig.block_size
    written = {(blocks[at // bs], at % bs) for at in range(40, 45)}
    assert rig.backend.rows.step.lengths.tolist() == [41, 42, 43, 44, 45, 0, 0, 0]
    for name, tensor in rig.controller.cache_kvs_map.items():
        now, then = (rows.reshape([tensor.shape[0], bs, -1]) for rows in (bits(tensor), before[name]))
        changed = np.argwhere((now != then).any(-1))
        assert {tuple(place) for place in changed.tolist()} == {(int(b), int(o)) for b, o in written}, name


def test_rows_are_made_once_in_a_run_of_the_model_and_anew_in_the_next(
    yarn: GoldenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastDeploy runs a model several times for one begun step before it captures it (defect 47)."""
    from fastdeploy_dsa.integrations.fastdeploy import dsa_backend

    rig, ids = rig_of(yarn.folder), yarn.prompts[0].fed_ids
    made: list[Any] = []
    make = dsa_backend.step_metadata
    monkeypatch.setattr(dsa_backend, "step_metadata", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    meta = rig.forward_meta([Chunk(1, ids, 0, 8, True)])
    rig.backend.init_attention_metadata(meta)
    with paddle.no_grad():
        for runs in (1, 2):
            rig.run(meta)
            assert len(made) == runs
            assert rig.backend.rows.step is made[-1]


def test_no_layer_reads_a_tensor_on_the_host(yarn: GoldenCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every such read would wait for the GPU, in each of 61 layers (defect 47)."""
    from fastdeploy_dsa.integrations.fastdeploy.sparse_layers import SparseAttention

    rig, ids = rig_of(yarn.folder), yarn.prompts[0].fed_ids
    attend = SparseAttention.forward
    visited: list[int] = []

    def guarded(self: Any, meta: Any, hidden: Any, *_positions: Any) -> Any:
        visited.append(self._layer_id)
        if self._is_first:
            return attend(self, meta, hidden)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("numpy", "item", "tolist", "__int__", "__float__", "__bool__", "__index__", "cpu"):
                patch.setattr(paddle.Tensor, name, _refuse_host_read)
            return attend(self, meta, hidden)

    monkeypatch.setattr(SparseAttention, "forward", guarded)
    rig.step([Chunk(1, ids, 0, 30, True), Chunk(2, ids, 0, 1, True)])
    assert visited == [0, 1, 2]


def _refuse_host_read(*_: Any) -> Any:
    raise AssertionError("a layer reads a tensor on the host")


def test_a_layer_waits_for_its_load_before_it_touches_its_caches(
    yarn: GoldenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastDeploy waits behind the indexer (defect 30)."""
    from fastdeploy_dsa.attention import dsa, mla
    from fastdeploy_dsa.integrations.fastdeploy import sparse_layers

    rig, ids = rig_of(yarn.folder), yarn.prompts[0].fed_ids
    order: list[str] = []

    class Counter:
        def wait_for_layer(self, layer: int) -> None:
            order.append(f"wait {layer}")

    def recorded(module: Any, op: str) -> None:
        run = getattr(module, op)
        monkeypatch.setattr(module, op, lambda **given: (order.append(op), run(**given))[1])

    recorded(dsa, "layer_write")
    recorded(sparse_layers, "index_select")
    recorded(mla, "sparse_mla")
    meta = rig.forward_meta([Chunk(1, ids, 0, 8, True)])
    rig.backend.init_attention_metadata(meta)
    meta.layer_done_counter = Counter()
    with paddle.no_grad():
        rig.run(meta)
    for layer in range(3):
        first = order.index(f"wait {layer}")
        assert order[first + 1] in (f"wait {layer}", "layer_write")
        accesses = [what for what in order[first:] if not what.startswith("wait")][:3]
        assert accesses == ["layer_write", "index_select", "sparse_mla"]
    before_first = order[: order.index("wait 0")]
    assert before_first == []


@pytest.mark.parametrize("heads", [64, 32, 16, 8, 1])
def test_heads_of_a_rank_give_their_slice_of_all_heads(yarn: GoldenCase, heads: int) -> None:
    """No padding up to 64 or 128 heads (defect 51)."""
    rig, ids = rig_of(yarn.folder), yarn.prompts[0].fed_ids
    rig.step([Chunk(1, ids, 0, 50, True)])
    rng = np.random.default_rng(heads)
    query = paddle.to_tensor(rng.standard_normal((6, 128, 576)).astype(np.float32))
    meta = rig.forward_meta([Chunk(1, ids, 50, 56, False)])
    rig.backend.init_attention_metadata(meta)
    rows = rig.backend.begin_rows(meta)
    slots = rows.step.block_table[1, 0] * rig.block_size + paddle.arange(8, dtype="int32")
    layer = rig.model.model.layers[0].self_attn.dsa_attn
    selected = paddle.full([6, 1, 20], -1, "int32")
    selected[:, 0, :8] = slots

    def attend(q: Any) -> np.ndarray:
        return rig.backend.forward(q, None, selected, None, None, None, layer=layer, forward_meta=meta).numpy()

    whole = attend(query)
    assert whole.shape == (6, 128, 512)
    for begin in range(0, 128, max(heads, 32)):
        part = attend(query[:, begin : begin + heads].contiguous())
        assert np.array_equal(part, whole[:, begin : begin + heads])


def test_two_ranks_select_the_same_and_add_up_to_the_whole(yarn: GoldenCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process plays both ranks of a tensor-parallel group in turn, layer 0's attention in each."""
    from fastdeploy.model_executor.layers import linear

    monkeypatch.setattr(linear, "tensor_model_parallel_all_reduce", lambda x, *_, **__: x, raising=False)
    ids = yarn.prompts[0].fed_ids
    whole = rig_of(yarn.folder)
    hidden = paddle.to_tensor(np.random.default_rng(5).standard_normal((50, 128)).astype(np.float32))

    def attended(rig: Rig) -> tuple[np.ndarray, np.ndarray]:
        meta = rig.forward_meta([Chunk(1, ids, 0, 50, True)])
        rig.backend.init_attention_metadata(meta)
        with paddle.no_grad():
            out = rig.model.model.layers[0].self_attn(meta, hidden)
        return out.numpy(), rig.backend.rows.selections[0].slot_ids.numpy()

    ranks = [attended(Rig(yarn.folder, tensor_parallel=(rank, 2))) for rank in range(2)]
    out, slots = attended(whole)
    assert np.array_equal(ranks[0][1], ranks[1][1])
    assert np.array_equal(ranks[0][1], slots)
    assert float(np.abs(ranks[0][0] + ranks[1][0] - out).max()) <= yarn.tolerances.attention


@pytest.mark.needs_cache_controller
def test_a_replaced_schedule_shares_selections_as_the_engine_does(
    yarn: GoldenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IndexCache through FD_DSA_CONFIG: layer 2 uses layer 1's selection and owns nothing (defect 60)."""
    monkeypatch.setenv(VARIABLE, json.dumps({"index_topk_freq": 2}))
    rig = Rig(yarn.folder)
    assert [name for name in rig.controller.cache_kvs_map if "indexer_caches_2" in name] == []
    assert not any("layers.2.self_attn.indexer" in name for name, _ in rig.model.named_parameters())
    (prompt, *_) = yarn.prompts
    steps = len(prompt.decode_ids) - 1
    traced = trace(
        yarn.folder,
        prompt.prompt_ids.tolist(),
        cache_dtype="float32",
        steps=steps,
        hf_overrides={"index_topk_freq": 2},
    )
    fed = [*prompt.prompt_ids, *traced.decode_ids[:-1]]
    logits = serve(rig.step, prompt.prompt_ids, fed, CHUNK)
    ours = np.concatenate([traced.logits_prompt, traced.logits_decode])
    assert float(np.abs(logits[-len(ours) :] - ours).max()) <= yarn.tolerances.logits
    assert float(np.abs(ours[prompt.stored] - prompt.logits).max()) > 1, "the schedule changes nothing here"


def test_a_schedule_that_needs_weights_the_checkpoint_has_not_is_refused(
    goldens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastDeploy passes over what is missing (E13)."""
    monkeypatch.setenv(VARIABLE, json.dumps({"index_topk_freq": 1}))
    with pytest.raises(PluginError, match="E13: layer 3 selects by itself"):
        Rig(goldens / "glm52_shared")


def test_caches_that_are_missing_are_named(yarn: GoldenCase) -> None:
    """ForwardMeta has every attribute, with None (defect 64)."""
    rig, ids = rig_of(yarn.folder), yarn.prompts[0].fed_ids
    meta = make_forward_meta([Chunk(1, ids, 0, 8, True)], rig.backend, None, rig.block_tables)
    rig.backend.init_attention_metadata(meta)
    with pytest.raises(ValueError, match=r"forward_meta\.caches: expected the cache tensors, got None"):
        rig.backend.begin_rows(meta)
    meta.caches = rig.caches[:-1]
    with pytest.raises(ValueError, match=r"forward_meta\.caches: expected 6 tensors"):
        rig.backend.begin_rows(meta)
    meta.cu_seqlens_q = None
    with pytest.raises(ValueError, match=r"forward_meta\.cu_seqlens_q: expected a tensor, got None"):
        rig.backend.begin_rows(meta)


def test_a_layer_of_fastdeploys_own_model_is_refused(yarn: GoldenCase) -> None:
    """Its indices are no slots: they would be read as some."""
    rig = rig_of(yarn.folder)
    rows = paddle.zeros([1, 1, 576])
    with pytest.raises(PluginError, match="layer 0 is FastDeploy's own"):
        rig.backend.forward_mixed(rows, rows, rows, None, rows, rows, type("Layer", (), {"layer_id": 0}), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.scheduler_config, "splitwise_role", "prefill"), "--splitwise-role mixed, got prefill"),
        (lambda c: setattr(c.model_config, "dtype", "float16"), "--dtype: expected bfloat16 or float32, got float16"),
        (lambda c: setattr(c.model_config, "num_hidden_layers", 2), "FastDeploy runs 2 layers"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused_at_start(
    yarn: GoldenCase, change: Callable[[Any], None], message: str
) -> None:
    config = make_config(yarn.folder)
    change(config)
    with pytest.raises(PluginError, match=message):
        make_backend(config)


@pytest.mark.needs_cache_controller
@pytest.mark.parametrize("chunk", [CHUNK, 1000])
def test_the_draft_model_gives_the_goldens_draft_logits(goldens: Path, chunk: int) -> None:
    """Loaded and set up by FastDeploy's own proposer code; its ForwardMeta has no positions (defects 40, 41, 43)."""
    golden = GoldenCase(goldens / "v32_mtp")
    rig = Rig(golden.folder)
    draft = DraftRig(rig)
    assert type(draft.model).__name__ == "SparseMTPForCausalLM"
    assert [tensor.ndim for tensor in draft.caches] == [4, 3]
    for prompt in golden.prompts:
        poison(rig)
        following = [*prompt.prompt_ids[1:], *prompt.decode_ids]

        def step(chunks: list[Chunk], following: list[int] = following) -> np.ndarray:
            (target,) = chunks
            _, hidden = rig.step_with_hidden(chunks)
            return draft.step([target._replace(tokens=following)], hidden)[0]

        logits = serve(step, prompt.prompt_ids, prompt.fed_ids, chunk)
        error = float(np.abs(logits[prompt.stored] - prompt.draft_logits).max())
        print(f"draft layer: {error:.1e} from the golden")
        assert error <= golden.tolerances.logits


def test_glms_draft_model_has_the_name_that_fastdeploy_makes_up() -> None:
    from fastdeploy.model_executor.models.model_base import ModelRegistry

    assert "GlmMoeDsaForCausalLM".replace("Moe", "MTP") == "GlmMTPDsaForCausalLM"
    assert ModelRegistry.get_class("GlmMTPDsaForCausalLM").__name__ == "SparseMTPForCausalLM"
