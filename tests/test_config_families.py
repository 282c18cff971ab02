"""The families beside DeepSeek-V3.2 and GLM: what is read of them, and that the engine refuses them by name."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdeploy_dsa.config import (
    CompressedConfig,
    ConfigError,
    DsaConfig,
    MlaConfig,
    ModelConfig,
    RopeConfig,
    UnsupportedConfigError,
)
from fastdeploy_dsa.engine.loading import read_model_config
from fastdeploy_dsa.index_schedule import IndexScheduleError
from fastdeploy_dsa.inspection import InspectionOptions, inspect_config
from fastdeploy_dsa.softmax_scale import SoftmaxScaleError

CONFIGS = Path(__file__).parent / "configs"
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
MLA_COLUMNS = ("deepseek_v2_lite.json", "deepseek_v3.json")
COMPRESSED_COLUMNS = ("deepseek_v4_flash.json", "deepseek_v4_pro.json")
YARN_V2 = RopeConfig("yarn", 1e4, 40.0, 4096, 32.0, 1.0, 1.0)
MAIN = RopeConfig("default", 1e4, 1.0, 1048576, 32.0, 1.0, 1.0)
COMPRESS = RopeConfig("yarn", 1.6e5, 16.0, 65536, 32.0, 1.0, 1.0)

COMMON: dict[str, tuple[Any, Any]] = {"rms_norm_eps": (1e-6, 1e-6), "dtype": ("bfloat16",) * 2, "warnings": ((), ())}
COMMON |= {"tie_word_embeddings": (False, False), "qk_rope_head_dim": (64, 64)}
MLA_TABLE: dict[str, tuple[Any, Any]] = COMMON | {
    "architecture": ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
    "model_type": ("deepseek_v2", "deepseek_v3"),
    "vocab_size": (102400, 129280),
    "hidden_size": (2048, 7168),
    "num_hidden_layers": (27, 61),
    "num_attention_heads": (16, 128),
    "num_nextn_predict_layers": (0, 1),
    "q_lora_rank": (0, 1536),
    "kv_lora_rank": (512, 512),
    "qk_nope_head_dim": (128, 128),
    "v_head_dim": (128, 128),
    "index_n_heads": (0, 0),
    "index_head_dim": (0, 0),
    "index_topk": (0, 0),
    "max_position_embeddings": (163840, 163840),
    "softmax_scale": (0.1147213867929261, 0.1352337788608801),
    "rope": (YARN_V2, YARN_V2),
    "bos_token_id": (100000, 0),
    "eos_token_ids": ((100001,), (1,)),
}
COMPRESSED_TABLE: dict[str, tuple[Any, Any]] = COMMON | {
    "architecture": ("DeepseekV4ForCausalLM",) * 2,
    "model_type": ("deepseek_v4",) * 2,
    "vocab_size": (129280, 129280),
    "hidden_size": (4096, 7168),
    "num_hidden_layers": (43, 61),
    "num_attention_heads": (64, 128),
    "num_nextn_predict_layers": (1, 1),
    "head_dim": (512, 512),
    "q_lora_rank": (1024, 1536),
    "o_groups": (8, 16),
    "o_lora_rank": (1024, 1024),
    "index_n_heads": (64, 64),
    "index_head_dim": (128, 128),
    "index_topk": (512, 1024),
    "sliding_window": (128, 128),
    "max_position_embeddings": (1048576, 1048576),
    "softmax_scale": (0.04419417382415922,) * 2,
    "layer_kinds": (
        ("swa",) * 2 + ("c4a", "c128a") * 20 + ("c4a",),
        ("c128a",) * 2 + ("c4a", "c128a") * 29 + ("c4a",),
    ),
    "router_types": (("hash",) * 3 + ("scores",) * 40, ("hash",) * 3 + ("scores",) * 58),
    "moe_intermediate_size": (2048, 3072),
    "n_routed_experts": (256, 384),
    "n_shared_experts": (1, 1),
    "num_experts_per_tok": (6, 6),
    "norm_topk_prob": (True, True),
    "routed_scaling_factor": (1.5, 2.5),
    "swiglu_limit": (10.0, 10.0),
    "hc_mult": (4, 4),
    "hc_sinkhorn_iters": (20, 20),
    "hc_eps": (1e-6, 1e-6),
    "weight_block_size": ((128, 128), (128, 128)),
    "main_rope": (MAIN, MAIN),
    "compress_rope": (COMPRESS, COMPRESS),
    "bos_token_id": (0, 0),
    "eos_token_ids": ((1,), (1,)),
}


def shipped(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CONFIGS / name).read_text())
    return content


def small_v4(**changes: Any) -> dict[str, Any]:
    """Six layers: window, 128, 4, 128, 4, window."""
    content = shipped("deepseek_v4_flash.json")
    content |= {"num_hidden_layers": 6, "compress_ratios": [0, 128, 4, 128, 4, 0, 0]}
    return content | changes


@pytest.mark.parametrize("column", range(2), ids=MLA_COLUMNS)
@pytest.mark.parametrize("field", MLA_TABLE)
def test_dense_models_read_as_published(field: str, column: int) -> None:
    config = ModelConfig.from_pretrained(CONFIGS / MLA_COLUMNS[column])
    assert type(config) is MlaConfig
    assert getattr(config, field) == MLA_TABLE[field][column]


@pytest.mark.parametrize("column", range(2), ids=COMPRESSED_COLUMNS)
@pytest.mark.parametrize("field", COMPRESSED_TABLE)
def test_compressed_models_read_as_published(field: str, column: int) -> None:
    config = ModelConfig.from_pretrained(CONFIGS / COMPRESSED_COLUMNS[column])
    assert type(config) is CompressedConfig
    assert getattr(config, field) == COMPRESSED_TABLE[field][column]


@pytest.mark.parametrize(("cls", "table"), [(MlaConfig, MLA_TABLE), (CompressedConfig, COMPRESSED_TABLE)])
def test_the_tables_cover_every_field(cls: type[ModelConfig], table: dict[str, Any]) -> None:
    assert {field.name for field in fields(cls)} - set(table) == {"index_schedule", "scale"}


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


@pytest.mark.parametrize("name", [*MLA_COLUMNS, *COMPRESSED_COLUMNS])
def test_a_wrapper_reads_as_the_text_config_in_it(name: str) -> None:
    wrapper = {"architectures": ["SomeVisionModel"], "model_type": "vision", "text_config": shipped(name)}
    assert ModelConfig.from_pretrained(wrapper) == ModelConfig.from_pretrained(shipped(name))


def test_a_key_of_the_parts_that_are_not_read_may_be_overridden() -> None:
    config = ModelConfig.from_pretrained(
        CONFIGS / "deepseek_v3.json", {"n_routed_experts": 4, "topk_method": "greedy"}
    )
    assert config == ModelConfig.from_pretrained(CONFIGS / "deepseek_v3.json")


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
    ("name", "changes", "message"),
    [
        ("deepseek_v32.json", {"compress_ratios": [0]}, "compress_ratios: no part of DeepseekV32ForCausalLM, got [0]"),
        (
            "deepseek_v3.json",
            {"layer_types": ["compressed_sparse_attention"]},
            "layer_types: no part of DeepseekV3ForCausalLM, got ['compressed_sparse_attention']",
        ),
        ("deepseek_v3.json", {"index_topk": 2048}, "index_topk: DeepseekV3ForCausalLM has no indexer, got 2048"),
        (
            "deepseek_v2_lite.json",
            {"index_topk_freq": 4},
            "index_topk_freq: DeepseekV2ForCausalLM has no indexer, got 4",
        ),
        ("deepseek_v2_lite.json", {"q_lora_rank": -1}, "q_lora_rank: expected an int from 0 to 1048576, got -1"),
    ],
)
def test_what_belongs_to_another_family_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        ModelConfig.from_pretrained(shipped(name) | changes)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek_v2_lite.json", "DeepseekV2ForCausalLM: models without an indexer cannot generate yet"),
        ("deepseek_v3.json", "DeepseekV3ForCausalLM: models without an indexer cannot generate yet"),
    ],
)
def test_the_engine_refuses_what_it_cannot_run(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "config.json").write_text((CONFIGS / name).read_text())
    with pytest.raises(UnsupportedConfigError, match=f"^{re.escape(reason)}$"):
        read_model_config(tmp_path, None)


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


def test_the_engine_reads_what_it_can_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((CONFIGS / "deepseek_v4_flash.json").read_text())
    assert isinstance(read_model_config(tmp_path, None), CompressedConfig)


def test_a_class_reads_its_own_family_only() -> None:
    assert isinstance(DsaConfig.from_pretrained(CONFIGS / "glm_5.json"), DsaConfig)
    assert isinstance(MlaConfig.from_pretrained(CONFIGS / "deepseek_v32.json"), DsaConfig)  # also latent attention
    with pytest.raises(UnsupportedConfigError, match=r"^DeepseekV3ForCausalLM: models without an indexer"):
        DsaConfig.from_pretrained(CONFIGS / "deepseek_v3.json")
    with pytest.raises(UnsupportedConfigError, match=r"^DeepseekV4ForCausalLM: expected a model of DsaConfig, got"):
        DsaConfig.from_pretrained(CONFIGS / "deepseek_v4_flash.json")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 9)
    | st.floats()
    | st.sampled_from(["", "yarn", "swa", "F", "sliding_attention"]),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(st.sampled_from(["main", "compress", "factor", "rope_theta", "type", "pattern"]), inner)
    ),
    max_leaves=8,
)


@UNHURRIED
@pytest.mark.parametrize("name", ["deepseek_v3.json", "deepseek_v4_flash.json"])
@given(data=st.data())
def test_any_values_are_inspected_or_refused_with_an_error_of_the_package(name: str, data: st.DataObject) -> None:
    content = small_v4() if "v4" in name else shipped(name)
    keys = [*content, "rope_parameters", "layer_types", "compress_rates", "text_config", "indexer_types", "index_topk"]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=3))
    try:
        config = ModelConfig.from_pretrained(content, changes)
    except (ConfigError, IndexScheduleError, SoftmaxScaleError) as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 - raising is one of two right answers
        return
    found = inspect_config(config, InspectionOptions(cache_format="float32", memory_bytes=1 << 30)).as_json()
    assert sum(layer["cache_bytes_per_token"] for layer in found["layers"]) == found["cache_bytes_per_token"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
