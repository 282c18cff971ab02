"""What the plug-in found and chose, as one table for the log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fastdeploy_dsa.integrations.fastdeploy.capabilities import Capabilities
from fastdeploy_dsa.integrations.fastdeploy.settings import VARIABLE, Settings

Row = tuple[str, str, str]
HEADER: Row = ("part", "found", "chosen")


def is_allowed(environ: Mapping[str, str]) -> bool:
    """Whether FastDeploy loads the plug-in: it loads none that FD_PLUGINS does not name."""
    return "fastdeploy_dsa" in environ.get("FD_PLUGINS", "").split(",")


def switch_rows(environ: Mapping[str, str], settings: Settings) -> tuple[Row, ...]:
    """The plug-in's own two variables."""
    live = "live" if is_allowed(environ) else "FastDeploy does not load the plug-in"
    replaced = ", ".join([*settings.overrides, *(["cache_format"] if settings.cache_format else [])])
    return (
        ("FD_PLUGINS", environ.get("FD_PLUGINS") or "not set", live),
        (VARIABLE, environ.get(VARIABLE) or "not set", replaced or "nothing replaced"),
    )


def capability_rows(found: Capabilities) -> tuple[Row, ...]:
    """A line for every decision that depends on the version or on a variable of FastDeploy."""
    allocation = "backends create their caches" if found.has_owned_caches else "backends are asked for shapes"
    if not found.has_cache_controller:
        manager, controller = "no v1 cache manager", "FastDeploy allocates: every layer has every role, no host cache"
    elif found.uses_cache_controller:
        manager, controller = "v1 cache manager, on", "this package's cache controller, host cache included"
    else:
        manager = "v1 cache manager, off (ENABLE_V1_KVCACHE_MANAGER=0)"
        controller = "FastDeploy allocates: every layer has every role, no host cache"
    drafts = "draft models registered" if found.has_draft_head else "no draft models"
    if not found.uses_cache_controller:
        drafts = "refused: a draft model needs the v1 cache manager"
    is_routed = found.attention_backend in ("DSA_ATTN", "MLA_ATTN")
    return (
        ("FastDeploy", f"{found.version}, {found.folder}", "served with"),
        (
            "FD_ATTENTION_BACKEND",
            found.attention_backend,
            "replaced" if is_routed else "FastDeploy's own: plug-in idle",
        ),
        ("DSA_ATTN", "DSAAttentionBackend", "FastDeployDSABackend"),
        ("MLA_ATTN", "MLAAttentionBackend", "FastDeployMLABackend (cache and sizes)"),
        ("DeepseekV32ForCausalLM", "registered", "replaced"),
        ("GlmMoeDsaForCausalLM", "registered" if found.has_glm else "absent", "replaced" if found.has_glm else "-"),
        ("MTP", "ParallelEHProjection" if found.has_draft_head else "no MTP layers", drafts),
        ("cache allocation", allocation, "FastDeploy's names and order, this package's layouts"),
        ("cache manager", manager, controller),
        ("block sizes", "formulas in config and runner", "from the declared layouts"),
    )


def format_table(rows: Iterable[Row], header: Sequence[str] = HEADER) -> str:
    """Rows as aligned text with a line under the header."""
    lines = [tuple(header), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([shown[0], "  ".join("-" * width for width in widths), *shown[1:]])
