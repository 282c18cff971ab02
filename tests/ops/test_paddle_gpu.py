"""The Paddle ops on a GPU: places, streams and graphs. What they compute, other files test through `paddle_gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from fastdeploy_dsa import ops
from tests.kit.compare import assert_same
from tests.kit.paddle_ops import PaddleOps

paddle = pytest.importorskip("paddle")

from tests.kit.op_arguments import FITTING, IN_PLACE, TENSORS  # noqa: E402 - it imports paddle


def on_gpu(implementation: PaddleOps, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with every tensor copied to the GPU."""
    return {
        name: implementation.tensor(value.numpy()) if hasattr(value, "shape") else value
        for name, value in arguments.items()
    }


def made_by(op: str, arguments: dict[str, Any]) -> list[Any]:
    """All that a call makes and changes."""
    result = getattr(ops, op)(**arguments)
    made = [] if result is None else [result] if isinstance(result, paddle.Tensor) else list(result)
    return [*made, *(arguments[name] for name in IN_PLACE.get(op, ()))]


@contextmanager
def nothing_falls_back() -> Iterator[None]:
    """Paddle's own ops that have no kernel on the device raise instead of running on the CPU."""
    flag = "FLAGS_enable_api_kernel_fallback"
    before = paddle.get_flags(flag)
    paddle.set_flags({flag: False})
    try:
        yield
    finally:
        paddle.set_flags(before)


@pytest.mark.parametrize("op", FITTING)
def test_results_lie_where_the_arguments_lie(paddle_gpu_implementation: PaddleOps, op: str) -> None:
    arguments = on_gpu(paddle_gpu_implementation, FITTING[op]())
    with nothing_falls_back():
        tensors = made_by(op, arguments)
    assert [tensor.place for tensor in tensors] == [next(iter(arguments.values())).place] * len(tensors)


@pytest.mark.parametrize(("op", "name"), TENSORS)
@pytest.mark.parametrize("moved_to", ["cpu", "gpu"])
def test_a_tensor_on_another_device_is_refused(
    paddle_gpu_implementation: PaddleOps, op: str, name: str, moved_to: str
) -> None:
    on_cpu = FITTING[op]()
    arguments = on_gpu(paddle_gpu_implementation, on_cpu)
    changed = on_cpu if moved_to == "gpu" else arguments
    other = arguments if moved_to == "gpu" else on_cpu
    # The first tensor of a call says where it runs, and the message names it and the one that lies elsewhere.
    words = rf"\b{name}: expected a tensor on Place\(\S+\) like \w+, got one on|: expected .* like {name}, got one on"
    with pytest.raises(ValueError, match=words):
        getattr(ops, op)(**{**changed, name: other[name]})


def all_gpus(implementation: PaddleOps) -> list[Any]:
    """Paddle's places of the kind that the implementation runs on."""
    here = implementation.gpu
    if isinstance(here, paddle.CUDAPlace):
        return [paddle.CUDAPlace(i) for i in range(paddle.device.cuda.device_count())]
    kind = here.get_device_type()
    return [paddle.CustomPlace(kind, i) for i in range(paddle.base.core.get_custom_device_count(kind))]


@pytest.mark.parametrize("op", FITTING)
def test_a_call_takes_tensors_of_the_current_gpu_alone(paddle_gpu_implementation: PaddleOps, op: str) -> None:
    """With one GPU only half of it is tested."""
    words = r"\b\w+: expected a tensor on the current device, Place\(\S+\b0\), got one on Place\(\S+\b{}\)"
    for number, place in enumerate(all_gpus(paddle_gpu_implementation)):
        arguments = on_gpu(replace(paddle_gpu_implementation, gpu=place), FITTING[op]())
        if number == 0:
            made_by(op, arguments)
        else:
            with pytest.raises(ValueError, match=words.format(number)):
                made_by(op, arguments)


@pytest.mark.parametrize("op", FITTING)
def test_a_captured_call_follows_its_arguments(paddle_gpu_implementation: PaddleOps, op: str) -> None:
    from paddle.device.cuda.graphs import CUDAGraph  # noqa: PLC0415

    paddle.seed(1)
    arguments = on_gpu(paddle_gpu_implementation, FITTING[op]())
    paddle.seed(2)
    others = on_gpu(paddle_gpu_implementation, FITTING[op]())
    made_by(op, arguments)  # CUDA loads a kernel when it is first launched
    graph = CUDAGraph()
    with paddle.device.stream_guard(paddle.device.Stream()):
        graph.capture_begin()
        try:
            captured = made_by(op, arguments)
        finally:
            graph.capture_end()
        for name, value in others.items():
            if hasattr(value, "shape"):
                arguments[name].copy_(value, True)
        graph.replay()
        paddle.device.synchronize()
        actual = [tensor.numpy() for tensor in captured]
        graph.reset()  # Paddle aborts if a graph is left at the end of the process
    for i, (tensor, expected) in enumerate(zip(actual, made_by(op, others), strict=True)):
        assert_same(tensor, expected.numpy(), f"result {i}")
