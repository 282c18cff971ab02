"""What a user asks of speculative decoding, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastdeploy_dsa import LLM
from fastdeploy_dsa.engine.speculative.config import SpeculativeConfig, read_speculative_config
from tests.models.mtp_checkpoint import write_tiny_mtp_model

THREE = {"method": "mtp", "num_speculative_tokens": 3}


@pytest.mark.parametrize(
    "value", [THREE, '{"method": "mtp", "num_speculative_tokens": 3}', SpeculativeConfig("mtp", 3)]
)
def test_object_and_json_text_mean_the_same(value: Any) -> None:
    assert read_speculative_config(value) == SpeculativeConfig(method="mtp", num_speculative_tokens=3, adaptive=True)


def test_none_is_no_drafting() -> None:
    assert read_speculative_config(None) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (THREE | {"method": "ngram"}, "speculative_config.method: expected 'mtp', got 'ngram'"),
        (THREE | {"method": None}, "speculative_config.method: expected 'mtp', got None"),
        ({"num_speculative_tokens": 3}, "speculative_config.method: missing"),
        ({"method": "mtp"}, "speculative_config.num_speculative_tokens: missing"),
        (
            THREE | {"num_speculative_tokens": 0},
            "speculative_config.num_speculative_tokens: expected an int of 1 to 5, got 0",
        ),
        (
            THREE | {"num_speculative_tokens": 6},
            "speculative_config.num_speculative_tokens: expected an int of 1 to 5, got 6",
        ),
        (
            THREE | {"num_speculative_tokens": "3"},
            "speculative_config.num_speculative_tokens: expected an int of 1 to 5, got '3'",
        ),
        (
            THREE | {"num_speculative_tokens": True},
            "speculative_config.num_speculative_tokens: expected an int of 1 to 5, got True",
        ),
        (THREE | {"adaptive": 1}, "speculative_config.adaptive: expected True or False, got 1"),
        (
            THREE | {"model": "draft"},
            "speculative_config: expected the keys method, num_speculative_tokens, adaptive, got 'model'",
        ),
        ("mtp", "speculative_config: Expecting value: line 1 column 1 (char 0)"),
        ("[]", "speculative_config: expected a JSON object, got list"),
        (3, "speculative_config: expected an object such as {'method': 'mtp'}, got 3"),
    ],
    ids=str,
)
def test_a_bad_config_is_named(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        read_speculative_config(value)
    assert str(caught.value) == message


def test_a_checkpoint_without_an_mtp_layer_is_refused_by_name(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a model with an MTP layer, got num_nextn_predict_layers 0"):
        LLM(tiny_model, speculative_config=THREE)


def test_a_checkpoint_that_lacks_the_promised_weights_is_refused_by_name(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"tensors are missing: model.layers.3.eh_proj.weight"):
        LLM(tiny_model, speculative_config=THREE, hf_overrides={"num_nextn_predict_layers": 1})


def test_a_budget_that_cannot_hold_the_drafts_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_mtp_model(tmp_path / "mtp")
    with pytest.raises(ValueError, match=r"max_num_seqs \(4\) of 1 \+ 3 rows each or more, got 15"):
        LLM(folder, speculative_config=THREE, max_num_batched_tokens=15, max_num_seqs=4)
    assert LLM(folder, speculative_config=THREE, max_num_batched_tokens=15, num_blocks=4)._core is not None
