"""Loads the Paddle op library, once and with its first call, and runs its ops."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdeploy_dsa.ops.checks import is_int, type_name

if TYPE_CHECKING:
    from paddle import Tensor

LIBRARY_FOLDER = Path(__file__).resolve().parent.parent / "_lib"
C_LIBRARY = LIBRARY_FOLDER / "libfastdeploy_dsa.so"
PADDLE_LIBRARY = LIBRARY_FOLDER / "libfastdeploy_dsa_paddle.so"

_OPTIONAL = "@OPTIONAL"  # how Paddle marks the name of an input that may be None

_SPIN_COUNT = "10000"  # some tens of microseconds

_IS_CHECKOUT = (LIBRARY_FOLDER.parent.parent / "custom_ops").is_dir()


def install_remedy(extra: str) -> str:
    """The command that installs the package again, with an extra: from its checkout where this is one."""
    return f"pip install -e '.[{extra}]'" if _IS_CHECKOUT else f"pip install 'fastdeploy-dsa[{extra}]'"


INSTALL_REMEDY = install_remedy("cpu")

OPS = (
    "block_copy",
    "compressed_mla",
    "compressed_row_read",
    "compressed_row_write",
    "index_key_write",
    "index_query_quant",
    "index_select",
    "indexer_logits",
    "inverse_rope",
    "kv_compress",
    "layer_write",
    "mla_cache_write",
    "sparse_mla",
    "topk_slots",
)


@cache
def load_paddle_ops(library: Path = PADDLE_LIBRARY) -> frozenset[str]:
    """Register the ops of a library with Paddle, once, and return their names.

    Raises:
        ImportError: paddle or the library is missing, or the library does not fit this paddle.
    """
    try:
        from paddle.base import core  # noqa: PLC0415 - the package imports without paddle
        from paddle.base.framework import OpProtoHolder  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(f"the ops need PaddlePaddle, which does not import ({error}): {INSTALL_REMEDY}") from error
    if not library.exists():
        raise ImportError(f"the ops were not built ({library.name} is missing): {INSTALL_REMEDY}")
    try:
        with _brief_spinning():
            names = core.load_op_meta_info_and_register_op(str(library))
    except Exception as error:  # Paddle raises various types when the dynamic linker refuses
        raise ImportError(f"{library.name} does not load ({error}); build it again: {INSTALL_REMEDY}") from error
    return frozenset(OpProtoHolder.instance().update_op_proto(names))


@contextmanager
def _brief_spinning() -> Iterator[None]:
    """Let waiting threads of the ops go to sleep soon, unless the user said otherwise.

    The OpenMP runtime of the ops reads its settings from the environment, once, when it is loaded: the only moment and
    the only way to say this. By default a thread spins for milliseconds before it sleeps; with more runnable threads
    than processors the spinning takes the time from whoever it waits for. Measured for a call of 0.45 ms on two
    threads beside other work: 16 ms with the default, 1 ms with this; on an idle machine both take 0.45 ms.
    """
    if any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]  # child processes choose for themselves


@cache
def _runner() -> Callable[..., list[Tensor]]:
    """Paddle's entry for custom ops, after our library has been loaded.

    Raises:
        ImportError: As load_paddle_ops.
    """
    load_paddle_ops()
    from paddle import _C_ops  # noqa: PLC0415

    # paddle fills this module when it is imported, so its types do not list the function.
    run: Callable[..., list[Tensor]] = _C_ops._run_custom_op  # type: ignore[attr-defined]
    return run


def run_op(name: str, *arguments: Any) -> list[Tensor]:
    """Call an op: its inputs in the order of its declaration in custom_ops/paddle, then its attributes.

    Returns:
        The op's outputs, always as a list.

    Raises:
        ImportError: As load_paddle_ops.
        ValueError: An argument does not fit; the message names it.
    """
    try:
        return _runner()(name, *arguments)
    except (TypeError, ValueError, OverflowError, SystemError):
        _refuse_wrong_types(name, arguments)
        raise


def _refuse_wrong_types(op: str, arguments: tuple[Any, ...]) -> None:
    """Name the argument that Paddle refused by its position, or whose int it cut off.

    Looked for after a failure only, so that a good call pays nothing.

    Raises:
        ValueError: An argument is no tensor, or a number no int64.
    """
    from paddle import Tensor  # noqa: PLC0415
    from paddle.base import core  # noqa: PLC0415
    from paddle.base.framework import OpProtoHolder  # noqa: PLC0415

    declaration = OpProtoHolder.instance().get_op_proto(op)
    inputs = [declared.name for declared in declaration.inputs]
    for declared_name, value in zip(inputs, arguments, strict=False):
        name = declared_name.removesuffix(_OPTIONAL)
        if not isinstance(value, Tensor) and (value is not None or name == declared_name):
            raise ValueError(f"{name}: expected a paddle.Tensor, got {type_name(value)}") from None
    # Paddle appends attributes of its own to those of the declaration.
    for attribute, value in zip(declaration.attrs, arguments[len(inputs) :], strict=False):
        fits = is_int(value) and -(1 << 63) <= value < 1 << 63
        if attribute.type == core.AttrType.LONG and not fits:
            raise ValueError(f"{attribute.name}: expected an int64, got {value!r}") from None
