"""The controller's side of pools: every tensor has its pool's blocks, on the device and on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cache_manager import (
    MAIN_POOL,
    CacheConfig,
    CacheController,
    CachePool,
    CacheSwapMetadata,
    CacheTensorSpec,
    HostAllocationFailed,
    NumpyCopier,
    TensorKey,
    UnknownBlock,
    WindowRoom,
    cache_bytes,
    most_blocks,
)
from tests.cache_manager.kit import NUM_DRAFT_LAYERS, NUM_LAYERS, POOLS, Backend

COUNTS = {"window": 5, "state": 6, "closed": 7}
HOST_COUNTS = {"window": 3, "state": 2, "closed": 1}


def controller(**options: Any) -> CacheController:
    config = CacheConfig(NUM_LAYERS, num_host_blocks=4, window_blocks=COUNTS, host_window_blocks=HOST_COUNTS)
    return CacheController(replace(config, **options), copier=NumpyCopier())


def full_controller(**options: Any) -> CacheController:
    made = controller(**options)
    made.initialize_kv_cache(Backend("windows"), 9)
    made.initialize_mtp_kv_cache(Backend("windows"), 8, NUM_DRAFT_LAYERS, NUM_LAYERS)
    return made


def test_every_tensor_has_the_blocks_of_its_pool_in_the_draft_group_too() -> None:
    made = full_controller()
    assert made.pools == tuple(POOLS.values())
    assert (made.num_device_blocks, made.window_blocks) == (8, COUNTS)
    for (role, layer), tensor in made.caches.items():
        main = 9 if layer < NUM_LAYERS else 8
        assert len(tensor) == COUNTS.get(role, main)
    assert made.num_bytes == sum(tensor.nbytes for tensor in made.caches.values())
    specs = [spec for group in made.groups.values() for spec in group.specs]
    # The draft group has a main block less than the other, 24 bytes a token.
    assert made.num_bytes == cache_bytes(specs, 9, COUNTS) - 4 * 24
    assert made.bytes_per_block == made.pool_bytes_per_block(MAIN_POOL) == 4 * 4 * 24
    assert made.pool_bytes_per_block("closed") == 2 * 36  # on layers 0 and 3


def test_the_host_has_its_own_number_of_blocks_in_each_pool() -> None:
    made = full_controller()
    assert made.host_window_blocks == {}
    made.initialize_host_cache()
    assert (made.num_host_blocks, made.host_window_blocks) == (4, HOST_COUNTS)
    host = made._mover.host
    assert host is not None
    for (role, layer), array in host.arrays.items():
        assert array.shape == (HOST_COUNTS.get(role, 4), made.caches[role, layer][0].nbytes)


def test_a_host_that_would_lack_windows_is_refused() -> None:
    made = full_controller(host_window_blocks={"window": 3, "closed": 1})
    with pytest.raises(ValueError, match="host_window_blocks of pool state: expected 1 or more, got 0"):
        made.initialize_host_cache()
    assert made.num_host_blocks == 0


def test_a_host_tier_that_fails_leaves_nothing_of_any_pool() -> None:
    class Failing:
        num_live = 0

        def allocate(self, num_bytes: int) -> np.ndarray:
            if self.num_live == 3:
                raise MemoryError("enough")
            self.num_live += 1
            return np.zeros(num_bytes, np.uint8)

        def free(self, memory: np.ndarray) -> None:
            self.num_live -= 1

    allocator = Failing()
    config = CacheConfig(NUM_LAYERS, num_host_blocks=4, window_blocks=COUNTS, host_window_blocks=HOST_COUNTS)
    made = CacheController(config, copier=NumpyCopier(), host_allocator=allocator)
    made.initialize_kv_cache(Backend("windows"), 9)
    with pytest.raises(HostAllocationFailed, match="enough"):
        made.initialize_host_cache()
    assert allocator.num_live == 0


@pytest.mark.parametrize("direction", ["inside", "out", "in"])
def test_a_copy_in_one_pool_touches_no_other(direction: str) -> None:
    made = full_controller()
    made.initialize_host_cache()
    host = made._mover.host
    assert host is not None
    rng = np.random.default_rng(2)
    for array in (*made.caches.values(), *host.arrays.values()):
        array[:] = rng.integers(0, 256, array.shape, np.uint8)
    before = {key: (tensor.copy(), host.arrays[key].copy()) for key, tensor in made.caches.items()}
    pairs = {"state": ([0, 1], [1, 0])} if direction != "inside" else {"state": ([0, 1], [4, 3])}
    if direction == "inside":
        made.copy_blocks([], [], pairs)
    else:
        start = made.evict_device_to_host if direction == "out" else made.load_host_to_device
        start(CacheSwapMetadata(windows=pairs)).synchronize()
    for key, (device_before, host_before) in before.items():
        source, changed = {
            "inside": (device_before, device_before.copy()),
            "out": (device_before, host_before.copy()),
            "in": (host_before, device_before.copy()),
        }[direction]
        if key[0] == "state":
            changed[list(pairs["state"][1])] = source[list(pairs["state"][0])]
        found = host.arrays[key] if direction == "out" else made.caches[key]
        other, other_before = (
            (made.caches[key], device_before) if direction == "out" else (host.arrays[key], host_before)
        )
        assert np.array_equal(found, changed), key
        assert np.array_equal(other, other_before), key


def test_a_block_that_a_pool_lacks_is_named_and_nothing_is_copied() -> None:
    made = full_controller()
    before = {key: tensor.copy() for key, tensor in made.caches.items()}
    with pytest.raises(UnknownBlock, match=r"blocks \[6\] of pool state are not among the 6 of the device"):
        made.copy_blocks([0], [1], {"state": ([0], [6])})
    with pytest.raises(ValueError, match="dst_block_ids: expected none of src_block_ids"):
        made.copy_blocks([0], [1], {"state": ([0], [0])})
    assert all(np.array_equal(before[key], tensor) for key, tensor in made.caches.items())


def test_a_pool_without_blocks_is_refused() -> None:
    made = controller(window_blocks={"window": 5})
    with pytest.raises(ValueError, match=r"window_blocks: expected blocks of pools \['state', 'closed'\]"):
        made.initialize_kv_cache(Backend("windows"), 9)
    assert not made.caches
    with pytest.raises(ValueError, match="window_blocks: expected 1 or more for pool window, got 0"):
        controller(window_blocks={"window": 0})


def test_a_pool_that_nobody_declares_is_refused() -> None:
    class Undeclared(Backend):
        def cache_pools(self) -> tuple[CachePool, ...]:
            return (POOLS["window"],)

    with pytest.raises(ValueError, match=r"specs name pools \['closed', 'state'\], cache_pools declares \['window'\]"):
        controller().initialize_kv_cache(Undeclared("windows"), 9)


def test_groups_that_disagree_about_a_pool_are_refused() -> None:
    class Other(Backend):
        def cache_pools(self) -> tuple[CachePool, ...]:
            return tuple(replace(pool, live_tokens=pool.live_tokens + 1) for pool in POOLS.values())

    made = controller()
    made.initialize_kv_cache(Backend("windows"), 9)
    with pytest.raises(ValueError, match=r"pools \['window', 'closed'\] are declared otherwise than by"):
        made.initialize_mtp_kv_cache(Other("windows"), 9, NUM_DRAFT_LAYERS, NUM_LAYERS)
    assert len(made.groups) == 1


def test_a_backend_without_windows_is_asked_for_none() -> None:
    class Plain:
        def cache_spec(self, layer_ids: tuple[int, ...], **_: object) -> tuple[CacheTensorSpec, ...]:
            return (CacheTensorSpec("key", "key", layer_ids, (3,), "uint8", 1, "key"),)

        def create_kv_cache(
            self,
            num_layers: int,
            num_blocks: int,
            cache_dtype: str | None = None,
            kv_cache_quant_type: str | None = None,
            layer_offset: int = 0,
        ) -> Mapping[TensorKey, np.ndarray]:
            return {("key", layer): np.zeros((num_blocks, 3), np.uint8) for layer in range(num_layers)}

    made = controller()
    made.initialize_kv_cache(Plain(), 9)
    assert (made.pools, made.window_blocks) == ((), {})


@pytest.mark.parametrize("memory", [0, 1, 1000, 1001, 5000, 10**6])
def test_the_most_blocks_that_fit_are_chosen(memory: int) -> None:
    specs, room = Backend("windows").cache_spec((0, 1, 2)), WindowRoom(num_requests=2, num_step_tokens=3)

    def bytes_of(num_blocks: int) -> int:
        return cache_bytes(specs, num_blocks, room.device_blocks(POOLS.values(), num_blocks))

    chosen = most_blocks(memory, 100, bytes_of)
    assert chosen == max([count for count in range(101) if count == 0 or bytes_of(count) <= memory])
