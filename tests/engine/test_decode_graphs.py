from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import Tensor

from fastdeploy_dsa.engine import decode_graphs, loading
from fastdeploy_dsa.engine.decode_graphs import DecodeGraphs, DecodeLimits, paddle_graphs
from fastdeploy_dsa.engine.loading import CacheOptions, load_runner, read_model_config
from fastdeploy_dsa.engine.runner import ModelRunner
from fastdeploy_dsa.engine.step_inputs import StepInputs
from fastdeploy_dsa.installation import DEMO_MODEL
from fastdeploy_dsa.step import StepMetadata

LIMITS = DecodeLimits(max_num_seqs=20, max_model_len=256, block_size=64)


@dataclass
class Model:
    """Hidden states that show every tensor of the step; counts its calls."""

    num_calls: int = 0
    captured: list[tuple[StepMetadata, Tensor]] = field(default_factory=list)
    config: Any = None

    def forward(self, step: StepMetadata, **_: Any) -> Tensor:
        self.num_calls += 1
        parts = [step.token_ids, step.positions, step.request_ids, step.lengths, step.slot_mapping]
        hidden = paddle.stack([part.astype("int64") for part in parts], axis=1)
        tables = (step.block_table, *step.window_tables.values())
        blocks = [table.astype("int64").sum(axis=1, keepdim=True) for table in tables]
        hidden = paddle.concat([hidden, *blocks], axis=1)[: step.num_tokens]
        self.captured.append((step, hidden))
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return hidden.astype("float32")


@dataclass
class HostGraph:
    """A graph whose replay runs the model again on the tensors of the capture."""

    model: Model
    is_open: bool = False
    is_reset: bool = False
    step: StepMetadata | None = None
    hidden: Tensor | None = None

    def capture_begin(self) -> None:
        self.is_open = True

    def capture_end(self) -> None:
        self.is_open = False
        self.step, self.hidden = self.model.captured[-1]

    def replay(self) -> None:
        assert self.step is not None
        assert self.hidden is not None
        self.hidden.copy_(Model().forward(self.step), False)

    def reset(self) -> None:
        self.is_reset = True


@pytest.fixture
def made() -> list[HostGraph]:
    return []


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def graphs(model: Model, made: list[HostGraph]) -> DecodeGraphs:
    def make() -> HostGraph:
        made.append(HostGraph(model))
        return made[-1]

    return DecodeGraphs(model.forward, LIMITS, make)


def decode_step(rng: np.random.Generator, num_requests: int, width: int = 3) -> StepInputs:
    return StepInputs(
        token_ids=rng.integers(0, 999, num_requests),
        positions=rng.integers(0, 64 * width, num_requests).astype(np.int32),
        request_ids=np.arange(num_requests, dtype=np.int32),
        block_table=rng.integers(0, 99, (num_requests, width)).astype(np.int32),
        logits_rows=np.arange(num_requests),
        window_tables={"window": rng.integers(-1, 99, (num_requests, 5)).astype(np.int32)},
    )


def eager(inputs: StepInputs) -> Any:
    rows, width = inputs.block_table.shape
    table = np.full((rows, LIMITS.max_blocks), -1, np.int32)
    table[:, :width] = inputs.block_table
    step = StepMetadata.build(
        token_ids=inputs.token_ids,
        positions=inputs.positions,
        request_ids=inputs.request_ids,
        block_table=np.concatenate([table, np.full((-rows % 8, LIMITS.max_blocks), -1, np.int32)]),
        block_size=64,
        window_tables={
            pool: np.concatenate([window, np.full((-rows % 8, window.shape[1]), -1, np.int32)])
            for pool, window in inputs.window_tables.items()
        },
    )
    return Model().forward(step).numpy()


def test_replays_with_changed_contents_equal_eager_steps(
    graphs: DecodeGraphs, model: Model, made: list[HostGraph]
) -> None:
    rng = np.random.default_rng(3)
    for num_requests in (8, 8, 8, 5, 7, 3, 12, 20, 12, 1):
        inputs = decode_step(rng, num_requests, width=int(rng.integers(1, 5)))
        assert np.array_equal(graphs.run(inputs).numpy(), eager(inputs))
    assert len(made) == 3  # 8, 16 and 24 rows
    assert model.num_calls == 6  # an eager run and a capture of each


def test_rows_that_fill_up_are_reset_when_a_smaller_step_follows(graphs: DecodeGraphs, made: list[HostGraph]) -> None:
    rng = np.random.default_rng(4)
    graphs.run(decode_step(rng, 8))
    graphs.run(decode_step(rng, 8))
    graphs.run(decode_step(rng, 2))
    step = made[0].step
    assert step is not None
    assert step.lengths.numpy()[2:].tolist() == [0] * 6
    assert step.slot_mapping.numpy()[2:].tolist() == [-1] * 6
    assert (step.block_table.numpy()[2:] == -1).all()


def test_the_tensors_of_a_graph_stay_where_they_are(graphs: DecodeGraphs, made: list[HostGraph]) -> None:
    rng = np.random.default_rng(5)
    graphs.run(decode_step(rng, 4))
    step = made[0].step
    assert step is not None
    before = [getattr(step, name).data_ptr() for name in decode_graphs._PERSISTENT]
    for _ in range(3):
        graphs.run(decode_step(rng, 6, width=4))
    assert [getattr(step, name).data_ptr() for name in decode_graphs._PERSISTENT] == before


def test_graphs_are_let_go_with_their_owner(model: Model) -> None:
    made: list[HostGraph] = []

    def make() -> HostGraph:
        made.append(HostGraph(model))
        return made[-1]

    graphs = DecodeGraphs(model.forward, LIMITS, make)
    graphs.run(decode_step(np.random.default_rng(6), 4))
    del graphs
    gc.collect()
    assert [graph.is_reset for graph in made] == [True]


def test_after_a_failed_capture_steps_run_eagerly_and_the_log_says_why(
    made: list[HostGraph], caplog: pytest.LogCaptureFixture
) -> None:
    model = Model(captured=[(None, None)])  # type: ignore[list-item]

    def forward(step: StepMetadata, **_: Any) -> Tensor:
        if made and made[0].is_open:
            raise RuntimeError("not while capturing")
        return Model().forward(step)

    def make() -> HostGraph:
        made.append(HostGraph(model))
        return made[-1]

    graphs = DecodeGraphs(forward, LIMITS, make)
    inputs = decode_step(np.random.default_rng(7), 4)
    assert graphs.takes(inputs)
    assert np.array_equal(graphs.run(inputs).numpy(), eager(inputs))
    assert not made[0].is_open
    assert caplog.messages == ["decode steps are not captured: not while capturing"]
    assert not graphs.takes(inputs)


@pytest.mark.parametrize(
    ("num_rows", "num_requests", "expected"), [(4, 4, True), (20, 20, True), (21, 21, False), (6, 4, False)]
)
def test_only_steps_of_one_row_a_request_are_captured(
    graphs: DecodeGraphs, num_rows: int, num_requests: int, expected: bool
) -> None:
    inputs = decode_step(np.random.default_rng(8), num_requests)
    rows = np.resize(np.arange(num_requests), num_rows)
    chunked = StepInputs(
        token_ids=inputs.token_ids[rows],
        positions=inputs.positions[rows],
        request_ids=rows.astype(np.int32),
        block_table=inputs.block_table,
        logits_rows=np.arange(num_requests),
    )
    assert graphs.takes(chunked) == expected


def test_the_runner_waits_for_every_layer_before_a_captured_step(model: Model) -> None:
    caches = {("key", 0): paddle.zeros([1]), ("indexer", 0): paddle.zeros([1]), ("key", 1): paddle.zeros([1])}
    runner = ModelRunner(model, None, caches, block_size=64, decode_limits=LIMITS, make_graph=lambda: HostGraph(model))
    waited: list[int] = []
    for seed in (1, 2):
        inputs = decode_step(np.random.default_rng(seed), 3)
        logits = runner.run(inputs, before_layer=waited.append).logits
        assert np.array_equal(logits, eager(inputs))
    assert waited == [0, 1, 0, 1]
    assert model.num_calls == 2


def test_the_cpu_captures_nothing() -> None:
    assert paddle_graphs("cpu", "") is None


@pytest.mark.parametrize("refusal", ["", "the host chooses the experts"])
def test_the_log_says_why_a_device_captures_nothing(refusal: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger=decode_graphs.__name__):
        maker = paddle_graphs("gpu:0", refusal)
    if maker is None:
        assert caplog.messages == [f"decode steps are not captured: {refusal or 'this Paddle captures no graphs'}"]
    else:
        assert not refusal


@pytest.mark.parametrize("drafts", [False, True])
def test_a_draft_model_switches_captures_off(monkeypatch: pytest.MonkeyPatch, model: Model, drafts: bool) -> None:
    monkeypatch.setattr(loading, "paddle_graphs", lambda device, refusal: lambda: HostGraph(model))
    config = read_model_config(DEMO_MODEL, None)
    options = CacheOptions("float32", 64, num_threads=1, device="cpu", num_blocks=4)
    loaded = load_runner(
        DEMO_MODEL, config=config, options=options, progress=False, drafts=drafts, decode_limits=LIMITS
    )
    assert (loaded.runner._graphs is None) == drafts
