"""An `Inspection` as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fastdeploy_dsa.byte_sizes import written_bytes
from fastdeploy_dsa.cache_layout import CacheSpan
from fastdeploy_dsa.inspection import Inspection, LayerInspection

KIND_NAMES = {
    "mla": "latent, whole context",
    "dsa": "latent, selected tokens",
    "swa": "window only",
    "c4a": "window + selected entries of 4",
    "c128a": "window + all entries of 128",
}


def render(inspection: Inspection, console: Console) -> None:
    """Print all tables."""
    for part in (_head(inspection), _layers(inspection), _tensors(inspection), _capacity(inspection)):
        console.print(part)
        console.print()
    for warning in inspection.warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False, style="yellow")


def written_layers(layer_ids: Sequence[int]) -> str:
    """Ascending ids in few words: "0-2, 6", "0-1, 3, 5, ..., 59"."""
    parts, first = [], 0
    while first < len(layer_ids):
        step = layer_ids[first + 1] - layer_ids[first] if first + 1 < len(layer_ids) else 1
        last = first
        while last + 1 < len(layer_ids) and layer_ids[last + 1] - layer_ids[last] == step:
            last += 1
        if step == 1:
            parts.append(f"{layer_ids[first]}" if last == first else f"{layer_ids[first]}-{layer_ids[last]}")
        elif last - first >= 3:
            parts.append(f"{layer_ids[first]}, {layer_ids[first] + step}, ..., {layer_ids[last]}")
        else:
            parts.append(f"{layer_ids[first]}")
            last = first
        first = last + 1
    return ", ".join(parts)


def written_number(value: float) -> str:
    """Whole, or with two decimals."""
    return f"{value:.0f}" if value == int(value) else f"{value:.2f}"


def _head(inspection: Inspection) -> Table:
    config, schedule = inspection.config, inspection.config.index_schedule
    table = _table("", "")
    table.show_header = False
    draft = f" + {config.num_nextn_predict_layers} draft" if config.num_nextn_predict_layers else ""
    table.add_row("model", f"{config.architecture} ({config.model_type}), {config.num_hidden_layers}{draft} layers")
    kinds = dict.fromkeys(layer.attention for layer in inspection.layers)
    table.add_row("attention", "; ".join(f"{kind}: {KIND_NAMES[kind]}" for kind in kinds))
    obstacle = config.generation_obstacle
    table.add_row("engine", f"no: {obstacle}" if obstacle else "can generate")
    scale = config.scale
    derivation = f"{scale.width}^-0.5" + (f" * {scale.magnitude:.10g}^2" if scale.magnitude != 1 else "")
    table.add_row("softmax scale", f"{scale.value!r} = {derivation} ({scale.rule})")
    if schedule.letters:
        full = len(schedule.full_layers)
        table.add_row("index schedule", f"{full} full, {len(schedule.letters) - full} shared, from {schedule.dialect}")
        table.add_row("", schedule.letters)
    return table


def _layers(inspection: Inspection) -> Table:
    """A row for layers that are alike; shared ones by the layer they take their selection from."""
    groups: dict[tuple[object, ...], list[LayerInspection]] = {}
    for layer in inspection.layers:
        groups.setdefault((layer.attention, layer.index, layer.source, layer.is_draft), []).append(layer)
    table = _table("layers", "attention", "index", "selection of", ">bytes per token", "by tensor")
    for alike in groups.values():
        layer = alike[0]
        parts = " + ".join(f"{written_number(value)} {role}" for role, value in layer.role_bytes.items() if value)
        table.add_row(
            written_layers([layer.layer for layer in alike]) + (" (draft)" if layer.is_draft else ""),
            layer.attention,
            layer.index or "-",
            "-" if layer.index is None else f"layer {layer.source}" if layer.source is not None else "itself",
            written_number(layer.cache_bytes_per_token),
            parts,
        )
    return table


def _tensors(inspection: Inspection) -> Table:
    total = inspection.plan.bytes_per_token
    table = _table("tensor", ">layers", ">block tokens", ">block bytes", ">bytes per token", ">share")
    for span in inspection.plan.spans:
        table.add_row(*_tensor_row(span, total))
    table.add_section()
    table.add_row("all layers", "", "", "", written_number(total), "")
    return table


def _tensor_row(span: CacheSpan, total: float) -> tuple[str, ...]:
    """A tensor's numbers; of one that holds a request's last tokens only, what it takes per request."""
    num_layers = len(span.spec.layer_ids)
    per_token = span.bytes_per_token * num_layers
    if span.live_tokens is None:
        amount, share = written_number(per_token), f"{per_token / total:.1%}"
    else:
        amount, share = written_bytes(span.live_bytes * num_layers), f"last {span.live_tokens} tokens"
    block = (str(span.block_tokens), str(span.spec.bytes_per_block))
    return span.spec.role, str(num_layers), *block, amount, share


def _capacity(inspection: Inspection) -> Table:
    options, plan = inspection.options, inspection.plan
    table = _table("", "")
    table.show_header = False
    if inspection.saved_bytes_per_token:
        unshared = inspection.unshared_plan.bytes_per_token
        table.add_row(
            "no index cache on shared layers",
            f"saves {written_number(inspection.saved_bytes_per_token)} of {written_number(unshared)} bytes per token"
            f" ({inspection.saved_bytes_per_token / unshared:.1%}),"
            f" {unshared / plan.bytes_per_token - 1:.1%} more tokens fit",
        )
    if plan.bytes_per_token != plan.unpadded_bytes_per_token:
        padding = plan.bytes_per_token - plan.unpadded_bytes_per_token
        table.add_row(
            "padding of blocks", f"{written_number(padding)} of {written_number(plan.bytes_per_token)} bytes per token"
        )
    request = plan.request_bytes(inspection.max_len)
    table.add_row(f"a request of {inspection.max_len} tokens", written_bytes(request))
    if len(inspection.stages) > 1:
        stages = ", ".join(
            f"{written_layers(stage.layer_ids)}: {written_number(stage.bytes_per_token)}"
            for stage in inspection.stages
        )
        table.add_row("bytes per token by stage", stages)
    if options.memory_bytes is not None:
        memory = written_bytes(options.memory_bytes)
        device = " per device" if options.tensor_parallel * options.pipeline_parallel > 1 else ""
        fits = "no limit" if inspection.max_tokens is None else f"{inspection.max_tokens} tokens"
        requests = inspection.max_requests
        fits += "" if requests is None else f"; requests of {inspection.max_len} tokens: {requests}"
        table.add_row(f"in {memory}{device}", fits)
    return table


def _table(*columns: str) -> Table:
    """Columns are named; those whose name begins with > are aligned to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table
