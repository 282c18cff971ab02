"""Patterns carry the model they were searched for: another model is a warning, or an error where that is asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastdeploy_dsa.config import ModelConfig
from fastdeploy_dsa.index_pattern import PUBLISHED_PATTERNS, model_fingerprint, pattern_of_artefact
from fastdeploy_dsa.index_schedule import IndexScheduleError

CONFIGS = Path(__file__).parent / "configs"
GLM_5 = CONFIGS / "glm_5.json"
V32 = CONFIGS / "deepseek_v32.json"
V4 = CONFIGS / "deepseek_v4_flash.json"
OF_GLM_5 = [published for published in PUBLISHED_PATTERNS if published.model == "GLM-5"]


def fingerprint(path: Path, **overrides: Any) -> str:
    return model_fingerprint(ModelConfig.from_pretrained(path, overrides))


def warnings(path: Path, pattern: object, **overrides: Any) -> tuple[str, ...]:
    return ModelConfig.from_pretrained(path, {"index_topk_pattern": pattern, **overrides}).warnings


def test_the_published_patterns_name_the_config_they_fit() -> None:
    assert {published.fingerprint for published in OF_GLM_5} == {fingerprint(GLM_5)}
    assert [len(published.letters) for published in PUBLISHED_PATTERNS] == [78, 78, 47, 47, 47]
    assert [published.letters.count("F") for published in PUBLISHED_PATTERNS] == [40, 22, 24, 12, 7]


@pytest.mark.parametrize("published", OF_GLM_5, ids=lambda published: published.share)
def test_a_published_pattern_on_its_own_model_is_no_warning(published: Any) -> None:
    config = ModelConfig.from_pretrained(GLM_5, {"index_topk_pattern": published.letters, "strict_pattern": True})
    assert (config.warnings, config.index_schedule.letters) == ((), published.letters)


def test_the_example_of_public_documentation_is_told_to_be_of_another_model() -> None:
    letters = OF_GLM_5[0].letters[:61]
    expected = (
        "index_topk_pattern is the first 61 letters of the published 1/2 pattern of GLM-5, "
        "searched for another model than DeepseekV32ForCausalLM"
    )
    assert warnings(V32, letters) == (f"W3: {expected}",)
    with pytest.raises(IndexScheduleError, match=f"^{re.escape(f'E14: {expected}')}$") as caught:
        warnings(V32, letters, strict_pattern=True)
    assert caught.value.code == "E14"


def test_a_published_pattern_on_a_model_of_the_same_length_is_told() -> None:
    (warning,) = warnings(CONFIGS / "glm_52.json", OF_GLM_5[1].letters, indexer_types=None, index_topk_freq=None)
    assert warning.startswith("W3: index_topk_pattern is the published 1/4 pattern of GLM-5, searched for another")


def test_a_short_pattern_may_equal_the_beginning_of_a_published_one() -> None:
    letters = OF_GLM_5[0].letters[:5]
    overrides = {"num_hidden_layers": 5, "index_topk_pattern": letters, "strict_pattern": True}
    assert ModelConfig.from_pretrained(V32, overrides).warnings == ()


def test_a_pattern_of_ones_own_is_no_warning() -> None:
    assert warnings(V32, "FS" * 30 + "F", strict_pattern=True) == ()


@pytest.mark.parametrize("path", [V32, GLM_5, V4], ids=lambda path: path.stem)
def test_a_pattern_with_its_models_fingerprint_is_no_warning(path: Path) -> None:
    num_letters = len(ModelConfig.from_pretrained(path).index_schedule.letters)
    pattern = {"pattern": "F" + "S" * (num_letters - 1), "model": {"name": "x", "fingerprint": fingerprint(path)}}
    config = ModelConfig.from_pretrained(path, {"index_topk_pattern": pattern, "strict_pattern": True})
    assert (config.warnings, config.index_schedule.letters) == ((), pattern["pattern"])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            {"name": "GLM-5", "fingerprint": "ab" * 32},
            "index_topk_pattern was searched for another model, 'GLM-5': expected fingerprint @, got abababababab",
        ),
        ({"name": "GLM-5"}, "index_topk_pattern: expected its model's fingerprint, got None"),
        (None, "index_topk_pattern: expected its model's fingerprint, got None"),
        ({"fingerprint": 7}, "index_topk_pattern: expected its model's fingerprint, got 7"),
    ],
)
def test_a_pattern_of_another_or_an_unknown_model_is_told(model: object, expected: str) -> None:
    pattern = {"pattern": "F" * 61, "model": model}
    expected = expected.replace("@", fingerprint(V32)[:12])
    assert warnings(V32, pattern) == (f"W3: {expected}",)
    with pytest.raises(IndexScheduleError, match=f"^{re.escape(f'E14: {expected}')}$"):
        warnings(V32, pattern, strict_pattern=True)


def test_a_pattern_that_is_not_in_use_is_not_doubted() -> None:
    doubtful = {"pattern": "F" * 61}
    assert warnings(V32, doubtful, use_index_cache=False, strict_pattern=True) == (
        "W7: use_index_cache is false: every layer is full, the schedule keys are ignored",
    )
    assert warnings(V32, doubtful, indexer_types=["full"] * 61, strict_pattern=True) == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"index_topk": 1024},
        {"num_attention_heads": 64},
        {"v_head_dim": 256},
        {"rope_theta": 20000},
        {"indexer_rope_interleave": True},
        {"rope_scaling": None},
    ],
)
def test_the_fingerprint_sees_what_the_selection_depends_on(changes: dict[str, Any]) -> None:
    assert fingerprint(V32, **changes) != fingerprint(V32)


def test_the_fingerprint_does_not_depend_on_the_spelling() -> None:
    content = json.loads(V32.read_text())
    rope = content["rope_scaling"]
    respelled = {**content, "rope_scaling": None, "rope_theta": None}
    respelled["rope_parameters"] = {**rope, "rope_type": rope["type"], "rope_theta": 10000.0, "type": None}
    assert model_fingerprint(ModelConfig.from_pretrained({"text_config": respelled})) == fingerprint(V32)
    assert fingerprint(V32, index_topk_freq=4, vocab_size=129281, index_topk_pattern=None) == fingerprint(V32)


def test_the_fingerprint_includes_a_known_revision_of_the_weights() -> None:
    config = ModelConfig.from_pretrained(V32)
    prints = {model_fingerprint(config, revision) for revision in (None, "a", "b")}
    assert len(prints) == 3


ARTEFACT: dict[str, Any] = {
    "format": "dsa-index-pattern/1",
    "model": {"name": "GLM-5", "fingerprint": "00"},
    "patterns": {"2": "FSF", "1": "FSS"},
}


def test_an_artefact_gives_a_pattern_with_its_model(tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(ARTEFACT))
    assert pattern_of_artefact(path, 1) == {"pattern": "FSS", "model": {"name": "GLM-5", "fingerprint": "00"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "dsa-index-pattern/2"}, "format: expected 'dsa-index-pattern/1', got 'dsa-index-pattern/2'"),
        ({"format": None}, "format: expected 'dsa-index-pattern/1', got None"),
        ({"model": "GLM-5"}, "model: expected an object, got 'GLM-5'"),
        ({"patterns": ["FSS"]}, "patterns: expected an object, got ['FSS']"),
        ({"patterns": {"2": "FSF"}}, "patterns: expected one of 1 full layers, got ['2']"),
        ({"patterns": {"1": 3}}, "patterns: expected one of 1 full layers, got ['1']"),
    ],
)
def test_a_file_that_is_no_artefact_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(ARTEFACT | changes))
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}$"):
        pattern_of_artefact(path, 1)
