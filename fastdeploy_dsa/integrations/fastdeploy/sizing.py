"""How many bytes a cache block takes, for FastDeploy's configuration and runner: from the declared layouts alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdeploy_dsa.cache_plan import plan_cache, without_sharing
from fastdeploy_dsa.config import DsaConfig, MlaConfig, ModelConfig
from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError
from fastdeploy_dsa.integrations.fastdeploy.served_model import ARCHITECTURES, read_served_config
from fastdeploy_dsa.integrations.fastdeploy.settings import read_settings
from fastdeploy_dsa.ops import CacheFormat

GIB = 1 << 30


def block_bytes(
    config: ModelConfig,
    *,
    cache_format: CacheFormat,
    block_size: int,
    num_draft_layers: int = 0,
    draft_ratio: float = 1.0,
    is_inline: bool = False,
) -> int:
    """Bytes of one block over all layers of the model and its draft model.

    Args:
        config: The model.
        cache_format: Of the caches.
        block_size: Tokens of a block.
        num_draft_layers: Layers of the draft model.
        draft_ratio: Blocks of the draft model for each of the model's.
        is_inline: FastDeploy's runner allocates, which gives every layer every role.
    """
    shared = without_sharing(config) if is_inline else config
    main = tuple(range(config.num_hidden_layers))
    drafts = tuple(range(config.num_hidden_layers, config.num_hidden_layers + num_draft_layers))

    def of(layers: tuple[int, ...]) -> int:
        plan = plan_cache(shared, cache_format=cache_format, block_size=block_size, layer_ids=layers)
        return sum(span.spec.bytes_per_block_all_layers for span in plan.spans)

    return of(main) + (int(of(drafts) * draft_ratio) if drafts else 0)


def size_host_cache(cache_config: Any, args: Mapping[str, Any]) -> None:
    """Correct a CacheConfig that was just made: bytes of a block, and the blocks that --swap-space holds.

    FastDeploy takes heads times head_dim; a latent cache has neither.

    Args:
        cache_config: A CacheConfig.
        args: What it was made of.

    Raises:
        PluginError: A host cache is asked for that this setting cannot have.
    """
    import paddle
    from fastdeploy import envs

    model = getattr(cache_config, "model_cfg", None)
    backend = envs.FD_ATTENTION_BACKEND
    if model is None or backend not in ("DSA_ATTN", "MLA_ATTN"):
        return
    config = _latent_config(model, backend)
    cache_format: CacheFormat = "bfloat16"
    if backend == "DSA_ATTN":
        cache_format = read_settings().resolved_cache_format(str(paddle.device.get_device()))
    uses_controller = bool(getattr(envs, "ENABLE_V1_KVCACHE_MANAGER", 0))
    cache_config.bytes_per_block = block_bytes(
        config,
        cache_format=cache_format,
        block_size=cache_config.block_size,
        num_draft_layers=_num_draft_layers(args),
        is_inline=not uses_controller,
    )
    cache_config.bytes_per_token_per_layer = cache_config.bytes_per_block // (
        cache_config.block_size * config.num_hidden_layers
    )
    if args.get("num_cpu_blocks") is None and cache_config.swap_space is not None:
        cache_config.num_cpu_blocks = int(cache_config.swap_space * GIB) // cache_config.bytes_per_block
    if backend == "DSA_ATTN" and cache_config.num_cpu_blocks and not uses_controller:
        raise PluginError(
            "--swap-space with DSA_ATTN needs ENABLE_V1_KVCACHE_MANAGER=1: FastDeploy's v0 cache manager does not "
            "move the index cache"
        )


def _latent_config(model: Any, backend: str) -> MlaConfig:
    if backend == "DSA_ATTN":
        config: ModelConfig = read_served_config(model.model, read_settings().overrides)
    else:
        config = ModelConfig.from_pretrained(model.model)
    if not isinstance(config, MlaConfig) or (backend == "DSA_ATTN") != isinstance(config, DsaConfig):
        raise PluginError(
            f"FD_ATTENTION_BACKEND={backend} does not fit {config.architecture}: DSA_ATTN serves "
            f"{', '.join(ARCHITECTURES)}, MLA_ATTN models with latent attention and no indexer"
        )
    return config


def _num_draft_layers(args: Mapping[str, Any]) -> int:
    speculative = args.get("speculative_config")
    return 1 if isinstance(speculative, Mapping) and speculative.get("method") == "mtp" else 0
