"""DeepSeek-V3.2 and GLM: what each missing, malformed or unsupported value is told."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_dsa.config import ConfigError, ModelConfig, UnsupportedConfigError
from fastdeploy_dsa.index_schedule import IndexScheduleError
from fastdeploy_dsa.softmax_scale import SoftmaxScaleError
from tests.kit.config_contents import FP8, PLAIN_ROPE, SMALL, UNHURRIED, YARN, small, without

MODEL_TYPES = "deepseek_v2 or deepseek_v3 or deepseek_v32 or glm_moe_dsa or deepseek_v4"


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
