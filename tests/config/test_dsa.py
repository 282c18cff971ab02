"""DeepSeek-V3.2 and GLM: the published files as they are published, and the spellings of one content."""

from __future__ import annotations

import logging
import math
from dataclasses import fields
from typing import Any

import pytest

from fastdeploy_dsa.config import DsaConfig, ModelConfig, RopeConfig
from fastdeploy_dsa.index_schedule import freq_letters
from tests.kit.config_contents import CONFIGS, DSA_COLUMNS, FP8, PLAIN_ROPE, SMALL, YARN, small, without

# The rows of the published models' table; columns as in DSA_COLUMNS.
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


@pytest.mark.parametrize("column", range(3), ids=DSA_COLUMNS)
@pytest.mark.parametrize("field", TABLE)
def test_shipped_configs_read_as_published(field: str, column: int) -> None:
    config = ModelConfig.from_pretrained(CONFIGS / DSA_COLUMNS[column])
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
