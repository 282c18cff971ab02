"""From a model folder to a runner with its cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_manager import CacheConfig, CacheController, HostAllocationFailed
from fastdeploy_dsa.attention.dsa import DSAAttentionBackend
from fastdeploy_dsa.attention.select import create_attention_backend
from fastdeploy_dsa.block_copier import PaddleBlockCopier
from fastdeploy_dsa.cache_layout import CACHE_FORMATS
from fastdeploy_dsa.config import DsaConfig
from fastdeploy_dsa.device import CPU
from fastdeploy_dsa.engine.decode_graphs import DecodeLimits, paddle_graphs
from fastdeploy_dsa.engine.progress import ProgressBar
from fastdeploy_dsa.engine.runner import ModelRunner
from fastdeploy_dsa.engine.speculative.mtp_runner import MtpRunner
from fastdeploy_dsa.models import MtpModel, load_model, load_model_with_mtp
from fastdeploy_dsa.ops import CacheFormat, CpuOptions


def read_cache_dtype(name: object, device: str) -> CacheFormat:
    """The cache format of a name; "auto" is what the device computes in: float32 on the CPU, fp8 on a GPU.

    Raises:
        ValueError: The name is unknown.
    """
    if name == "auto":
        return "float32" if device == CPU else "fp8"
    for cache_format in CACHE_FORMATS:
        if name == cache_format:
            return cache_format
    raise ValueError(f"cache_dtype: expected one of auto, {', '.join(CACHE_FORMATS)}, got {name!r}")


def read_model_config(folder: Path, hf_overrides: Mapping[str, Any] | None) -> DsaConfig:
    """The configuration of a model folder.

    Raises:
        ValueError: The folder does not exist, or the configuration is refused.
    """
    if not folder.is_dir():
        raise ValueError(
            "model: expected a folder with config.json and safetensors files (nothing is downloaded), "
            f"got {str(folder)!r}"
        )
    return DsaConfig.from_pretrained(folder, overrides=hf_overrides)


@dataclass(frozen=True)
class CacheOptions:
    """The cache a runner gets.

    Attributes:
        cache_dtype: Format of the entries.
        block_size: Tokens of a block.
        num_threads: Of the CPU ops; 0 means every processor the process may run on.
        device: Where model and cache are, Paddle's name.
        num_blocks: Blocks; None: as many as memory_bytes holds, but no more than wanted_blocks.
        memory_bytes: What the cache may take, all layers together.
        wanted_blocks: Blocks with which nothing ever has to wait.
        host_bytes: Host memory for blocks that leave the device; 0: there is no such tier.
    """

    cache_dtype: CacheFormat
    block_size: int
    num_threads: int
    device: str
    num_blocks: int | None
    memory_bytes: int = 0
    wanted_blocks: int = 0
    host_bytes: int = 0

    def choose_num_blocks(self, bytes_per_block: int) -> int:
        """Blocks of the cache.

        Raises:
            ValueError: Not even one fits.
        """
        if self.num_blocks is not None:
            return self.num_blocks
        if self.memory_bytes < bytes_per_block:
            raise ValueError(
                f"cache_memory: expected room for a block of {self.block_size} tokens ({bytes_per_block} bytes), "
                f"got {self.memory_bytes}"
            )
        return min(self.wanted_blocks, self.memory_bytes // bytes_per_block)

    def num_host_blocks(self, bytes_per_block: int) -> int:
        """Blocks of the host tier.

        Raises:
            ValueError: There should be some, but not even one fits, or nothing copies between device and host.
        """
        if self.host_bytes > 0 and self.device != CPU:
            raise ValueError(f"swap_space: expected 0 on device {self.device!r}, got {self.host_bytes} bytes")
        if 0 < self.host_bytes < bytes_per_block:
            raise ValueError(
                f"swap_space: expected 0 or room for a block of {self.block_size} tokens ({bytes_per_block} bytes), "
                f"got {self.host_bytes}"
            )
        return self.host_bytes // bytes_per_block


@dataclass(frozen=True)
class LoadedModel:
    """A runner, and the owner of its cache.

    Attributes:
        runner: The model with its cache.
        draft_runner: The checkpoint's draft model with its own; None if it was not asked for.
        cache_controller: Has a host tier if one was asked for and could be allocated.
        num_blocks: Of the cache.
    """

    runner: ModelRunner
    draft_runner: MtpRunner | None
    cache_controller: CacheController
    num_blocks: int


def load_runner(
    folder: Path,
    *,
    config: DsaConfig,
    options: CacheOptions,
    progress: bool | None,
    drafts: bool = False,
    decode_limits: DecodeLimits | None = None,
) -> LoadedModel:
    """Load the weights and allocate the caches.

    Args:
        folder: The checkpoint.
        config: Of the model.
        options: Of the caches.
        progress: As LLM.
        drafts: Whether the checkpoint's draft model is wanted.
        decode_limits: The largest decode step; steps within are captured as graphs where device and model allow it.

    Raises:
        ValueError: As load_model_with_mtp and create_attention_backend, or the cache or its host tier is too small for
            a block.
    """
    draft_models: tuple[MtpModel, ...] = ()
    with ProgressBar("loading weights", 1, is_wanted=progress) as bar:
        if drafts:
            model, draft_models = load_model_with_mtp(folder, config=config, on_tensor=bar.update)
        else:
            model = load_model(folder, config=config, on_tensor=bar.update)
    cpu = CpuOptions(num_threads=options.num_threads)
    backend = create_attention_backend(
        model.config,
        cache_dtype=options.cache_dtype,
        block_size=options.block_size,
        cpu=cpu,
        device=options.device,
    )
    num_layers = model.config.num_hidden_layers
    bytes_per_block = backend.bytes_per_block(num_layers + len(draft_models))
    num_blocks = options.choose_num_blocks(bytes_per_block)
    cache_config = CacheConfig(num_layers=num_layers, num_host_blocks=options.num_host_blocks(bytes_per_block))
    controller = CacheController(cache_config, copier=PaddleBlockCopier(cpu))
    controller.initialize_kv_cache(backend, num_blocks)
    if draft_models:
        controller.initialize_mtp_kv_cache(backend, num_blocks, len(draft_models), layer_offset=num_layers)
    try:
        controller.initialize_host_cache()
    except HostAllocationFailed as failure:
        logging.getLogger(__name__).warning("%s; going on without swap_space", failure)
    runner = ModelRunner(
        model,
        backend,
        controller.caches,
        block_size=options.block_size,
        decode_limits=decode_limits,
        # A draft model keeps hidden states over several steps; a graph's next replay would overwrite them.
        make_graph=None if drafts else paddle_graphs(options.device, model.capture_refusal),
    )
    draft_runner = None
    if draft_models:
        assert isinstance(backend, DSAAttentionBackend), "a model with an indexer has this one"  # noqa: S101
        draft_runner = MtpRunner(draft_models, backend, controller.caches, block_size=options.block_size)
    return LoadedModel(runner, draft_runner, controller, num_blocks)
