"""What a FastDeploy version offers: found by looking at its classes, never by its version number.

Version numbers of development trees are all alike; what decides is whether a class, a method or a parameter is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError

_ATTENTION = "fastdeploy.model_executor.layers.attention"
_MODELS = "fastdeploy.model_executor.models"

REQUIRED: dict[str, tuple[str, ...]] = {
    "fastdeploy.platforms._Backend.DSA_ATTN": (),
    f"{_ATTENTION}.dsa_attention_backend.DSAAttentionBackend.__init__": ("fd_config", "num_heads", "head_dim"),
    f"{_ATTENTION}.dsa_attention_backend.DSAAttentionBackend.init_attention_metadata": ("forward_meta",),
    f"{_ATTENTION}.dsa_attention_backend.DSAAttentionBackend.forward_mixed": (
        *("q", "k", "v", "qkv", "compressed_kv", "k_pe", "layer", "forward_meta"),
    ),
    f"{_MODELS}.deepseek_v3.Indexer.__init__": ("fd_config", "layer_id", "prefix"),
    f"{_MODELS}.deepseek_v3.DeepseekV32DSAAttention.__init__": ("fd_config", "layer_id", "prefix"),
    f"{_MODELS}.deepseek_v3.DeepseekV32DSAAttention.forward": ("forward_meta", "hidden_states"),
    f"{_MODELS}.deepseek_v3.DeepseekV32ForCausalLM.load_weights": ("weights_iterator",),
    f"{_MODELS}.model_base.ModelRegistry.register_model_class": ("architecture", "module_name", "module_path"),
}
"""What the plug-in cannot do without: dotted name to the parameters it passes by keyword."""


@dataclass(frozen=True)
class Capabilities:
    """A FastDeploy version as the plug-in sees it.

    Attributes:
        version: From its metadata or version file.
        folder: Where it is.
        obstacles: Why the plug-in cannot serve with it; empty if it can.
        has_glm: The GLM-5 architecture.
        has_draft_head: The projection of an MTP layer, which the draft models need.
        has_owned_caches: Backends create their cache; else FastDeploy asks them for shapes.
        has_cache_controller: The v1 cache manager.
        uses_cache_controller: It is switched on.
        attention_backend: FD_ATTENTION_BACKEND.
    """

    version: str
    folder: str
    obstacles: tuple[str, ...]
    has_glm: bool
    has_draft_head: bool
    has_owned_caches: bool
    has_cache_controller: bool
    uses_cache_controller: bool
    attention_backend: str

    def require(self) -> None:
        """Go on only with a version that can be served with.

        Raises:
            PluginError: The version and everything that is missing.
        """
        if self.obstacles:
            raise PluginError(
                f"FastDeploy {self.version} in {self.folder} cannot be served with: {'; '.join(self.obstacles)}. "
                "Sparse attention came with the development tree of March 2026 and release 2.6."
            )


def fastdeploy_folder() -> Path:
    """Where FastDeploy is installed; it is not imported.

    Raises:
        PluginError: It is not there.
    """
    spec = importlib.util.find_spec("fastdeploy")
    if spec is None or spec.origin is None:
        raise PluginError(
            "FastDeploy is not installed in this environment: the plug-in (FD_PLUGINS=fastdeploy_dsa) has nothing to "
            "plug into"
        )
    return Path(spec.origin).parent


def find_capabilities() -> Capabilities:
    """Look at the FastDeploy of this environment, importing what is looked at.

    Raises:
        PluginError: There is none.
    """
    folder = fastdeploy_folder()
    has_controller = _is_there("fastdeploy.cache_manager.v1.cache_controller.CacheController")
    return Capabilities(
        version=_version(folder),
        folder=str(folder),
        obstacles=_obstacles(),
        has_glm=_is_there(f"{_MODELS}.glm_moe_dsa.GlmMoeDsaForCausalLM"),
        has_draft_head=_is_there("fastdeploy.model_executor.layers.mtp_linear.ParallelEHProjection"),
        has_owned_caches=_is_there(f"{_ATTENTION}.base_attention_backend.AttentionBackend.create_kv_cache"),
        has_cache_controller=has_controller,
        uses_cache_controller=has_controller and bool(_environment("ENABLE_V1_KVCACHE_MANAGER")),
        attention_backend=str(_environment("FD_ATTENTION_BACKEND")),
    )


def _obstacles() -> tuple[str, ...]:
    """What of REQUIRED is not there, each class once however many of its methods are asked for."""
    reasons: dict[str, None] = {}
    for name, parameters in REQUIRED.items():
        reason, found = _walk(name)
        if found is None:
            reasons[reason] = None
            continue
        accepted = inspect.signature(found).parameters if parameters else {}
        absent = [parameter for parameter in parameters if parameter not in accepted]
        if absent:
            reasons[f"{name} takes no {', '.join(absent)}"] = None
    return tuple(reasons)


def _walk(name: str) -> tuple[str, Any]:
    """No reason and the object of a dotted name; else why it cannot be had, and None."""
    parts, cause = name.split("."), ""
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):  # else that part of the name is a class, or not there
                cause = f"{module} cannot be imported: {error}"
            continue
        for place, part in enumerate(parts[length:], start=length):
            found = getattr(found, part, None)
            if found is None:
                return cause or f"{'.'.join(parts[: place + 1])} is not there", None
        return "", found
    return cause or f"{parts[0]} is not there", None


def _is_there(name: str) -> bool:
    return _walk(name)[1] is not None


def _environment(name: str) -> Any:
    """A variable as FastDeploy reads it, with its default."""
    from fastdeploy import envs

    return getattr(envs, name, os.environ.get(name, ""))


def _version(folder: Path) -> str:
    """From the file a build writes, the installed package, or the default in a source tree's setup.py."""
    for file, pattern in ((folder / "version.txt", _BUILT), (folder.parent / "setup.py", _IN_SOURCE)):
        if file.is_file() and (found := pattern.search(file.read_text(encoding="utf-8"))):
            return found[1]
    for name in ("fastdeploy-gpu", "fastdeploy"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


_BUILT = re.compile(r"^fastdeploy version: *(\S+)", re.MULTILINE)
_IN_SOURCE = re.compile(r"FASTDEPLOY_VERSION\", \"([^\"]+)")
