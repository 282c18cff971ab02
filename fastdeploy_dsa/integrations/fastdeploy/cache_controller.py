"""FastDeploy's CacheController over this package's: its names and promises outside, one owner of tensors inside."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import paddle
from fastdeploy.cache_manager.v1.base import KVCacheBase
from fastdeploy.cache_manager.v1.metadata import AsyncTaskHandler, CacheLevel

from cache_manager import CacheConfig, CacheController, CacheOwner, LayerDoneCounter, TransferFailed
from fastdeploy_dsa.integrations.fastdeploy import host_memory
from fastdeploy_dsa.integrations.fastdeploy.cache_methods import CacheMethods
from fastdeploy_dsa.integrations.fastdeploy.shaped_owner import SCALED, STORAGE_NAMES, ShapedOwner
from fastdeploy_dsa.integrations.fastdeploy.transfer_view import TransferView

TRANSFER_TIMEOUT = 300.0  # seconds; a load that is merely slow is not an error

WRITE_POLICIES = ("write_back", "write_through", "write_through_selective")


class FastDeployCacheController(KVCacheBase):  # type: ignore[misc]
    """Takes FastDeploy's place in its worker, for every attention backend.

    The tensors, the host tier and the copies are those of `owned`; the maps under FastDeploy's names are views.
    """

    def __init__(self, config: Any, local_rank: int, device_id: int) -> None:
        """Make a controller without caches.

        Raises:
            PluginError: A host cache is asked for, and there is no memory for it.
        """
        super().__init__(config)
        self._num_layers = int(self.model_config.num_hidden_layers)
        self._lock = threading.RLock()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cache_transfer")
        self._layer_done_counter: LayerDoneCounter | None = None
        self._pending_evict_counters: list[Any] = []
        self._numa_bound = False
        self._local_rank = local_rank
        self._device_id = device_id
        self.attn_backend: Any = None
        self.cache_kvs_map: dict[str, Any] = {}
        self.host_cache_kvs_map: dict[str, int] = {}
        self.owned = self._make_owned(local_rank, device_id)
        self._transfer_manager = TransferView(self.owned)
        self._initialized = True

    def _make_owned(self, local_rank: int, device_id: int) -> CacheController:
        device, num_host_blocks = str(paddle.device.get_device()), int(self.cache_config.num_cpu_blocks or 0)
        quant_type = self._get_kv_cache_quant_type()
        policy = self.write_policy if self.write_policy in WRITE_POLICIES else "write_back"
        config = CacheConfig(
            num_layers=self._num_layers,
            cache_dtype="uint8" if quant_type is not None else getattr(self.model_config, "dtype", None),
            kv_cache_quant_type=quant_type,
            tensor_parallel_size=int(self.parallel_config.tensor_parallel_size),
            num_host_blocks=num_host_blocks,
            write_policy=policy,  # type: ignore[arg-type] # one of WRITE_POLICIES
            transfer_timeout=TRANSFER_TIMEOUT,
        )
        return CacheController(
            config,
            local_rank,
            device_id,
            copier=host_memory.copier_for(device, device_id),
            host_allocator=host_memory.allocator_for(device, num_host_blocks),
        )

    @property
    def write_policy(self) -> str | None:
        """When cached blocks are copied to the host, as FastDeploy names it; None: it does not say."""
        return getattr(self.cache_config, "write_policy", None)

    @property
    def transfer_manager(self) -> TransferView:
        """The copies, as FastDeploy looks at them."""
        return self._transfer_manager

    @property
    def swap_layer_done_counter(self) -> LayerDoneCounter | None:
        """Of the latest load to the device."""
        return self._layer_done_counter

    def initialize_kv_cache(self, attn_backend: Any, num_gpu_blocks: int) -> list[Any]:
        """Allocate the model's cache; the host's follows when all caches are there, see initialize_host_cache.

        Returns:
            The tensors by (layer, role order of the backend).
        """
        self.attn_backend = attn_backend
        return self._registered(self.owned.initialize_kv_cache(_owner(attn_backend), num_gpu_blocks))

    def initialize_mtp_kv_cache(
        self, attn_backend: Any, num_gpu_blocks: int, num_mtp_layers: int, layer_offset: int
    ) -> list[Any]:
        """Allocate the draft model's cache: a second group, copied and freed with the first."""
        owner = _owner(attn_backend)
        return self._registered(
            self.owned.initialize_mtp_kv_cache(owner, num_gpu_blocks, num_mtp_layers, layer_offset)
        )

    def initialize_host_cache(self, attn_backend: Any) -> dict[str, int]:
        """Allocate the host tier for every group there is; nothing happens if there should be none or it exists.

        Returns:
            As get_host_cache_kvs_map.
        """
        self.attn_backend = attn_backend
        if self.cache_config.num_cpu_blocks and not self.host_cache_kvs_map:
            self._bind_to_closest_numa_node()
            self.host_cache_kvs_map = self.owned.initialize_host_cache()
            self._transfer_manager.set_host_cache_kvs_map(self.host_cache_kvs_map)
        return self.host_cache_kvs_map

    def get_kv_caches(self) -> dict[str, Any]:
        """Storage name to tensor, over all groups; a new dict, which the caller may clear."""
        return dict(self.cache_kvs_map)

    def get_host_cache_kvs_map(self) -> dict[str, int]:
        """Storage name to address; empty without a host tier."""
        return self.host_cache_kvs_map

    def submit_swap_tasks(self, evict_metadata: Any | None, swap_in_metadata: Any | None) -> LayerDoneCounter | None:
        """Start an eviction and then a load; both run in this order.

        Returns:
            The load's counter; None without a load.

        Raises:
            TransferFailed: An earlier eviction failed, or this one under write_back: the host blocks hold nothing.
        """
        self._wait_for_pending_evict_counters()
        if evict_metadata is not None:
            self._pending_evict_counters.append(self.evict_device_to_host(evict_metadata))
            if self._should_wait_for_swap_out():
                self._wait_for_pending_evict_counters()
        if swap_in_metadata is None:
            return None
        self._layer_done_counter = self.load_host_to_device(swap_in_metadata)
        return self._layer_done_counter

    def load_host_to_device(self, swap_metadata: Any) -> LayerDoneCounter:
        """Start to copy host blocks to device blocks; layers are ready one after the other."""
        return self._submit_swap_task(
            meta=swap_metadata,
            src_location=CacheLevel.HOST,
            dst_location=CacheLevel.DEVICE,
            transfer_fn_all=None,
            transfer_fn_layer=None,
        )

    def evict_device_to_host(self, swap_metadata: Any) -> LayerDoneCounter:
        """Start to copy device blocks to host blocks."""
        return self._submit_swap_task(
            meta=swap_metadata,
            src_location=CacheLevel.DEVICE,
            dst_location=CacheLevel.HOST,
            transfer_fn_all=None,
            transfer_fn_layer=None,
            force_all_layers=True,
        )

    def _submit_swap_task(
        self,
        meta: Any,
        src_location: Any,
        dst_location: Any,
        transfer_fn_all: Callable[..., bool] | None,
        transfer_fn_layer: Callable[..., bool] | None,
        force_all_layers: bool = False,
    ) -> LayerDoneCounter:
        """Start a copy; without functions it is this controller's own, over every role of every layer of every group.

        Without block ids nothing is copied, and meta says so; what a function raises is in meta and in the counter.
        """
        if not meta.src_block_ids or not meta.dst_block_ids:
            counter = LayerDoneCounter((), timeout=TRANSFER_TIMEOUT)
            meta.success, meta.error_message = False, "no block ids: nothing was copied"
            return counter
        if transfer_fn_all is None and transfer_fn_layer is None:
            start = (
                self.owned.load_host_to_device
                if dst_location == CacheLevel.DEVICE
                else self.owned.evict_device_to_host
            )
            return start(meta)
        counter = LayerDoneCounter(range(self._num_layers), timeout=TRANSFER_TIMEOUT, metadata=meta)
        run = partial(transfer_fn_all or _nothing, meta.src_block_ids, meta.dst_block_ids)
        if not force_all_layers:
            layers = counter.get_pending_layers()
            run = partial(
                transfer_fn_layer or _nothing, layers, counter.mark_layer_done, meta.src_block_ids, meta.dst_block_ids
            )
        self._executor.submit(_finish, counter, run, is_whole=force_all_layers)
        return counter

    def prefetch_from_storage(self, metadata: Any) -> Any:
        """Refused: there is no storage tier."""
        return _refusal("a storage tier is not offered")

    def backup_device_to_storage(self, device_block_ids: list[int], metadata: Any) -> Any:
        """Refused: there is no storage tier."""
        return _refusal("a storage tier is not offered")

    def backup_host_to_storage(self, host_block_ids: list[int], metadata: Any) -> Any:
        """Refused: there is no storage tier."""
        return _refusal("a storage tier is not offered")

    def send_to_node(self, metadata: Any) -> Any:
        """Refused: caches do not move between nodes."""
        return _refusal("disaggregated prefill and decoding is not offered")

    def wait_for_transfer_from_node(self, metadata: Any) -> Any:
        """Refused: caches do not move between nodes."""
        return _refusal("disaggregated prefill and decoding is not offered")

    def reset_cache(self) -> bool:
        """Let every copy end and forget pending evictions; tensors and their bytes stay.

        Returns:
            False if that failed; the cause is in the log, and everything is as before.
        """
        return self._succeeds("reset_cache", self._reset)

    def free_cache(self, clear_storage: bool = False) -> bool:
        """Let every copy end, then release every cache, on the device and on the host.

        Returns:
            As reset_cache. After a failed drain nothing is released.
        """

        def free() -> None:
            if not self.reset_cache():
                raise TransferFailed("copies go on: nothing is released")
            self.free_gpu_cache()
            self._free_host_cache()
            if clear_storage:
                self._clear_storage()

        return self._succeeds("free_cache", free)

    def free_gpu_cache(self) -> None:
        """Let every copy end, then drop all tensors of all groups, and the host tier, which means nothing now."""
        if self.owned.num_host_blocks:
            self.host_cache_kvs_map = {}
        self.owned.free_gpu_cache()
        self.cache_kvs_map.clear()
        self._layer_done_counter = None

    def get_stats(self) -> dict[str, Any]:
        """Counters for people."""
        with self._lock:
            return {
                "initialized": self._initialized,
                "num_layers": self._num_layers,
                "pending_evict_counters": len(self._pending_evict_counters),
                "transfer_manager": self._transfer_manager.get_stats(),
            }

    def start(self) -> None:
        """Start the transfer thread; may be called again."""
        self._transfer_manager.start()

    def stop(self) -> None:
        """Let every copy end, then end both threads; may be called again."""
        self._transfer_manager.stop()
        self._executor.shutdown(wait=False)

    def __del__(self) -> None:
        """Give page-locked memory back; nothing else holds it."""
        try:  # noqa: SIM105 - at exit the interpreter may have dropped suppress, or anything else
            self._free_host_cache()
        except Exception:  # noqa: BLE001 - see above
            pass

    def _free_host_cache(self) -> None:
        """Release the host's blocks; those of this controller go with the device's, whose copies they are."""
        host_caches = getattr(self, "host_cache_kvs_map", None)
        if not host_caches:
            return
        if self.owned.num_host_blocks:
            self.free_gpu_cache()
        elif self.attn_backend is not None:
            self.attn_backend.free_host_kv_cache(host_caches)
        host_caches.clear()

    def _clear_storage(self) -> None:
        """Empty a storage connector that somebody hung in; what goes wrong there is logged, as FastDeploy does."""
        connector = getattr(self._transfer_manager, "_storage_connector", None)
        empty = getattr(connector, "clear", None) or getattr(connector, "disconnect", None)
        if empty is not None:
            self._succeeds("clearing the storage", empty)

    def _reset(self) -> None:
        self.owned.drain()
        with self._lock:
            self._pending_evict_counters.clear()

    def _wait_for_pending_evict_counters(self) -> None:
        """Return when earlier evictions are done. Raises: as submit_swap_tasks."""
        while self._pending_evict_counters:
            self._pending_evict_counters.pop(0).wait_all()

    def _should_wait_for_swap_out(self) -> bool:
        return self.write_policy == "write_back"

    def _get_kv_cache_quant_type(self) -> str | None:
        return getattr(self.quant_config, "kv_cache_quant_type", None)

    def _is_fp8_quantization(self, quant_type: str | None = None) -> bool:
        return (self._get_kv_cache_quant_type() if quant_type is None else quant_type) == SCALED

    def _get_cache_names(self, layer_idx: int) -> dict[str, str]:
        """Role to storage name, for every role there is."""
        return {role: self._format_cache_name(role, layer_idx) for role in STORAGE_NAMES}

    def _format_cache_name(self, role: str, layer_idx: int) -> str:
        if role not in STORAGE_NAMES:
            raise ValueError(f"role: expected one of {', '.join(STORAGE_NAMES)}, got {role!r}")
        rank = self._local_rank % int(self.parallel_config.tensor_parallel_size)
        return f"{STORAGE_NAMES[role]}_{layer_idx}_rank{rank}.device{self._device_id}"

    def _get_numa_node_for_gpu(self, device_id: int) -> int:
        return host_memory.numa_node_of_gpu(device_id)

    def _bind_to_closest_numa_node(self) -> bool:
        """Let the host's blocks lie next to the GPU; a binding that exists stays."""
        if not self._numa_bound:
            self._numa_bound = host_memory.bind_to_numa_node(self._get_numa_node_for_gpu(self._device_id))
        return self._numa_bound

    def _registered(self, tensors: list[Any]) -> list[Any]:
        """Let the map show what is owned now."""
        self.cache_kvs_map = self.owned.get_kv_caches()
        self._transfer_manager.set_cache_kvs_map(self.cache_kvs_map)
        return tensors

    def _succeeds(self, name: str, action: Callable[[], object]) -> bool:
        try:
            action()
        except Exception:
            logging.getLogger(__name__).exception("%s failed", name)
            return False
        return True


def _owner(attn_backend: Any) -> CacheOwner:
    """The backend itself if it declares its cache, else what follows from the shapes it tells."""
    return attn_backend if isinstance(attn_backend, CacheMethods) else ShapedOwner(attn_backend)


def _finish(counter: LayerDoneCounter, run: Callable[[], bool], *, is_whole: bool) -> None:
    """Run somebody else's copy and bring the counter to an end, whatever it does."""
    try:
        is_done = run()
        for layer in counter.get_pending_layers() if is_done and is_whole else ():
            counter.mark_layer_done(layer)
        if not is_done:
            counter.mark_failed(TransferFailed("the copy reported failure"))
    except Exception as cause:  # noqa: BLE001 - the counter hands it to whoever waits
        counter.mark_failed(cause)


def _nothing(*_arguments: object) -> bool:
    """Stands in for a copy function that was not given."""
    return False


def _refusal(reason: str) -> Any:
    """A task that has failed before it began."""
    handler = AsyncTaskHandler()
    handler.set_error(reason)
    return handler
