"""Every op takes tensors that fit, and refuses any other dtype, rank or size, naming the argument."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_dsa import ops
from tests.kit.op_arguments import ARENAS, FITTING, IN_PLACE, OPTIONAL, TENSORS, T, call, outputs, tensor

pytestmark = pytest.mark.usefixtures("tensors_on_the_cpu")

# (op, argument, axis) whose size no other argument has, so that any size fits.
FREE_AXES = {
    ("mla_cache_write", "cache", 0),
    ("mla_cache_write", "cache", 2),
    ("index_key_write", "cache", 0),
    ("index_key_write", "cache", 1),
    ("index_query_quant", "query", 2),
    ("indexer_logits", "index_cache", 0),
    ("indexer_logits", "index_cache", 1),
    ("indexer_logits", "block_table", 0),
    ("indexer_logits", "block_table", 1),
    ("topk_slots", "logits", 1),
    ("topk_slots", "block_table", 0),
    ("topk_slots", "block_table", 1),
    ("index_select", "index_cache", 0),
    ("index_select", "index_cache", 1),
    ("index_select", "block_table", 0),
    ("index_select", "block_table", 1),
    ("sparse_mla", "query", 1),
    ("sparse_mla", "latent_cache", 0),
    ("sparse_mla", "latent_cache", 2),
    ("sparse_mla", "slot_ids", 1),
    ("compressed_row_write", "cache", 0),
    ("compressed_row_read", "cache", 0),
    ("compressed_row_read", "slot_ids", 0),
    ("kv_compress", "state_cache", 0),
    ("kv_compress", "state_cache", 1),
    ("kv_compress", "state_table", 0),
    ("kv_compress", "state_table", 1),
    ("kv_compress", "entry_cache", 0),
    ("compressed_mla", "window_cache", 0),
    ("compressed_mla", "window_slots", 1),
    ("compressed_mla", "entry_cache", 0),
    ("compressed_mla", "entry_slots", 1),
    ("inverse_rope", "x", 1),
    ("inverse_rope", "x", 2),
    ("block_copy", "src", 0),
    ("block_copy", "dst", 0),
}
AXES = [(op, name, axis) for op, name in TENSORS for axis in range(FITTING[op]()[name].ndim)]


def grown(x: paddle.Tensor, axis: int) -> paddle.Tensor:
    shape = list(x.shape)
    shape[axis] += 1
    return paddle.zeros(shape, dtype=x.dtype)


@pytest.mark.parametrize("op", FITTING)
def test_fitting_arguments_are_taken(op: str) -> None:
    call(op, FITTING[op]())


@pytest.mark.parametrize(("op", "name"), [pair for pair in TENSORS if pair not in ARENAS])
def test_a_wrong_dtype_is_refused(op: str, name: str) -> None:
    arguments = FITTING[op]()
    arguments[name] = arguments[name].cast("int16")
    with pytest.raises(ValueError, match=rf"\b{name}: expected .*got int16 \["):
        call(op, arguments)


@pytest.mark.parametrize(("op", "name"), [pair for pair in TENSORS if pair not in ARENAS])
def test_a_wrong_rank_is_refused(op: str, name: str) -> None:
    arguments = FITTING[op]()
    arguments[name] = arguments[name].unsqueeze(0)
    with pytest.raises(ValueError, match=rf"\b{name}: expected .*got \w+ \[1, "):
        call(op, arguments)


@pytest.mark.parametrize("name", ["src", "dst"])
@pytest.mark.parametrize("change", [lambda x: x.cast("int32"), lambda x: x.unsqueeze(1)], ids=["dtype", "rank"])
def test_arenas_that_disagree_are_refused(name: str, change: Callable[[paddle.Tensor], paddle.Tensor]) -> None:
    arguments = FITTING["block_copy"]()
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=r"\bdst: expected blocks like those of src"):
        call("block_copy", arguments)


@pytest.mark.parametrize(("op", "name", "axis"), [axis for axis in AXES if axis not in FREE_AXES])
def test_a_size_that_disagrees_is_refused(op: str, name: str, axis: int) -> None:
    arguments = FITTING[op]()
    arguments[name] = grown(arguments[name], axis)
    # The one that came first fixes the size, so that the message may blame another and name this one as its source.
    blamed = rf"\b{name}: expected|\(from {name}\)|cache: expected (rows|blocks) of|like those of {name}"
    with pytest.raises(ValueError, match=blamed):
        call(op, arguments)


@pytest.mark.parametrize(("op", "name", "axis"), sorted(FREE_AXES))
def test_a_size_that_stands_alone_is_free(op: str, name: str, axis: int) -> None:
    arguments = FITTING[op]()
    arguments[name] = grown(arguments[name], axis)
    call(op, arguments)


@pytest.mark.parametrize(("op", "name"), TENSORS)
@pytest.mark.parametrize(
    ("value", "kind"),
    [(np.zeros((2, 2), np.float32), "numpy.ndarray"), ([1, 2], "list"), (None, "NoneType"), (3, "int")],
    ids=["numpy", "list", "none", "int"],
)
def test_what_is_no_tensor_is_refused(op: str, name: str, value: object, kind: str) -> None:
    if value is None and (op, name) in OPTIONAL:
        kind = "None"  # and the others stay
    with pytest.raises(ValueError, match=rf"^{name}: expected a paddle.Tensor,.* got {kind}$"):
        call(op, {**FITTING[op](), name: value})


@pytest.mark.parametrize("op", FITTING)
def test_an_empty_batch_is_valid(op: str) -> None:
    arguments = FITTING[op]()
    per_row = {name for name, x in arguments.items() if hasattr(x, "shape") and x.shape[0] == T}
    rows = {"src_block_ids", "dst_block_ids"} if op == "block_copy" else per_row
    for name in rows:
        arguments[name] = arguments[name][:0]
    results = outputs(op, arguments)
    num_targets = len(IN_PLACE.get(op, ()))
    made, changed = results[: len(results) - num_targets], results[len(results) - num_targets :]
    assert [x.shape[0] for x in made] == [0] * len(made)
    assert not any(x.any() for x in changed)


@given(
    latent=st.tuples(st.integers(0, 3), st.integers(1, 3)),
    rope=st.tuples(st.integers(0, 3), st.integers(1, 3)),
    row=st.integers(1, 6),
    num_slots=st.integers(0, 3),
)
def test_mla_cache_write_takes_exactly_the_shapes_that_agree(
    latent: tuple[int, int], rope: tuple[int, int], row: int, num_slots: int
) -> None:
    arguments = {
        "latent": tensor(*latent),
        "rope": tensor(*rope),
        "cache": tensor(2, 1, 4, row),
        "slot_mapping": paddle.arange(num_slots),
    }
    if latent[0] == rope[0] == num_slots and latent[1] + rope[1] == row:
        ops.mla_cache_write(**arguments)
    else:
        with pytest.raises(ValueError, match=r"\b(rope|cache|slot_mapping): expected"):
            ops.mla_cache_write(**arguments)


def test_every_op_has_a_function_of_its_name() -> None:
    assert set(FITTING) == set(ops.library.OPS)
    assert all(callable(getattr(ops, op)) for op in ops.library.OPS)
