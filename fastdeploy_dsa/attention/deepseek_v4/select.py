"""Which attention class serves DeepSeek-V4 on a device: the same conditions choose and explain."""

from __future__ import annotations

from fastdeploy_dsa.attention.deepseek_v4.base import DeepseekV4Attention
from fastdeploy_dsa.attention.deepseek_v4.flashmla import DeepseekV4FlashMLAAttention
from fastdeploy_dsa.attention.deepseek_v4.plain_rows import DeepseekV4PlainRowAttention
from fastdeploy_dsa.attention.deepseek_v4.reference import DeepseekV4ReferenceAttention
from fastdeploy_dsa.attention.dsa import DSAAttentionBackend
from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.device import CPU
from fastdeploy_dsa.ops import CacheFormat

ATTENTION_CLASSES: list[type[DeepseekV4Attention]] = [
    DeepseekV4FlashMLAAttention,
    DeepseekV4PlainRowAttention,
    DeepseekV4ReferenceAttention,
]
"""In order of preference."""


def select_dsv4_attn_cls(
    config: CompressedConfig, *, device: str = CPU, cache_format: CacheFormat = "float32", name: str | None = None
) -> type[DeepseekV4Attention]:
    """The first class that serves the model, or the one that is asked for by its name.

    Args:
        config: The model.
        device: Paddle's name of the device.
        cache_format: Of the caches.
        name: Name of a class; None: the first of ATTENTION_CLASSES that fits.

    Raises:
        ValueError: None fits, with the reason of each; an unknown name, or one whose class does not fit.
    """
    if name == DSAAttentionBackend.__name__:
        raise ValueError(f"name: {name} serves latent attention, {config.architecture} has compressed entries")
    asked_for = [cls for cls in ATTENTION_CLASSES if name in (None, cls.__name__)]
    if not asked_for:
        known = ", ".join(cls.__name__ for cls in ATTENTION_CLASSES)
        raise ValueError(f"name: expected one of {known}, got {name!r}")
    reasons = []
    for cls in asked_for:
        support = cls.supports(config, device, cache_format)
        if support.ok:
            return cls
        reasons.append(f"{cls.__name__}: {support.reason}")
    raise ValueError(f"no attention class for {config.architecture} on {device}: {'; '.join(reasons)}")
