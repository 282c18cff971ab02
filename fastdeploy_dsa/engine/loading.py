"""From a model folder to a runner with its cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_manager import CacheConfig, CacheController, HostAllocationFailed, WindowRoom, cache_bytes, most_blocks
from fastdeploy_dsa.attention.backend import AttentionBackend
from fastdeploy_dsa.attention.deepseek_v4.select import select_dsv4_attn_cls
from fastdeploy_dsa.attention.select import create_attention_backend
from fastdeploy_dsa.block_copier import PaddleBlockCopier
from fastdeploy_dsa.cache_layout import CACHE_FORMATS
from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.device import CPU
from fastdeploy_dsa.engine.decode_graphs import DecodeLimits, paddle_graphs
from fastdeploy_dsa.engine.progress import ProgressBar
from fastdeploy_dsa.engine.runner import ModelRunner
from fastdeploy_dsa.engine.speculative.mtp_runner import MtpRunner
from fastdeploy_dsa.models import (
    DraftModel,
    RunnableConfig,
    load_model,
    load_model_with_mtp,
    read_runnable_config,
)
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


def read_model_config(folder: Path, hf_overrides: Mapping[str, Any] | None) -> RunnableConfig:
    """The configuration of a model folder.

    Raises:
        ValueError: The folder does not exist, or the configuration is refused.
    """
    if not folder.is_dir():
        raise ValueError(
            "model: expected a folder with config.json and safetensors files (nothing is downloaded), "
            f"got {str(folder)!r}"
        )
    return read_runnable_config(folder, hf_overrides)


_NO_ROOM = WindowRoom(num_requests=0, num_step_tokens=0, has_snapshots=False)


@dataclass(frozen=True)
class CacheOptions:
    """The cache a runner gets.

    Attributes:
        cache_dtype: Format of the entries.
        block_size: Tokens of a block.
        num_threads: Of the CPU ops; 0 means every processor the process may run on.
        device: Where model and cache are, Paddle's name.
        num_blocks: Main blocks; None: as many as memory_bytes holds, but no more than wanted_blocks.
        memory_bytes: What the cache may take, all layers and pools together.
        wanted_blocks: Main blocks with which nothing ever has to wait.
        host_bytes: Host memory for blocks that leave the device; 0: there is no such tier.
        room: What requests hold in window pools; only for models whose cache has any.
    """

    cache_dtype: CacheFormat
    block_size: int
    num_threads: int
    device: str
    num_blocks: int | None
    memory_bytes: int = 0
    wanted_blocks: int = 0
    host_bytes: int = 0
    room: WindowRoom = _NO_ROOM

    def choose_num_blocks(self, bytes_of: Callable[[int], int], *, has_windows: bool = False) -> int:
        """Main blocks of the cache.

        Args:
            bytes_of: Main blocks to bytes of the whole cache.
            has_windows: Whether window pools are part of it.

        Raises:
            ValueError: Not even one fits.
        """
        if self.num_blocks is not None:
            return self.num_blocks
        num_blocks = most_blocks(self.memory_bytes, self.wanted_blocks, bytes_of)
        if num_blocks == 0:
            windows = f" and the windows of {self.room.num_requests} requests" if has_windows else ""
            raise ValueError(
                f"cache_memory: expected room for a block of {self.block_size} tokens{windows} ({bytes_of(1)} bytes), "
                f"got {self.memory_bytes}"
            )
        return num_blocks

    def choose_num_host_blocks(self, bytes_of: Callable[[int], int]) -> int:
        """Main blocks of the host tier.

        Args:
            bytes_of: Main blocks to bytes of the whole host tier.

        Raises:
            ValueError: There should be some, but not even one fits, or nothing copies between device and host.
        """
        if self.host_bytes == 0:
            return 0
        if self.device != CPU:
            raise ValueError(f"swap_space: expected 0 on device {self.device!r}, got {self.host_bytes} bytes")
        num_blocks = most_blocks(self.host_bytes, self.host_bytes, bytes_of)
        if num_blocks == 0:
            raise ValueError(
                f"swap_space: expected 0 or room for a block of {self.block_size} tokens ({bytes_of(1)} bytes), "
                f"got {self.host_bytes}"
            )
        return num_blocks


@dataclass(frozen=True)
class LoadedModel:
    """A runner, and the owner of its cache.

    Attributes:
        runner: The model with its cache.
        draft_runner: The checkpoint's draft model with its own; None if it was not asked for.
        cache_controller: Has a host tier if one was asked for and could be allocated.
    """

    runner: ModelRunner
    draft_runner: MtpRunner | None
    cache_controller: CacheController

    @property
    def num_blocks(self) -> int:
        """Main blocks of the cache."""
        return self.cache_controller.num_device_blocks or 0


def load_runner(
    folder: Path,
    *,
    config: RunnableConfig,
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
    attention_cls = None
    if isinstance(config, CompressedConfig):
        attention_cls = select_dsv4_attn_cls(config, device=options.device, cache_format=options.cache_dtype)
    draft_models: tuple[DraftModel, ...] = ()
    with ProgressBar("loading weights", 1, is_wanted=progress) as bar:
        if drafts:
            model, draft_models = load_model_with_mtp(
                folder, config=config, on_tensor=bar.update, attention_cls=attention_cls
            )
        else:
            model = load_model(folder, config=config, on_tensor=bar.update, attention_cls=attention_cls)
    cpu = CpuOptions(num_threads=options.num_threads)
    backend = create_attention_backend(
        model.config,
        cache_dtype=options.cache_dtype,
        block_size=options.block_size,
        cpu=cpu,
        device=options.device,
    )
    num_layers = model.config.num_hidden_layers
    controller = create_controller(backend, options, num_layers, len(draft_models))
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
        draft_runner = MtpRunner(draft_models, backend, controller.caches, block_size=options.block_size)
    return LoadedModel(runner, draft_runner, controller)


def create_controller(
    backend: AttentionBackend, options: CacheOptions, num_layers: int, num_draft_layers: int
) -> CacheController:
    """Allocate the caches of the target and its draft model.

    Raises:
        ValueError: The cache or its host tier is too small for a block.
    """
    specs = backend.cache_spec(tuple(range(num_layers + num_draft_layers)))
    pools, room = backend.cache_pools(), options.room
    num_blocks = options.choose_num_blocks(
        lambda count: cache_bytes(specs, count, room.device_blocks(pools, count)), has_windows=bool(pools)
    )
    num_host_blocks = options.choose_num_host_blocks(
        lambda count: cache_bytes(specs, count, room.host_blocks(pools, count))
    )
    cache_config = CacheConfig(
        num_layers=num_layers,
        num_host_blocks=num_host_blocks,
        window_blocks=room.device_blocks(pools, num_blocks),
        host_window_blocks=room.host_blocks(pools, num_host_blocks) if num_host_blocks else {},
    )
    controller = CacheController(cache_config, copier=PaddleBlockCopier(CpuOptions(num_threads=options.num_threads)))
    controller.initialize_kv_cache(backend, num_blocks)
    if num_draft_layers:
        controller.initialize_mtp_kv_cache(backend, num_blocks, num_draft_layers, layer_offset=num_layers)
    return controller
