"""What can go wrong before FastDeploy runs: no FastDeploy, bad switches, models that are not served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastdeploy_dsa.integrations.fastdeploy.capabilities import Capabilities
from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError
from fastdeploy_dsa.integrations.fastdeploy.log_table import capability_rows, format_table, switch_rows
from fastdeploy_dsa.integrations.fastdeploy.served_model import served_model
from fastdeploy_dsa.integrations.fastdeploy.settings import MODEL_KEYS, OWN_KEYS, VARIABLE, Settings, read_settings
from fastdeploy_dsa.integrations.fastdeploy.sizing import block_bytes
from tests.kit.goldens import REPOSITORY

CONFIGS = REPOSITORY / "tests" / "configs"


def setting(**keys: Any) -> dict[str, str]:
    return {VARIABLE: json.dumps(keys)}


def fd_config(folder: Path, num_layers: int, model_type: str = "main") -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(model=str(folder), num_hidden_layers=num_layers),
        speculative_config=SimpleNamespace(model_type=model_type),
    )


def checkpoint(folder: Path, **overrides: Any) -> Path:
    """A folder with a small DeepSeek-V3.2 config.json."""
    content = {**json.loads((CONFIGS / "deepseek_v32.json").read_text(encoding="utf-8")), **overrides}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def python(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run Python without FastDeploy, whatever is on PYTHONPATH here."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", VARIABLE)}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=REPOSITORY,
        env={**clean, **environ},
    )


def test_the_entry_point_module_imports_nothing_of_fastdeploy_or_paddle() -> None:
    code = (
        "import sys, fastdeploy_dsa.integrations.fastdeploy.plugin as plugin\n"
        "assert callable(plugin.register) and callable(plugin.runner_class)\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('fastdeploy', 'paddle')])"
    )
    ran = python("-c", code)
    assert ran.stdout.strip() == "[]", ran.stderr


@pytest.mark.parametrize("function", ["register", "runner_class"])
def test_without_fastdeploy_the_plugin_says_so_in_one_line(function: str) -> None:
    code = (
        "from fastdeploy_dsa.integrations.fastdeploy import plugin\n"
        f"try: plugin.{function}()\nexcept RuntimeError as error: print(error)"
    )
    ran = python("-c", code, FD_PLUGINS="fastdeploy_dsa")
    assert ran.stdout.count("\n") == 1
    assert ran.stdout.startswith("fastdeploy_dsa: FastDeploy is not installed"), ran.stderr


def test_the_check_exits_with_the_reason() -> None:
    ran = python("-m", "fastdeploy_dsa.integrations.fastdeploy", FD_PLUGINS="fastdeploy_dsa")
    assert ran.returncode == 1
    assert ran.stderr.startswith("fastdeploy_dsa: FastDeploy is not installed")


def test_a_version_without_sparse_attention_is_refused_with_all_that_is_missing(tmp_path: Path) -> None:
    """A package of FastDeploy's name with nothing in it."""
    (tmp_path / "fastdeploy").mkdir()
    (tmp_path / "fastdeploy" / "__init__.py").write_text("")
    (tmp_path / "fastdeploy" / "envs.py").write_text("FD_ATTENTION_BACKEND = 'APPEND_ATTN'\n")
    (tmp_path / "fastdeploy" / "version.txt").write_text("fastdeploy version: 2.3.1\n")
    ran = python("-m", "fastdeploy_dsa.integrations.fastdeploy", PYTHONPATH=str(tmp_path))
    assert ran.returncode == 1
    assert "FastDeploy 2.3.1 in " in ran.stderr
    for missing in ("platforms", "model_executor"):
        assert f"fastdeploy.{missing} is not there" in ran.stderr


def test_a_version_whose_own_packages_are_missing_is_refused_with_their_names(tmp_path: Path) -> None:
    (tmp_path / "fastdeploy" / "platforms").mkdir(parents=True)
    (tmp_path / "fastdeploy" / "__init__.py").write_text("")
    (tmp_path / "fastdeploy" / "envs.py").write_text("FD_ATTENTION_BACKEND = 'DSA_ATTN'\n")
    (tmp_path / "fastdeploy" / "platforms" / "__init__.py").write_text("import a_package_that_nobody_has\n")
    ran = python("-m", "fastdeploy_dsa.integrations.fastdeploy", PYTHONPATH=str(tmp_path))
    assert ran.returncode == 1
    reason = "fastdeploy.platforms cannot be imported: No module named 'a_package_that_nobody_has'"
    assert reason in ran.stderr
    assert "fastdeploy.platforms is not there" not in ran.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "FD_DSA_CONFIG: "),
        ("[]", "expected a JSON object, got list"),
        ('{"index_topk_freq": 2, "index_topk_freq": 4}', "index_topk_freq"),
        ('{"topk": 4}', "unknown key topk; expected some of use_index_cache"),
        ('{"cache_format": "int8"}', "cache_format: expected one of fp8, bfloat16, float32, got 'int8'"),
        (
            '{"index_topk_freq": 4, "index_topk_pattern": "FFS"}',
            "index_topk_pattern and index_topk_freq contradict each other",
        ),
        ('{"use_index_cache": false, "index_topk_freq": 4}', "use_index_cache is false, yet index_topk_freq is given"),
        (
            '{"index_topk_pattern": "FFS", "index_skip_topk_offset": 3}',
            "index_skip_topk_offset goes with index_topk_freq, not with index_topk_pattern",
        ),
    ],
)
def test_a_bad_switch_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(PluginError) as caught:
        read_settings({VARIABLE: text})
    assert str(caught.value).startswith("fastdeploy_dsa: FD_DSA_CONFIG")
    assert message in str(caught.value)


def test_no_variable_replaces_nothing() -> None:
    assert read_settings({}).overrides == {}
    assert read_settings({VARIABLE: "  "}).cache_format is None


def test_a_schedule_replaces_whatever_schedule_the_checkpoint_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path, indexer_types=["full"] * 61, index_topk_freq=1)
    assert "S" not in served_model(fd_config(folder, 61)).config.index_schedule.letters
    monkeypatch.setenv(VARIABLE, json.dumps({"index_topk_freq": 4}))
    served = served_model(fd_config(folder, 61))
    assert served.config.index_schedule.letters.count("F") == 16
    assert served.config.index_schedule.dialect == "index_topk_freq"


def test_keys_of_config_json_switch_index_cache_without_any_variable(tmp_path: Path) -> None:
    served = served_model(fd_config(checkpoint(tmp_path, index_topk_freq=2), 61))
    assert served.config.index_schedule.letters.count("F") == 31


def test_a_schedule_of_another_model_is_named_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, json.dumps({"index_topk_pattern": "FFS"}))
    with pytest.raises(PluginError, match=r"E05: .*FD_DSA_CONFIG"):
        served_model(fd_config(checkpoint(tmp_path), 61))


def test_a_model_that_is_not_served_is_named_with_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}')
    with pytest.raises(PluginError, match=r"Qwen3ForCausalLM.*served with sparse attention: DeepseekV32ForCausalLM"):
        served_model(fd_config(tmp_path, 61))


def test_models_that_only_the_engine_runs_are_refused(tmp_path: Path) -> None:
    content = (CONFIGS / "deepseek_v4_flash.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(PluginError) as caught:
        served_model(fd_config(tmp_path, json.loads(content)["num_hidden_layers"]))
    assert str(caught.value).endswith("served with sparse attention: DeepseekV32ForCausalLM, GlmMoeDsaForCausalLM")


def test_other_layer_counts_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"FastDeploy runs 60 layers, config\.json has 61"):
        served_model(fd_config(checkpoint(tmp_path), 60))


def test_a_draft_has_the_layers_behind_the_models(tmp_path: Path) -> None:
    served = served_model(fd_config(checkpoint(tmp_path), 1, "mtp"))
    assert served.layer_ids == (61,)
    assert served.is_draft
    with pytest.raises(PluginError, match="has 1 MTP layers, FastDeploy asks for 2"):
        served_model(fd_config(tmp_path, 2, "mtp"))


def test_block_sizes_are_those_of_the_layouts(tmp_path: Path) -> None:
    """FastDeploy's formula gives 36 times as much for this model."""
    config = served_model(fd_config(checkpoint(tmp_path), 61)).config
    assert block_bytes(config, cache_format="fp8", block_size=64) == 64 * 61 * 788
    with_drafts = block_bytes(config, cache_format="fp8", block_size=64, num_draft_layers=1, draft_ratio=2.0)
    assert with_drafts == 64 * 61 * 788 + 2 * 64 * 788


def test_shared_layers_cost_no_index_cache_unless_fastdeploy_allocates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, json.dumps({"index_topk_freq": 4}))
    config = served_model(fd_config(checkpoint(tmp_path), 61)).config
    assert block_bytes(config, cache_format="fp8", block_size=64) == 64 * (61 * 656 + 16 * 132)
    assert block_bytes(config, cache_format="fp8", block_size=64, is_inline=True) == 64 * 61 * 788


def found(**changes: Any) -> Capabilities:
    values = {
        "version": "2.6.0",
        "folder": "/somewhere",
        "obstacles": (),
        "has_glm": True,
        "has_draft_head": True,
        "has_owned_caches": False,
        "has_cache_controller": True,
        "uses_cache_controller": True,
        "attention_backend": "DSA_ATTN",
    }
    return Capabilities(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "part", "chosen"),
    [
        ({}, "cache manager", "this package's cache controller, host cache included"),
        ({"uses_cache_controller": False}, "cache manager", "every layer has every role, no host cache"),
        (
            {"has_cache_controller": False, "uses_cache_controller": False},
            "MTP",
            "refused: a draft model needs the v1 cache manager",
        ),
        ({}, "MTP", "draft models registered"),
        ({"has_glm": False}, "GlmMoeDsaForCausalLM", "-"),
        ({"attention_backend": "APPEND_ATTN"}, "FD_ATTENTION_BACKEND", "plug-in idle"),
    ],
)
def test_the_table_says_what_follows_from_what_was_found(changes: dict[str, Any], part: str, chosen: str) -> None:
    (row,) = (row for row in capability_rows(found(**changes)) if row[0] == part)
    assert chosen in row[2]


def test_the_pages_table_is_what_the_check_prints() -> None:
    page = (REPOSITORY / "docs" / "serving_with_fastdeploy.md").read_text(encoding="utf-8")
    (block,) = (part for part in page.split("```")[1::2] if part.startswith("text\npart "))
    here = found(version="2.6.0-dev", folder=".../FastDeploy/fastdeploy")
    rows = (*switch_rows({"FD_PLUGINS": "fastdeploy_dsa"}, Settings()), *capability_rows(here))
    assert block.removeprefix("text\n").strip() == format_table(rows)


def test_the_pages_switches_are_those_that_are_read() -> None:
    page = (REPOSITORY / "docs" / "serving_with_fastdeploy.md").read_text(encoding="utf-8")
    section = page.split("## Switches")[1].split("\n## ")[0]
    assert {key for key in MODEL_KEYS + OWN_KEYS if f"`{key}`" not in section} == set()


def test_backend_owned_caches_are_told_apart() -> None:
    tables = [format_table(capability_rows(found(has_owned_caches=owned))) for owned in (False, True)]
    assert "backends are asked for shapes" in tables[0]
    assert "backends create their caches" in tables[1]
    assert all(len({line.index("  ") for line in table.splitlines()[1:2]}) == 1 for table in tables)


def test_a_version_with_obstacles_is_refused() -> None:
    with pytest.raises(
        PluginError, match=r"FastDeploy 2\.6\.0 in /somewhere cannot be served with: x is not there; y"
    ):
        found(obstacles=("x is not there", "y takes no z")).require()
