"""Cache plans: published bytes, agreement with the backends, and what fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_manager import cache_bytes
from fastdeploy_dsa.attention.deepseek_v4.backend import DeepseekV4AttentionBackend
from fastdeploy_dsa.attention.mla import MLAAttentionBackend
from fastdeploy_dsa.attention.select import create_attention_backend
from fastdeploy_dsa.cache_plan import (
    DEFAULT_STEP_TOKENS,
    CachePlan,
    compressed_sizes,
    plan_cache,
    plan_stages,
    without_sharing,
)
from fastdeploy_dsa.config import CompressedConfig, MlaConfig, ModelConfig
from fastdeploy_dsa.engine.loading import CacheOptions, create_controller
from fastdeploy_dsa.engine.step_plan import SchedulerLimits
from fastdeploy_dsa.index_pattern import PUBLISHED_PATTERNS
from fastdeploy_dsa.ops import CacheFormat

CONFIGS = Path(__file__).parent / "configs"
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))


def config_of(name: str, **overrides: Any) -> ModelConfig:
    return ModelConfig.from_pretrained(CONFIGS / f"{name}.json", overrides)


def backbone(config: ModelConfig, cache_format: CacheFormat = "fp8") -> CachePlan:
    return plan_cache(config, cache_format=cache_format, layer_ids=tuple(range(config.num_hidden_layers)))


@pytest.mark.parametrize(
    ("name", "overrides", "without_draft", "with_draft"),
    [
        ("deepseek_v2_lite", {}, 27 * 656, 27 * 656),
        ("deepseek_v3", {}, 61 * 656, 62 * 656),
        ("deepseek_v32", {}, 48068, 48856),
        ("deepseek_v32", {"index_topk_freq": 2}, 44108, 44896),
        ("deepseek_v32", {"index_topk_freq": 4}, 42128, 42916),
        ("glm_5", {}, 61464, 62252),
        ("glm_5", {"index_topk_pattern": PUBLISHED_PATTERNS[1].letters}, 54072, 54860),
        ("glm_52", {}, 53940, 54728),
        ("deepseek_v4_flash", {}, 3915, 3915),
        ("deepseek_v4_pro", {}, 5609.25, 5609.25),
    ],
)
def test_bytes_per_token_are_the_published_ones(
    name: str, overrides: dict[str, Any], without_draft: float, with_draft: float
) -> None:
    config = config_of(name, **overrides)
    assert backbone(config).bytes_per_token == without_draft
    assert plan_cache(config, cache_format="fp8").bytes_per_token == with_draft


@pytest.mark.parametrize(
    ("name", "unpadded", "window_bytes", "state_bytes"),
    [
        ("deepseek_v4_flash", 3850.25, 3214336, 12206080),
        ("deepseek_v4_pro", 5511.4375, 4559872, 18710528),
    ],
)
def test_compressed_models_need_the_published_bytes(
    name: str, unpadded: float, window_bytes: int, state_bytes: int
) -> None:
    plan = backbone(config_of(name))
    live = {"swa": 0, "state": 0}
    for span in plan.spans:
        if span.live_tokens is not None:
            live["swa" if span.spec.role == "swa" else "state"] += span.live_bytes * len(span.spec.layer_ids)
    assert plan.unpadded_bytes_per_token == unpadded
    assert live == {"swa": window_bytes, "state": state_bytes}


def test_bfloat16_rows_take_what_they_take() -> None:
    assert backbone(config_of("deepseek_v32"), "bfloat16").bytes_per_token == 61 * (1152 + 256)
    assert backbone(config_of("deepseek_v3"), "bfloat16").bytes_per_token == 61 * 1152


@pytest.mark.parametrize("cache_format", ["fp8", "bfloat16", "float32"])
@pytest.mark.parametrize(("name", "overrides"), [("deepseek_v32", {"index_topk_freq": 4}), ("glm_52", {})])
def test_a_plan_is_what_the_backend_allocates(name: str, overrides: dict[str, Any], cache_format: CacheFormat) -> None:
    config = config_of(name, **overrides)
    backend = create_attention_backend(config, cache_dtype=cache_format)  # type: ignore[arg-type]
    layer_ids = tuple(range(config.num_layers))
    plan = plan_cache(config, cache_format=cache_format)
    assert tuple(span.spec for span in plan.spans) == backend.cache_spec(layer_ids)
    assert plan.bytes_per_token * backend.block_size == backend.bytes_per_block(config.num_layers)


def test_a_plan_of_dense_layers_is_what_their_backend_allocates() -> None:
    config = config_of("deepseek_v3")
    assert isinstance(config, MlaConfig)
    backend = MLAAttentionBackend(
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        softmax_scale=config.softmax_scale,
        cache_format="fp8",
    )
    specs = tuple(span.spec for span in plan_cache(config, cache_format="fp8").spans)
    assert specs == backend.cache_spec(tuple(range(config.num_layers)))


def test_sharing_saves_the_index_cache() -> None:
    config = config_of("glm_52")
    assert backbone(without_sharing(config)).bytes_per_token - backbone(config).bytes_per_token == 57 * 132


def test_stages_hold_all_layers_once_and_the_draft_layers_last() -> None:
    config = config_of("glm_52")
    stages = plan_stages(config, (0, 39), cache_format="fp8")
    assert [stage.layer_ids for stage in stages] == [tuple(range(39)), tuple(range(39, 79))]
    assert sum(stage.bytes_per_token for stage in stages) == plan_cache(config, cache_format="fp8").bytes_per_token


@pytest.mark.parametrize("name", NAMES)
@UNHURRIED
@given(memory=st.integers(1, 1 << 40), length=st.integers(1, 1 << 20))
def test_what_is_said_to_fit_fits_and_no_more(name: str, memory: int, length: int) -> None:
    plan = plan_cache(config_of(name), cache_format="fp8")
    requests = plan.max_requests(memory, length)
    assert requests is not None
    assert requests == 0 or plan.allocated_bytes(requests, length) <= memory
    assert memory < plan.allocated_bytes(requests + 1, length)
    assert plan.pools or plan.allocated_bytes(requests, length) == requests * plan.request_bytes(length)
    tokens = plan.max_tokens(memory)
    assert tokens is not None
    assert tokens == 0 or plan.allocated_bytes(1, tokens) <= memory
    assert memory < plan.allocated_bytes(1, tokens + 1)


@pytest.mark.parametrize("cache_format", ["fp8", "bfloat16"])
@pytest.mark.parametrize("name", ["deepseek_v4_flash", "deepseek_v4_pro"])
def test_capacity_is_what_the_engine_allocates(name: str, cache_format: CacheFormat) -> None:
    config = config_of(name)
    assert isinstance(config, CompressedConfig)
    block_size, memory, length = 256, 700 << 20, 1000
    plan = plan_cache(config, cache_format=cache_format)
    requests = plan.max_requests(memory, length)
    assert requests is not None
    assert requests >= 1
    limits = SchedulerLimits(DEFAULT_STEP_TOKENS, requests, length, block_size)
    options = CacheOptions(
        cache_format,
        block_size,
        num_threads=1,
        device="cpu",
        num_blocks=None,
        memory_bytes=memory,
        wanted_blocks=requests * limits.num_blocks(length),
        room=limits.window_room(has_snapshots=True),
    )
    backend = DeepseekV4AttentionBackend(
        sizes=compressed_sizes(config), softmax_scale=1.0, cache_format=cache_format, block_size=block_size
    )
    controller = create_controller(backend, options, config.num_hidden_layers, config.num_nextn_predict_layers)
    allocated = sum(tensor.numel().item() * tensor.element_size() for tensor in controller.caches.values())
    assert controller.num_bytes == allocated == plan.allocated_bytes(requests, length) <= memory
    assert controller.num_device_blocks == requests * 4
    assert plan.allocated_bytes(requests + 1, length) > memory
    least = cache_bytes(backend.cache_spec(plan.layer_ids), 1, options.room.device_blocks(plan.pools, 1))
    few = replace(options, memory_bytes=least - 1)
    message = rf"cache_memory: .* 256 tokens and the windows of {requests} requests \({least} bytes\), got"
    with pytest.raises(ValueError, match=message):
        create_controller(backend, few, config.num_hidden_layers, config.num_nextn_predict_layers)


def test_layers_without_a_growing_cache_set_no_limit() -> None:
    plan = plan_cache(config_of("deepseek_v4_flash"), cache_format="fp8", layer_ids=(0, 1))
    assert plan.max_tokens(1) is None
    assert plan_cache(config_of("deepseek_v4_flash"), cache_format="fp8", layer_ids=()).max_requests(1, 10) is None
