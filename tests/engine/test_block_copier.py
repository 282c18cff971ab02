"""Copies between Paddle tensors and host arrays: every byte, on the same memory."""

from __future__ import annotations

from threading import Thread

import numpy as np
import paddle
import pytest

from fastdeploy_dsa.block_copier import PaddleBlockCopier, byte_rows

DTYPES = ["float32", "bfloat16", "uint8"]


def random_tensor(dtype: str, num_blocks: int) -> paddle.Tensor:
    width = {"float32": 4, "bfloat16": 2, "uint8": 1}[dtype] * 3 * 5
    values = np.random.default_rng(num_blocks).integers(0, 256, (num_blocks, width), np.uint8)
    tensor = paddle.zeros([num_blocks, 1, 3, 5], dtype=dtype)
    byte_rows(tensor).set_value(values)
    return tensor


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_shares_the_memory_of_a_tensor_and_of_an_array(dtype: str) -> None:
    tensor = random_tensor(dtype, 4)
    rows = byte_rows(tensor)
    assert (rows.data_ptr(), rows.dtype) == (tensor.data_ptr(), paddle.uint8)
    array = np.zeros((4, 30), np.uint8)
    assert byte_rows(array).data_ptr() == array.ctypes.data
    assert PaddleBlockCopier().address(tensor) == tensor.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_a_thread", [False, True])
def test_blocks_go_to_the_host_and_come_back_byte_by_byte(dtype: str, in_a_thread: bool) -> None:
    tensor = random_tensor(dtype, 6)
    before = byte_rows(tensor).numpy().copy()
    host = np.full((3, before.shape[1]), 0xDD, np.uint8)
    copier = PaddleBlockCopier()

    def out_and_in() -> None:
        copier.copy(src=tensor, dst=host, src_block_ids=np.array([5, 0]), dst_block_ids=np.array([0, 2]))
        copier.copy(src=host, dst=tensor, src_block_ids=np.array([0, 2]), dst_block_ids=np.array([1, 3]))
        copier.copy(src=tensor, dst=tensor, src_block_ids=np.array([1]), dst_block_ids=np.array([4]))

    if in_a_thread:
        thread = Thread(target=out_and_in)
        thread.start()
        thread.join()
    else:
        out_and_in()
    np.testing.assert_array_equal(host[[0, 2]], before[[5, 0]])
    assert (host[1] == 0xDD).all()
    np.testing.assert_array_equal(byte_rows(tensor).numpy(), before[[0, 5, 2, 0, 5, 5]])


def test_strided_views_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks: expected a contiguous tensor"):
        byte_rows(paddle.zeros([4, 6]).transpose([1, 0]))
    with pytest.raises(ValueError, match="blocks: expected a contiguous array"):
        byte_rows(np.zeros((4, 6), np.uint8)[:, :3])
