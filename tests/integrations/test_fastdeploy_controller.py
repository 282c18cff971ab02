"""The controller in FastDeploy's place: what it allocates and owns, the host tier, copies and their ends."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle")
pytestmark = [pytest.mark.needs_fastdeploy, pytest.mark.needs_cache_controller]

from cache_manager import CacheMoved, CacheSwapMetadata, TransferFailed  # noqa: E402
from fastdeploy_dsa.index_schedule import IndexSchedule  # noqa: E402
from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError  # noqa: E402
from tests.integrations.fastdeploy_rig.controllers import (  # noqa: E402
    NUM_BLOCKS,
    NUM_LAYERS,
    GqaBackend,
    bare_controller,
    dsa_backend,
    mla_backend,
)
from tests.integrations.fastdeploy_rig.pinned import Pinned  # noqa: E402

HOST_BLOCKS = 4


def started(backend: Any, *, draft: bool = False, **options: Any) -> Any:
    """A controller with the caches of a backend, its draft model's behind them, and the host tier if there is one."""
    controller = bare_controller(**options)
    controller.initialize_kv_cache(attn_backend=backend, num_gpu_blocks=NUM_BLOCKS)
    if draft:
        controller.initialize_mtp_kv_cache(
            attn_backend=backend, num_gpu_blocks=NUM_BLOCKS, num_mtp_layers=1, layer_offset=NUM_LAYERS
        )
    controller.initialize_host_cache(backend)
    return controller


def bytes_of(tensor: Any) -> np.ndarray:
    return (tensor if tensor.dtype == paddle.uint8 else paddle.view(tensor, "uint8")).numpy()


def fill(tensors: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random bytes into every tensor; returns them."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for tensor in tensors.values():
        content = rng.integers(0, 255, bytes_of(tensor).shape, np.uint8)
        tensor.set_value(
            content if tensor.dtype == paddle.uint8 else paddle.view(paddle.to_tensor(content), tensor.dtype)
        )
    return {name: bytes_of(tensor) for name, tensor in tensors.items()}


class TestAllocation:
    @pytest.mark.parametrize(("make", "per_layer"), [(GqaBackend, 2), (mla_backend, 1), (dsa_backend, 2)])
    def test_every_kind_of_backend_gets_its_tensors(self, make: Callable[[], Any], per_layer: int) -> None:
        """FastDeploy's own controller expects two shapes and fails for sparse attention."""
        controller = bare_controller()
        tensors = controller.initialize_kv_cache(make(), NUM_BLOCKS)
        assert len(tensors) == per_layer * NUM_LAYERS
        assert all(tensor is named for tensor, named in zip(tensors, controller.get_kv_caches().values(), strict=True))

    def test_the_flat_list_is_by_layer_and_role_whatever_order_the_backend_returns(self) -> None:
        backend = dsa_backend()
        create = backend.create_kv_cache
        backend.create_kv_cache = lambda **asked: dict(reversed(create(**asked).items()))
        controller = bare_controller()
        tensors = controller.initialize_kv_cache(backend, NUM_BLOCKS)
        assert [tensor.ndim for tensor in tensors] == [4, 3, 4, 3]
        assert [name.split("_rank")[0] for name in controller.cache_kvs_map] == [
            *("key_caches_0", "indexer_caches_0", "key_caches_1", "indexer_caches_1")
        ]

    def test_a_layer_that_shares_a_selection_has_no_index_cache(self) -> None:
        controller = started(dsa_backend(index_schedule=IndexSchedule("FS")), num_cpu_blocks=HOST_BLOCKS)
        assert [name.split("_rank")[0] for name in controller.cache_kvs_map] == [
            *("key_caches_0", "indexer_caches_0", "key_caches_1")
        ]
        assert set(controller.get_host_cache_kvs_map()) == set(controller.cache_kvs_map)

    def test_scales_have_the_same_bytes_on_host_and_device(self) -> None:
        controller = started(GqaBackend(), quant_type="block_wise_fp8", num_cpu_blocks=HOST_BLOCKS)
        roles = [name.split("_0_rank")[0] for name in controller.cache_kvs_map if "_0_rank" in name]
        assert roles == ["key_caches", "value_caches", "key_cache_scales", "value_cache_scales"]
        for spec in controller.owned.groups[0].specs:
            block = controller.owned.caches[spec.role, 0][0]
            assert spec.bytes_per_block == bytes_of(block).size

    def test_the_drafts_tensors_have_absolute_layers_and_both_roles(self) -> None:
        controller = started(dsa_backend(), draft=True)
        assert [name for name in controller.cache_kvs_map if "_2_" in name] == [
            *("key_caches_2_rank0.device0", "indexer_caches_2_rank0.device0")
        ]

    def test_clearing_a_map_that_was_handed_out_clears_nothing_else(self) -> None:
        """FastDeploy clears the draft model's map, which was the controller's own."""
        controller = started(dsa_backend(), draft=True)
        controller.get_kv_caches().clear()
        assert len(controller.cache_kvs_map) == 2 * (NUM_LAYERS + 1)

    def test_freed_tensors_die_with_the_last_reference_outside(self) -> None:
        """The profile run's cache must be gone before the real one is allocated."""
        controller = started(dsa_backend())
        alive = [weakref.ref(tensor) for tensor in controller.get_kv_caches().values()]
        controller.free_gpu_cache()
        assert [reference() for reference in alive] == [None] * len(alive)
        controller.initialize_kv_cache(dsa_backend(), NUM_BLOCKS + 1)
        assert controller.owned.num_device_blocks == NUM_BLOCKS + 1

    def test_an_address_that_changed_since_the_capture_is_an_error(self) -> None:
        controller = started(dsa_backend())
        captured = controller.owned.generation
        controller.owned.check_pinned_addresses(captured)
        controller.free_gpu_cache()
        controller.initialize_kv_cache(dsa_backend(), NUM_BLOCKS)
        with pytest.raises(CacheMoved):
            controller.owned.check_pinned_addresses(captured)


class TestHostTier:
    def test_it_is_one_allocation_per_role_and_none_before_all_caches_are_there(
        self, pinned: Pinned, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """FastDeploy allocates twice, the first time for the profile run, and once for each layer and role."""
        monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
        controller = bare_controller(num_cpu_blocks=HOST_BLOCKS)
        controller.initialize_kv_cache(dsa_backend(), NUM_BLOCKS)
        controller.initialize_mtp_kv_cache(dsa_backend(), NUM_BLOCKS, 1, NUM_LAYERS)
        assert pinned.sizes == []
        controller.initialize_host_cache(dsa_backend())
        assert len(pinned.sizes) == 2
        controller.initialize_host_cache(dsa_backend())
        assert len(pinned.sizes) == 2
        assert controller.free_cache()
        assert sorted(pinned.freed) == sorted(pinned.allocated)

    @pytest.mark.parametrize("missing", ["cuda_host_alloc", "cuda_host_free"])
    def test_without_allocator_or_free_it_is_refused_before_anything_is_allocated(
        self, pinned: Pinned, monkeypatch: pytest.MonkeyPatch, missing: str
    ) -> None:
        from fastdeploy.cache_manager import ops

        monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
        monkeypatch.setattr(ops, missing, None)
        with pytest.raises(PluginError, match="--swap-space needs FastDeploy's cuda_host_alloc and cuda_host_free"):
            bare_controller(num_cpu_blocks=HOST_BLOCKS)
        assert pinned.sizes == []
        assert bare_controller(num_cpu_blocks=0).initialize_kv_cache(dsa_backend(), NUM_BLOCKS)

    def test_its_blocks_are_those_the_scheduler_counts_on(self) -> None:
        controller = started(dsa_backend(), num_cpu_blocks=HOST_BLOCKS)
        assert controller.owned.num_host_blocks == HOST_BLOCKS
        assert set(controller.get_host_cache_kvs_map()) == set(controller.cache_kvs_map)
        assert started(dsa_backend(), num_cpu_blocks=0).get_host_cache_kvs_map() == {}

    @pytest.mark.parametrize("make", [dsa_backend, mla_backend, GqaBackend])
    def test_what_went_to_the_host_comes_back_in_every_role_of_every_layer(self, make: Callable[[], Any]) -> None:
        """The draft's layers too; FastDeploy's controller copies neither them nor the index cache."""
        controller = started(make(), draft=True, num_cpu_blocks=HOST_BLOCKS)
        before = fill(controller.cache_kvs_map, seed=11)
        evicted = CacheSwapMetadata(src_block_ids=[3, 1], dst_block_ids=[0, 2])
        assert controller.submit_swap_tasks(evicted, None) is None
        controller.owned.drain()
        assert evicted.success
        for tensor in controller.cache_kvs_map.values():
            tensor.set_value(paddle.zeros_like(tensor))
        loaded = CacheSwapMetadata(src_block_ids=[2, 0], dst_block_ids=[4, 0])
        counter = controller.submit_swap_tasks(None, loaded)
        assert counter is controller.swap_layer_done_counter
        for layer in range(NUM_LAYERS + 1):
            counter.wait_for_layer(layer)
        assert loaded.mapping == {2: 4, 0: 0}
        for name, tensor in controller.cache_kvs_map.items():
            now = bytes_of(tensor)
            assert np.array_equal(now[4], before[name][1]), name
            assert np.array_equal(now[0], before[name][3]), name
            assert not now[1:4].any(), name

    def test_names_of_high_ranks_count_inside_the_tensor_parallel_group(self) -> None:
        controller = started(dsa_backend(), num_cpu_blocks=HOST_BLOCKS, local_rank=3, tensor_parallel_size=2)
        assert all("_rank1." in name for name in controller.cache_kvs_map)
        counter = controller.load_host_to_device(CacheSwapMetadata(src_block_ids=[0], dst_block_ids=[0]))
        counter.wait_all()
        assert counter.get_completed_count() == NUM_LAYERS

    @pytest.mark.parametrize(("src", "dst"), [([], [1]), ([1], [])])
    def test_without_block_ids_nothing_is_copied_and_nothing_waits(self, src: list[int], dst: list[int]) -> None:
        meta = CacheSwapMetadata(src_block_ids=src, dst_block_ids=dst)
        counter = started(dsa_backend(), num_cpu_blocks=HOST_BLOCKS).load_host_to_device(meta)
        counter.wait_all(timeout=0.01)
        assert not meta.success
        assert meta.error_message == "no block ids: nothing was copied"


class TestCopiesOfOthers:
    """FastDeploy's tests hand copy functions in."""

    def submit(self, controller: Any, meta: Any, **functions: Any) -> Any:
        from fastdeploy.cache_manager.v1.metadata import CacheLevel

        given = {"transfer_fn_all": None, "transfer_fn_layer": None, **functions}
        return controller._submit_swap_task(
            meta=meta, src_location=CacheLevel.DEVICE, dst_location=CacheLevel.HOST, **given
        )

    def test_all_layers_at_once(self) -> None:
        seen: list[Any] = []
        meta = CacheSwapMetadata(src_block_ids=[0, 1], dst_block_ids=[10, 11])
        counter = self.submit(
            bare_controller(),
            meta,
            transfer_fn_all=lambda *ids: bool(seen.append(ids)) or True,
            force_all_layers=True,
        )
        counter.wait_all(timeout=5.0)
        assert seen == [([0, 1], [10, 11])]
        assert meta.success

    def test_layer_by_layer(self) -> None:
        def copy(layers: list[int], done: Callable[[int], None], src: list[int], dst: list[int]) -> bool:
            for layer in layers:
                done(layer)
            return True

        meta = CacheSwapMetadata(src_block_ids=[5], dst_block_ids=[0])
        self.submit(bare_controller(), meta, transfer_fn_layer=copy).wait_all(timeout=5.0)
        assert meta.success

    @pytest.mark.parametrize("failure", [RuntimeError("GPU error"), None])
    def test_a_failure_is_in_the_metadata_and_ends_every_wait_at_once(self, failure: Exception | None) -> None:
        def copy(src: list[int], dst: list[int]) -> bool:
            if failure is not None:
                raise failure
            return False

        meta = CacheSwapMetadata(src_block_ids=[0], dst_block_ids=[10])
        counter = self.submit(bare_controller(), meta, transfer_fn_all=copy, force_all_layers=True)
        with pytest.raises(TransferFailed):
            counter.wait_all(timeout=5.0)
        assert not meta.success
        assert ("GPU error" if failure else "reported failure") in str(meta.error_message)


class TestLife:
    def test_write_back_waits_for_the_eviction_before_it_loads(self) -> None:
        controller = started(dsa_backend(), num_cpu_blocks=HOST_BLOCKS, write_policy="write_back")
        fill(controller.cache_kvs_map, seed=12)
        evicted = CacheSwapMetadata(src_block_ids=[0], dst_block_ids=[1])
        controller.submit_swap_tasks(evicted, CacheSwapMetadata(src_block_ids=[1], dst_block_ids=[2]))
        assert evicted.success
        assert controller._pending_evict_counters == []
        controller.swap_layer_done_counter.wait_all()
        for tensor in controller.cache_kvs_map.values():
            assert np.array_equal(bytes_of(tensor)[2], bytes_of(tensor)[0])

    @pytest.mark.parametrize("action", ["reset_cache", "free_cache"])
    def test_resetting_and_freeing_wait_for_a_copy_that_goes_on(
        self, monkeypatch: pytest.MonkeyPatch, action: str
    ) -> None:
        controller = started(dsa_backend(), num_cpu_blocks=HOST_BLOCKS)
        go, order = threading.Event(), list[str]()
        copy = controller.owned._copier.copy

        def slow(**arguments: Any) -> None:
            go.wait(5.0)
            copy(**arguments)
            order.append("copied")

        monkeypatch.setattr(controller.owned._copier, "copy", slow)
        controller.load_host_to_device(CacheSwapMetadata(src_block_ids=[0], dst_block_ids=[0]))
        threading.Timer(0.05, go.set).start()
        assert getattr(controller, action)()
        order.append("returned")
        assert order == ["copied"] * 2 * NUM_LAYERS + ["returned"]

    def test_a_failing_reset_is_false_and_its_cause_is_in_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        controller = started(dsa_backend())

        class Broken(list[Any]):
            def clear(self) -> None:
                raise RuntimeError("lock error")

        controller._pending_evict_counters = Broken()
        with caplog.at_level(logging.ERROR):
            assert not controller.reset_cache()
        assert "lock error" in caplog.text
        assert len(controller.cache_kvs_map) == 2 * NUM_LAYERS

    def test_start_and_stop_may_be_called_again(self) -> None:
        controller = started(dsa_backend(), num_cpu_blocks=HOST_BLOCKS)
        controller.start()
        controller.stop()
        controller.stop()

    def test_what_is_not_offered_fails_before_it_begins(self) -> None:
        controller = bare_controller()
        for task in (
            controller.prefetch_from_storage(None),
            controller.backup_device_to_storage([0], None),
            controller.backup_host_to_storage([0], None),
            controller.send_to_node(None),
            controller.wait_for_transfer_from_node(None),
        ):
            assert task.error
            assert task.error.endswith("is not offered")
