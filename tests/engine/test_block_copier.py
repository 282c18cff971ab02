"""Copies between Paddle tensors and host arrays: every byte, on the same memory."""

from __future__ import annotations

from threading import Thread

import numpy as np
import paddle
import pytest

from cache_manager import CacheManager
from fastdeploy_dsa.attention.deepseek_v4.backend import DeepseekV4AttentionBackend
from fastdeploy_dsa.block_copier import PaddleBlockCopier, byte_rows
from fastdeploy_dsa.compressed_cache_layout import CompressedSizes
from fastdeploy_dsa.engine.loading import CacheOptions, create_controller
from fastdeploy_dsa.engine.step_plan import SchedulerLimits
from fastdeploy_dsa.ops import CacheFormat

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


@pytest.mark.parametrize("cache_format", ["fp8", "bfloat16", "float32"])
def test_windows_and_states_of_a_compressed_model_survive_the_host(cache_format: CacheFormat) -> None:
    limits = SchedulerLimits(max_num_batched_tokens=64, max_num_seqs=2, max_model_len=2048, block_size=256)
    room = limits.window_room(has_snapshots=True)
    options = CacheOptions(
        cache_format, 256, num_threads=1, device="cpu", num_blocks=8, host_bytes=50 << 20, room=room
    )
    sizes = CompressedSizes(
        head_dim=512,
        qk_rope_head_dim=64,
        index_head_dim=128,
        sliding_window=128,
        ratios=((0, 1), (1, 128), (2, 4), (3, 4), (4, 1)),
        selecting_layers=(2,),
    )
    backend = DeepseekV4AttentionBackend(sizes=sizes, softmax_scale=1.0, cache_format=cache_format, block_size=256)
    controller = create_controller(backend, options, num_layers=4, num_draft_layers=1)
    controller.initialize_host_cache()
    manager, tokens = CacheManager(controller, num_blocks=8, block_size=256), np.arange(700)
    table = manager.open(tokens)
    for num_tokens in (*range(64, 700, 64), 700):
        manager.extend(table, num_tokens)
        manager.commit(table, tokens[:num_tokens])

    def rows() -> dict[tuple[str, int], np.ndarray]:
        """Of the blocks that nobody else has: the last main one, and the windows that no snapshot needs."""
        blocks = {"main": table.blocks[2:]} | {name: window.blocks for name, window in table.windows.items()}
        specs = [spec for group in controller.groups.values() for spec in group.specs]
        return {
            (spec.role, layer): byte_rows(controller.caches[spec.role, layer]).numpy()[blocks[spec.pool]]
            for spec in specs
            for layer in spec.layer_ids
        }

    rng = np.random.default_rng(3)
    for tensor in controller.caches.values():
        rows_of_bytes = byte_rows(tensor)
        rows_of_bytes.set_value(rng.integers(0, 256, rows_of_bytes.shape, np.uint8))
    before = rows()
    manager.swap_out(table)
    for tensor in controller.caches.values():
        tensor.zero_()
    other = manager.open(np.arange(5000, 5600))
    manager.extend(other, 64)
    manager.swap_in(table)
    manager.drain()
    after = rows()
    assert {key: len(blocks) for key, blocks in before.items()}.items() >= {("key", 1): 1, ("swa", 4): 3}.items()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    manager.check_integrity()
