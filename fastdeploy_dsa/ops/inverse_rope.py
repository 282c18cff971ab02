from __future__ import annotations

from typing import TYPE_CHECKING

from fastdeploy_dsa.ops.checks import require_contiguous
from fastdeploy_dsa.ops.library import run_op
from fastdeploy_dsa.ops.types import DEFAULT_CPU_OPTIONS, CpuOptions, codes_of

if TYPE_CHECKING:
    from paddle import Tensor


def inverse_rope(*, x: Tensor, cos: Tensor, sin: Tensor, cpu: CpuOptions = DEFAULT_CPU_OPTIONS) -> None:
    """Undo the rotation of the last numbers of attention outputs, in place.

    Args:
        x: [T, num_heads, head_dim] float32 or bfloat16, contiguous; the last rope_dim numbers of each head change.
        cos: [T, rope_dim / 2] float32, of the query's position; rope_dim is at most head_dim.
        sin: As cos.
        cpu: How to run on the CPU.

    Raises:
        ValueError: A tensor has another shape, dtype or device, or x is not contiguous.

    Source: custom_ops/include/dsa/inverse_rope.h
    """
    require_contiguous("x", x)
    run_op("dsa_inverse_rope", x, cos, sin, *codes_of(cpu))
