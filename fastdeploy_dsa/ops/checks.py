"""Checks of arguments that a binding cannot make. Shapes, dtypes and devices are checked in custom_ops/paddle."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from paddle import Tensor

Name = TypeVar("Name", bound=str)

_MAX_FLOAT32 = float.fromhex("0x1.fffffep127")


def type_name(value: object) -> str:
    """As a user would write it: "list", "numpy.ndarray"."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def is_int(value: object) -> bool:
    """Whether it is a number that counts; True and False do not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_contiguous(argument: str, tensor: Tensor) -> None:
    """Refuse an in-place target that Paddle would replace by a contiguous copy: the writes would vanish.

    Raises:
        ValueError: The tensor is a strided view, or no tensor.
    """
    try:
        is_contiguous = tensor.is_contiguous()
    except AttributeError:
        raise ValueError(f"{argument}: expected a paddle.Tensor, got {type_name(tensor)}") from None
    if not is_contiguous and tensor.size:
        raise ValueError(
            f"{argument}: expected a contiguous tensor, because it is written in place, "
            f"got strides {list(tensor.strides)} for shape {list(tensor.shape)}"
        )


def code_of(argument: str, name: Name, codes: Mapping[Name, int]) -> int:
    """The C ABI's number for a name.

    Raises:
        ValueError: The name is not among the codes.
    """
    try:
        return codes[name]
    except (KeyError, TypeError):  # a list cannot even be looked up
        raise ValueError(f"{argument}: expected one of {', '.join(codes)}, got {name!r}") from None


def require_bool(argument: str, value: bool) -> bool:
    """The switch itself: Paddle takes any number for one.

    Raises:
        ValueError: It is neither True nor False.
    """
    if isinstance(value, bool):
        return value
    raise ValueError(f"{argument}: expected True or False, got {value!r}")


def given_size(argument: str, size: int | None) -> int:
    """The size itself, 0 for None.

    Raises:
        ValueError: It is neither None nor an int of at least 1.
    """
    if size is None:
        return 0
    if is_int(size) and size >= 1:
        return int(size)
    raise ValueError(f"{argument}: expected an int of at least 1, got {size!r}")


def _is_real(value: object) -> bool:
    # Nearly always a float, and to ask an abstract class is slow.
    return isinstance(value, float) or (isinstance(value, Real) and not isinstance(value, bool))


def finite_float32(argument: str, value: float) -> float:
    """The number, which may be of any real type.

    Raises:
        ValueError: It is no real number, or not finite as float32.
    """
    # The comparison comes before float(), because an int may exceed every float. NaN fails it too.
    if _is_real(value) and abs(value) <= _MAX_FLOAT32:
        return float(value)
    raise ValueError(f"{argument}: expected a number that is finite as float32, got {value!r}")
