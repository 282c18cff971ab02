"""docs/attention_variants.md, followed: its file and its line make a platform that serves a model."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa.attention.deepseek_v4 import select
from fastdeploy_dsa.attention.deepseek_v4.base import DeepseekV4Attention
from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.models import load_model
from tests.kit.compare import assert_same
from tests.kit.compressed_serving import CompressedServing
from tests.kit.serving import in_chunks
from tests.kit.tiny_compressed_model import VOCAB_SIZE, tiny_compressed_config, write_tiny_compressed_model

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "attention_variants.md").read_text(encoding="utf-8")


@pytest.fixture
def new_class(tmp_path: Path) -> type[DeepseekV4Attention]:
    """From the file that the page shows."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (name,) = re.findall(r"`(\w+\.py)`:$", PAGE, re.MULTILINE)
    path = tmp_path / name
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GroupedHeadsAttention


@pytest.fixture
def listed(new_class: type[DeepseekV4Attention], monkeypatch: pytest.MonkeyPatch) -> type[DeepseekV4Attention]:
    """With the line that the page shows."""
    (first,) = re.findall(r"ATTENTION_CLASSES = \[(\w+), DeepseekV4FlashMLAAttention, \.\.\.\]", PAGE)
    assert first == new_class.__name__
    monkeypatch.setattr(select, "ATTENTION_CLASSES", [new_class, *select.ATTENTION_CLASSES])
    return new_class


def config_of(**changes: Any) -> CompressedConfig:
    return CompressedConfig.from_pretrained(tiny_compressed_config(**changes))


def test_it_is_chosen_where_it_serves_and_says_why_it_does_not(listed: type[DeepseekV4Attention]) -> None:
    choose = select.select_dsv4_attn_cls
    assert choose(config_of(), cache_format="bfloat16") is listed
    assert choose(config_of(), cache_format="fp8").__name__ == "DeepseekV4ReferenceAttention"
    with pytest.raises(ValueError, match=r"GroupedHeadsAttention: its rows are plain numbers, got cache_dtype 'fp8'"):
        choose(config_of(), cache_format="fp8", name="GroupedHeadsAttention")
    with pytest.raises(ValueError, match="GroupedHeadsAttention: at most 128 heads, got 130"):
        choose(config_of(num_attention_heads=130), cache_format="float32", name="GroupedHeadsAttention")


@pytest.mark.parametrize("cache_format", ["float32", "bfloat16"])
def test_it_serves_a_model_bit_for_bit_like_the_reference(
    listed: type[DeepseekV4Attention], tmp_path: Path, cache_format: Any
) -> None:
    folder = write_tiny_compressed_model(tmp_path / "model")
    sequence = np.random.default_rng(5).integers(0, VOCAB_SIZE, 150)
    logits = {}
    for name in (listed.__name__, "DeepseekV4ReferenceAttention"):
        config = CompressedConfig.from_pretrained(folder)
        attention_cls = select.select_dsv4_attn_cls(config, cache_format=cache_format, name=name)
        model = load_model(folder, attention_cls=attention_cls)
        assert model.layers[0].attention._sinks.shape == [attention_cls.get_padded_num_q_heads(4)]
        (logits[name],) = CompressedServing(model, [sequence], cache_format=cache_format).run(
            in_chunks([len(sequence)], 60)
        )
    first, second = logits.values()
    assert_same(first, second, "logits")
