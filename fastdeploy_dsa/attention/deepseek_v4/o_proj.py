"""The output projection: undo the rotation of the heads' results, then project them by groups of heads."""

from __future__ import annotations

import paddle
from paddle import Tensor

from fastdeploy_dsa.layers import linear
from fastdeploy_dsa.ops import CpuOptions, inverse_rope
from fastdeploy_dsa.rotary import Rotation


def grouped_o_proj(o: Tensor, *, rotation: Rotation, wo_a: Tensor, wo_b: Tensor, cpu: CpuOptions) -> Tensor:
    """Steps 7 and 8: undo the rotation, project every group of heads, join the groups (rules S28, S29).

    Args:
        o: [T, num_heads, head_dim] float32, changed: the rotation is undone in place.
        rotation: Of the T rows.
        wo_a: [groups, o_lora_rank, num_heads / groups * head_dim] float32.
        wo_b: [hidden_size, groups * o_lora_rank] float32.
        cpu: Options of the CPU ops.

    Returns:
        [T, hidden_size] float32.
    """
    grouped = _unrotated_groups(o, rotation, wo_a.shape[0], cpu)
    projected = [linear(grouped[:, group], wo_a[group]) for group in range(wo_a.shape[0])]
    return linear(paddle.concat(projected, axis=-1), wo_b)


def _unrotated_groups(o: Tensor, rotation: Rotation, num_groups: int, cpu: CpuOptions) -> Tensor:
    inverse_rope(x=o, cos=rotation.cos, sin=rotation.sin, cpu=cpu)
    return o.reshape([o.shape[0], num_groups, -1])
