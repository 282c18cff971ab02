"""DeepSeek-V4's attention classes: what is abstract, what is chosen where and why, padding and output projections."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import numpy as np
import paddle
import pytest

from fastdeploy_dsa.attention.backend import Support
from fastdeploy_dsa.attention.deepseek_v4 import base, flashmla, plain_rows, reference
from fastdeploy_dsa.attention.deepseek_v4.base import DeepseekV4Attention
from fastdeploy_dsa.attention.deepseek_v4.flashmla import DeepseekV4FlashMLAAttention
from fastdeploy_dsa.attention.deepseek_v4.o_proj import grouped_o_proj
from fastdeploy_dsa.attention.deepseek_v4.plain_rows import DeepseekV4PlainRowAttention
from fastdeploy_dsa.attention.deepseek_v4.reference import DeepseekV4ReferenceAttention
from fastdeploy_dsa.attention.deepseek_v4.select import ATTENTION_CLASSES, select_dsv4_attn_cls
from fastdeploy_dsa.attention.select import create_attention_backend
from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.models.deepseek_v4 import DeepseekV4ForCausalLM
from fastdeploy_dsa.ops import CpuOptions
from fastdeploy_dsa.rotary import Rotation
from tests.kit.compare import assert_same
from tests.kit.compressed_serving import CompressedServing
from tests.kit.serving import in_one_step
from tests.kit.tiny_compressed_model import random_weights, tiny_compressed_config

ABSTRACT = {"supports", "get_padded_num_q_heads", "forward_mqa"}
CPU = CpuOptions(num_threads=1)
PRODUCTION = {"head_dim": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}


def config_of(**changes: Any) -> CompressedConfig:
    return CompressedConfig.from_pretrained(tiny_compressed_config(**changes))


def test_the_base_cannot_be_made_nor_a_subclass_that_lacks_a_method() -> None:
    assert DeepseekV4Attention.__abstractmethods__ == ABSTRACT
    with pytest.raises(TypeError, match="abstract"):
        DeepseekV4Attention(None, config_of(), 0)
    for missing in ABSTRACT:
        others = {name: DeepseekV4ReferenceAttention.__dict__[name] for name in ABSTRACT - {missing}}
        with pytest.raises(TypeError, match=missing):
            type("Incomplete", (DeepseekV4Attention,), others)(None, config_of(), 0)


def test_the_base_knows_no_platform_and_platforms_override_nothing_else() -> None:
    tree = ast.parse(inspect.getsource(base))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any("device" in (name or "") or "flashmla" in (name or "") for name in imported)
    for cls in ATTENTION_CLASSES:
        assert cls.__bases__ == (DeepseekV4Attention,)
        own = {name for name in vars(cls) if not name.startswith("__") and name != "_abc_impl"}
        assert own == ABSTRACT | {"cache_formats"}


def test_heads_are_padded_to_what_the_kernel_takes() -> None:
    padded = DeepseekV4FlashMLAAttention.get_padded_num_q_heads
    assert [padded(count) for count in (1, 16, 64, 65, 128)] == [64, 64, 64, 128, 128]
    with pytest.raises(ValueError, match="num_heads: expected at most 128, got 129"):
        padded(129)
    for cls in (DeepseekV4PlainRowAttention, DeepseekV4ReferenceAttention):
        assert [cls.get_padded_num_q_heads(count) for count in (1, 16, 129)] == [1, 16, 129]


@pytest.fixture
def has_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (flashmla, plain_rows, reference):
        monkeypatch.setattr(module, "kernel_support", lambda device: Support(True))


@pytest.mark.parametrize(
    ("changes", "device", "cache_format", "chosen"),
    [
        ({}, "cpu", "float32", DeepseekV4ReferenceAttention),
        ({}, "cpu", "fp8", DeepseekV4ReferenceAttention),
        (PRODUCTION, "gpu:0", "fp8", DeepseekV4FlashMLAAttention),
        (PRODUCTION, "gpu:0", "bfloat16", DeepseekV4PlainRowAttention),
        (PRODUCTION | {"num_attention_heads": 130}, "gpu:0", "fp8", DeepseekV4PlainRowAttention),
        ({}, "gpu:0", "fp8", DeepseekV4PlainRowAttention),  # rows of another size than the kernel's
    ],
)
@pytest.mark.usefixtures("has_gpu_kernels")
def test_the_first_class_that_serves_is_chosen(
    changes: dict[str, Any], device: str, cache_format: Any, chosen: type[DeepseekV4Attention]
) -> None:
    config = config_of(**changes)
    assert select_dsv4_attn_cls(config, device=device, cache_format=cache_format) is chosen
    assert cache_format in chosen.cache_formats
    assert select_dsv4_attn_cls(config, device=device, cache_format=cache_format, name=chosen.__name__) is chosen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "DSAAttentionBackend"},
            "name: DSAAttentionBackend serves latent attention, DeepseekV4ForCausalLM has",
        ),
        ({"name": "Other"}, "name: expected one of DeepseekV4FlashMLAAttention, DeepseekV4PlainRowAttention, "),
        ({"name": "DeepseekV4FlashMLAAttention"}, "a GPU's layout, got device 'cpu'"),
        ({"name": "DeepseekV4PlainRowAttention"}, "a GPU's kernels, got device 'cpu'"),
        (
            {"name": "DeepseekV4FlashMLAAttention", "device": "gpu:0", "cache_format": "bfloat16"},
            "its rows are fp8, got cache_dtype 'bfloat16'",
        ),
        (
            {"name": "DeepseekV4FlashMLAAttention", "device": "gpu:0", "cache_format": "fp8"},
            "a row is 512 numbers, 64 of them rotated, got head_dim 48 and qk_rope_head_dim 16",
        ),
    ],
)
def test_a_refusal_names_the_reason(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_dsv4_attn_cls(config_of(), **arguments)


def test_without_any_class_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (flashmla, plain_rows, reference):
        monkeypatch.setattr(module, "kernel_support", lambda device: Support(False, "no kernels"))
    with pytest.raises(ValueError, match=r"on gpu:0: .*its rows are fp8.*PlainRow.*no kernels.*Reference.*no kernels"):
        select_dsv4_attn_cls(config_of(), device="gpu:0", cache_format="bfloat16")


def model_with(cls: type[DeepseekV4Attention], **changes: Any) -> DeepseekV4ForCausalLM:
    config = config_of(**changes)
    tensors = {name: paddle.to_tensor(values) for name, values in random_weights(config, seed=3).items()}
    return DeepseekV4ForCausalLM(config, tensors, cls)


def test_padded_heads_change_nothing() -> None:
    """FlashMLA's class on the CPU ops, 16 heads in 64, against the class that pads nothing; both round queries."""
    changes = PRODUCTION | {"num_attention_heads": 16, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128]}
    sequence = np.random.default_rng(2).integers(0, 264, 140)
    logits = []
    for cls in (DeepseekV4FlashMLAAttention, DeepseekV4PlainRowAttention):
        model = model_with(cls, **changes)
        logits += CompressedServing(model, [sequence], cache_format="fp8").run(in_one_step([len(sequence)]))
    sinks = model_with(DeepseekV4FlashMLAAttention, **changes).layers[0].attention._sinks.numpy()
    assert np.isneginf(sinks[16:]).all()
    assert np.isfinite(sinks[:16]).all()
    assert_same(*logits, "logits")


def test_a_layer_that_shares_a_selection_refuses_to_guess_one() -> None:
    model = model_with(DeepseekV4ReferenceAttention, index_topk_pattern="FS")
    attention = model.layers[3].attention
    assert attention.indexer is None
    with pytest.raises(ValueError, match="selection: layer 3 owns no indexer and got no selection"):
        attention._entries(None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 64}, "block_size: expected a multiple of 128, which"),
        ({"cache_dtype": "int8"}, "cache_format: expected one of fp8, bfloat16, float32, got 'int8'"),
    ],
)
def test_a_backend_refuses_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_attention_backend(config_of(), **({"cache_dtype": "fp8", "block_size": 256} | changes))


def test_an_fp8_index_cache_of_wide_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="index_head_dim: an fp8 index cache takes at most 128, got 192"):
        create_attention_backend(config_of(index_head_dim=192), cache_dtype="fp8", block_size=256)


# Output projection ---------------------------------------------------------------------------------------------------


class Projection:
    """Six rows, 4 heads of 80 numbers in 2 groups, 16 of them rotated."""

    def __init__(self) -> None:
        rng = np.random.default_rng(11)
        self.o = rng.standard_normal((6, 4, 80)).astype(np.float32)
        self.wo_a = rng.standard_normal((2, 10, 160)).astype(np.float32)
        self.wo_b = rng.standard_normal((24, 20)).astype(np.float32)
        angles = rng.uniform(-3, 3, (6, 8)).astype(np.float32)
        self.cos, self.sin = np.cos(angles), np.sin(angles)

    @property
    def rotation(self) -> Rotation:
        cos, sin = paddle.to_tensor(self.cos), paddle.to_tensor(self.sin)
        return Rotation(cos, sin, paddle.complex(cos, sin))

    def unrotated(self) -> np.ndarray:
        """Rule S28, in float64."""
        o, (cos, sin) = self.o.astype(np.float64), (part.astype(np.float64)[:, None] for part in (self.cos, self.sin))
        even, odd = o[..., 64::2], o[..., 65::2]
        o[..., 64::2], o[..., 65::2] = even * cos + odd * sin, odd * cos - even * sin
        return o

    def projected(self, o: np.ndarray) -> np.ndarray:
        groups = np.einsum("tgx,gox->tgo", o.reshape(6, 2, 160), self.wo_a)
        return groups.reshape(6, -1) @ self.wo_b.T

    def run(self) -> np.ndarray:
        o, wo_a, wo_b = (paddle.to_tensor(given) for given in (self.o, self.wo_a, self.wo_b))
        return grouped_o_proj(o, rotation=self.rotation, wo_a=wo_a, wo_b=wo_b, cpu=CPU).numpy()


def test_groups_of_neighbouring_heads_are_projected_and_joined() -> None:
    case = Projection()
    np.testing.assert_allclose(case.run(), case.projected(case.unrotated()), rtol=0, atol=1e-3)
