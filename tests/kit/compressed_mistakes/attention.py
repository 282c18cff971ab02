"""Sinks, scale, norms and projections of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fastdeploy_dsa.attention.deepseek_v4.base as base_module
import fastdeploy_dsa.attention.deepseek_v4.o_proj as o_proj_module
from tests.kit.compressed_mistakes.planting import Mistake, Planting, magnitude


def sinks_of(wrong: Callable[[Any], Any]) -> Mistake:
    def plant(planting: Planting) -> None:
        for layer in planting.layers:
            planting.patch.setattr(layer.attention, "_sinks", wrong(layer.attention._sinks))

    return plant


def scale_with_magnitude(planting: Planting) -> None:
    backend = planting.serving.backend
    planting.patch.setattr(backend, "softmax_scale", backend.softmax_scale * magnitude(planting) ** 2)


def groups_strided(planting: Planting) -> None:
    """Group g takes heads g, g + groups, ... in place of neighbours."""
    right = o_proj_module._unrotated_groups

    def wrong(o: Any, rotation: Any, num_groups: int, cpu: Any) -> Any:
        rows, width = o.shape[0], o.shape[2]
        in_order = right(o, rotation, num_groups, cpu).reshape([rows, -1, num_groups, width])
        return in_order.transpose([0, 2, 1, 3]).reshape([rows, num_groups, -1])

    planting.patch.setattr(o_proj_module, "_unrotated_groups", wrong)


def without_inverse_rotation(planting: Planting) -> None:
    planting.patch.setattr(o_proj_module, "inverse_rope", lambda **given: None)


def without_q_norm(planting: Planting) -> None:
    right = base_module.rms_norm
    unweighted = {id(layer.attention._unweighted) for layer in planting.layers}
    planting.patch.setattr(
        base_module, "rms_norm", lambda x, weight, eps: x if id(weight) in unweighted else right(x, weight, eps)
    )


def without_kv_norm(planting: Planting) -> None:
    """The rows of the window and the entries are not normed."""
    right = base_module.rms_norm
    norms = {id(layer.attention._kv_norm) for layer in planting.layers}
    planting.patch.setattr(
        base_module, "rms_norm", lambda x, weight, eps: x if id(weight) in norms else right(x, weight, eps)
    )
