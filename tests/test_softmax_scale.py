"""Softmax scales: every config form that exists, as a mapping, as an object and inside a wrapper."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdeploy_dsa.config import ModelConfig
from fastdeploy_dsa.softmax_scale import SoftmaxScaleError, resolve_softmax_scale, softmax_scale

CONFIGS = Path(__file__).parent / "configs"
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

WITHOUT_MAGNITUDE = 0.07216878364870322
WITH_MAGNITUDE = 0.1352337788608801
GLM = 0.0625
V4 = 0.04419417382415922
NEVER = (
    576**-0.5,  # width of the cache row
    576**-0.5 * 1.3688879454113936**2,
    512**-0.5 * (0.1 * math.log(16) + 1) ** 2,  # V4 with the magnitude of its compressed layers
)

WIDTHS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
YARN = {
    "type": "yarn",
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
}
NO_TYPE = {key: value for key, value in YARN.items() if key != "type"}
LINEAR = {"type": "linear", "factor": 2.0}
COMPRESSED = {"qk_rope_head_dim": 64, "head_dim": 512}
MAIN, COMPRESS = {"rope_type": "default"}, {"rope_type": "yarn", "factor": 16.0}


def without(rope: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in rope.items() if key not in names}


FORMS: dict[str, tuple[dict[str, Any], float]] = {
    "1 no rope keys": (WIDTHS, WITHOUT_MAGNITUDE),
    "1 rope_scaling null": ({**WIDTHS, "rope_scaling": None}, WITHOUT_MAGNITUDE),
    "1 rope_scaling empty": ({**WIDTHS, "rope_scaling": {}}, WITHOUT_MAGNITUDE),
    "2 default": ({**WIDTHS, "rope_parameters": {"rope_type": "default"}}, WITHOUT_MAGNITUDE),
    "2 default with theta": (
        {**WIDTHS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        WITHOUT_MAGNITUDE,
    ),
    "2 default under rope_scaling": ({**WIDTHS, "rope_scaling": {"rope_type": "default"}}, WITHOUT_MAGNITUDE),
    "2 theta alone": ({**WIDTHS, "rope_parameters": {"rope_theta": 1e6}}, WITHOUT_MAGNITUDE),
    "3 type": ({**WIDTHS, "rope_scaling": YARN}, WITH_MAGNITUDE),
    "4 rope_type": ({**WIDTHS, "rope_scaling": {**NO_TYPE, "rope_type": "yarn"}}, WITH_MAGNITUDE),
    "4 rope_type wins": ({**WIDTHS, "rope_scaling": {**YARN, "rope_type": "yarn", "type": "linear"}}, WITH_MAGNITUDE),
    "4 rope_type null": ({**WIDTHS, "rope_scaling": {**YARN, "rope_type": None}}, WITH_MAGNITUDE),
    "4 deepseek_yarn": ({**WIDTHS, "rope_scaling": {**YARN, "type": "deepseek_yarn"}}, WITH_MAGNITUDE),
    "5 rope_parameters": ({**WIDTHS, "rope_parameters": YARN, "rope_scaling": None}, WITH_MAGNITUDE),
    "5 rope_parameters win": ({**WIDTHS, "rope_parameters": YARN, "rope_scaling": LINEAR}, WITH_MAGNITUDE),
    "6 mscale_all_dim 0.707": ({**WIDTHS, "rope_scaling": {**YARN, "mscale_all_dim": 0.707}}, 0.1147213867929261),
    "7 no mscale_all_dim": ({**WIDTHS, "rope_scaling": without(YARN, "mscale_all_dim")}, WITHOUT_MAGNITUDE),
    "7 mscale_all_dim false": ({**WIDTHS, "rope_scaling": {**YARN, "mscale_all_dim": False}}, WITHOUT_MAGNITUDE),
    "7 mscale_all_dim null": ({**WIDTHS, "rope_scaling": {**YARN, "mscale_all_dim": None}}, WITHOUT_MAGNITUDE),
    "7 mscale_all_dim 0": ({**WIDTHS, "rope_scaling": {**YARN, "mscale_all_dim": 0}}, WITHOUT_MAGNITUDE),
    "9 apply_yarn_scaling": ({**WIDTHS, "rope_scaling": {**YARN, "apply_yarn_scaling": False}}, WITHOUT_MAGNITUDE),
    "9 apply_scale": ({**WIDTHS, "rope_scaling": {**YARN, "apply_scale": False}}, WITHOUT_MAGNITUDE),
    "9 attention_factor": ({**WIDTHS, "rope_scaling": {**YARN, "attention_factor": 1.0}}, WITHOUT_MAGNITUDE),
    "9 attention_factor int": ({**WIDTHS, "rope_scaling": {**YARN, "attention_factor": 1}}, WITHOUT_MAGNITUDE),
    "9 other attention_factor": ({**WIDTHS, "rope_scaling": {**YARN, "attention_factor": 0.5}}, WITH_MAGNITUDE),
    "9 apply_yarn_scaling true": ({**WIDTHS, "rope_scaling": {**YARN, "apply_yarn_scaling": True}}, WITH_MAGNITUDE),
    "11 factor 1": ({**WIDTHS, "rope_scaling": {**YARN, "factor": 1.0}}, WITHOUT_MAGNITUDE),
    "11 factor 0.5": ({**WIDTHS, "rope_scaling": {**YARN, "factor": 0.5}}, WITHOUT_MAGNITUDE),
    "11 factor 1 answers first": (
        {**WIDTHS, "rope_scaling": {**YARN, "factor": 1.0, "mscale_all_dim": "x"}},
        WITHOUT_MAGNITUDE,
    ),
    "12 GLM, head_dim 192": ({"qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "head_dim": 192}, GLM),
    "12 GLM, head_dim 64": ({"qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "head_dim": 64}, GLM),
    "13 compress_ratios": (
        {"compress_ratios": [4], "head_dim": 128, "rope_scaling": {**YARN, "mscale_all_dim": 0.707}},
        0.08838834764831845,
    ),
    "14 V4": ({**COMPRESSED, "compress_ratios": [0, 0, 4, 128], "rope_scaling": {**YARN, "factor": 16}}, V4),
    "15 V4 by layer types and rates": (
        {**COMPRESSED, "layer_types": ["compressed_sparse_attention"], "compress_rates": {"x": 4}},
        V4,
    ),
    "15 V4 by rates": ({**COMPRESSED, "compress_rates": {"x": 4}}, V4),
    "15 V4 by layer types": ({**COMPRESSED, "layer_types": ["a", "heavily_compressed_attention"]}, V4),
    "15 V4 by nested rope": ({**COMPRESSED, "rope_parameters": {"main": MAIN, "compress": COMPRESS}}, V4),
    "16 V4.1": ({**COMPRESSED, "compress_ratios": [0, 0, 2, 1]}, V4),
    "other layer types": ({**WIDTHS, "layer_types": ["indexed_attention"]}, WITHOUT_MAGNITUDE),
    "compress_ratios null": ({**WIDTHS, "compress_ratios": None}, WITHOUT_MAGNITUDE),
}

SHAPES = {
    "mapping": lambda config: config,
    "object": lambda config: SimpleNamespace(**config),
    "wrapper": lambda config: {"qk_nope_head_dim": 1, "compress_ratios": [4], "text_config": config},
    "object in object": lambda config: SimpleNamespace(text_config=SimpleNamespace(**config)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_its_number_twice_and_leaves_the_config_alone(form: str, shape: str) -> None:
    config, expected = FORMS[form]
    shaped = SHAPES[shape](copy.deepcopy(config))
    before = copy.deepcopy(shaped)
    scale = softmax_scale(shaped)
    assert isinstance(scale, float)
    assert math.isclose(scale, expected, rel_tol=1e-15)
    assert softmax_scale(shaped) == scale
    assert shaped == before


@pytest.mark.parametrize("form", FORMS)
def test_no_form_gives_a_number_known_to_be_wrong(form: str) -> None:
    assert not any(math.isclose(softmax_scale(FORMS[form][0]), wrong, rel_tol=1e-6) for wrong in NEVER)


@pytest.mark.parametrize(
    ("file_name", "expected"),
    [
        ("deepseek_v2_lite.json", 0.1147213867929261),
        ("deepseek_v3.json", WITH_MAGNITUDE),
        ("deepseek_v32.json", WITH_MAGNITUDE),
        ("glm_5.json", GLM),
        ("glm_52.json", GLM),
        ("deepseek_v4_flash.json", V4),
        ("deepseek_v4_pro.json", V4),
    ],
)
def test_shipped_configs(file_name: str, expected: float) -> None:
    scale = softmax_scale(json.loads((CONFIGS / file_name).read_text()))
    assert softmax_scale(ModelConfig.from_pretrained(CONFIGS / file_name)) == scale
    assert math.isclose(scale, expected, rel_tol=1e-15)
    if file_name == "deepseek_v32.json":
        assert not math.isclose(scale, WITHOUT_MAGNITUDE, rel_tol=1e-3)
    else:
        assert not math.isclose(scale, 192**-0.5, rel_tol=1e-3)


@pytest.mark.parametrize(
    ("rope", "expected", "warning"),
    [
        (NO_TYPE, WITH_MAGNITUDE, "W1: the rope settings have a factor but no type: treated as yarn"),
        (without(YARN, "factor"), WITHOUT_MAGNITUDE, "W2: yarn without a factor: no magnitude correction"),
    ],
)
def test_doubtful_settings_are_resolved_with_a_warning(rope: dict[str, Any], expected: float, warning: str) -> None:
    scale = resolve_softmax_scale({**WIDTHS, "rope_scaling": rope})
    assert math.isclose(scale.value, expected, rel_tol=1e-15)
    assert scale.warnings == (warning,)


@pytest.mark.parametrize("form", FORMS)
def test_settled_forms_give_no_warning(form: str) -> None:
    assert resolve_softmax_scale(FORMS[form][0]).warnings == ()


def test_width_magnitude_and_rule_are_told() -> None:
    described = resolve_softmax_scale({**WIDTHS, "rope_scaling": YARN}).describe()
    expected = "0.1352337788608801 from width 192 and magnitude 1.3688879454113936"
    assert described == f"{expected} (yarn with factor 40 and mscale_all_dim 1.0)"


@pytest.mark.parametrize(
    ("config", "code", "message"),
    [
        ({"compress_ratios": [4]}, "E1", "head_dim: expected an int from 0 to 1048576, got None"),
        ({"compress_ratios": [4], "head_dim": 0}, "E1", "head_dim: expected an int >= 1, got 0"),
        ({"compress_ratios": [4], "head_dim": -4}, "E1", "head_dim: expected an int from 0 to 1048576, got -4"),
        ({"qk_rope_head_dim": 64}, "E2", "qk_nope_head_dim: expected an int from 0 to 1048576, got None"),
        ({"qk_nope_head_dim": 128}, "E2", "qk_rope_head_dim: expected an int from 0 to 1048576, got None"),
        ({**WIDTHS, "qk_nope_head_dim": True}, "E2", "qk_nope_head_dim: expected an int from 0 to 1048576, got True"),
        (
            {**WIDTHS, "qk_nope_head_dim": 128.0},
            "E2",
            "qk_nope_head_dim: expected an int from 0 to 1048576, got 128.0",
        ),
        ({**WIDTHS, "qk_rope_head_dim": "64"}, "E2", "qk_rope_head_dim: expected an int from 0 to 1048576, got '64'"),
        ({**WIDTHS, "qk_rope_head_dim": -64}, "E2", "qk_rope_head_dim: expected an int from 0 to 1048576, got -64"),
        (
            {**WIDTHS, "qk_nope_head_dim": 10**400},
            "E2",
            "qk_nope_head_dim: expected an int from 0 to 1048576, got 1000",
        ),
        (
            {"qk_nope_head_dim": 0, "qk_rope_head_dim": 0},
            "E2",
            "qk_nope_head_dim + qk_rope_head_dim: expected at least 1, got 0",
        ),
        ({**WIDTHS, "rope_scaling": "yarn"}, "E3", "rope_scaling: expected a mapping, got 'yarn'"),
        ({**WIDTHS, "rope_parameters": [1]}, "E3", "rope_parameters: expected a mapping, got [1]"),
        *[
            ({**WIDTHS, "rope_scaling": {**NO_TYPE, key: kind}}, "E4", f"rope type {kind!r} is not supported with MLA")
            for key in ("type", "rope_type")
            for kind in ("linear", "dynamic", "llama3", "longrope", "YARN", "", 3, ["yarn"])
        ],
        *[
            (
                {**WIDTHS, "rope_scaling": {**YARN, "factor": factor}},
                "E5",
                f"factor: expected a number > 0, got {repr(factor)[:77]}",
            )
            for factor in (True, "40", math.nan, math.inf, -math.inf, 0, -40, 10**400)
        ],
        *[
            (
                {**WIDTHS, "rope_scaling": {**YARN, "mscale_all_dim": value}},
                "E6",
                f"mscale_all_dim: expected a number >= 0, got {value!r}",
            )
            for value in (True, "1.0", math.nan, math.inf, -1.0)
        ],
    ],
)
def test_a_mistake_is_told_with_its_code_key_and_value(config: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(SoftmaxScaleError, match=re.escape(message)) as caught:
        softmax_scale(config)
    assert caught.value.code == code
    assert str(caught.value).startswith(f"{code}: {message}")


@UNHURRIED
@given(nope=st.integers(1, 512), rope=st.integers(1, 512), factor=st.floats(1.0, 1e4), mscale=st.floats(0.0, 4.0))
def test_scale_is_the_definition(nope: int, rope: int, factor: float, mscale: float) -> None:
    settings = {"rope_type": "yarn", "factor": factor, "mscale_all_dim": mscale}
    scale = softmax_scale({"qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "rope_parameters": settings})
    magnitude = 1 + mscale * math.log(factor) / 10
    assert math.isclose(scale, magnitude**2 / math.sqrt(nope + rope), rel_tol=1e-14)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["yarn", "default", "1"])
ROPE_KEYS = st.sampled_from(
    ["rope_type", "type", "factor", "mscale_all_dim", "attention_factor", "apply_scale", "apply_yarn_scaling"]
)
KEYS = st.sampled_from(
    [
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "head_dim",
        "compress_ratios",
        "layer_types",
        "rope_parameters",
        "text_config",
    ]
)


@UNHURRIED
@given(config=st.dictionaries(KEYS, VALUES), rope=VALUES | st.dictionaries(ROPE_KEYS, VALUES))
def test_any_values_give_a_finite_number_or_a_coded_error(config: dict[str, Any], rope: Any) -> None:
    try:
        scale = softmax_scale({**WIDTHS, "rope_scaling": rope, **config})
    except SoftmaxScaleError as error:
        assert re.fullmatch(r"E\d", error.code)  # noqa: PT017 - raising is one of two right answers
    else:
        assert math.isfinite(scale)
        assert scale > 0
