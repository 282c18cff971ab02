"""Which attention backend serves a model on a device: the same conditions choose and explain."""

from __future__ import annotations

from fastdeploy_dsa.attention.backend import AttentionBackend
from fastdeploy_dsa.attention.deepseek_v4.backend import DeepseekV4AttentionBackend
from fastdeploy_dsa.attention.dsa import DSAAttentionBackend
from fastdeploy_dsa.attention.gqa import GQAAttentionBackend
from fastdeploy_dsa.attention.mla import MLAAttentionBackend
from fastdeploy_dsa.cache_plan import compressed_sizes
from fastdeploy_dsa.config import CompressedConfig, DsaConfig, ModelConfig
from fastdeploy_dsa.device import CPU
from fastdeploy_dsa.ops import CacheFormat, CpuOptions

BACKENDS: tuple[type[AttentionBackend], ...] = (
    DeepseekV4AttentionBackend,
    DSAAttentionBackend,
    MLAAttentionBackend,
    GQAAttentionBackend,
)


def select_backend(config: ModelConfig, device: str) -> type[AttentionBackend]:
    """The first backend that supports the model on the device.

    Raises:
        ValueError: None does; the message has every backend's reason.
    """
    reasons = []
    for backend in BACKENDS:
        support = backend.supports(config, device)
        if support.ok:
            return backend
        reasons.append(f"{backend.__name__}: {support.reason}")
    raise ValueError(f"no attention backend for {config.architecture} on {device}: {'; '.join(reasons)}")


def create_attention_backend(
    config: ModelConfig,
    *,
    cache_dtype: CacheFormat,
    block_size: int = 64,
    cpu: CpuOptions | None = None,
    device: str = CPU,
) -> AttentionBackend:
    """Make the backend that serves the model on a device.

    Args:
        config: The model.
        cache_dtype: Number format of the caches.
        block_size: Tokens of a cache block.
        cpu: Options of the CPU ops.
        device: Paddle's name of the device.

    Raises:
        ValueError: No backend serves the model, or a size does not fit the format.
    """
    backend = select_backend(config, device)
    if issubclass(backend, DeepseekV4AttentionBackend) and isinstance(config, CompressedConfig):
        return backend(
            sizes=compressed_sizes(config),
            softmax_scale=config.softmax_scale,
            cache_format=cache_dtype,
            block_size=block_size,
            cpu=cpu,
        )
    if not (issubclass(backend, DSAAttentionBackend) and isinstance(config, DsaConfig)):
        raise ValueError(f"{config.architecture}: {backend.__name__} is made by its host framework")
    made = backend(
        index_head_dim=config.index_head_dim,
        index_schedule=config.index_schedule,
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        softmax_scale=config.softmax_scale,
        cache_format=cache_dtype,
        block_size=block_size,
        cpu=cpu,
    )
    made.bytes_per_block(config.num_hidden_layers)  # a size that does not fit the format raises here, not at first use
    return made
