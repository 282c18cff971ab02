"""Puts this package's classes where FastDeploy looks for its own. Nothing of FastDeploy's is edited."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from fastdeploy_dsa.integrations.fastdeploy.capabilities import Capabilities, fastdeploy_folder, find_capabilities
from fastdeploy_dsa.integrations.fastdeploy.log_table import capability_rows, format_table
from fastdeploy_dsa.integrations.fastdeploy.settings import read_settings

_HERE = "fastdeploy_dsa.integrations.fastdeploy"
BACKEND_OF_NAME = {
    "DSA_ATTN": f"{_HERE}.dsa_backend.FastDeployDSABackend",
    "MLA_ATTN": f"{_HERE}.mla_backend.FastDeployMLABackend",
}


@cache
def install() -> Capabilities:
    """Route the backends, register the models and take over the block sizes; once per process.

    Raises:
        PluginError: As plugin.register.
    """
    fastdeploy_folder()
    read_settings()
    found = find_capabilities()
    found.require()
    _route_backends()
    _register_models(found)
    _take_over_block_sizes()
    _log(found)
    logging.getLogger("fastdeploy_dsa").setLevel(logging.INFO)  # what is served belongs into a server's log
    return found


def install_runner() -> type[Any]:
    """The runner class; binds the cache controller's name in the runner's module.

    Raises:
        PluginError: As plugin.register.
    """
    found = install()
    from fastdeploy_dsa.integrations.fastdeploy.runner import runner_class

    return runner_class(found)


def _route_backends() -> None:
    from fastdeploy.platforms import _Backend
    from fastdeploy.platforms.cpu import CPUPlatform
    from fastdeploy.platforms.cuda import CUDAPlatform

    routes = {_Backend.__members__[name]: target for name, target in BACKEND_OF_NAME.items()}
    for platform in (CUDAPlatform, CPUPlatform):
        inherited = platform.get_attention_backend_cls

        def choose(selected: Any, inherited: Any = inherited) -> Any:
            return routes[selected] if selected in routes else inherited(selected)

        platform.get_attention_backend_cls = staticmethod(choose)


def _register_models(found: Capabilities) -> None:
    from fastdeploy.model_executor.models.model_base import ModelCategory, ModelRegistry

    from fastdeploy_dsa.integrations.fastdeploy import model

    classes: list[tuple[type[Any], str, str]] = [(model.DeepseekV32ForCausalLM, "DeepseekV32ForCausalLM", "model")]
    if found.has_glm:
        classes.append((model.GlmMoeDsaForCausalLM, "GlmMoeDsaForCausalLM", "model"))
    if found.has_draft_head:
        from fastdeploy_dsa.integrations.fastdeploy import mtp

        classes.append((mtp.SparseMTPForCausalLM, mtp.SparseMTPForCausalLM.name(), "mtp"))
    for model_class, architecture, module_name in classes:
        ModelRegistry.register_model_class(
            architecture=architecture,
            module_name=module_name,
            module_path=_HERE,
            category=ModelCategory.TEXT_GENERATION,
            primary_use=ModelCategory.TEXT_GENERATION,
        )(model_class)


def _take_over_block_sizes() -> None:
    from fastdeploy.config import CacheConfig

    from fastdeploy_dsa.integrations.fastdeploy.sizing import size_host_cache

    inherited = CacheConfig.__init__

    def initialize(self: Any, args: dict[str, Any]) -> None:
        inherited(self, args)
        size_host_cache(self, args)

    CacheConfig.__init__ = initialize


def _log(found: Capabilities) -> None:
    from fastdeploy.utils import llm_logger

    for line in format_table(capability_rows(found)).splitlines():
        llm_logger.info("fastdeploy_dsa: %s", line)
