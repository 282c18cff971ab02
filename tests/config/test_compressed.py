"""DeepSeek-V4: kinds of layers, rotations and routers in every spelling, and what contradictions are told."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fastdeploy_dsa.config import CompressedConfig, ConfigError, ModelConfig, UnsupportedConfigError
from fastdeploy_dsa.index_schedule import IndexScheduleError
from tests.kit.config_contents import CONFIGS, shipped, small_v4


@pytest.mark.parametrize(
    ("name", "kinds", "first", "last"),
    [
        (
            "deepseek_v4_flash.json",
            {"swa": 2, "c4a": 21, "c128a": 20},
            {"c4a": 2, "c128a": 3},
            {"c4a": 42, "c128a": 41},
        ),
        ("deepseek_v4_pro.json", {"swa": 0, "c4a": 30, "c128a": 31}, {"c4a": 2, "c128a": 0}, {"c4a": 60, "c128a": 59}),
    ],
)
def test_kinds_of_compressed_layers(
    name: str, kinds: dict[str, int], first: dict[str, int], last: dict[str, int]
) -> None:
    config = ModelConfig.from_pretrained(CONFIGS / name)
    layers = {kind: [i for i in range(config.num_hidden_layers) if config.layer_kind(i) == kind] for kind in kinds}
    assert {kind: len(ids) for kind, ids in layers.items()} == kinds
    assert {kind: layers[kind][0] for kind in first} == first
    assert {kind: layers[kind][-1] for kind in last} == last
    assert config.layer_kind(config.num_hidden_layers) == "swa"  # the draft layer
    assert config.index_schedule.layer_ids == tuple(layers["c4a"])


@pytest.mark.parametrize(
    ("name", "freq", "full", "shared"),
    [
        ("deepseek_v4_flash.json", 2, 11, 10),
        ("deepseek_v4_flash.json", 4, 6, 15),
        ("deepseek_v4_pro.json", 4, 9, 21),
    ],
)
def test_the_frequency_counts_layers_with_an_indexer_only(name: str, freq: int, full: int, shared: int) -> None:
    schedule = ModelConfig.from_pretrained(CONFIGS / name, {"index_topk_freq": freq}).index_schedule
    assert (schedule.letters.count("F"), schedule.letters.count("S")) == (full, shared)


def test_full_layers_of_flash_with_frequency_4() -> None:
    schedule = ModelConfig.from_pretrained(CONFIGS / "deepseek_v4_flash.json", {"index_topk_freq": 4}).index_schedule
    assert schedule.full_layers == (2, 4, 12, 20, 28, 36)
    assert [schedule.source(layer) for layer in (2, 4, 6, 8, 10, 12, 42)] == [2, 4, 4, 4, 4, 12, 36]


@pytest.mark.parametrize("key", ["index_topk_pattern", "indexer_types"])
def test_a_list_over_all_layers_is_told_what_is_counted(key: str) -> None:
    value: Any = "F" * 43 if key == "index_topk_pattern" else ["full"] * 43
    code = "E05" if key == "index_topk_pattern" else "E03"
    message = (
        f"{code}: {key}: expected 21 entries, one per layer with an indexer (layer 2, 4, ..., 42), got 43, "
        "which is one per backbone layer"
    )
    with pytest.raises(IndexScheduleError, match=f"^{re.escape(message)}$"):
        ModelConfig.from_pretrained(CONFIGS / "deepseek_v4_flash.json", {key: value})


def test_a_pattern_over_the_layers_with_an_indexer_is_taken() -> None:
    config = ModelConfig.from_pretrained(CONFIGS / "deepseek_v4_flash.json", {"index_topk_pattern": "FS" * 10 + "F"})
    assert config.index_schedule.full_layers == tuple(range(2, 43, 4))


@pytest.mark.parametrize(
    "changes",
    [
        {"compress_ratios": [0, 128, 4, 128, 4, 0]},  # no entry for the draft layer
        {"compress_ratios": [0, 128, 4, 128, 4, 0, 0, 0, 0]},
        {
            "compress_ratios": None,
            "layer_types": [
                "sliding_attention",
                *["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
                "sliding_attention",
            ],
        },
        {
            "layer_types": [
                "sliding_attention",
                *["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
                *["sliding_attention"] * 3,
            ],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
            "compress_rate_csa": 4,
        },
    ],
)
def test_spellings_of_layer_kinds(changes: dict[str, Any]) -> None:
    assert ModelConfig.from_pretrained(small_v4(**changes)) == ModelConfig.from_pretrained(small_v4())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"factor": 16, "original_max_position_embeddings": 65536, "rope_type": "yarn"}},
        {
            "rope_theta": None,
            "compress_rope_theta": None,
            "rope_parameters": {
                "main": {"rope_type": "default", "rope_theta": 10000},
                "compress": {
                    "rope_type": "yarn",
                    "rope_theta": 160000,
                    "factor": 16,
                    "original_max_position_embeddings": 65536,
                    "attention_factor": 1.0,
                },
            },
        },
        {
            "rope_parameters": {
                "main": {"rope_type": "default"},
                "compress": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "mscale": 1.0},
            },
        },
    ],
    ids=["flat rope_parameters", "nested", "nested with thetas outside"],
)
def test_spellings_of_the_two_rotations(rope: dict[str, Any]) -> None:
    expected = ModelConfig.from_pretrained(small_v4())
    changed = small_v4(rope_scaling=None, **rope)
    assert ModelConfig.from_pretrained(changed) == expected


def test_a_nested_theta_wins_over_one_outside_with_a_warning() -> None:
    nested = {
        "main": {"rope_type": "default", "rope_theta": 5000},
        "compress": {"rope_type": "default", "rope_theta": 7000},
    }
    config = ModelConfig.from_pretrained(small_v4(rope_parameters=nested))
    assert isinstance(config, CompressedConfig)
    assert (config.main_rope.theta, config.compress_rope.theta) == (5000.0, 7000.0)
    assert config.warnings == (
        "rope_theta: 10000 at the top level is ignored, the rope settings say 5000",
        "compress_rope_theta: 160000 at the top level is ignored, the rope settings say 7000",
    )


@pytest.mark.parametrize("names", [{}, {"architectures": None}, {"architectures": None, "model_type": None}])
def test_a_compressed_model_is_told_by_what_it_holds(names: dict[str, Any]) -> None:
    assert isinstance(ModelConfig.from_pretrained(small_v4(**names)), CompressedConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"compress_ratios": None},
            "layer_types, compress_ratios: both missing, expected one entry per layer in either",
        ),
        (
            {"compress_ratios": [0, 128, 4]},
            "compress_ratios: expected at least 6 entries, one per backbone layer, got 3",
        ),
        (
            {"compress_ratios": [0, 128, 4, 128, 4, 0, 4]},
            "compress_ratios: position 6: expected 0 behind the 6 backbone layers, got 4",
        ),
        (
            {"compress_ratios": [0, 128, 8, 128, 4, 0]},
            "compress_ratios: position 2: expected 0 or 4 or 128, got 8",
        ),
        ({"compress_ratios": [0.0] * 6}, "compress_ratios: position 0: expected 0 or 4 or 128, got 0.0"),
        ({"compress_ratios": [False] * 6}, "compress_ratios: position 0: expected 0 or 4 or 128, got False"),
        ({"compress_ratios": "0"}, "compress_ratios: expected a list, got '0'"),
        (
            {"layer_types": ["sliding_attention"] * 6},
            "layer_types, compress_ratios: layer 1 is sliding_attention in the one and has ratio 128 in the other",
        ),
        (
            {"layer_types": ["sliding_attention"] * 5},
            "layer_types: expected at least 6 entries, one per backbone layer, got 5",
        ),
        ({"layer_types": ["full_attention"] * 6}, "layer_types: position 0: expected 'sliding_attention' or"),
        (
            {"compress_rates": {"compressed_sparse_attention": 8}},
            "compress_rates.compressed_sparse_attention: only 4 is",
        ),
        ({"compress_rates": {"sliding_attention": 1}}, "compress_rates: expected 'compressed_sparse_attention' or"),
        ({"compress_rates": [4]}, "compress_rates: expected an object, got [4]"),
        ({"compress_rate_hca": 64}, "compress_rate_hca: only 128 is supported, got 64"),
        ({"compress_rate_csa": 4.0}, "compress_rate_csa: only 4 is supported, got 4.0"),
        ({"o_groups": 7}, "num_attention_heads: expected a multiple of o_groups 7, got 64"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: only 1 is supported, got 8"),
        ({"qk_rope_head_dim": 128, "head_dim": 64}, "qk_rope_head_dim: expected at most head_dim 64, got 128"),
        ({"sliding_window": 0}, "sliding_window: expected an int from 1 to 2147483647, got 0"),
        ({"rope_scaling": {"main": {}, "factor": 2}}, "rope settings: compress: missing"),
        ({"rope_scaling": {"main": {}, "compress": 3}}, "rope settings: compress: expected an object, got 3"),
        (
            {
                "rope_parameters": {
                    "main": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 5},
                    "compress": {},
                }
            },
            "rope settings: main: only type 'default' is supported, got 'yarn'",
        ),
        ({"compress_rope_theta": None}, "compress_rope_theta: missing"),
        ({"compress_rope_theta": 1}, "compress_rope_theta: expected a finite number > 1, got 1"),
        ({"q_lora_rank": None}, "q_lora_rank: missing"),
        ({"num_hash_layers": None}, "mlp_layer_types, num_hash_layers: both missing, expected one of them"),
        (
            {"mlp_layer_types": ["hash_moe"] * 5},
            "mlp_layer_types: expected at least 6 entries, one per backbone layer, got 5",
        ),
        ({"mlp_layer_types": ["dense"] * 6}, "mlp_layer_types: position 0: expected 'hash_moe' or 'moe', got 'dense'"),
        (
            {"mlp_layer_types": ["hash_moe"] * 4 + ["moe"] * 2},
            "mlp_layer_types, num_hash_layers: layer 3 is hash_moe in the list, with num_hash_layers 3",
        ),
        ({"scoring_func": "sigmoid"}, "scoring_func: only 'sqrtsoftplus' is supported, got 'sigmoid'"),
        ({"n_group": 8}, "n_group: only 1 is supported, got 8"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok: expected at most n_routed_experts 256, got 257"),
        ({"swiglu_limit": -1}, "swiglu_limit: expected a finite number > 0, got -1"),
        ({"hc_mult": 0}, "hc_mult: expected an int from 1 to 64, got 0"),
        ({"hc_sinkhorn_iters": 0}, "hc_sinkhorn_iters: expected an int from 1 to 1000, got 0"),
        ({"hc_eps": None}, "hc_eps: missing"),
        ({"expert_dtype": "int4"}, "expert_dtype: expected fp4 or fp8 or bf16, got 'int4'"),
    ],
)
def test_a_malformed_compressed_model_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        ModelConfig.from_pretrained(small_v4(**changes))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"architectures": ["DeepseekV41ForCausalLM"], "model_type": "deepseek_v41"}, ""),
        ({"architectures": None, "model_type": "deepseek_v4_1"}, ""),
        ({"compress_ratios": [0, 0] + [2] * 18 + [1] * 26}, " (compression ratio 1, compression ratio 2)"),
        ({"kv_source_layer_ids": [2, 8]}, " (kv_source_layer_ids)"),
        ({"candidate_source_layer_id": 20, "index_source_layer_ids": [2]}, " (index_source_layer_ids, candidate_"),
    ],
)
def test_the_next_compressed_model_is_recognised_and_refused(changes: dict[str, Any], found: str) -> None:
    message = f"DeepSeek-V4.1 is not supported yet: its layers read the entries and selections of source layers{found}"
    with pytest.raises(UnsupportedConfigError, match=f"^{re.escape(message)}"):
        ModelConfig.from_pretrained(shipped("deepseek_v4_flash.json") | changes)


@pytest.mark.parametrize(
    ("changes", "hashed", "limit"),
    [
        ({}, 3, 10.0),
        ({"num_hash_layers": None, "mlp_layer_types": ["hash_moe"] + ["moe"] * 7}, 1, 10.0),
        ({"num_hash_layers": 100}, 6, 10.0),
        ({"num_hash_layers": 0, "swiglu_limit": 0}, 0, 0.0),
        ({"swiglu_limit": None, "expert_dtype": "fp4"}, 3, 0.0),
    ],
)
def test_routers_and_limits_are_read_in_every_spelling(changes: dict[str, Any], hashed: int, limit: float) -> None:
    config = ModelConfig.from_pretrained(small_v4(**changes))
    assert isinstance(config, CompressedConfig)
    assert [config.router_type(layer) for layer in range(7)] == ["hash"] * hashed + ["scores"] * (7 - hashed)
    assert config.swiglu_limit == limit
