"""What FastDeploy expects behind a cache controller's `transfer_manager`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cache_manager import CacheController


class TransferView:
    """The maps FastDeploy hands over, the thread's life and the counters; the copies themselves are the owner's."""

    def __init__(self, owned: CacheController) -> None:
        """Look at the controller that copies."""
        self._owned = owned
        self._storage_connector: Any = None
        self.cache_kvs_map: Mapping[str, Any] = {}
        self.host_cache_kvs_map: Mapping[str, Any] = {}

    def set_cache_kvs_map(self, cache_kvs_map: Mapping[str, Any]) -> None:
        """Remember a map; copies go by (role, layer) and never ask for a name."""
        self.cache_kvs_map = cache_kvs_map

    def set_host_cache_kvs_map(self, host_cache_kvs_map: Mapping[str, Any]) -> None:
        """As set_cache_kvs_map."""
        self.host_cache_kvs_map = host_cache_kvs_map

    def get_stats(self) -> dict[str, Any]:
        """Counters of the copies."""
        return self._owned.get_stats()

    def start(self) -> None:
        """Start the transfer thread."""
        self._owned.start()

    def stop(self) -> None:
        """Let every copy end, then end the thread."""
        self._owned.stop()
