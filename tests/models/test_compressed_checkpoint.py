"""Checkpoints of DeepSeek-V4: what is read, what is skipped, and what is refused by its name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.models import load_model, load_model_with_mtp
from tests.kit.tiny_compressed_model import write_tiny_compressed_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_compressed_model(tmp_path / "model", num_nextn_predict_layers=2)


def change(folder: Path, **changes: Any) -> None:
    """Replace tensors, whose names have dots for double underscores; None takes one out."""
    weights = load_file(folder / WEIGHTS)
    for name, value in changes.items():
        weights.pop(name.replace("__", "."), None)
        if value is not None:
            weights[name.replace("__", ".")] = value
    save_file(weights, folder / WEIGHTS)


def test_draft_layers_are_skipped_unless_they_are_wanted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastdeploy_dsa"):
        load_model(folder)
    assert "MTP layer, not in use without speculative decoding" in caplog.text
    model, drafts = load_model_with_mtp(folder)
    assert [draft.layer_id for draft in drafts] == [4, 5]
    assert [draft.layer.attention._ratio for draft in drafts] == [1, 1]
    assert len(model.layers) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers__2__attn__attn_sink": None}, "tensors are missing: layers.2.attn.attn_sink"),
        ({"layers__0__ffn__gate__tid2eid": None}, "tensors are missing: layers.0.ffn.gate.tid2eid"),
        ({"layers__1__attn__compressor__ape": None}, "tensors are missing: layers.1.attn.compressor.ape"),
        ({"hc_head_fn": None}, "tensors are missing: hc_head_fn"),
        (
            {"layers__1__attn__attn_sink": np.zeros(3, np.float32)},
            r"layers.1.attn.attn_sink: expected shape \(4,\), got \(3,\)",
        ),
        (
            {"layers__0__attn__compressor__ape": np.zeros((4, 96), np.float32)},
            "unknown tensor: layers.0.attn.compressor.ape",
        ),
        ({"layers__9__attn_norm__weight": np.zeros(32, np.float32)}, "unknown tensor: layers.9.attn_norm.weight"),
        (
            {"layers__0__ffn__gate__tid2eid": np.full((264, 2), 4)},
            "layers.0.ffn.gate.tid2eid: expected experts from 0 to 3, got 4 for token 0",
        ),
        (
            {"layers__0__ffn__gate__tid2eid": np.zeros((264, 2), np.float32)},
            "layers.0.ffn.gate.tid2eid: expected dtype I64, I32, got F32",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    change(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_missing_draft_layer_is_named_where_it_is_wanted(folder: Path) -> None:
    change(folder, mtp__1__h_proj__weight=None)
    load_model(folder)
    with pytest.raises(ValueError, match=r"tensors are missing: mtp\.1\.h_proj\.weight"):
        load_model_with_mtp(folder)


def test_several_draft_layers_draft_for_each_other(folder: Path) -> None:
    """Two layers, each for one more token: tokens are those without drafts, across a window's end."""
    prompts = [np.random.default_rng(seed).integers(0, 264, length).tolist() for seed, length in enumerate((100, 9))]
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=2)
    speculative = {"method": "mtp", "num_speculative_tokens": 2, "adaptive": False}
    results = []
    for options in ({}, {"speculative_config": speculative}):
        llm = LLM(folder, max_model_len=256, check_integrity=True, **options)
        results.append([(output.token_ids, output.logprobs) for output in llm.generate(prompts, params)])
    assert results[0] == results[1]


def test_weights_stored_as_they_are_released_serve_alike(tmp_path: Path) -> None:
    """fp8 with power-of-two scales for matrices, fp4 for routed experts: what they stand for, written as float32."""
    shape = {"hidden_size": 64, "moe_intermediate_size": 32}
    plain = write_tiny_compressed_model(tmp_path / "plain", seed=4, **shape)
    packed = write_tiny_compressed_model(
        tmp_path / "packed",
        seed=4,
        **shape,
        expert_dtype="fp4",
        quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32]},
    )
    weights, rng = load_file(plain / WEIGHTS), np.random.default_rng(5)
    expanded, stored = dict(weights), dict(weights)
    for name in ("layers.1.attn.wq_b", "layers.2.attn.wo_a", "layers.3.ffn.experts.1.w2", "layers.0.ffn.experts.0.w1"):
        values = weights[f"{name}.weight"]
        is_expert = "experts" in name
        block = (1, 32) if is_expert else (32, 32)
        scales = 2.0 ** rng.integers(-4, 0, [-(-size // side) for size, side in zip(values.shape, block, strict=True)])
        repeated = np.kron(scales, np.ones(block))[: values.shape[0], : values.shape[1]]
        numbers = rng.integers(-3, 4, values.shape).astype(np.float32)  # exact in both formats
        expanded[f"{name}.weight"] = (numbers * repeated).astype(np.float32)
        codes = np.array([13, 12, 10, 0, 2, 4, 5], np.uint8)[numbers.astype(int) + 3]  # e2m1: -3 .. 3
        stored[f"{name}.weight"] = codes[:, 0::2] | codes[:, 1::2] << 4 if is_expert else numbers
        stored[f"{name}.scale"] = scales
    save_file(expanded, plain / WEIGHTS)
    _write_packed(packed / WEIGHTS, stored)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=2)
    prompt = rng.integers(0, 264, 140).tolist()
    results = [LLM(model, max_model_len=256).generate([prompt], params)[0] for model in (plain, packed)]
    assert (results[0].token_ids, results[0].logprobs) == (results[1].token_ids, results[1].logprobs)


def _write_packed(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """As safetensors, with the dtypes of the released files."""
    from tests.kit.safetensors_files import Stored, f32, safetensors_bytes  # noqa: PLC0415 - bytes of files

    files: dict[str, Stored] = {}
    e4m3 = {value: code for code, value in enumerate([0.0, *[None] * 55, 1.0]) if value is not None}
    e4m3 |= {2.0: 0x40, 3.0: 0x44}
    for name, values in tensors.items():
        if name.endswith(".scale"):
            codes = (np.log2(values) + 127).astype(np.uint8)
            files[name] = Stored("F8_E8M0", codes.shape, codes.tobytes())
        elif name.removesuffix("weight") + "scale" in tensors and values.dtype == np.uint8:
            files[name] = Stored("I8", values.shape, np.ascontiguousarray(values).tobytes())
        elif name.removesuffix("weight") + "scale" in tensors:
            codes = np.vectorize(lambda value: e4m3[abs(value)] | (0x80 if value < 0 else 0))(values).astype(np.uint8)
            files[name] = Stored("F8_E4M3", codes.shape, codes.tobytes())
        elif values.dtype == np.int64:
            files[name] = Stored("I64", values.shape, values.tobytes())
        else:
            files[name] = f32(values)
    path.write_bytes(safetensors_bytes(files))
