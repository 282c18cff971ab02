"""Models beside DeepSeek-V3.2 and GLM as they are published, and which class reads which model."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
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
from tests.kit.config_contents import COMPRESSED_COLUMNS, CONFIGS, MLA_COLUMNS, UNHURRIED, shipped, small_v4

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
