"""What a configuration means for serving: kinds of layers, schedule, scale, cache and capacity. No paddle here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastdeploy_dsa.cache_plan import CachePlan, plan_cache, plan_stages, without_sharing
from fastdeploy_dsa.config import CompressedConfig, ConfigError, LayerKind, ModelConfig
from fastdeploy_dsa.config.keys import MAX_POSITIONS
from fastdeploy_dsa.index_schedule import IndexSchedule
from fastdeploy_dsa.ops import CacheFormat
from fastdeploy_dsa.pipeline_stages import PipelineIndexMode, stage_schedule, stage_starts
from fastdeploy_dsa.strict_json import parse_json_object
from fastdeploy_dsa.wording import shown

_POSITION_BYTES = 4  # a row of a selection is int32


@dataclass(frozen=True)
class InspectionOptions:
    """A deployment to plan for.

    Attributes:
        cache_format: Number format of the caches.
        memory_bytes: What the caches of one device may take; None: capacity is not asked for.
        max_len: Tokens of a request; None: as many as the model has positions for.
        tensor_parallel: Ranks that share the heads; each holds the whole cache, which has no heads.
        pipeline_parallel: Stages that share the layers.
        pp_index_mode: What a stage does that begins with a shared layer.
    """

    cache_format: CacheFormat = "fp8"
    memory_bytes: int | None = None
    max_len: int | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    pp_index_mode: PipelineIndexMode = "carry"


@dataclass(frozen=True)
class LayerInspection:
    """One layer.

    Attributes:
        index: Whether it selects by itself; None: it does not select.
        source: The layer whose selection a shared layer uses.
        role_bytes: Cache bytes per token by role.
    """

    layer: int
    attention: LayerKind
    index: Literal["full", "shared"] | None
    source: int | None
    is_draft: bool
    role_bytes: Mapping[str, float]

    @property
    def cache_bytes_per_token(self) -> float:
        return sum(self.role_bytes.values())


@dataclass(frozen=True)
class Inspection:
    """A configuration and what follows from it.

    Attributes:
        config: The model; its schedule is the one the deployment runs.
        layers: Backbone layers, then draft layers.
        plan: All caches.
        unshared_plan: All caches if every layer were full.
        stages: The caches of each pipeline stage.
        warnings: What is doubtful in the configuration or the deployment.
    """

    config: ModelConfig
    options: InspectionOptions
    layers: tuple[LayerInspection, ...]
    plan: CachePlan
    unshared_plan: CachePlan
    stages: tuple[CachePlan, ...]
    warnings: tuple[str, ...]

    @property
    def max_len(self) -> int:
        return self.options.max_len or self.config.max_position_embeddings

    @property
    def saved_bytes_per_token(self) -> float:
        """What the layers without an index cache save."""
        return self.unshared_plan.bytes_per_token - self.plan.bytes_per_token

    @property
    def max_tokens(self) -> int | None:
        """Tokens of one request that the fullest stage holds; None without a limit."""
        return _least([stage.max_tokens(self.options.memory_bytes or 0) for stage in self.stages])

    @property
    def max_requests(self) -> int | None:
        """Requests of max_len tokens that the fullest stage holds; None without a limit."""
        return _least([stage.max_requests(self.options.memory_bytes or 0, self.max_len) for stage in self.stages])

    def as_json(self) -> dict[str, Any]:
        """The content of `inspect --json`."""
        config, schedule = self.config, self.config.index_schedule
        content: dict[str, Any] = {
            "architecture": config.architecture,
            "model_type": config.model_type,
            "can_generate": not config.generation_obstacle,
            "generation_obstacle": config.generation_obstacle or None,
            "softmax_scale": config.softmax_scale,
            "softmax_scale_width": config.scale.width,
            "softmax_scale_magnitude": config.scale.magnitude,
            "softmax_scale_rule": config.scale.rule,
            "index_schedule": schedule.letters or None,
            "index_schedule_dialect": schedule.dialect if schedule.letters else None,
            "cache_format": self.options.cache_format,
            "layers": [_layer_as_json(layer) for layer in self.layers],
            "tensors": [
                {
                    "role": span.spec.role,
                    "layers": list(span.spec.layer_ids),
                    "layout_id": span.spec.layout_id,
                    "block_shape": list(span.spec.block_shape),
                    "dtype": span.spec.dtype,
                    "pool": span.spec.pool,
                    "block_tokens": span.block_tokens,
                    "bytes_per_block": span.spec.bytes_per_block,
                    "bytes_per_token": _number(span.bytes_per_token),
                    "live_tokens": span.live_tokens,
                }
                for span in self.plan.spans
            ],
            "cache_bytes_per_token": _number(self.plan.bytes_per_token),
            "unpadded_cache_bytes_per_token": _number(self.plan.unpadded_bytes_per_token),
            "saved_bytes_per_token": _number(self.saved_bytes_per_token),
            "live_bytes_per_request": sum(span.live_bytes * len(span.spec.layer_ids) for span in self.plan.spans),
            "max_len": self.max_len,
            "request_bytes": self.plan.request_bytes(self.max_len),
            "stage_starts": [stage.layer_ids[0] for stage in self.stages],
        }
        if self.options.memory_bytes is not None:
            content |= {
                "memory_bytes": self.options.memory_bytes,
                "max_tokens": self.max_tokens,
                "max_requests": self.max_requests,
            }
        return content | {"warnings": list(self.warnings)}


def inspect_config(config: ModelConfig, options: InspectionOptions | None = None) -> Inspection:
    """Plan the caches of a model.

    Raises:
        ValueError: A deployment that the model does not allow, or a size that does not fit the cache format.
        IndexScheduleError: E11, a stage begins with a shared layer and the mode is "error".
    """
    options = InspectionOptions() if options is None else options
    _require_ranks(config, options)
    starts = stage_starts(config.num_hidden_layers, options.pipeline_parallel)
    staged = stage_schedule(config.index_schedule, starts, config.num_hidden_layers, options.pp_index_mode)
    warnings = (*config.warnings, *_deployment_warnings(config, options, staged.schedule, staged.carried_starts))
    config = replace(config, index_schedule=staged.schedule)
    plan = plan_cache(config, cache_format=options.cache_format)
    return Inspection(
        config=config,
        options=options,
        layers=tuple(_layer(config, plan, layer) for layer in range(config.num_layers)),
        plan=plan,
        unshared_plan=plan_cache(without_sharing(config), cache_format=options.cache_format),
        stages=plan_stages(config, starts, cache_format=options.cache_format),
        warnings=warnings,
    )


def inspect_model(
    model: str | os.PathLike[str], overrides: str | None = None, options: InspectionOptions | None = None
) -> Inspection:
    """Inspect what a command line names.

    Args:
        model: A folder, its config.json, or the JSON of a config itself, which begins with a brace or a bracket.
        overrides: JSON of an object.
        options: The deployment.

    Raises:
        ValueError: As `ModelConfig.from_pretrained` and `inspect_config`.
    """
    is_json = isinstance(model, str) and model.lstrip().startswith(("{", "["))
    source = parse_json_object(str(model), "PATH_OR_JSON", ConfigError) if is_json else model
    replaced = None if overrides is None else parse_json_object(overrides, "hf_overrides", ConfigError)
    return inspect_config(ModelConfig.from_pretrained(source, replaced), options)


def _require_ranks(config: ModelConfig, options: InspectionOptions) -> None:
    if options.max_len is not None and not 1 <= options.max_len <= MAX_POSITIONS:
        raise ValueError(f"max_len: expected an int from 1 to {MAX_POSITIONS}, got {shown(options.max_len)}")
    tensor_parallel = options.tensor_parallel
    name, count = "num_attention_heads", config.num_attention_heads
    if isinstance(config, CompressedConfig):
        name, count = "o_groups", config.o_groups
    if tensor_parallel < 1 or count % tensor_parallel:
        raise ValueError(f"tp: expected a divisor of {name} {count}, got {tensor_parallel}")


def _deployment_warnings(
    config: ModelConfig, options: InspectionOptions, schedule: IndexSchedule, carried_starts: tuple[int, ...]
) -> list[str]:
    warnings = [
        f"pipeline stage from layer {start} on begins with a shared layer: the stage before sends its selection, "
        f"{_POSITION_BYTES * config.index_topk} bytes per token"
        for start in carried_starts
    ]
    forced = sorted(set(schedule.full_layers) - set(config.index_schedule.full_layers))
    if forced:
        warnings.append(
            "made full to begin a pipeline stage, so the checkpoint must have their indexer weights: layers "
            + ", ".join(map(str, forced))
        )
    if options.max_len is not None and options.max_len > config.max_position_embeddings:
        warnings.append(
            f"max_len {shown(options.max_len)} is beyond max_position_embeddings {config.max_position_embeddings}"
        )
    return warnings


def _layer(config: ModelConfig, plan: CachePlan, layer: int) -> LayerInspection:
    kind, is_draft = config.layer_kind(layer), layer >= config.num_hidden_layers
    index: Literal["full", "shared"] | None = None
    source: int | None = None
    if kind in ("dsa", "c4a"):
        schedule = config.index_schedule
        index = "full" if is_draft or schedule.is_full(layer) else "shared"
        source = schedule.source(layer) if index == "shared" else None
    return LayerInspection(layer, kind, index, source, is_draft, plan.layer_bytes(layer))


def _layer_as_json(layer: LayerInspection) -> dict[str, Any]:
    content = {
        "layer": layer.layer,
        "attention": layer.attention,
        "index": layer.index,
        "source": layer.source,
        "cache_bytes_per_token": _number(layer.cache_bytes_per_token),
    }
    return content | ({"draft": True} if layer.is_draft else {})


def _least(limits: list[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _number(value: float) -> int | float:
    """Whole numbers without a decimal point."""
    return int(value) if value == int(value) else value
