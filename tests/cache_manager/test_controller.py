"""CacheController: names, order, groups and clean failure, for specs of any shape."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping

import numpy as np
import pytest

from cache_manager import CacheConfig, CacheController, CacheInUse, CacheTensorSpec, ordered_keys


class Backend:
    """Declares made-up roles with odd sizes and creates NumPy arrays, in an order of its own choosing."""

    def __init__(
        self, roles: tuple[str, ...] = ("key", "extra"), owners: range = range(100), shuffle: bool = False
    ) -> None:
        self.roles, self.owners, self.shuffle = roles, owners, shuffle

    def cache_spec(
        self, layer_ids: tuple[int, ...], cache_dtype: str | None = None, kv_cache_quant_type: str | None = None
    ) -> tuple[CacheTensorSpec, ...]:
        def spec(role: str) -> CacheTensorSpec:
            layers = layer_ids if role == "key" else tuple(layer for layer in layer_ids if layer in self.owners)
            return CacheTensorSpec(role, f"{role}_caches", layers, (3, 7), "uint8", 1, role)

        return tuple(spec(role) for role in self.roles)

    def create_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        cache_dtype: str | None = None,
        kv_cache_quant_type: str | None = None,
        layer_offset: int = 0,
    ) -> Mapping[tuple[str, int], np.ndarray]:
        keys = ordered_keys(self.cache_spec(tuple(range(layer_offset, layer_offset + num_layers))))
        made = {key: np.zeros((num_blocks, 3, 7), np.uint8) for key in keys}
        return dict(reversed(made.items())) if self.shuffle else made


def controller(num_layers: int = 3, **rank: int) -> CacheController:
    return CacheController(CacheConfig(num_layers=num_layers, tensor_parallel_size=2), **rank)


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_flat_list_is_ordered_by_layer_and_declared_role(shuffle: bool) -> None:
    manager = controller()
    tensors = manager.initialize_kv_cache(Backend(shuffle=shuffle), num_gpu_blocks=2)
    expected = [("key", 0), ("extra", 0), ("key", 1), ("extra", 1), ("key", 2), ("extra", 2)]
    assert list(manager.groups[0].positions) == expected
    assert all(manager.caches[key] is tensor for key, tensor in zip(expected, tensors, strict=True))


def test_a_layer_without_a_role_has_no_entry() -> None:
    manager = controller()
    manager.initialize_kv_cache(Backend(owners=range(1, 2)), num_gpu_blocks=2)
    assert manager.groups[0].positions == {("key", 0): 0, ("key", 1): 1, ("extra", 1): 2, ("key", 2): 3}
    assert manager.num_bytes == 2 * 4 * 21


def test_storage_names_carry_layer_rank_and_device() -> None:
    manager = controller(num_layers=1, local_rank=3, device_id=5)
    manager.initialize_kv_cache(Backend(), num_gpu_blocks=1)
    manager.initialize_mtp_kv_cache(Backend(), num_gpu_blocks=1, num_mtp_layers=1, layer_offset=1)
    assert list(manager.get_kv_caches()) == [
        "key_caches_0_rank1.device5",
        "extra_caches_0_rank1.device5",
        "key_caches_1_rank1.device5",
        "extra_caches_1_rank1.device5",
    ]


def test_the_draft_group_takes_the_same_path_with_absolute_layer_ids() -> None:
    manager = controller()
    main = manager.initialize_kv_cache(Backend(), num_gpu_blocks=4)
    draft = manager.initialize_mtp_kv_cache(Backend(), num_gpu_blocks=6, num_mtp_layers=1, layer_offset=3)
    assert [key for key in manager.caches if key[1] == 3] == [("key", 3), ("extra", 3)]
    assert [tensor.shape[0] for tensor in main + draft] == [4] * 6 + [6] * 2


def test_freeing_drops_the_only_strong_references() -> None:
    manager = controller()
    references = [weakref.ref(tensor) for tensor in manager.initialize_kv_cache(Backend(), num_gpu_blocks=1)]
    manager.free_gpu_cache()
    gc.collect()
    assert all(reference() is None for reference in references)
    manager.initialize_kv_cache(Backend(), num_gpu_blocks=1)


def test_a_second_initialisation_is_refused_and_keeps_the_first() -> None:
    manager = controller()
    first = manager.initialize_kv_cache(Backend(), num_gpu_blocks=1)
    with pytest.raises(CacheInUse, match="layers 0 and up exists already"):
        manager.initialize_kv_cache(Backend(), num_gpu_blocks=2)
    assert manager.caches["key", 0] is first[0]


def test_overlapping_draft_layers_are_refused() -> None:
    manager = controller()
    manager.initialize_kv_cache(Backend(), num_gpu_blocks=1)
    with pytest.raises(ValueError, match=r"layer_offset: layers \[2\] belong to another group"):
        manager.initialize_mtp_kv_cache(Backend(), num_gpu_blocks=1, num_mtp_layers=2, layer_offset=2)


def test_no_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="num_gpu_blocks: expected 1 or more, got 0"):
        controller().initialize_kv_cache(Backend(), num_gpu_blocks=0)


def test_a_backend_that_fails_or_lies_leaves_nothing_behind() -> None:
    class Liar(Backend):
        def create_kv_cache(self, *args: int, **kwargs: int) -> Mapping[tuple[str, int], np.ndarray]:  # type: ignore[override]
            return {("key", 0): np.zeros(1)}

    class Failing(Backend):
        def create_kv_cache(self, *args: int, **kwargs: int) -> Mapping[tuple[str, int], np.ndarray]:  # type: ignore[override]
            raise MemoryError

    manager = controller()
    with pytest.raises(ValueError, match=r"created and declared cache tensors differ in \[\('extra', 0\)"):
        manager.initialize_kv_cache(Liar(), num_gpu_blocks=1)
    with pytest.raises(MemoryError):
        manager.initialize_kv_cache(Failing(), num_gpu_blocks=1)
    assert not manager.caches
    manager.initialize_kv_cache(Backend(), num_gpu_blocks=1)
