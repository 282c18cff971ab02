"""`inspect` as a serving engineer runs it: numbers, refusals in one line, speed, picture."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdeploy_dsa import cli, inspection_plot
from fastdeploy_dsa.config import ModelConfig
from fastdeploy_dsa.index_pattern import PUBLISHED_PATTERNS
from fastdeploy_dsa.index_schedule import freq_letters
from fastdeploy_dsa.inspection import InspectionOptions, inspect_config
from fastdeploy_dsa.inspection_view import written_layers

CONFIGS = Path(__file__).parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def package_log_level() -> Iterator[None]:
    """The command line sets it for its process."""
    logger = logging.getLogger("fastdeploy_dsa")
    level = logger.level
    yield
    logger.setLevel(level)


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What --json prints, in this process."""
    assert cli.main(["inspect", *map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    (line,) = captured.out.splitlines()
    content: dict[str, Any] = json.loads(line)
    return content


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused configuration gives."""
    try:
        status = cli.main(["inspect", *map(str, arguments)])
    except SystemExit as leaving:
        status = leaving.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert (status, captured.out) == (cli.USER_ERROR, "")
    (line,) = captured.err.splitlines()
    return line.removeprefix("fastdeploy-dsa: error: ")


@pytest.mark.parametrize(
    ("name", "model_type", "scale", "bytes_per_token", "kinds", "letters"),
    [
        ("deepseek_v2_lite", "deepseek_v2", 0.1147213867929261, 17712, {"mla": 27}, None),
        ("deepseek_v3", "deepseek_v3", 0.1352337788608801, 40672, {"mla": 62}, None),
        ("deepseek_v32", "deepseek_v32", 0.1352337788608801, 48856, {"dsa": 62}, "F" * 61),
        ("glm_5", "glm_moe_dsa", 0.0625, 62252, {"dsa": 79}, "F" * 78),
        ("glm_52", "glm_moe_dsa", 0.0625, 54728, {"dsa": 79}, freq_letters(78, 4, 3)),
        (
            "deepseek_v4_flash",
            "deepseek_v4",
            0.04419417382415922,
            3915,
            {"swa": 3, "c4a": 21, "c128a": 20},
            "F" * 21,
        ),
        ("deepseek_v4_pro", "deepseek_v4", 0.04419417382415922, 5609.25, {"c128a": 31, "c4a": 30, "swa": 1}, "F" * 30),
    ],
)
def test_every_family_is_inspected(
    capsys: pytest.CaptureFixture[str],
    name: str,
    model_type: str,
    scale: float,
    bytes_per_token: float,
    kinds: dict[str, int],
    letters: str | None,
) -> None:
    found = inspect(capsys, CONFIGS / f"{name}.json")
    config = ModelConfig.from_pretrained(CONFIGS / f"{name}.json")
    layers = found["layers"]
    assert (found["model_type"], found["index_schedule"], found["warnings"]) == (model_type, letters, [])
    assert found["softmax_scale"] == pytest.approx(scale, rel=1e-12)
    assert found["cache_bytes_per_token"] == bytes_per_token
    assert sum(layer["cache_bytes_per_token"] for layer in layers) == bytes_per_token
    assert [layer["layer"] for layer in layers] == list(range(config.num_layers))
    counted = [layer["attention"] for layer in layers]
    assert {kind: counted.count(kind) for kind in kinds} == kinds
    assert len(counted) == sum(kinds.values())
    assert [layer["layer"] for layer in layers if layer.get("draft")] == list(
        range(config.num_hidden_layers, config.num_layers)
    )
    selecting = {"F": "full", "S": "shared"}
    listed = [layer["index"] for layer in layers if layer["index"] and not layer.get("draft")]
    assert listed == [selecting[letter] for letter in letters or ""]


def test_shared_layers_name_their_source_and_save_their_index_cache(capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(capsys, CONFIGS / "glm_52.json")
    layers = found["layers"]
    assert layers[2] == {"layer": 2, "attention": "dsa", "index": "full", "source": None, "cache_bytes_per_token": 788}
    assert layers[5] == {"layer": 5, "attention": "dsa", "index": "shared", "source": 2, "cache_bytes_per_token": 656}
    assert layers[78] == layers[2] | {"layer": 78, "draft": True}
    for layer in layers:
        if layer["index"] == "shared":
            assert layers[layer["source"]]["index"] == "full"
            assert layer["source"] < layer["layer"]
    assert found["saved_bytes_per_token"] == 7524


def test_layers_that_do_not_select_have_no_index(capsys: pytest.CaptureFixture[str]) -> None:
    layers = inspect(capsys, CONFIGS / "deepseek_v4_flash.json", "--hf-overrides", '{"index_topk_freq": 4}')["layers"]
    assert layers[0] == {"layer": 0, "attention": "swa", "index": None, "source": None, "cache_bytes_per_token": 0}
    assert layers[3] == {
        "layer": 3,
        "attention": "c128a",
        "index": None,
        "source": None,
        "cache_bytes_per_token": 6.75,
    }
    assert layers[4] == {"layer": 4, "attention": "c4a", "index": "full", "source": None, "cache_bytes_per_token": 180}
    shared = {"layer": 10, "attention": "c4a", "index": "shared", "source": 4, "cache_bytes_per_token": 146.25}
    assert layers[10] == shared


@pytest.mark.parametrize("spelling", ["folder", "file", "text", "wrapped text"])
def test_a_model_is_named_by_folder_file_or_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, spelling: str
) -> None:
    text = (CONFIGS / "glm_52.json").read_text()
    (tmp_path / "config.json").write_text(text)
    argument = {
        "folder": tmp_path,
        "file": tmp_path / "config.json",
        "text": f"\n {text}",
        "wrapped text": f'{{"text_config": {text}}}',
    }[spelling]
    overrides = '{"indexer_types": null, "use_index_cache": true, "index_topk_freq": 2}'
    found = inspect(capsys, argument, "--hf-overrides", overrides)
    assert found["index_schedule"] == freq_letters(78, 2, 3)


@pytest.mark.parametrize(
    ("name", "memory", "max_tokens"),
    [
        # Blocks of 64 tokens of 62 * 656 + 62 * 132 bytes.
        ("deepseek_v32", "80GiB", (80 << 30) // (48856 * 64) * 64),
        ("glm_52", str(54728 * 64), 64),
        ("glm_52", str(54728 * 64 - 1), 0),
    ],
)
def test_capacity_is_what_whole_blocks_hold(
    capsys: pytest.CaptureFixture[str], name: str, memory: str, max_tokens: int
) -> None:
    found = inspect(capsys, CONFIGS / f"{name}.json", "--memory", memory)
    assert found["max_tokens"] == max_tokens
    assert abs(max_tokens - found["memory_bytes"] / found["cache_bytes_per_token"]) < 6000


def test_capacity_counts_windows_of_a_step_and_of_cached_prefixes(capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(capsys, CONFIGS / "deepseek_v4_flash.json", "--memory", "80 GB")
    window, states4, states128 = 44 * 37440, 21 * (32768 + 8192), 20 * 32768  # bytes of a block, all layers
    # Blocks of the last 127, 7 and 127 tokens and of 512 more, wherever they begin in a block of 64, 4 and 8 tokens.
    request = 11 * window + 131 * states4 + 81 * states128
    snapshot = 2 * window + states4  # 127 tokens and 4 tokens before a boundary
    groups, rest = divmod(80 * 10**9 - request, 16 * 3915 * 256 + snapshot)
    blocks = 16 * groups + max(0, rest - snapshot) // (3915 * 256)
    assert found["max_tokens"] == blocks * 256


def test_requests_of_a_length_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--memory", "80GiB", "--max-len", 131072]
    found = inspect(capsys, CONFIGS / "deepseek_v32.json", *arguments)
    assert (found["max_requests"], found["request_bytes"]) == (13, 131072 * 48856)
    assert "max_tokens" not in inspect(capsys, CONFIGS / "deepseek_v32.json")
    assert inspect(capsys, CONFIGS / "deepseek_v32.json")["max_len"] == 163840


def test_the_fullest_stage_decides(capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(capsys, CONFIGS / "glm_52.json", "--memory", "80GiB", "--pp", 2)
    assert found["stage_starts"] == [0, 39]
    assert found["max_tokens"] == (80 << 30) // (27560 * 64) * 64  # 39 layers, 10 of them full, and the draft layer
    assert found["warnings"] == [
        "pipeline stage from layer 39 on begins with a shared layer: the stage before sends its selection, "
        "8192 bytes per token"
    ]


def test_a_stage_can_be_made_to_begin_with_a_full_layer(capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(capsys, CONFIGS / "glm_52.json", "--pp", 2, "--pp-index-mode", "force_full")
    assert found["layers"][39]["index"] == "full"
    assert found["layers"][41]["source"] == 39
    assert found["cache_bytes_per_token"] == 54728 + 132
    assert found["warnings"] == [
        "made full to begin a pipeline stage, so the checkpoint must have their indexer weights: layers 39"
    ]


def test_warnings_of_the_config_and_the_deployment_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = json.dumps({"index_topk_pattern": PUBLISHED_PATTERNS[0].letters[:61], "index_topk_freq": 4})
    found = inspect(capsys, CONFIGS / "deepseek_v32.json", "--hf-overrides", overrides, "--max-len", 200000)
    assert [warning[:3] for warning in found["warnings"]] == ["W1:", "W3:", "max"]


@pytest.mark.parametrize("cache_dtype", ["fp8", "bfloat16", "float32"])
def test_the_cache_format_can_be_chosen(capsys: pytest.CaptureFixture[str], cache_dtype: str) -> None:
    found = inspect(capsys, CONFIGS / "deepseek_v3.json", "--cache-dtype", cache_dtype)
    assert found["cache_bytes_per_token"] == 62 * {"fp8": 656, "bfloat16": 1152, "float32": 2304}[cache_dtype]


def test_whether_the_engine_can_run_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(capsys, CONFIGS / "glm_5.json")["can_generate"] is True
    found = inspect(capsys, CONFIGS / "deepseek_v3.json")
    assert (found["can_generate"], found["generation_obstacle"]) == (
        False,
        "models without an indexer cannot generate yet",
    )


V32 = CONFIGS / "deepseek_v32.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such file"),
        (["{"], "PATH_OR_JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (["[1]"], "PATH_OR_JSON: expected a JSON object, got list"),
        (['{"a": 1, "a": 2}'], "PATH_OR_JSON: a: given twice, as 1 and 2"),
        (['{"a": NaN}'], "PATH_OR_JSON: NaN is not a number a config may hold"),
        (["[" * 5000], "PATH_OR_JSON: nested too deeply, expected at most 64 levels"),
        (['{"a":' * 5000 + "1" + "}" * 5000], "PATH_OR_JSON: nested too deeply, expected at most 64 levels"),
        (['{"a":' * 65 + "1" + "}" * 65], "PATH_OR_JSON: nested too deeply, expected at most 64 levels"),
        (['{"model_type": "llama"}'], "model_type: expected deepseek_v2 or deepseek_v3 or"),
        ([V32, "--hf-overrides", "index_topk=3"], "hf_overrides: Expecting value: line 1 column 1 (char 0)"),
        ([V32, "--hf-overrides", "[]"], "hf_overrides: expected a JSON object, got list"),
        ([V32, "--hf-overrides", '{"index_topk": NaN}'], "hf_overrides: NaN is not a number a config may hold"),
        (
            [V32, "--hf-overrides", '{"index_topk_frq": 4}'],
            f"{V32} with overrides of index_topk_frq: overrides: unknown key 'index_topk_frq', "
            "the nearest known one is 'index_topk_freq'",
        ),
        ([V32, "--hf-overrides", '{"index_topk_freq": 0}'], "E06: index_topk_freq: expected an int >= 1, got 0"),
        ([V32, "--memory", "much"], "memory: expected bytes, such as 1048576 or '512MiB', got 'much'"),
        ([V32, "--memory", "0"], "memory: expected an int of 1 or more, got 0"),
        ([V32, "--memory", "-1GiB"], "argument --memory: expected one argument"),
        ([V32, "--max-len", "0"], "max_len: expected an int from 1 to 2147483647, got 0"),
        (
            [V32, "--max-len", "9" * 30],
            "max_len: expected an int from 1 to 2147483647, got 999999999999999999999999999999",
        ),
        ([V32, "--max-len", "x"], "argument --max-len: invalid int value: 'x'"),
        ([V32, "--tp", "3"], "tp: expected a divisor of num_attention_heads 128, got 3"),
        ([V32, "--tp", "0"], "tp: expected a divisor of num_attention_heads 128, got 0"),
        ([V32, "--pp", "62"], "pp: expected an int from 1 to 61, the number of layers, got 62"),
        ([CONFIGS / "deepseek_v4_flash.json", "--tp", "16"], "tp: expected a divisor of o_groups 8, got 16"),
        (
            [CONFIGS / "glm_52.json", "--pp", "2", "--pp-index-mode", "error"],
            "E11: the pipeline stage from layer 39 on: layer 39 is shared, expected a full layer",
        ),
        ([V32, "--cache-dtype", "int4"], "argument --cache-dtype: invalid choice: 'int4'"),
        ([V32, "--plot", "picture.txt"], "plot: expected a file name ending such as .png, got 'picture.txt'"),
        ([V32, "--plot", "/dev/null/picture.png"], "[Errno 20] Not a directory"),
        (
            [V32, "--hf-overrides", '{"index_head_dim": 256}'],
            "index_head_dim: an fp8 index cache takes at most 128, got 256",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_refused_configuration_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[object], message: str
) -> None:
    assert complaint(capsys, *arguments).startswith(message)


def test_tables_name_schedule_scale_bytes_and_capacity(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["inspect", str(CONFIGS / "glm_52.json"), "--memory", "80GiB", "--pp", "2", "--tp", "8"]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "GlmMoeDsaForCausalLM (glm_moe_dsa), 78 + 1 draft layers",
        "21 full, 57 shared, from indexer_types",
        freq_letters(78, 4, 3),
        "0.0625 = 256^-0.5 (rope type default)",
        "0-2, 6, 10, ..., 74",
        "656 key + 132 indexer",
        "saves 7524 of 62252 bytes per token (12.1%), 13.7% more tokens fit",
        "0-38: 27168, 39-78: 27560",
        "in 80 GiB per device",
        "warning: pipeline stage from layer 39 on",
    ):
        assert expected in shown


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_tables(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert cli.main(["inspect", str(CONFIGS / f"{name}.json")]) == 0
    assert "all layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("layer_ids", "written"),
    [
        ([0], "0"),
        ([0, 1], "0-1"),
        ([0, 1, 2, 6, 10, 14, 18], "0-2, 6, 10, ..., 18"),
        ([2, 4, 6, 8], "2, 4, ..., 8"),
        ([2, 4, 6], "2, 4, 6"),
        ([1, 3, 4, 5, 9], "1, 3-5, 9"),
        ([], ""),
    ],
)
def test_layers_are_written_shortly(layer_ids: list[int], written: str) -> None:
    assert written_layers(layer_ids) == written


@pytest.mark.parametrize("name", NAMES)
def test_a_plot_is_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    path = tmp_path / "picture.png"
    memory = ["--memory", "80GiB"] if name.startswith("deepseek_v3") else []
    inspect(capsys, CONFIGS / f"{name}.json", "--plot", path, "--pp", 2, *memory)
    assert path.read_bytes().startswith(PNG)


def test_without_matplotlib_the_install_command_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    found = complaint(capsys, V32, "--plot", "picture.png")
    assert found == "plot: expected matplotlib to be installed, run pip install 'fastdeploy-dsa[plot]'"
    assert inspection_plot.INSTALL_COMMAND in found


def test_inspecting_needs_no_paddle_and_under_two_seconds() -> None:
    code = (
        "import sys; from fastdeploy_dsa import cli; status = cli.main(sys.argv[1:]); "
        "assert 'paddle' not in sys.modules and 'matplotlib' not in sys.modules; sys.exit(status)"
    )
    for name in ("glm_52", "deepseek_v4_pro"):
        command = [sys.executable, "-c", code, "inspect", str(CONFIGS / f"{name}.json"), "--memory", "80GiB"]
        before = os.times()
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        after = os.times()  # processor time: other processes may keep this machine busy
        used = after.children_user + after.children_system - before.children_user - before.children_system
        assert used < 2.0, name


def test_an_inspection_needs_no_command_line() -> None:
    inspection = inspect_config(ModelConfig.from_pretrained(V32), InspectionOptions(memory_bytes=1 << 30))
    assert inspection.max_tokens == (1 << 30) // (48856 * 64) * 64
    assert inspection.saved_bytes_per_token == 0
