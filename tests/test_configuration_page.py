"""docs/configuration.md: every refusal it lists is what the code says, every output it shows is what a user sees."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdeploy_dsa import cli
from fastdeploy_dsa.config import MODELS, CompressedConfig, ConfigError, DsaConfig, MlaConfig, ModelConfig
from fastdeploy_dsa.strict_json import parse_json_object

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
WARNED_PART, REFUSED_PART = PAGE.split("## What is refused")
ROW = re.compile(r"^\| (\w+) \| `(\{.*\})` \| (.+) \|$", re.MULTILINE)
WARNED, REFUSED = ROW.findall(WARNED_PART), ROW.findall(REFUSED_PART)
NO_JSON = re.findall(r"^\| `(.+)` \| (config\.json: .+) \|$", PAGE, re.MULTILINE)
EXAMPLES = re.findall(r"^    (fastdeploy-dsa inspect .+)\n\n((?:    .*\n|\n)+?)(?=\n*^\S)", PAGE, re.MULTILINE)
WIDTH = "110"


@pytest.fixture(autouse=True)
def package_log_level() -> Iterator[None]:
    """The command line sets it for its process."""
    logger = logging.getLogger("fastdeploy_dsa")
    level = logger.level
    yield
    logger.setLevel(level)


def test_the_page_lists_what_it_should() -> None:
    assert len(REFUSED) + len(NO_JSON) >= 90
    assert len(EXAMPLES) == 3
    assert {row[2][:3] for row in WARNED} == {"W1:", "W2:", "W3:", "W4:", "W7:", "rop"}
    codes = set(re.findall(r"\| (E\d+): ", PAGE))
    assert codes == {
        *(f"E{number:02}" for number in (1, 2, 3, 4, 5, 6, 7, 8, 10, 14)),
        "E1",
        "E3",
        "E4",
        "E5",
        "E6",
        "E2",
    }


@pytest.mark.parametrize(("name", "overrides", "message"), REFUSED, ids=[row[1][:60] for row in REFUSED])
def test_a_listed_configuration_is_refused_as_listed(name: str, overrides: str, message: str) -> None:
    content = json.loads((ROOT / "tests" / "configs" / f"{name}.json").read_text())
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ModelConfig.from_pretrained(content, json.loads(overrides))


@pytest.mark.parametrize(("name", "overrides", "message"), WARNED, ids=[row[1][:60] for row in WARNED])
def test_a_listed_configuration_gives_the_listed_warning(name: str, overrides: str, message: str) -> None:
    config = ModelConfig.from_pretrained(ROOT / "tests" / "configs" / f"{name}.json", json.loads(overrides))
    assert config.warnings == (message,)


@pytest.mark.parametrize(("text", "message"), NO_JSON)
def test_a_listed_file_is_refused_as_listed(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parse_json_object(text, "config.json", ConfigError)


@pytest.mark.parametrize(("command", "output"), EXAMPLES, ids=[command[:60] for command, _ in EXAMPLES])
def test_an_example_prints_what_the_page_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, output: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", WIDTH)
    cli.main(shlex.split(command)[1:])
    captured = capsys.readouterr()
    printed = [line.rstrip() for line in (captured.out + captured.err).rstrip().splitlines()]
    assert printed == [line.removeprefix("    ").rstrip() for line in output.rstrip().splitlines()]


def test_the_model_table_is_what_the_reader_makes() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `(\w+)`, .* \| (yes|no) \|$", PAGE, re.MULTILINE)
    listed = {name: (cls, runs) for names, cls, runs in rows for name in re.findall(r"\w+", names)}
    classes = {"mla": MlaConfig, "dsa": DsaConfig, "compressed": CompressedConfig}
    assert listed == {
        model.architecture: (
            classes[model.family].__name__,
            "no" if classes[model.family].generation_obstacle else "yes",
        )
        for model in MODELS
    }
