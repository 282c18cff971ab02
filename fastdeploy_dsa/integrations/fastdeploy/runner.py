"""FastDeploy's GPU model runner with this package's cache controller and block sizes."""

from __future__ import annotations

from typing import Any

from fastdeploy.worker import gpu_model_runner

from fastdeploy_dsa.integrations.fastdeploy.capabilities import Capabilities
from fastdeploy_dsa.integrations.fastdeploy.dsa_backend import FastDeployDSABackend
from fastdeploy_dsa.integrations.fastdeploy.sizing import block_bytes


class FastDeployModelRunner(gpu_model_runner.GPUModelRunner):  # type: ignore[misc]
    """Differs from FastDeploy's where sizes and the life of the cache are concerned, for this package's backend."""

    _captured_generation: int | None = None

    def cal_theortical_kvcache(self) -> int:
        """Bytes of one block over all layers, those of the draft model included; FastDeploy's spelling."""
        backend = self.attn_backends[0] if self.attn_backends else None
        if not isinstance(backend, FastDeployDSABackend):
            return int(super().cal_theortical_kvcache())
        has_drafts = self._has_draft_model()
        return block_bytes(
            backend.served.config,
            cache_format=backend.cache_format,
            block_size=backend.block_size,
            num_draft_layers=1 if has_drafts else 0,
            draft_ratio=self.speculative_config.num_gpu_block_expand_ratio if has_drafts else 1.0,
            is_inline=not getattr(self, "enable_cache_manager_v1", False),
        )

    def initialize_kv_cache(self, profile: bool = False) -> None:
        """Allocate the caches; the host tier after all others, and not for the profile run with its passing sizes."""
        super().initialize_kv_cache(profile)
        if not profile and getattr(self, "enable_cache_manager_v1", False):
            self.cache_controller.initialize_host_cache(self.attn_backends[0])

    def initialize_forward_meta(self, *args: Any, **kwargs: Any) -> None:
        """Begin a step; a captured one reads all layers without a stop, so every load must be there before."""
        super().initialize_forward_meta(*args, **kwargs)
        controller = getattr(self, "cache_controller", None)
        if controller is None or not self.forward_meta.step_use_cudagraph:
            return
        if self.forward_meta.layer_done_counter is not None:
            self.forward_meta.layer_done_counter.wait_all()
        if controller.owned.groups:
            controller.owned.check_pinned_addresses(self._captured_generation)

    def capture_model(self, *args: Any, **kwargs: Any) -> Any:
        """Capture the graphs, and remember which allocation of the caches they hold the addresses of."""
        self._captured_generation = None
        captured = super().capture_model(*args, **kwargs)
        controller = getattr(self, "cache_controller", None)
        self._captured_generation = None if controller is None else controller.owned.generation
        return captured

    def _has_draft_model(self) -> bool:
        return bool(self.speculative_config.method == "mtp")  # a string or an enumeration of strings


def runner_class(found: Capabilities) -> type[Any]:
    """The runner; binds the cache controller in FastDeploy's runner module, where its name is looked up."""
    if found.has_cache_controller:
        from fastdeploy_dsa.integrations.fastdeploy.cache_controller import (
            FastDeployCacheController,
        )

        gpu_model_runner.CacheController = FastDeployCacheController
    return FastDeployModelRunner
