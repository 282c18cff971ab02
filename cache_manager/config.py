"""What the cache manager must know of the deployment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

WritePolicy = Literal["write_back", "write_through", "write_through_selective"]


@dataclass(frozen=True)
class CacheConfig:
    """What the controller must know of the deployment.

    Attributes:
        num_layers: Layers of the main model on this rank.
        cache_dtype: Element type handed to the backend; None leaves the choice to it.
        kv_cache_quant_type: Quantisation handed to the backend.
        tensor_parallel_size: Ranks that share a model; storage names count ranks inside it.
        num_host_blocks: Blocks of the host tier's main pool; 0: there is no host tier.
        window_blocks: Device blocks of every other pool that a backend's specs name.
        host_window_blocks: Host blocks of the same pools, if there is a host tier.
        write_policy: When a cached block is copied to the host: as it leaves the device (write_back), as soon as it is
            cached (write_through), or with its second use (write_through_selective).
        transfer_timeout: Seconds after which waiting for a copy is an error.
    """

    num_layers: int
    cache_dtype: str | None = None
    kv_cache_quant_type: str | None = None
    tensor_parallel_size: int = 1
    num_host_blocks: int = 0
    window_blocks: Mapping[str, int] = field(default_factory=dict)
    host_window_blocks: Mapping[str, int] = field(default_factory=dict)
    write_policy: WritePolicy = "write_back"
    transfer_timeout: float = 60.0

    def __post_init__(self) -> None:
        """Check what the types do not say.

        Raises:
            ValueError: A number is too small, or the policy unknown.
        """
        for name, low in (("num_layers", 0), ("tensor_parallel_size", 1), ("num_host_blocks", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected {low} or more, got {getattr(self, name)}")
        for name in ("window_blocks", "host_window_blocks"):
            for pool, count in getattr(self, name).items():
                if count < 1:
                    raise ValueError(f"{name}: expected 1 or more for pool {pool}, got {count}")
        if self.write_policy not in get_args(WritePolicy):
            expected = ", ".join(get_args(WritePolicy))
            raise ValueError(f"write_policy: expected one of {expected}, got {self.write_policy!r}")
        if not self.transfer_timeout > 0:
            raise ValueError(f"transfer_timeout: expected more than 0 seconds, got {self.transfer_timeout}")
