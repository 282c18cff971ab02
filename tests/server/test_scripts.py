"""The launch scripts print commands that the programs they start understand."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastdeploy_dsa.cli import build_parser

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
FASTDEPLOY = ["serve_deepseek_v32.sh", "serve_glm5.sh", "serve_mtp.sh"]
LONGEST = {"serve_deepseek_v32.sh": "deepseek_v32.json", "serve_glm5.sh": "glm_5.json", "serve_mtp.sh": "glm_5.json"}
MODEL = "/models/with a space and a 'quote'"
# Of FastDeploy 2.6's API server, by the kind of value; a real FastDeploy, where there is one, is looked at below.
FLAGS = json.loads((Path(__file__).parent / "fastdeploy_flags.json").read_text(encoding="utf-8"))
KINDS = {"int": int, "float": float, "json": json.loads, "text": str}


def dry_run(script: str, *arguments: str, **environment: str) -> list[str]:
    """The command, as a shell would read it."""
    done = subprocess.run(
        [SCRIPTS / script, *arguments, "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    return shlex.split(line)


def fastdeploy_options(command: list[str]) -> argparse.Namespace:
    """The flags of the server, which are all known."""
    module = command.index("fastdeploy.entrypoints.openai.api_server")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for kind, names in FLAGS.items():
        for name in names:
            if kind == "switch":
                parser.add_argument(f"--{name}", action="store_true")
            elif kind == "boolean":
                parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
            else:
                parser.add_argument(f"--{name}", type=KINDS[kind])
    return parser.parse_args(command[module + 1 :])


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sh")))
def test_the_shell_understands_the_script(script: str) -> None:
    subprocess.run(["bash", "-n", SCRIPTS / script], check=True)


@pytest.mark.parametrize("script", FASTDEPLOY)
def test_the_plug_in_and_every_feature_are_on(script: str) -> None:
    command = dry_run(script, MODEL)
    module = command.index("-m")
    assert command[0] == "env"
    assert dict(pair.split("=", 1) for pair in command[1 : module - 1]) == {
        "FD_PLUGINS": "fastdeploy_dsa",
        "FD_ATTENTION_BACKEND": "DSA_ATTN",
        "ENABLE_V1_KVCACHE_MANAGER": "1",
    }
    options = fastdeploy_options(command)
    assert options.model == MODEL
    assert options.enable_prefix_caching
    assert options.enable_chunked_prefill
    assert options.graph_optimization_config == {"use_cudagraph": True}
    assert options.tensor_parallel_size == 8
    assert options.block_size == 64
    config = json.loads((SCRIPTS.parent / "tests" / "configs" / LONGEST[script]).read_text(encoding="utf-8"))
    assert 131072 <= options.max_model_len <= config["max_position_embeddings"]
    assert config["num_attention_heads"] % options.tensor_parallel_size == 0


def test_the_mtp_script_drafts_with_the_models_own_layer() -> None:
    options = fastdeploy_options(dry_run("serve_mtp.sh", MODEL))
    assert options.speculative_config["method"] == "mtp"
    assert options.speculative_config["model"] == MODEL
    assert 1 <= options.speculative_config["num_speculative_tokens"] <= 5
    assert fastdeploy_options(dry_run("serve_glm5.sh", MODEL)).speculative_config is None


@pytest.mark.parametrize("script", FASTDEPLOY)
def test_later_flags_replace_those_of_the_script(script: str) -> None:
    options = fastdeploy_options(dry_run(script, MODEL, "--max-model-len", "4096", "--ips", "10.0.0.1,10.0.0.2"))
    assert (options.max_model_len, options.ips) == (4096, "10.0.0.1,10.0.0.2")


@pytest.mark.parametrize("script", FASTDEPLOY)
def test_a_model_is_required(script: str) -> None:
    for arguments, got in (([], "nothing"), (["--dry-run"], "nothing"), ([""], "nothing"), (["--tp", "8"], "--tp")):
        done = subprocess.run([SCRIPTS / script, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"scripts/{script} MODEL [FLAG...] [--dry-run]" in done.stderr
        assert done.stderr.endswith(f"expected the folder of the model first, got {got}\n")


@pytest.mark.parametrize("script", [*FASTDEPLOY, "serve_local_cpu.sh"])
def test_help_is_the_scripts_usage_wherever_it_stands(script: str) -> None:
    for arguments in (["--help"], ["-h"], [MODEL, "--help"]):
        done = subprocess.run([SCRIPTS / script, *arguments], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert f"  scripts/{script} " in done.stdout
        assert "[--dry-run]" in done.stdout
        assert "set -e" not in done.stdout


def test_dry_run_stands_anywhere() -> None:
    flags = [MODEL, "--swap-space", "64"]
    commands = []
    for place in range(len(flags) + 1):
        arguments = [*flags[:place], "--dry-run", *flags[place:]]
        done = subprocess.run([SCRIPTS / "serve_mtp.sh", *arguments], capture_output=True, text=True, check=True)
        commands.append(done.stdout)
    assert len(set(commands)) == 1
    assert "--dry-run" not in commands[0]


def test_the_local_script_serves_the_demo_model_on_the_cpu() -> None:
    command = dry_run("serve_local_cpu.sh", "--port", "0", PYTHON=sys.executable)
    assert command[:4] == [sys.executable, "-m", "fastdeploy_dsa", "serve"]
    options = build_parser().parse_args(command[3:])
    assert (options.model, options.device, options.host, options.port) == (None, "cpu", "127.0.0.1", 0)


def test_without_dry_run_the_command_is_run() -> None:
    arguments = [SCRIPTS / "serve_local_cpu.sh", "--port", "any"]
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=False, env=os.environ | {"PYTHON": sys.executable}
    )
    assert done.returncode == 2
    assert done.stderr == "fastdeploy-dsa: error: argument --port: invalid int value: 'any'\n"


if find_spec("fastdeploy") is not None:

    def test_the_flags_of_the_scripts_are_known_to_the_installed_fastdeploy() -> None:
        from fastdeploy.entrypoints.openai.utils import make_arg_parser  # noqa: PLC0415
        from fastdeploy.utils import FlexibleArgumentParser  # noqa: PLC0415

        actual = set(make_arg_parser(FlexibleArgumentParser())._option_string_actions)
        used = {word for script in FASTDEPLOY for word in dry_run(script, MODEL) if word.startswith("--")}
        assert used <= actual
