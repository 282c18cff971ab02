"""ModelConfig: the shipped files, their dialects, overrides, and what each malformed value is told."""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdeploy_dsa.config import ConfigError, DsaConfig, ModelConfig, RopeConfig, UnsupportedConfigError
from fastdeploy_dsa.index_schedule import IndexScheduleError, freq_letters
from fastdeploy_dsa.softmax_scale import SoftmaxScaleError

CONFIGS = Path(__file__).parent / "configs"
MODEL_TYPES = "deepseek_v2 or deepseek_v3 or deepseek_v32 or glm_moe_dsa or deepseek_v4"
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

SMALL: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 128,
    "index_head_dim": 128,
    "index_n_heads": 8,
    "index_topk": 20,
    "intermediate_size": 96,
    "kv_lora_rank": 512,
    "layer_types": ["indexed_attention"] * 4,
    "max_position_embeddings": 2560,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 24,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "pad_token_id": None,
    "q_lora_rank": 64,
    "qk_head_dim": 192,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rope_type": "yarn",
    },
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "v_head_dim": 32,
    "vocab_size": 256,
}
YARN: dict[str, Any] = SMALL["rope_parameters"]
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def small(**changes: Any) -> dict[str, Any]:
    return {**SMALL, **changes}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def shipped(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CONFIGS / name).read_text())
    return content


# The rows of the published models' table; columns as in COLUMNS.
COLUMNS = ("deepseek_v32.json", "glm_5.json", "glm_52.json")
TABLE: dict[str, tuple[Any, Any, Any]] = {
    "architecture": ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM", "GlmMoeDsaForCausalLM"),
    "model_type": ("deepseek_v32", "glm_moe_dsa", "glm_moe_dsa"),
    "hidden_size": (7168, 6144, 6144),
    "num_hidden_layers": (61, 78, 78),
    "num_attention_heads": (128, 64, 64),
    "q_lora_rank": (1536, 2048, 2048),
    "kv_lora_rank": (512, 512, 512),
    "qk_nope_head_dim": (128, 192, 192),
    "qk_rope_head_dim": (64, 64, 64),
    "v_head_dim": (128, 256, 256),
    "qk_head_dim": (192, 256, 256),
    "index_n_heads": (64, 32, 32),
    "index_head_dim": (128, 128, 128),
    "index_topk": (2048, 2048, 2048),
    "indexer_rope_interleave": (False, True, True),
    "rope": (
        RopeConfig("yarn", 10000.0, 40.0, 4096, 32.0, 1.0, 1.0),
        RopeConfig("default", 1e6, 1.0, 202752, 32.0, 1.0, 1.0),
        RopeConfig("default", 8e6, 1.0, 1048576, 32.0, 1.0, 1.0),
    ),
    "max_position_embeddings": (163840, 202752, 1048576),
    "rms_norm_eps": (1e-6, 1e-5, 1e-5),
    "n_routed_experts": (256, 256, 256),
    "num_experts_per_tok": (8, 8, 8),
    "n_shared_experts": (1, 1, 1),
    "n_group": (8, 1, 1),
    "topk_group": (4, 1, 1),
    "routed_scaling_factor": (2.5, 2.5, 2.5),
    "intermediate_size": (18432, 12288, 12288),
    "moe_intermediate_size": (2048, 2048, 2048),
    "vocab_size": (129280, 154880, 154880),
    "num_nextn_predict_layers": (1, 1, 1),
    "index_share_for_mtp_iteration": (False, False, True),
    "softmax_scale": (0.1352337788608801, 0.0625, 0.0625),
    "mlp_layer_types": (("dense",) * 3 + ("sparse",) * 58, *[("dense",) * 3 + ("sparse",) * 75] * 2),
    "mtp_mlp_type": ("sparse", "sparse", "sparse"),
    "weight_block_size": ((128, 128), None, None),
    "dtype": ("bfloat16", "bfloat16", "bfloat16"),
    "bos_token_id": (0, None, None),
    "eos_token_ids": ((1,), (154820, 154827, 154829), (154820, 154827, 154829)),
    "hidden_act": ("silu", "silu", "silu"),
    "attention_bias": (False, False, False),
    "tie_word_embeddings": (False, False, False),
    "norm_topk_prob": (True, True, True),
    "warnings": ((), (), ()),
}


@pytest.mark.parametrize("column", range(3), ids=COLUMNS)
@pytest.mark.parametrize("field", TABLE)
def test_shipped_configs_read_as_published(field: str, column: int) -> None:
    config = ModelConfig.from_pretrained(CONFIGS / COLUMNS[column])
    assert getattr(config, field) == TABLE[field][column]


def test_the_table_covers_every_field() -> None:
    assert {field.name for field in fields(DsaConfig)} - set(TABLE) == {"index_schedule", "scale"}


@pytest.mark.parametrize(
    ("file_name", "overrides", "letters"),
    [
        ("deepseek_v32.json", {}, "F" * 61),
        ("glm_5.json", {}, "F" * 78),
        ("glm_52.json", {}, "FFF" + "SSSF" * 18 + "SSS"),
        ("deepseek_v32.json", {"index_topk_freq": 4}, "F" + "FSSS" * 15),
        ("deepseek_v32.json", {"index_topk_freq": 2}, "F" + "FS" * 30),
        ("glm_52.json", {"use_index_cache": False}, "F" * 78),
        ("glm_52.json", {"indexer_types": None}, freq_letters(78, 4, 3)),
        ("glm_52.json", {"indexer_types": None, "index_topk_freq": None}, "F" * 78),
    ],
)
def test_schedules_of_shipped_configs(file_name: str, overrides: dict[str, Any], letters: str) -> None:
    config = ModelConfig.from_pretrained(CONFIGS / file_name, overrides)
    assert config.index_schedule.letters == letters


@pytest.mark.parametrize(
    ("rope_keys", "expected"),
    [
        ({"rope_parameters": PLAIN_ROPE}, RopeConfig("default", 1e4, 1.0, 2560, 32.0, 1.0, 1.0)),
        ({"rope_theta": 500}, RopeConfig("default", 500.0, 1.0, 2560, 32.0, 1.0, 1.0)),
        ({"rope_theta": 500, "rope_scaling": {}}, RopeConfig("default", 500.0, 1.0, 2560, 32.0, 1.0, 1.0)),
        ({"rope_parameters": YARN}, RopeConfig("yarn", 1e4, 40.0, 64, 32.0, 1.0, 1.0)),
        (
            {"rope_theta": 10000, "rope_scaling": {**without(YARN, "rope_type", "rope_theta"), "type": "yarn"}},
            RopeConfig("yarn", 1e4, 40.0, 64, 32.0, 1.0, 1.0),
        ),
        (
            {"rope_parameters": {**YARN, "rope_type": "deepseek_yarn"}},
            RopeConfig("yarn", 1e4, 40.0, 64, 32.0, 1.0, 1.0),
        ),
        (
            {"rope_parameters": without(YARN, "beta_fast", "beta_slow", "mscale", "mscale_all_dim")},
            RopeConfig("yarn", 1e4, 40.0, 64, 32.0, 1.0, 0.1 * math.log(40) + 1),
        ),
        (
            {"rope_parameters": {**YARN, "mscale": 0.707}},
            RopeConfig("yarn", 1e4, 40.0, 64, 32.0, 1.0, (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)),
        ),
        ({"rope_parameters": {**YARN, "attention_factor": 0.5}}, RopeConfig("yarn", 1e4, 40.0, 64, 32.0, 1.0, 0.5)),
        (
            {"rope_parameters": {**YARN, "beta_fast": 16, "beta_slow": 2}},
            RopeConfig("yarn", 1e4, 40, 64, 16.0, 2.0, 1.0),
        ),
        (
            {"rope_parameters": YARN, "rope_scaling": {"type": "linear"}},
            RopeConfig("yarn", 1e4, 40, 64, 32.0, 1.0, 1.0),
        ),
    ],
)
def test_rope_dialects(rope_keys: dict[str, Any], expected: RopeConfig) -> None:
    config = ModelConfig.from_pretrained({**without(SMALL, "rope_parameters"), **rope_keys})
    assert config.rope == expected


def test_nested_theta_wins_over_another_one_outside_with_a_warning() -> None:
    config = ModelConfig.from_pretrained(small(rope_theta=500.0))
    assert config.rope.theta == 1e4
    assert config.warnings == ("rope_theta: 500.0 at the top level is ignored, the rope settings say 10000",)


def test_warnings_of_schedule_scale_and_rope_are_kept_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    rope = without(YARN, "rope_type")
    with caplog.at_level(logging.INFO, logger="fastdeploy_dsa"):
        config = ModelConfig.from_pretrained(small(use_index_cache=True, rope_parameters=rope, rope_theta=500.0))
    assert [warning[:2] for warning in config.warnings] == ["W4", "W1", "ro"]
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [f"config: {warning}" for warning in config.warnings]
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert told[0] == "index schedule: 4 full and 0 shared layers from default: FFFF"
    assert told[1].startswith("softmax scale: 0.1352337788608801 from width 192")


@pytest.mark.parametrize("name", COLUMNS)
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
    ("changes", "mlp_layer_types"),
    [
        ({"mlp_layer_types": None}, ("dense", "sparse", "sparse", "sparse")),
        ({"mlp_layer_types": None, "first_k_dense_replace": 0}, ("sparse",) * 4),
        ({"mlp_layer_types": None, "first_k_dense_replace": 9}, ("dense",) * 4),
        (
            {"first_k_dense_replace": None, "mlp_layer_types": ["sparse", "dense", "sparse", "dense"]},
            ("sparse", "dense", "sparse", "dense"),
        ),
    ],
)
def test_kinds_of_feed_forward_layers(changes: dict[str, Any], mlp_layer_types: tuple[str, ...]) -> None:
    assert ModelConfig.from_pretrained(small(**changes)).mlp_layer_types == mlp_layer_types


@pytest.mark.parametrize("experts", [{"n_routed_experts": None}, {"n_routed_experts": 0}])
def test_a_model_without_experts_needs_no_expert_keys(experts: dict[str, Any]) -> None:
    moe_keys = [key for key in SMALL if "expert" in key or "group" in key or key.startswith(("moe", "routed", "mlp"))]
    config = ModelConfig.from_pretrained({**without(SMALL, *moe_keys), **experts})
    assert config.mlp_layer_types == ("dense",) * 4
    assert config.mtp_mlp_type == "dense"
    assert (config.n_routed_experts, config.n_group, config.num_experts_per_tok) == (0, 0, 0)


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
    ("config", "message"),
    [
        (
            small(architectures=["LlamaForCausalLM"]),
            "architectures: expected DeepseekV2ForCausalLM or DeepseekV3ForCausalLM or DeepseekV32ForCausalLM or "
            "GlmMoeDsaForCausalLM or DeepseekV4ForCausalLM, got 'LlamaForCausalLM'",
        ),
        (
            {**without(SMALL, "architectures"), "model_type": "llama"},
            f"model_type: expected {MODEL_TYPES}, got 'llama'",
        ),
        ({}, f"model_type: expected {MODEL_TYPES}, got None"),
        *[
            (small(**{key: value}), f"{key}: this kind of sparse attention is not supported, got {value!r}")
            for key, value in {
                "index_kpool": 2,
                "index_kpool_always_select_tail": True,
                "index_kpool_compress": "mean",
                "index_init_tokens": 4,
                "index_local_tokens": 64,
                "cli_factor": 2,
                "candidate_source_layer_id": 0,
                "kv_source_layer_ids": [2, 8],
                "index_source_layer_ids": [2],
            }.items()
        ],
        (small(hidden_act="gelu"), "hidden_act: only 'silu' is supported, got 'gelu'"),
        (small(attention_bias=True), "attention_bias: only False is supported, got True"),
        (small(attention_bias=0), "attention_bias: only False is supported, got 0"),
        (small(mlp_bias=True), "mlp_bias: only False is supported, got True"),
        (small(rope_interleave=False), "rope_interleave: only True is supported, got False"),
        (small(moe_layer_freq=2), "moe_layer_freq: only 1 is supported, got 2"),
        (small(scoring_func="softmax"), "scoring_func: only 'sigmoid' is supported, got 'softmax'"),
        (small(topk_method="greedy"), "topk_method: only 'noaux_tc' is supported, got 'greedy'"),
        (small(compression_config={"a": 1}), "compression_config: only None is supported, got {'a': 1}"),
        (
            small(rope_parameters={**YARN, "rope_type": "deepseek_llama_scaling"}),
            "rope settings: rope type 'deepseek_llama_scaling' is not supported",
        ),
        (
            small(rope_parameters={**YARN, "truncate": False}),
            "rope settings: truncate: only True is supported, got False",
        ),
        (
            small(quantization_config={**FP8, "quant_method": "awq"}),
            "quantization_config.quant_method: only 'fp8' is supported, got 'awq'",
        ),
        (
            small(quantization_config={**FP8, "activation_scheme": "static"}),
            "quantization_config.activation_scheme: only 'dynamic' is supported, got 'static'",
        ),
        (
            small(quantization_config={**FP8, "fmt": "e5m2"}),
            "quantization_config.fmt: only 'e4m3' is supported, got 'e5m2'",
        ),
        (
            small(quantization_config={**FP8, "group_size": 64}),
            "quantization_config.group_size: not supported, got 64",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfigError, match=re.escape(message)) as caught:
        ModelConfig.from_pretrained(config)
    assert isinstance(caught.value, NotImplementedError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "changes",
    [
        {"index_kpool": 1, "cli_factor": 1, "index_init_tokens": 0, "index_local_tokens": 0},
        {"index_kpool_always_select_tail": False, "index_kpool_compress": None, "candidate_source_layer_id": None},
        {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_interleave": True},
        {"quantization_config": None},
    ],
)
def test_values_that_ask_for_nothing_are_accepted(changes: dict[str, Any]) -> None:
    assert ModelConfig.from_pretrained(small(**changes)) == ModelConfig.from_pretrained(SMALL)


def test_quantization_keys_without_effect_on_the_weights_are_ignored() -> None:
    quantization = {**FP8, "weight_block_size": [64, 32], "modules_to_not_convert": ["lm_head"]}
    quantization |= {"scale_fmt": "ue8m0", "fmt": "e4m3", "activation_scheme": "dynamic", "dequantize": False}
    assert ModelConfig.from_pretrained(small(quantization_config=quantization)).weight_block_size == (64, 32)


REQUIRED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("moe_intermediate_size", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group"),
    *("routed_scaling_factor", "q_lora_rank", "kv_lora_rank", "v_head_dim", "index_n_heads", "index_head_dim"),
    *("index_topk", "rms_norm_eps", "max_position_embeddings"),
)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: missing$"):
        ModelConfig.from_pretrained(without(SMALL, key))


@pytest.mark.parametrize("value", [-1, 0, 1.0, 1.5, "1", True, [1], {}, math.nan, 1 << 40, 10**300])
@pytest.mark.parametrize("key", [key for key in REQUIRED if key not in ("routed_scaling_factor", "rms_norm_eps")])
def test_a_size_is_a_positive_int_within_reason(key: str, value: object) -> None:
    if key == "n_shared_experts" and value == 0 and value is not False:
        assert ModelConfig.from_pretrained(small(n_shared_experts=0)).n_shared_experts == 0
        return
    with pytest.raises(ConfigError, match=rf"^{key}: expected an int from [01] to \d+, got ") as caught:
        ModelConfig.from_pretrained({**SMALL, key: value})
    assert str(caught.value).endswith(repr(value)[:77] + ("..." if len(repr(value)) > 80 else ""))


@pytest.mark.parametrize("value", [-1.0, 0, "1", True, [1], math.nan, math.inf, 10**400])
@pytest.mark.parametrize("key", ["routed_scaling_factor", "rms_norm_eps"])
def test_a_factor_is_a_positive_finite_number(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: expected a finite number > 0, got "):
        ModelConfig.from_pretrained({**SMALL, key: value})


@pytest.mark.parametrize("value", [0, 1, "true", [], 1.0])
@pytest.mark.parametrize(
    "key", ["norm_topk_prob", "tie_word_embeddings", "indexer_rope_interleave", "index_share_for_mtp_iteration"]
)
def test_a_flag_is_true_or_false(key: str, value: object) -> None:
    message = f"{key}: expected true or false, got {value!r}"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        ModelConfig.from_pretrained({**SMALL, key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": "DeepseekV32ForCausalLM"}, "architectures: expected a list of one name, got 'Deepseek"),
        ({"architectures": ["A", "B"]}, "architectures: expected a list of one name, got ['A', 'B']"),
        ({"model_type": 3}, "model_type: expected a string, got 3"),
        (
            {"model_type": "glm_moe_dsa"},
            "model_type: expected 'deepseek_v32' beside architecture DeepseekV32ForCausalLM, got 'glm_moe_dsa'",
        ),
        ({"text_config": "text"}, "text_config: expected an object, got 'text'"),
        ({"text_config": {"text_config": {}}}, "text_config: expected at the top level only"),
        ({"qk_rope_head_dim": 63, "qk_head_dim": None}, "qk_rope_head_dim: expected an even int, got 63"),
        (
            {"qk_rope_head_dim": 130, "qk_head_dim": None},
            "qk_rope_head_dim: expected at most index_head_dim 128, got 130",
        ),
        ({"qk_head_dim": 128}, "qk_head_dim: expected qk_nope_head_dim + qk_rope_head_dim = 192, got 128"),
        ({"qk_nope_head_dim": 0}, "qk_nope_head_dim: expected an int from 1 to 1048576, got 0"),
        ({"n_group": 3}, "n_routed_experts: expected a multiple of n_group 3, got 8"),
        ({"n_group": 8}, "n_group: expected at least two experts per group, got 8 groups of 8 experts"),
        ({"topk_group": 5}, "topk_group: expected at most n_group 4, got 5"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: expected at most the experts in the kept groups 4, got 5"),
        ({"n_routed_experts": -8}, "n_routed_experts: expected an int from 0 to 65536, got -8"),
        ({"n_routed_experts": None}, "mlp_layer_types: layer 1 is sparse, but n_routed_experts is absent"),
        ({"mlp_layer_types": "dense"}, "mlp_layer_types: expected a list, got 'dense'"),
        (
            {"mlp_layer_types": ["dense", "moe", "sparse", "sparse"]},
            "mlp_layer_types: position 1: expected 'dense' or 'sparse', got 'moe'",
        ),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types: expected 4 entries, one per layer, got 1"),
        (
            {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]},
            "mlp_layer_types, first_k_dense_replace: layer 1 is dense in the list"
            " and sparse with first_k_dense_replace 1",
        ),
        (
            {"mlp_layer_types": None, "first_k_dense_replace": None},
            "first_k_dense_replace, mlp_layer_types: both missing, but the model has experts",
        ),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace: expected an int from 0 to 4096, got -1"),
        (
            {"layer_types": ["indexed_attention", "sliding_attention"] * 2},
            "layer_types: position 1: expected 'indexed_attention' or 'deepseek_sparse_attention',"
            " got 'sliding_attention'",
        ),
        ({"layer_types": ["indexed_attention"] * 3}, "layer_types: expected 4 entries, one per layer, got 3"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers: expected an int from 0 to 4096, got -1"),
        ({"bos_token_id": -1}, "bos_token_id: expected an int from 0 to 16777216, got -1"),
        ({"bos_token_id": 256}, "bos_token_id: expected less than vocab_size 256, got 256"),
        ({"eos_token_id": [1, 256]}, "eos_token_id: expected less than vocab_size 256, got 256"),
        ({"eos_token_id": [1, -1]}, "eos_token_id: expected an int >= 0 or a list of them, got [1, -1]"),
        ({"eos_token_id": "1"}, "eos_token_id: expected an int >= 0 or a list of them, got '1'"),
        ({"dtype": "int8"}, "dtype: expected bfloat16 or float16 or float32, got 'int8'"),
        ({"torch_dtype": "float32"}, "dtype: bfloat16, but torch_dtype: float32"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta: missing"),
        (
            {"rope_parameters": {**PLAIN_ROPE, "rope_theta": 1}},
            "rope settings: rope_theta: expected a finite number > 1",
        ),
        (
            {"rope_parameters": {**PLAIN_ROPE, "rope_theta": "1e4"}},
            "rope settings: rope_theta: expected a finite number",
        ),
        ({"rope_parameters": without(YARN, "factor")}, "rope settings: factor: missing"),
        (
            {"rope_parameters": without(YARN, "original_max_position_embeddings")},
            "rope settings: original_max_position_embeddings: missing",
        ),
        (
            {"rope_parameters": {**YARN, "beta_slow": 0}},
            "rope settings: beta_slow: expected a finite number > 0, got 0",
        ),
        (
            {"rope_parameters": {**YARN, "beta_fast": 1}},
            "rope settings: beta_fast: expected a finite number > 1, got 1",
        ),
        ({"rope_parameters": {**YARN, "mscale": "1"}}, "rope settings: mscale: expected a finite number > 0, got '1'"),
        (
            {"rope_parameters": {**YARN, "attention_factor": -1}},
            "rope settings: attention_factor: expected a finite number > 0, got -1",
        ),
        ({"quantization_config": "fp8"}, "quantization_config: expected an object, got 'fp8'"),
        ({"quantization_config": {}}, "quantization_config.quant_method: missing"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.weight_block_size: missing"),
        *[
            (
                {"quantization_config": {**FP8, "weight_block_size": size}},
                f"quantization_config.weight_block_size: expected two ints from 1 to 1048576, got {size!r}",
            )
            for size in (128, [128], [128, 0], [128, True], [128.0, 128], "ab")
        ],
    ],
)
def test_a_malformed_or_contradicting_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        ModelConfig.from_pretrained({**SMALL, **changes})


def test_schedule_and_scale_errors_keep_their_codes() -> None:
    with pytest.raises(IndexScheduleError, match=r"^E06: index_topk_freq"):
        ModelConfig.from_pretrained(SMALL, {"index_topk_freq": 0})
    with pytest.raises(SoftmaxScaleError, match=r"^E4: rope type 'linear'"):
        ModelConfig.from_pretrained(SMALL, {"rope_parameters": {**YARN, "rope_type": "linear"}})


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


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "fp8", "yarn", "dense"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*SMALL, *YARN, *FP8]), inner, max_size=3)
    ),
    max_leaves=6,
)


@UNHURRIED
@given(
    changes=st.dictionaries(
        st.sampled_from([*SMALL, "rope_scaling", "rope_theta", "quantization_config", "text_config", "torch_dtype"]),
        VALUES,
        min_size=1,
        max_size=3,
    )
)
def test_any_values_give_a_config_or_one_of_its_errors(changes: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_pretrained({**SMALL, **changes})
    except (ConfigError, IndexScheduleError, SoftmaxScaleError) as error:
        assert str(error)  # noqa: PT017 - raising is one of two right answers
    else:
        assert len(config.mlp_layer_types) == len(config.index_schedule.letters) == config.num_hidden_layers
        assert math.isfinite(config.softmax_scale)
        assert math.isfinite(config.rope.table_multiplier)


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
