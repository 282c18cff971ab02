"""Where a config comes from: files, wrappers, overrides and what is wrong with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastdeploy_dsa.config import ConfigError, ModelConfig
from tests.kit.config_contents import DSA_COLUMNS, SMALL, shipped, small, without


@pytest.mark.parametrize("name", DSA_COLUMNS)
def test_a_wrapper_reads_as_the_text_config_in_it(name: str) -> None:
    plain = shipped(name)
    wrapper = {"architectures": ["SomeVisionModel"], "model_type": "vision", "hidden_size": 5, "text_config": plain}
    assert ModelConfig.from_pretrained(wrapper) == ModelConfig.from_pretrained(plain)


def test_a_wrapper_may_hold_what_concerns_the_whole_checkpoint() -> None:
    moved = ("architectures", "model_type", "quantization_config", "torch_dtype", "bos_token_id", "eos_token_id")
    plain = shipped("deepseek_v32.json")
    wrapper = {key: plain[key] for key in moved} | {"text_config": without(plain, *moved)}
    assert ModelConfig.from_pretrained(wrapper) == ModelConfig.from_pretrained(plain)


def test_the_text_config_wins_over_the_wrapper() -> None:
    wrapper = {"eos_token_id": 5, "bos_token_id": 6, "dtype": "float16", "tie_word_embeddings": True}
    assert ModelConfig.from_pretrained({**wrapper, "text_config": SMALL}) == ModelConfig.from_pretrained(SMALL)


def test_overrides_reach_the_text_config() -> None:
    wrapper = {"text_config": shipped("glm_52.json")}
    config = ModelConfig.from_pretrained(wrapper, {"indexer_types": ["full"] * 78, "index_topk": 512})
    assert (config.index_schedule.letters, config.index_topk) == ("F" * 78, 512)


def test_null_is_absent() -> None:
    nulls = dict.fromkeys(["index_topk_pattern", "num_nextn_predict_layers", "quantization_config", "text_config"])
    assert ModelConfig.from_pretrained(small(**nulls)) == ModelConfig.from_pretrained(SMALL)


def test_an_override_of_null_removes_a_key() -> None:
    config = ModelConfig.from_pretrained(small(index_topk_freq=2), {"index_topk_freq": None, "bos_token_id": None})
    assert config.index_schedule.letters == "FFFF"
    assert config.bos_token_id is None


def test_the_content_is_left_alone() -> None:
    content = json.loads(json.dumps(SMALL))
    ModelConfig.from_pretrained(content, {"index_topk": 5})
    assert content == SMALL


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("index_topk_frq", "index_topk_freq"),
        ("num_hiden_layers", "num_hidden_layers"),
        ("eos_token_ids", "eos_token_id"),
        ("rope_type", "rope_theta"),
        ("Hidden_Size", "hidden_size"),
    ],
)
def test_an_unknown_override_is_told_the_nearest_key(key: str, nearest: str) -> None:
    message = f"overrides: unknown key {key!r}, the nearest known one is {nearest!r}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        ModelConfig.from_pretrained(SMALL, {key: 1})


def test_bookkeeping_keys_of_a_file_are_ignored() -> None:
    extra = {"transformers_version": "5.0", "use_cache": True, "auto_map": {}, "ep_size": 1, "pretraining_tp": 1}
    assert ModelConfig.from_pretrained(small(**extra)) == ModelConfig.from_pretrained(SMALL)


@pytest.mark.parametrize(
    ("eos", "generation", "expected"),
    [
        (1, {"eos_token_id": [2, 1, 7]}, (1, 2, 7)),
        ([5, 5, 1], {"eos_token_id": 3}, (5, 1, 3)),
        (None, {"eos_token_id": 3}, (3,)),
        (1, {}, (1,)),
        (None, {"temperature": 1.0}, ()),
    ],
)
def test_generation_config_adds_end_tokens(
    tmp_path: Path, eos: object, generation: dict[str, Any], expected: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small(eos_token_id=eos)))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert ModelConfig.from_pretrained(tmp_path).eos_token_ids == expected
    assert ModelConfig.from_pretrained(str(tmp_path), {"eos_token_id": 9}).eos_token_ids == (9,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"hidden_size": 1, "hidden_size": 2}', "hidden_size: given twice, as 1 and 2"),
        ('{"rope_parameters": {"factor": 1, "factor": 1}}', "factor: given twice, as 1 and 1"),
        ('{"rms_norm_eps": NaN}', "NaN is not a number a config may hold"),
        ('{"rms_norm_eps": -Infinity}', "-Infinity is not a number a config may hold"),
        ('{"rms_norm_eps": 1e999}', "1e999 is not a number a config may hold"),
        ("[1]", "expected a JSON object, got list"),
        ("{", "Expecting property name enclosed in double quotes"),
        ("", "Expecting value"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        (b"\xff\xfe", "codec can't decode"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        ModelConfig.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, NaN]}')
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "generation_config.json"))):
        ModelConfig.from_pretrained(tmp_path)


def test_an_error_in_a_file_names_the_file_and_the_overrides(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    message = f"{tmp_path / 'config.json'} with overrides of index_topk, n_group: n_group: expected an int"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        ModelConfig.from_pretrained(tmp_path, {"index_topk": 3, "n_group": -1})


@pytest.mark.parametrize("missing", ["nowhere", "."])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        ModelConfig.from_pretrained(tmp_path / missing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "path_or_dict: expected a path or a mapping, got int"),
        ((SMALL, ["index_topk"]), "overrides: expected a mapping, got ['index_topk']"),
        ((SMALL, {3: 1}), "overrides: unknown key 3"),
        ((SMALL, {"text_config": {"index_topk": 1}}), "text_config: expected at the top level only"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        ModelConfig.from_pretrained(*arguments)


def nested(depth: int) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for _ in range(depth):
        content = {"factor": content}
    return content


def endless() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["factor"] = content
    return content


@pytest.mark.parametrize("key", ["index_topk", "rope_parameters", "indexer_types", "quantization_config", "use_cache"])
@pytest.mark.parametrize("value", [nested(65), nested(100_000), endless()], ids=["65", "100000", "endless"])
def test_bottomless_nesting_is_refused(key: str, value: object) -> None:
    message = "nested too deeply, expected at most 64 levels"
    with pytest.raises(ConfigError, match=f"^path_or_dict: {message}$"):
        ModelConfig.from_pretrained({**SMALL, key: value})
    with pytest.raises(ConfigError, match=f"^overrides: {message}$"):
        ModelConfig.from_pretrained(SMALL, {key: value})
