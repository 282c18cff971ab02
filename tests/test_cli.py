"""The command line as a user runs it: text alone on stdout, one line per mistake, exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastdeploy_dsa import LLM, SamplingParams, cli
from tests.kit.byte_tokenizer import save_byte_tokenizer
from tests.kit.tiny_model import INDEX_TOPK, MAX_POSITIONS, VOCAB_SIZE, write_tiny_model

IDS = [int(token) for token in np.random.default_rng(1).integers(0, VOCAB_SIZE, 45)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def ids_file(tmp_path: Path) -> Path:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(IDS), encoding="utf-8")
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    command = [sys.executable, "-m", "fastdeploy_dsa", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a mistake gives; in this process, because importing paddle takes seconds."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        status = leaving.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert status == cli.USER_ERROR
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("fastdeploy-dsa: error: ")
    return line.removeprefix("fastdeploy-dsa: error: ")


def test_generate_prints_the_texts_alone_one_per_prompt(model: Path) -> None:
    prompts = ["First prompt", "Zweiter Prompt: äöü"]
    result = run("generate", "--model", model, "--max-tokens", 20, "--num-threads", 1, *prompts)
    outputs = LLM(model, num_threads=1).generate(prompts, SamplingParams(max_tokens=20, temperature=0.0))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "".join(output.text + "\n" for output in outputs)
    assert result.stderr == ""


def test_generate_repeats_itself_with_a_seed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        arguments = ["generate", "--model", str(model), "--temperature", "1", "--top-p", "0.9", "--seed", str(seed)]
        assert cli.main([*arguments, "--num-threads", "1", "--max-tokens", "12", "a prompt"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_generate_with_drafts_prints_the_same_texts_and_says_what_they_brought(
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompt = "The code of the red box is 4812. What is the code of the red box?"
    config = '{"method": "mtp", "num_speculative_tokens": 3}'
    captured = []
    for options in ([], ["--speculative-config", config, "--stats"]):
        assert cli.main(["generate", *options, prompt]) == 0
        captured.append(capsys.readouterr())
    assert captured[0].out == captured[1].out
    assert "4812" in captured[0].out
    lines = captured[1].err.splitlines()
    rounds = next(line for line in lines if line.startswith("rounds"))
    assert float(rounds.rsplit(", ", 1)[1].split()[0]) > 2
    assert next(line for line in lines if line.startswith("drafts")).count("%") == 4
    assert next(line for line in lines if line.startswith("time")).count(" s (") == 3


def test_a_bad_speculative_config_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    message = complaint(capsys, "generate", "--speculative-config", '{"method": "eagle"}', "prompt")
    assert message == "speculative_config.num_speculative_tokens: missing"
    config = '{"method": "eagle", "num_speculative_tokens": 1}'
    message = complaint(capsys, "generate", "--speculative-config", config, "prompt")
    assert message == "speculative_config.method: expected 'mtp', got 'eagle'"


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "fp8"])
def test_logits_are_saved_and_do_not_depend_on_the_chunk_size(
    model: Path, ids_file: Path, tmp_path: Path, cache_dtype: str
) -> None:
    saved = []
    for chunk in ([], ["--chunk-size", "7"]):
        path = tmp_path / f"out{len(chunk)}.safetensors"
        fixed = ["--cache-dtype", cache_dtype, "--steps", "3", "--num-threads", "1"]
        arguments = ["logits", str(model), "--token-ids", str(ids_file), "--save", str(path), *fixed]
        assert cli.main(arguments + chunk) == 0
        saved.append(load_file(path))
    whole, chunked = saved
    assert set(whole) == {"logits_prompt", "decode_ids", "logits_decode", "topk.0", "topk.1"}
    for name, tensor in whole.items():
        np.testing.assert_array_equal(tensor, chunked[name], err_msg=name)
    assert (whole["logits_prompt"].shape, whole["logits_prompt"].dtype) == ((len(IDS), VOCAB_SIZE), np.float32)
    assert (whole["logits_decode"].shape, whole["logits_decode"].dtype) == ((3, VOCAB_SIZE), np.float32)
    assert (whole["decode_ids"].shape, whole["decode_ids"].dtype) == ((4,), np.int64)
    assert (whole["topk.1"].shape, whole["topk.1"].dtype) == ((len(IDS) + 3, INDEX_TOPK), np.int32)
    for position, row in enumerate(whole["topk.0"]):
        selected = row[row >= 0]
        assert len(selected) == min(INDEX_TOPK, position + 1)
        assert (row[len(selected) :] == -1).all()
        assert (np.diff(selected) > 0).all()
        assert selected[-1] <= position


def test_the_saved_decode_steps_are_what_generate_does(model: Path, ids_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    arguments = ["logits", str(model), "--token-ids", str(ids_file), "--save", str(path), "--num-threads", "1"]
    assert cli.main([*arguments, "--steps", "5"]) == 0
    saved = load_file(path)
    greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    assert saved["decode_ids"].tolist() == LLM(model, num_threads=1).generate([IDS], greedy)[0].token_ids
    assert saved["logits_decode"].argmax(axis=1).tolist() == saved["decode_ids"][1:].tolist()
    assert saved["logits_prompt"][-1].argmax() == saved["decode_ids"][0]


def test_without_steps_the_decode_tensors_are_empty(model: Path, ids_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    assert cli.main(["logits", str(model), "--token-ids", str(ids_file), "--save", str(path)]) == 0
    saved = load_file(path)
    assert (saved["decode_ids"].shape, saved["logits_decode"].shape) == ((1,), (0, VOCAB_SIZE))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected a list of at least one token id, got an empty list"),
        ("{}", "expected a list of at least one token id, got dict"),
        ("7", "expected a list of at least one token id, got int"),
        ("[1, 2", "expected a JSON list of token ids, got a file that is not JSON: "),
        ("[1, true]", "place 1: expected a token id of 0 or more, got True"),
        ("[1.0]", "place 0: expected a token id of 0 or more, got 1.0"),
        ('["1"]', "place 0: expected a token id of 0 or more, got '1'"),
        ("[[1]]", "place 0: expected a token id of 0 or more, got [1]"),
        ("[3, -1]", "place 1: expected a token id of 0 or more, got -1"),
        (f"[{VOCAB_SIZE}]", f"token_ids[0]: expected a token id of 0 to {VOCAB_SIZE - 1}, got {VOCAB_SIZE}"),
        ("\ufeff[1]", "got a file that is not JSON"),
        ("[" * 100_000, "got a file that is not JSON"),
        (
            json.dumps([1] * (MAX_POSITIONS + 1)),
            f"at most max_position_embeddings ({MAX_POSITIONS}) tokens and steps, got {MAX_POSITIONS + 1} + 0",
        ),
    ],
    ids=lambda value: value[:20],
)
def test_bad_token_ids_are_named(
    model: Path, ids_file: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    ids_file.write_text(content, encoding="utf-8")
    save = ids_file.with_name("out.safetensors")
    assert message in complaint(capsys, "logits", model, "--token-ids", ids_file, "--save", save)
    assert not save.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chunk-size", "0"], "chunk_size: expected an int of 1 or more, got 0"),
        (["--steps", "-1"], "steps: expected an int of 0 or more, got -1"),
        (["--steps", "x"], "argument --steps: invalid int value: 'x'"),
        (["--steps", str(MAX_POSITIONS)], "expected at most max_position_embeddings"),
        (["--num-threads", "-1"], "num_threads: expected an int of 0 or more, got -1"),
        (["--cache-dtype", "int4"], "argument --cache-dtype: invalid choice: 'int4'"),
        (["--save", "/dev/null/out"], "/dev/null/out: expected a file that can be written, got Not a directory"),
        (["--save", "."], ".: expected a file that can be written, got Is a directory"),
        (["--token-ids", "nowhere.json"], "nowhere.json: expected a JSON list of token ids, got No such file"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_argument_of_logits_is_named(
    model: Path, ids_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    save = ids_file.with_name("out.safetensors")
    assert message in complaint(capsys, "logits", model, "--token-ids", ids_file, "--save", save, *arguments)
    assert not save.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "prompts[0]: expected text or token ids, got an empty prompt"),
        (["a" * MAX_POSITIONS], f"prompts[0]: expected at most {MAX_POSITIONS - 1} tokens"),
        (["--temperature", "-1", "a"], "temperature: expected a number in [0, inf), got -1.0"),
        (["--top-p", "2", "a"], "top_p: expected a number in (0, 1], got 2.0"),
        (["--max-tokens", "0", "a"], "max_tokens: expected an int of 1 or more, got 0"),
        (["--seed", "-1", "a"], "seed: expected an int of 0 to"),
        ([], "the following arguments are required: PROMPT"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_a_bad_argument_of_generate_is_named(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in complaint(capsys, "generate", "--model", model, *arguments)


def test_an_empty_model_name_and_too_many_threads_are_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model: expected a folder, got an empty name" in complaint(capsys, "generate", "--model", "", "a")
    assert "num_threads: expected" in complaint(capsys, "generate", "--model", model, "--num-threads", 2**32 + 1, "a")


def test_text_reaches_a_stdout_that_claims_to_be_ascii(model: Path) -> None:
    command = [sys.executable, "-m", "fastdeploy_dsa", "generate", "--model", str(model), "--temperature", "5"]
    done = subprocess.run(
        [*command, "--num-threads", "1", "--max-tokens", "40", "--seed", "3", "日本"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout.isascii()
    done.stdout.decode("utf-8")


def test_logits_that_are_not_finite_are_an_error_and_not_a_file(
    tmp_path: Path, ids_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, save = write_tiny_model(tmp_path / "overflowing"), tmp_path / "out.safetensors"
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][:] = 3e38
    save_file(weights, folder / "model.safetensors")
    arguments = ("logits", folder, "--token-ids", ids_file, "--save", save)
    assert "logits at position 0 are not all finite" in complaint(capsys, *arguments)
    assert not save.exists()


def test_a_mistake_in_a_process_of_its_own_is_one_line_and_status_2(tmp_path: Path) -> None:
    result = run("generate", "--model", tmp_path / "nowhere", "a prompt")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("fastdeploy-dsa: error: model: expected a folder")
    assert "Traceback" not in result.stderr


def test_no_command_and_an_unknown_one_are_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: COMMAND" in complaint(capsys)
    assert "invalid choice: 'train'" in complaint(capsys, "train")


def test_help_and_version_do_not_import_paddle() -> None:
    code = """
import sys
from fastdeploy_dsa import cli
try:
    cli.main([sys.argv[1]])
except SystemExit as leaving:
    assert leaving.code == 0
assert "paddle" not in sys.modules
"""
    for option in ("--help", "--version"):
        subprocess.run([sys.executable, "-c", code, option], check=True, capture_output=True, timeout=60)


def test_check_reports_and_says_so_in_its_status() -> None:
    result = run("check")
    assert result.returncode in (0, 1)
    assert result.stdout
    assert "Traceback" not in result.stderr
