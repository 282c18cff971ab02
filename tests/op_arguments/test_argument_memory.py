"""Every op takes its inputs in any memory layout, and writes into contiguous memory only."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from fastdeploy_dsa import ops
from tests.kit.op_arguments import BLOCKS, FITTING, IN_PLACE, TARGETS, TENSORS, call, outputs

pytestmark = pytest.mark.usefixtures("tensors_on_the_cpu")


def strided_copy(x: paddle.Tensor) -> paddle.Tensor:
    """The same numbers, with other memory between them along the last axis."""
    wide = paddle.concat([x, x], axis=-1)
    view = wide[..., : x.shape[-1]]
    return view if not view.is_contiguous() else paddle.stack([x, x], axis=-1)[..., 0]


@pytest.mark.parametrize(("op", "name"), [*TARGETS, ("block_copy", "src")])
def test_an_arena_that_is_not_contiguous_is_refused_and_nothing_is_written(op: str, name: str) -> None:
    arguments = FITTING[op]()
    x = arguments[name]
    whole = paddle.concat([x, x], axis=-1)
    before = whole.numpy()
    arguments[name] = whole[..., : x.shape[-1]]
    targets = [arguments[target] for target in IN_PLACE[op]]
    targets_before = [target.numpy() for target in targets]
    with pytest.raises(ValueError, match=rf"\b{name}: expected a contiguous tensor"):
        call(op, arguments)
    np.testing.assert_array_equal(whole.numpy(), before)
    for target, target_before in zip(targets, targets_before, strict=True):
        np.testing.assert_array_equal(target.numpy(), target_before)


@pytest.mark.parametrize(("op", "name"), TARGETS)
def test_a_contiguous_part_of_a_cache_is_written_through(op: str, name: str) -> None:
    arguments = FITTING[op]()
    size = len(arguments[name])
    whole = paddle.concat([arguments[name]] * 2, axis=0)
    before = whole.numpy()
    arguments[name] = whole[size:]
    call(op, arguments)
    written = whole.numpy()
    np.testing.assert_array_equal(written[:size], before[:size])
    assert (written[size:] != before[size:]).any()


@pytest.mark.parametrize(("op", "name"), [pair for pair in TENSORS if pair not in {*TARGETS, ("block_copy", "src")}])
def test_an_input_that_is_not_contiguous_gives_the_same_result(op: str, name: str) -> None:
    paddle.seed(1)
    contiguous = FITTING[op]()
    paddle.seed(1)
    strided = FITTING[op]()
    strided[name] = strided_copy(strided[name])
    assert not strided[name].is_contiguous()
    for got, expected in zip(outputs(op, strided), outputs(op, contiguous), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("op", FITTING)
def test_a_tensor_that_wants_gradients_is_taken(op: str) -> None:
    arguments = FITTING[op]()
    name = next(name for name in arguments if name not in IN_PLACE.get(op, ()))
    arguments[name].stop_gradient = False
    with paddle.no_grad():
        call(op, arguments)


def test_block_copy_inside_one_arena_moves_blocks() -> None:
    arena = paddle.arange(BLOCKS * 2).reshape([BLOCKS, 2])
    ids = paddle.to_tensor
    ops.block_copy(src=arena, dst=arena, src_block_ids=ids([0, 1]), dst_block_ids=ids([3, 2]))
    assert arena.tolist() == [[0, 1], [2, 3], [2, 3], [0, 1]]
