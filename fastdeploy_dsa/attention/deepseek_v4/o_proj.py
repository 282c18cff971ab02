"""Output projections that several attention classes share: undo the rotation, then project by groups of heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import paddle
from paddle import Tensor

from fastdeploy_dsa.layers import linear
from fastdeploy_dsa.ops import CpuOptions, inverse_rope
from fastdeploy_dsa.rotary import Rotation

QUANT_GROUP = 128  # numbers that share one scale
_E4M3_MAX = 448.0
_SMALLEST_AMAX = 1e-4  # keeps scales of empty groups away from zero
_MANTISSA_STEPS = 1 << 23  # of a float32


class EinsumRecipe(NamedTuple):
    """How a grouped fp8 product takes its scales.

    Attributes:
        block: (rows of one operand, rows of the other, inner numbers) that share one scale of the weights' operand.
        packs_scales: Whether four power-of-two scales share an int32, aligned for bulk copies; else they are float32.
    """

    block: tuple[int, int, int]
    packs_scales: bool


def compute_fp8_einsum_recipe(sm_major: int, block: int = QUANT_GROUP) -> EinsumRecipe:
    """The recipe of a GPU generation (rule S47).

    Args:
        sm_major: Major number of the compute capability: 9 Hopper, 10 Blackwell.
        block: Numbers that share a scale.
    """
    return EinsumRecipe((1, 128, 128), False) if sm_major <= 9 else EinsumRecipe((1, 1, block), True)


def reference_grouped_o_proj(
    o: Tensor,
    *,
    rotation: Rotation,
    wo_a: Tensor,
    wo_b: Callable[[Tensor], Tensor],
    cpu: CpuOptions,
) -> Tensor:
    """Steps 7 and 8: undo the rotation, project every group of heads, join the groups (rules S28, S29).

    Args:
        o: [T, num_heads, head_dim] float32, changed: the rotation is undone in place.
        rotation: Of the T rows.
        wo_a: [groups, o_lora_rank, num_heads / groups * head_dim] float32.
        wo_b: From [T, groups * o_lora_rank] to the result.
        cpu: Options of the CPU ops.
    """
    grouped = _unrotated_groups(o, rotation, wo_a.shape[0], cpu)
    return wo_b(_joined(grouped, wo_a))


def fp8_grouped_o_proj(
    o: Tensor,
    *,
    rotation: Rotation,
    wo_a: Tensor,
    wo_b: Callable[[Tensor], Tensor],
    cpu: CpuOptions,
) -> Tensor:
    """As reference_grouped_o_proj, with the heads' results quantised to e4m3 as a grouped fp8 product takes them.

    Products of e4m3 numbers are exact in float32, so this is what such a product gives, up to the order of its sums.
    """
    grouped = _unrotated_groups(o, rotation, wo_a.shape[0], cpu)
    numbers, scales = quantize_by_group(grouped)
    dequantized = numbers * scales.repeat_interleave(QUANT_GROUP, axis=-1)[..., : grouped.shape[-1]]
    return wo_b(_joined(dequantized, wo_a))


def quantize_by_group(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers on the e4m3 grid and power-of-two scales, one per 128 numbers of the last axis.

    Args:
        x: [..., width] float32; the last group may be shorter.

    Returns:
        [..., width] float32, each a number of e4m3, and [..., groups] float32.
    """
    width = x.shape[-1]
    filled = paddle.nn.functional.pad(x, [0, -width % QUANT_GROUP], pad_from_left_axis=False)
    by_group = filled.reshape([*x.shape[:-1], -1, QUANT_GROUP])
    amax = paddle.clip(by_group.abs().max(axis=-1), min=_SMALLEST_AMAX)
    scales = _ceil_pow2(amax / _E4M3_MAX)
    numbers = (by_group / scales.unsqueeze(-1)).astype(paddle.float8_e4m3fn).astype("float32")
    return numbers.reshape(filled.shape)[..., :width], scales


def _ceil_pow2(x: Tensor) -> Tensor:
    """Smallest power of two that is not below x > 0: its bits with the mantissa carried into the exponent."""
    bits = x.view("int32") + (_MANTISSA_STEPS - 1)
    return (bits // _MANTISSA_STEPS * _MANTISSA_STEPS).view("float32")


def _unrotated_groups(o: Tensor, rotation: Rotation, num_groups: int, cpu: CpuOptions) -> Tensor:
    inverse_rope(x=o, cos=rotation.cos, sin=rotation.sin, cpu=cpu)
    return o.reshape([o.shape[0], num_groups, -1])


def _joined(grouped: Tensor, wo_a: Tensor) -> Tensor:
    """Every group's projection, side by side."""
    return paddle.concat([linear(grouped[:, group], wo_a[group]) for group in range(wo_a.shape[0])], axis=-1)
