"""The cache methods of the backends, and the copies that a GPU's operators make, as FastDeploy calls them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle")
pytestmark = pytest.mark.needs_fastdeploy

from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError  # noqa: E402
from tests.integrations.fastdeploy_rig.controllers import BLOCK_SIZE, NUM_BLOCKS, dsa_backend, mla_backend  # noqa: E402
from tests.integrations.fastdeploy_rig.pinned import Pinned  # noqa: E402


class TestBackends:
    def test_dsa_creates_key_and_indexer_of_absolute_layers_in_fastdeploys_order(self) -> None:
        caches = dsa_backend().create_kv_cache(num_layers=2, num_blocks=NUM_BLOCKS, layer_offset=10)
        assert list(caches) == [("key", 10), ("indexer", 10), ("key", 11), ("indexer", 11)]
        assert caches["key", 10].shape == [NUM_BLOCKS, 1, BLOCK_SIZE, 656]
        assert caches["indexer", 11].shape == [NUM_BLOCKS, BLOCK_SIZE, 132]
        assert {cache.dtype for cache in caches.values()} == {paddle.uint8}
        assert not any(cache.numpy().any() for cache in caches.values())

    def test_dsa_ignores_the_dtype_it_is_asked_for(self) -> None:
        caches = dsa_backend().create_kv_cache(num_layers=1, num_blocks=3, cache_dtype="bfloat16")
        assert {cache.dtype for cache in caches.values()} == {paddle.uint8}

    def test_dsa_tells_three_shapes_and_mla_two(self) -> None:
        assert dsa_backend().get_kv_cache_shape(max_num_blocks=7) == (
            [7, 1, BLOCK_SIZE, 656],
            [],
            [7, BLOCK_SIZE, 132],
        )
        assert mla_backend().get_kv_cache_shape(max_num_blocks=7) == ([7, 1, BLOCK_SIZE, 576], [])

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_mla_takes_the_models_dtype(self, dtype: str) -> None:
        caches = mla_backend().create_kv_cache(num_layers=2, num_blocks=3, cache_dtype=dtype, layer_offset=4)
        assert list(caches) == [("key", 4), ("key", 5)]
        assert {str(cache.dtype) for cache in caches.values()} == {f"paddle.{dtype}"}

    def test_mla_refuses_a_quantised_cache_and_names_both_settings(self) -> None:
        with pytest.raises(PluginError, match="MLA_ATTN and kv_cache_quant_type block_wise_fp8 contradict"):
            mla_backend().create_kv_cache(1, 3, "uint8", kv_cache_quant_type="block_wise_fp8")

    @pytest.mark.parametrize("make", [dsa_backend, mla_backend])
    def test_without_an_allocator_there_is_no_host_cache(self, make: Callable[[], Any]) -> None:
        with pytest.raises(NotImplementedError, match="cuda_host_alloc"):
            make().create_host_kv_cache(num_layers=1, num_blocks=1, cache_item_bytes=1)

    def test_host_cache_has_a_buffer_for_every_tensor_and_all_of_them_are_freed(self, pinned: Pinned) -> None:
        caches = dsa_backend().create_host_kv_cache(num_layers=2, num_blocks=3, cache_item_bytes=1, layer_offset=6)
        assert list(caches) == [("key", 6), ("indexer", 6), ("key", 7), ("indexer", 7)]
        assert pinned.sizes == [3 * BLOCK_SIZE * 656, 3 * BLOCK_SIZE * 132] * 2
        renamed = {"one": caches["key", 6], "none": 0, "two": caches["indexer", 6], "three": None}
        pinned.refused = {caches["key", 6]}
        dsa_backend().free_host_kv_cache(renamed)
        assert renamed == {}
        assert pinned.freed == [caches["indexer", 6]]

    def test_a_failing_host_allocation_gives_the_earlier_ones_back(self, pinned: Pinned) -> None:
        pinned.allowed = 3
        with pytest.raises(MemoryError):
            dsa_backend().create_host_kv_cache(num_layers=2, num_blocks=3, cache_item_bytes=1)
        assert sorted(pinned.freed) == sorted(pinned.allocated)


class TestSwapOperators:
    """Copies on a GPU go through FastDeploy's operators: the plug-in's calls, with a double that moves the bytes."""

    def test_ids_and_direction_are_those_of_the_operator(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fastdeploy.cache_manager import ops

        from fastdeploy_dsa.integrations.fastdeploy.host_memory import SwapOpCopier

        calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr(ops, "swap_cache_per_layer", lambda *given: calls.append(given), raising=False)
        tensor, host = paddle.zeros([5, 16, 8], "bfloat16"), np.zeros((3, 256), np.uint8)
        ids = {"src_block_ids": np.array([4, 1]), "dst_block_ids": np.array([0, 2])}
        SwapOpCopier(7).copy(src=tensor, dst=host, **ids)
        SwapOpCopier(7).copy(src=host, dst=tensor, **ids)
        assert [call[1:] for call in calls] == [
            (host.ctypes.data, 3, [4, 1], [0, 2], 7, 0),
            (host.ctypes.data, 3, [0, 2], [4, 1], 7, 1),
        ]
        assert all(call[0].dtype == paddle.uint8 for call in calls)

    def test_blocks_the_operator_would_cut_off_are_refused(self) -> None:
        from fastdeploy_dsa.integrations.fastdeploy.host_memory import SwapOpCopier

        with pytest.raises(PluginError, match="multiple of 8 bytes, got 132"):
            SwapOpCopier(0).copy(
                src=paddle.zeros([2, 132], "uint8"),
                dst=np.zeros((2, 132), np.uint8),
                src_block_ids=np.array([0]),
                dst_block_ids=np.array([0]),
            )

    def test_the_numa_node_is_read_from_the_drivers_tool(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fastdeploy_dsa.integrations.fastdeploy import host_memory

        answers = {"NUMA IDs of closest CPU: 1-3,5\n": 1, "": -1}
        for text, node in answers.items():
            said = SimpleNamespace(returncode=0, stdout=text)
            monkeypatch.setattr(host_memory.subprocess, "run", lambda *_, said=said, **__: said)
            assert host_memory.numa_node_of_gpu(0) == node
        monkeypatch.setattr(host_memory.subprocess, "run", lambda *_, **__: 1 / 0)
        assert host_memory.numa_node_of_gpu(0) == -1
        assert host_memory.bind_to_numa_node(-1) is False
