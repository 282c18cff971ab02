"""An `Inspection` as a picture: the layers, their cache bytes, and how many requests fit at which length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdeploy_dsa.byte_sizes import written_bytes
from fastdeploy_dsa.inspection import Inspection
from fastdeploy_dsa.inspection_view import KIND_NAMES, written_number

INSTALL_COMMAND = "pip install 'fastdeploy-dsa[plot]'"

_KIND_COLOURS = {"mla": "#4C72B0", "dsa": "#2F5D8C", "swa": "#9A9A9A", "c4a": "#2F5D8C", "c128a": "#C08A3E"}
_SHARED_COLOUR = "#A9C4DE"
_ROLE_COLOURS = {"key": "#2F5D8C", "indexer": "#D1495B"}
_FIRST_LENGTH = 1024
_HALF_A_REQUEST = 0.5
_LEAST_GIB = 2.0**-20


def save_plot(inspection: Inspection, path: Path) -> None:
    """Draw and save.

    Raises:
        ValueError: matplotlib is missing, or the file name's ending is no picture format it can write.
        OSError: The file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an optional package
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise ValueError(f"plot: expected matplotlib to be installed, run {INSTALL_COMMAND}") from None
    endings = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lower().lstrip(".") not in endings:
        raise ValueError(f"plot: expected a file name ending such as .png, got {path.name!r}")
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic(
        [["kinds", "kinds"], ["layers", "layers"], ["bytes", "bytes"], ["total", "requests"]],
        height_ratios=[0.2, 0.5, 2.0, 2.1],
    )
    figure.suptitle(_title(inspection), x=0.01, ha="left", fontsize=13, fontweight="bold")
    _draw_layers(axes["layers"], axes["kinds"], inspection)
    _draw_bytes(axes["bytes"], inspection)
    _draw_total(axes["total"], inspection)
    _draw_requests(axes["requests"], inspection)
    figure.savefig(path, dpi=130)


def _title(inspection: Inspection) -> str:
    config, schedule = inspection.config, inspection.config.index_schedule
    parts = [config.architecture, f"{inspection.options.cache_format} cache"]
    parts.append(f"{written_number(inspection.plan.bytes_per_token)} bytes per token")
    if schedule.letters:
        shared = schedule.letters.count("S")
        parts.append(f"{len(schedule.letters) - shared} full, {shared} shared selections ({schedule.dialect})")
    return "  ·  ".join(parts)


def _draw_layers(axes: Any, legend_axes: Any, inspection: Inspection) -> None:
    """One tile a layer; a line leads from a full layer over the layers that share its selection."""
    labels: dict[str, str] = {}
    for layer in inspection.layers:
        colour = _SHARED_COLOUR if layer.index == "shared" else _KIND_COLOURS[layer.attention]
        kind = f"{layer.attention}: {KIND_NAMES[layer.attention]}"
        labels.setdefault(kind + (f", {layer.index}" if layer.index else ""), colour)
        axes.bar(layer.layer, 1, width=0.92, color=colour, hatch="///" if layer.is_draft else None, edgecolor="white")
    labels_of_draft = any(layer.is_draft for layer in inspection.layers)
    last_shared = {layer.source: layer.layer for layer in inspection.layers if layer.source is not None}
    for source, last in last_shared.items():
        axes.plot([source, last], [1.18, 1.18], color=_KIND_COLOURS["c4a"], linewidth=1.5, clip_on=False)
        axes.plot([source], [1.18], marker="o", markersize=3.5, color=_KIND_COLOURS["c4a"], clip_on=False)
    for stage in inspection.stages[1:]:
        axes.axvline(stage.layer_ids[0] - 0.5, color="black", linewidth=1.5, linestyle=":", ymax=1.25, clip_on=False)
    handles = [axes.bar(0, 0, color=colour, label=label) for label, colour in labels.items()]
    if labels_of_draft:
        handles.append(axes.bar(0, 0, color="white", edgecolor="grey", hatch="///", label="draft layer"))
    legend_axes.axis("off")
    legend = legend_axes.legend(
        handles=handles, ncols=len(handles), frameon=False, fontsize=8.5, loc="center left", borderaxespad=0.0
    )
    legend.set_in_layout(False)  # a wide one may not narrow the axes
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    _layer_axis(axes, inspection)


def _draw_bytes(axes: Any, inspection: Inspection) -> None:
    layers = inspection.layers
    below = [0.0] * len(layers)
    for role in _roles(inspection):
        heights = [layer.role_bytes.get(role, 0.0) for layer in layers]
        axes.bar(
            range(len(layers)),
            heights,
            bottom=below,
            width=0.92,
            color=_ROLE_COLOURS[role],
            edgecolor="white",
            label=role,
        )
        below = [bottom + height for bottom, height in zip(below, heights, strict=True)]
    full = [sum(inspection.unshared_plan.layer_bytes(layer.layer).values()) for layer in layers]
    spared = [layer.layer for layer in layers if full[layer.layer] > below[layer.layer]]
    if spared:
        axes.bar(
            spared,
            [full[layer] - below[layer] for layer in spared],
            bottom=[below[layer] for layer in spared],
            width=0.92,
            fill=False,
            edgecolor=_ROLE_COLOURS["indexer"],
            linestyle=":",
            linewidth=0.8,
            label="saved by sharing",
        )
    for number, stage in enumerate(inspection.stages[1:], 2):
        axes.axvline(stage.layer_ids[0] - 0.5, color="black", linewidth=1.5, linestyle=":")
        label = {"color": "white", "fontsize": 8.5, "bbox": {"facecolor": "black", "pad": 2.0}}
        middle = axes.get_xaxis_transform()
        axes.text(stage.layer_ids[0] - 0.5, 0.5, f"stage {number}", transform=middle, ha="center", **label)
    axes.set_title("Cache bytes per token and layer", loc="left", fontsize=11)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, fontsize=9)
    axes.set_xlabel("layer")
    axes.spines[["top", "right"]].set_visible(False)
    _layer_axis(axes, inspection)


def _draw_total(axes: Any, inspection: Inspection) -> None:
    plans = {"as configured": inspection.plan}
    if inspection.saved_bytes_per_token:
        plans["every layer full"] = inspection.unshared_plan
    for place, plan in enumerate(plans.values()):
        left = 0.0
        for role in _roles(inspection):
            width = sum(
                span.bytes_per_token * len(span.spec.layer_ids) for span in plan.spans if span.spec.role == role
            )
            axes.barh(place, width, left=left, height=0.55, color=_ROLE_COLOURS[role])
            text = f"{role}\n{written_number(width)}"
            if width > 0.1 * inspection.unshared_plan.bytes_per_token:
                axes.text(left + width / 2, place, text, ha="center", va="center", color="white")
            elif width:
                axes.text(left + width / 2, place - 0.3, text, ha="center", va="bottom", color=_ROLE_COLOURS[role])
            left += width
        axes.text(left, place, f"  {written_number(left)}", va="center", fontweight="bold")
    axes.set_yticks(range(len(plans)), list(plans))
    axes.set_ylim(len(plans) - 0.5, -0.65)
    axes.set_xlim(0, 1.18 * inspection.unshared_plan.bytes_per_token or 1)
    windows = sum(span.live_bytes * len(span.spec.layer_ids) for span in inspection.plan.spans)
    more = f" (and {written_bytes(windows)} per request)" if windows else ""
    axes.set_title(f"Bytes per token, all layers{more}", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_requests(axes: Any, inspection: Inspection) -> None:
    """Against the length of a request: how many fit into the memory, or what one takes if no memory was given."""
    longest = max(inspection.config.max_position_embeddings, inspection.max_len, 2 * _FIRST_LENGTH)
    lengths = [_FIRST_LENGTH]
    while lengths[-1] * 2 <= longest:
        lengths.append(lengths[-1] * 2)
    memory = inspection.options.memory_bytes
    if memory is None:
        points = [inspection.plan.request_bytes(length) / 1024**3 for length in lengths]
        axes.set_title("GiB of cache per request", loc="left", fontsize=11)
    else:
        points = [_fitting(inspection, memory, length) for length in lengths]
        axes.set_title(f"Requests that fit in {written_bytes(memory)} of cache per device", loc="left", fontsize=11)
    least = _HALF_A_REQUEST if memory is not None else _LEAST_GIB
    heights = [max(point, least) for point in points]  # 0 has no place on a logarithmic axis
    axes.plot(lengths, heights, marker="o", color=_ROLE_COLOURS["key"])
    for length, point, height in zip(lengths, points, heights, strict=True):
        text = f"{point:.0f}" if memory is not None else f"{point:.3g}"
        axes.annotate(text, (length, height), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.axvline(inspection.max_len, color="grey", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(min(heights) / 1.5, max(heights) * 3)
    axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens of a request")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _fitting(inspection: Inspection, memory: int, length: int) -> float:
    limits = [stage.max_requests(memory, length) for stage in inspection.stages]
    return min((limit for limit in limits if limit is not None), default=0)


def _roles(inspection: Inspection) -> list[str]:
    return list(dict.fromkeys(span.spec.role for span in inspection.plan.spans if span.live_tokens is None))


def _layer_axis(axes: Any, inspection: Inspection) -> None:
    count = len(inspection.layers)
    axes.set_xlim(-0.7, count - 0.3)
    step = 1 if count <= 30 else 2 if count <= 64 else 4
    axes.set_xticks(range(0, count, step))
    axes.tick_params(axis="x", labelsize=8)
