"""CacheController's host tier, addresses, generations and order of release."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from itertools import pairwise
from threading import Timer

import numpy as np
import pytest

from cache_manager import (
    CacheConfig,
    CacheController,
    CacheInUse,
    CacheMoved,
    CacheSwapMetadata,
    HostAllocationFailed,
    NoHostTier,
    NumpyCopier,
    PlainAllocator,
    TransferFailed,
    TransferTimeout,
    UnknownBlock,
)
from cache_manager.host_cache import ALIGNMENT
from tests.cache_manager.kit import NUM_DRAFT_LAYERS, NUM_LAYERS, SHAPES, Backend, Cache, CountingAllocator


def controller(shape: str = "dsa fp8", *, allocator: object = None, with_draft: bool = True, **options: object):
    config = CacheConfig(num_layers=NUM_LAYERS, **({"num_host_blocks": 6} | options))  # type: ignore[arg-type]
    manager = CacheController(config, copier=NumpyCopier(), host_allocator=allocator)  # type: ignore[arg-type]
    manager.initialize_kv_cache(Backend(shape), 4)
    if with_draft:
        manager.initialize_mtp_kv_cache(Backend(shape), 4, NUM_DRAFT_LAYERS, NUM_LAYERS)
    return manager


@pytest.mark.parametrize("shape", SHAPES)
def test_there_is_one_host_allocation_per_role_and_none_before_it_is_asked_for(shape: str) -> None:
    allocator = CountingAllocator()
    manager = controller(shape, allocator=allocator)
    assert allocator.num_allocated == 0
    manager.initialize_host_cache()
    assert allocator.num_allocated == len(SHAPES[shape])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_has_as_many_bytes_on_the_host_as_on_the_device(shape: str) -> None:
    cache = Cache(shape, num_host_blocks=6)
    for key, array in cache.controller.caches.items():
        host = cache.host_arrays()[key]
        assert host.shape == (6, array[0].nbytes)
        assert host.dtype == np.uint8
    assert cache.controller.bytes_per_block * 10 == cache.controller.num_bytes
    assert isinstance(cache.controller.bytes_per_block, int)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_round_trip_restores_every_tensor_of_both_groups(shape: str) -> None:
    """Main and draft layers, scales and index keys: what stays behind keeps the poison."""
    manager = controller(shape)
    manager.initialize_host_cache()
    rng = np.random.default_rng(0)
    originals = {}
    for key, array in manager.caches.items():
        array[...] = rng.integers(0, 256, array.shape, np.uint8)
        originals[key] = array.copy()
    evicted = CacheSwapMetadata([0, 1, 3], [5, 2, 0])
    manager.evict_device_to_host(evicted).synchronize()
    assert evicted.mapping == {0: 5, 1: 2, 3: 0}
    for array in manager.caches.values():
        array[...] = 0xBA
    loaded = CacheSwapMetadata([5, 2, 0], [3, 0, 1])
    manager.submit_swap_tasks(None, loaded)
    manager.drain()
    assert loaded.success
    for key, array in manager.caches.items():
        assert np.array_equal(array[[3, 0, 1]], originals[key][[0, 1, 3]]), key
        assert (array[2] == 0xBA).all()
    per_block = manager.bytes_per_block
    assert manager.get_stats()["bytes_moved"] == {
        "device_to_device": 0,
        "device_to_host": 3 * per_block,
        "host_to_device": 3 * per_block,
    }


def test_host_addresses_have_the_names_of_the_device_tensors_and_do_not_overlap() -> None:
    manager = controller("gqa with scales")
    addresses = manager.initialize_host_cache()
    assert addresses == manager.get_host_cache_kvs_map()
    assert addresses.keys() == manager.get_kv_caches().keys()
    arrays = manager._mover.host.arrays  # type: ignore[union-attr]
    spans = sorted((array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays.values())
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_plain_memory_is_aligned_to_pages() -> None:
    for num_bytes in (1, 5000, 3 * ALIGNMENT):
        memory = PlainAllocator().allocate(num_bytes)
        assert (memory.ctypes.data % ALIGNMENT, memory.shape) == (0, (num_bytes,))


@pytest.mark.parametrize("fails_at", range(4))
def test_a_host_allocation_that_fails_half_way_is_rolled_back(fails_at: int) -> None:
    allocator = CountingAllocator(fails_at)
    manager = controller("gqa with scales", allocator=allocator)
    with pytest.raises(HostAllocationFailed, match="6 blocks could not be allocated: injected failure"):
        manager.initialize_host_cache()
    assert allocator.num_allocated == fails_at
    assert allocator.live == []
    assert (manager.num_host_blocks, manager.get_host_cache_kvs_map()) == (0, {})
    with pytest.raises(NoHostTier):
        manager.evict_device_to_host(CacheSwapMetadata([0], [0]))
    manager.initialize_host_cache()
    assert manager.num_host_blocks == 6


def test_an_allocator_that_cannot_free_is_refused_before_it_allocates() -> None:
    class Leaky:
        free = None

        def allocate(self, num_bytes: int) -> None:
            pytest.fail("allocated")

    with pytest.raises(HostAllocationFailed, match="the allocator cannot free"):
        controller(allocator=Leaky()).initialize_host_cache()


def test_an_allocator_that_returns_something_else_is_refused_and_freed() -> None:
    class Short(CountingAllocator):
        def allocate(self, num_bytes: int) -> np.ndarray:
            return super().allocate(num_bytes - 1)

    allocator = Short()
    with pytest.raises(HostAllocationFailed, match="allocator: expected"):
        controller(allocator=allocator).initialize_host_cache()
    assert allocator.live == []


@pytest.mark.parametrize("release", ["free_cache", "free_gpu_cache"])
def test_every_host_allocation_is_freed_once(release: str) -> None:
    allocator = CountingAllocator()
    manager = controller("gqa with scales", allocator=allocator)
    manager.initialize_host_cache()
    getattr(manager, release)()
    getattr(manager, release)()
    assert (allocator.num_allocated, allocator.live) == (4, [])


def test_a_failing_release_does_not_keep_the_other_arenas() -> None:
    class Stubborn(CountingAllocator):
        def free(self, memory: np.ndarray) -> None:
            super().free(memory)
            if len(self.live) == 2:
                raise OSError("stuck")

    allocator = Stubborn()
    manager = controller("gqa with scales", allocator=allocator)
    manager.initialize_host_cache()
    assert not manager.free_cache()
    assert "stuck" in str(manager.last_error)
    assert (allocator.live, manager.num_host_blocks, dict(manager.groups)) == ([], 0, {})


def test_zero_host_blocks_mean_no_tier_and_no_allocation() -> None:
    allocator = CountingAllocator()
    manager = controller(allocator=allocator, num_host_blocks=0)
    assert manager.initialize_host_cache() == {}
    assert (allocator.num_allocated, manager.num_host_blocks) == (0, 0)


def test_groups_cannot_change_under_a_host_tier() -> None:
    manager = controller(with_draft=False)
    manager.initialize_host_cache()
    with pytest.raises(CacheInUse, match="the host tier exists already"):
        manager.initialize_mtp_kv_cache(Backend("mla"), 4, 1, NUM_LAYERS)
    with pytest.raises(CacheInUse, match="the host tier exists already"):
        manager.initialize_host_cache()
    with pytest.raises(CacheInUse, match="free them together"):
        manager.free_group(0)
    assert list(manager.groups) == [0]


def test_freeing_the_draft_group_keeps_the_main_one() -> None:
    manager = controller()
    main = [name for name in manager.get_kv_caches() if f"_{NUM_LAYERS}_" not in name]
    manager.get_kv_caches().clear()  # a view, not the books
    manager.free_group(NUM_LAYERS)
    assert list(manager.get_kv_caches()) == main
    with pytest.raises(ValueError, match=r"first_layer_id: expected one of \[0\], got 3"):
        manager.free_group(NUM_LAYERS)


def test_after_free_no_part_of_the_manager_keeps_a_tensor_alive() -> None:
    manager = controller()
    manager.initialize_host_cache()
    metadata = CacheSwapMetadata([0], [1])
    manager.evict_device_to_host(metadata).synchronize()
    manager.submit_swap_tasks(None, CacheSwapMetadata([1], [2]))
    manager.copy_blocks([0], [3])
    references = [weakref.ref(tensor) for tensor in manager.caches.values()]
    manager.free_gpu_cache()
    manager.stop()  # the transfer thread's last frame is gone, too
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_a_replay_after_a_new_allocation_is_refused() -> None:
    manager = controller(num_host_blocks=0)
    captured = manager.generation
    manager.check_pinned_addresses(captured)
    manager.free_gpu_cache()
    with pytest.raises(CacheMoved, match="captured under generation"):
        manager.check_pinned_addresses(captured)
    manager.initialize_kv_cache(Backend("dsa fp8"), 4)
    with pytest.raises(CacheMoved):
        manager.check_pinned_addresses(captured)
    manager.check_pinned_addresses()
    manager.check_pinned_addresses(manager.generation)


def test_a_replay_after_a_tensor_moved_is_refused() -> None:
    class Moving(NumpyCopier):
        offset = 0

        def address(self, tensor: np.ndarray) -> int:
            return super().address(tensor) + self.offset

    copier = Moving()
    manager = CacheController(CacheConfig(num_layers=1), copier=copier)
    manager.initialize_kv_cache(Backend("mla"), 2)
    manager.check_pinned_addresses()
    copier.offset = 64
    with pytest.raises(CacheMoved, match=r"cache tensor \('key', 0\) was at 0x"):
        manager.check_pinned_addresses()
    with pytest.raises(ValueError, match="copier: expected one, got None"):
        CacheController(CacheConfig(num_layers=1)).check_pinned_addresses()


def test_every_allocation_and_release_has_its_own_generation() -> None:
    manager = controller(with_draft=False, num_host_blocks=0)
    seen = [manager.generation]
    manager.initialize_mtp_kv_cache(Backend("mla"), 4, 1, NUM_LAYERS)
    seen.append(manager.generation)
    manager.free_group(NUM_LAYERS)
    seen.append(manager.generation)
    manager.free_cache()
    seen.append(manager.generation)
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("release", ["free_cache", "free_gpu_cache", "reset_cache", "stop"])
def test_a_copy_under_way_ends_before_memory_is_released(release: str) -> None:
    cache = Cache(num_host_blocks=6)
    with cache.closed_gate():
        counter = cache.controller.evict_device_to_host(CacheSwapMetadata([0, 1], [3, 4]))
        Timer(0.2, cache.copier.gate.set).start()
        assert getattr(cache.controller, release)() in (True, None)
        assert counter.is_all_done()


def test_memory_under_a_copy_that_hangs_is_not_released(caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(num_host_blocks=6, transfer_timeout=0.05)
    with cache.closed_gate():
        cache.controller.evict_device_to_host(CacheSwapMetadata([0], [0]))
        generation = cache.controller.generation
        with caplog.at_level(logging.ERROR):
            assert not cache.controller.free_cache()
            assert not cache.controller.reset_cache()
        assert "free_cache failed" in caplog.text
        assert "TransferTimeout" in caplog.text
        assert isinstance(cache.controller.last_error, TransferTimeout)
        with pytest.raises(TransferTimeout):
            cache.controller.free_gpu_cache()
        with pytest.raises(TransferTimeout):
            cache.controller.stop()
        assert cache.controller.generation == generation
        assert cache.allocator.live  # type: ignore[attr-defined]
        assert cache.controller.get_stats()["pending_transfers"] == 1
    assert cache.controller.free_cache()
    assert cache.controller.last_error is None


def test_start_and_stop_work_on_real_objects_as_often_as_one_likes() -> None:
    manager = controller()
    manager.start()
    manager.start()
    manager.initialize_host_cache()
    manager.evict_device_to_host(CacheSwapMetadata([0], [1])).synchronize()
    manager.stop()
    manager.stop()
    manager.evict_device_to_host(CacheSwapMetadata([1], [2])).synchronize()
    manager.stop()


def test_an_eviction_alone_has_no_counter_and_an_empty_load_is_done() -> None:
    manager = controller()
    manager.initialize_host_cache()
    assert manager.submit_swap_tasks(CacheSwapMetadata([0], [1]), None) is None
    assert manager.swap_layer_done_counter is None
    empty = CacheSwapMetadata()
    counter = manager.submit_swap_tasks(None, empty)
    assert counter is not None
    counter.wait_all(0.0)
    assert (empty.success, empty.error_message, manager.swap_layer_done_counter) == (True, None, counter)
    assert manager.submit_swap_tasks(None, None) is None
    assert manager.reset_cache()
    assert manager.swap_layer_done_counter is None


def test_a_load_into_blocks_whose_eviction_failed_does_not_begin() -> None:
    cache = Cache(num_host_blocks=6)
    array = cache.controller.caches["key", 0]
    array[0] = 5
    cache.copier.fails_in = 2
    evict, load = CacheSwapMetadata([0], [1]), CacheSwapMetadata([2], [0])
    counter = cache.controller.submit_swap_tasks(evict, load)
    assert counter is not None
    with pytest.raises(TransferFailed, match="injected failure"):
        counter.wait_all()
    assert (evict.success, load.success) == (False, False)
    assert "injected failure" in str(evict.error_message)
    assert (array[0] == 5).all()


def test_an_eviction_waits_for_the_compute_before_it() -> None:
    cache = Cache(num_host_blocks=6)
    cache.controller.evict_device_to_host(CacheSwapMetadata([0], [1]))
    assert cache.copier.num_orderings == 1
    cache.controller.load_host_to_device(CacheSwapMetadata([1], [0]))
    assert cache.copier.num_orderings == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.copy_blocks([0], [10]), UnknownBlock, r"blocks \[10\] are not among the 10 of the device"),
        (lambda c: c.copy_blocks([-1], [1]), UnknownBlock, r"blocks \[-1\] are not among"),
        (lambda c: c.copy_blocks([0, 1], [2]), ValueError, "dst_block_ids: expected 2 blocks, got 1"),
        (lambda c: c.copy_blocks([0, 1], [2, 2]), ValueError, "dst_block_ids: expected distinct blocks"),
        (lambda c: c.copy_blocks([0, 1], [2, 0]), ValueError, "dst_block_ids: expected none of src_block_ids"),
        (lambda c: c.evict_device_to_host(CacheSwapMetadata([0], [6])), UnknownBlock, "among the 6 of the host"),
        (lambda c: c.load_host_to_device(CacheSwapMetadata([0, 1], [0])), ValueError, "expected 2 blocks, got 1"),
        (
            lambda c: c.submit_swap_tasks(CacheSwapMetadata([0], [0]), CacheSwapMetadata([9], [0])),
            UnknownBlock,
            r"blocks \[9\] are not among the 6 of the host",
        ),
    ],
)
def test_impossible_copies_are_refused_and_copy_nothing(
    call: Callable[[CacheController], object], error: type[Exception], message: str
) -> None:
    cache = Cache(num_host_blocks=6)
    with pytest.raises(error, match=message):
        call(cache.controller)
    cache.controller.drain()
    assert cache.copier.num_copies == 0
    assert cache.controller.swap_layer_done_counter is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": -1}, "num_layers: expected 0 or more, got -1"),
        ({"num_host_blocks": -1}, "num_host_blocks: expected 0 or more, got -1"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size: expected 1 or more, got 0"),
        ({"write_policy": "write_around"}, "write_policy: expected one of write_back, .*, got 'write_around'"),
        ({"transfer_timeout": 0.0}, "transfer_timeout: expected more than 0 seconds, got 0.0"),
    ],
)
def test_impossible_configurations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheConfig(**({"num_layers": 1} | options))  # type: ignore[arg-type]


def test_a_host_tier_without_anything_to_copy_with_is_refused() -> None:
    with pytest.raises(ValueError, match="expected both, got None and 0 groups"):
        CacheController(CacheConfig(num_layers=1, num_host_blocks=1)).initialize_host_cache()
