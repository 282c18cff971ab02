"""The replay sends what the trace says, counts what the server did, and calls a failure one."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest

from fastdeploy_dsa.server.serving import Server
from tests.server.serving import metrics

NO_TIME = '{"at": "soon", "prompt": "a", "max_tokens": 1}\n'
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_serving.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    specification = importlib.util.spec_from_file_location("bench_serving", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["bench_serving"] = module  # its dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def run(bench: ModuleType, server: Server, folder: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    path = folder / "result.json"
    status = bench.main(["--base-url", server.url, "--json", str(path), *map(str, arguments)])
    return status, json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("chat", [False, True])
def test_figures_agree_with_the_servers_counters(
    bench: ModuleType, server: Server, client: openai.OpenAI, tmp_path: Path, chat: bool
) -> None:
    before = metrics(server)
    made = ["--num-requests", 12, "--rate", 50, "--shared-words", 40, "--num-prefixes", 2, "--max-tokens", 6]
    status, result = run(bench, server, tmp_path, *made, "--seed", int(chat), *(["--chat"] if chat else []))
    grown = {name: value - before.get(name, 0.0) for name, value in metrics(server).items()}
    figures = result["figures"]
    assert status == 0
    assert (figures["num_requests"], figures["num_completed"], figures["errors"]) == (12, 12, {})
    assert figures["num_output_tokens"] == grown["generated_tokens_total"]
    assert figures["num_prompt_tokens"] == grown["prefix_queried_tokens_total"]
    hits = grown["prefix_hit_tokens_total{device}"]
    assert hits > 0
    assert figures["prefix_hit_rate"] == hits / figures["num_prompt_tokens"]
    assert figures["output_tokens_per_s"] * figures["seconds"] == pytest.approx(figures["num_output_tokens"])
    for outcome in result["outcomes"]:
        assert 0 < outcome["ttft_s"] < outcome["latency_s"] <= figures["seconds"]
        assert outcome["tpot_s"] > 0
        assert outcome["ttft_s"] + 5 * outcome["tpot_s"] <= outcome["latency_s"]


def test_a_saved_trace_replays_as_the_same_requests(
    bench: ModuleType, server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    made = ["--num-requests", 3, "--shared-words", 5, "--prompt-words", 3, "--max-tokens", 2]
    _, first = run(bench, server, tmp_path, *made, "--rate", 100, "--save-trace", trace)
    lines = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    assert [set(line) for line in lines] == [{"at", "prompt", "max_tokens"}] * 3
    assert 0 == lines[0]["at"] < lines[1]["at"] < lines[2]["at"]
    status, second = run(bench, server, tmp_path, "--trace", trace)
    assert status == 0
    tokens = [[outcome["num_prompt_tokens"] for outcome in result["outcomes"]] for result in (first, second)]
    assert tokens[0] == tokens[1]


def test_failed_requests_are_counted_by_status_and_change_the_exit_status(
    bench: ModuleType, server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    requests = [{"at": 0, "prompt": prompt, "max_tokens": 2} for prompt in ("fine", [1, 2], [999], "a" * 600)]
    trace.write_text("".join(json.dumps(request) + "\n" for request in requests), encoding="utf-8")
    status, result = run(bench, server, tmp_path, "--trace", trace)
    assert status == 1
    assert result["figures"]["errors"] == {"400": 2}
    assert result["figures"]["num_completed"] == 2
    assert [outcome["error"] for outcome in result["outcomes"]] == ["", "", "400", "400"]


def test_what_cannot_be_sent_is_one_line(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    for content, words in (("", "empty file"), ('{"at": 0}\n', "line 1"), ("{\n", "line 1"), (NO_TIME, "line 1")):
        trace.write_text(content, encoding="utf-8")
        assert bench.main(["--trace", str(trace)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert bench.main(["--base-url", "http://127.0.0.1:9/v1", "--num-requests", "1"]) == 2
    assert capsys.readouterr().err == "bench_serving: error: Connection error.\n"


@pytest.mark.parametrize(
    ("name", "value"), [("--concurrency", "0"), ("--num-prefixes", "0"), ("--rate", "0"), ("--rate", "nan")]
)
def test_an_option_out_of_its_range_is_named(
    bench: ModuleType, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["--base-url", "http://127.0.0.1:9/v1", name, value])
    assert caught.value.code == 2
    assert f"{name}: expected" in capsys.readouterr().err


def test_the_summary_is_made_of_what_ended_well(bench: ModuleType) -> None:
    outcomes = [
        bench.Outcome("", 0.1 * number, 0.01, 1.0, num_prompt_tokens=10, num_output_tokens=4, num_cached_tokens=5)
        for number in range(1, 12)
    ]
    figures = bench.summary([*outcomes, bench.Outcome("503"), bench.Outcome("503")], 2.0)
    assert figures["errors"] == {"503": 2}
    assert (figures["num_requests"], figures["num_completed"]) == (13, 11)
    assert (figures["requests_per_s"], figures["output_tokens_per_s"], figures["total_tokens_per_s"]) == (5.5, 22, 77)
    assert figures["prefix_hit_rate"] == 0.5
    expected = {"mean": 600.0, "p50": 600.0, "p90": 1000.0, "p99": 1090.0, "max": 1100.0}
    assert figures["ttft_ms"] == pytest.approx(expected)
    untold = [bench.Outcome("", 0.1, None, 1.0, num_prompt_tokens=10, num_output_tokens=1)]
    figures = bench.summary(untold, 1.0)
    assert (figures["prefix_hit_rate"], figures["tpot_ms"]) == (None, None)
    assert "ttft_ms" in bench.table(figures)
