"""Paged KV-cache management that knows no model: specs, blocks, tensors, prefixes and a host tier."""

from cache_manager.block_pool import BlockId, BlockPool
from cache_manager.block_table import BlockTable, WindowBlocks
from cache_manager.config import CacheConfig, WritePolicy
from cache_manager.controller import CacheController
from cache_manager.copier import BlockCopier, BlockIds, CopyEvent, NumpyCopier
from cache_manager.errors import (
    CacheError,
    CacheInUse,
    CacheMoved,
    HostAllocationFailed,
    NoHostTier,
    OutOfBlocks,
    TransferFailed,
    TransferTimeout,
    UnknownBlock,
    UnknownTable,
    WrongState,
)
from cache_manager.group import CacheGroup, CacheOwner
from cache_manager.host_cache import HostAllocator, HostCache, PlainAllocator
from cache_manager.manager import CacheManager
from cache_manager.matching import PrefixMatch
from cache_manager.prefix_tree import PrefixNode, PrefixTree, Tier
from cache_manager.sizing import WindowRoom, cache_bytes, most_blocks
from cache_manager.spec import MAIN_POOL, CachePool, CacheTensorSpec, TensorKey, ordered_keys
from cache_manager.stats import CacheStats, TierBlocks
from cache_manager.transfer import CacheSwapMetadata, LayerDoneCounter

__all__ = [
    "MAIN_POOL",
    "BlockCopier",
    "BlockId",
    "BlockIds",
    "BlockPool",
    "BlockTable",
    "CacheConfig",
    "CacheController",
    "CacheError",
    "CacheGroup",
    "CacheInUse",
    "CacheManager",
    "CacheMoved",
    "CacheOwner",
    "CachePool",
    "CacheStats",
    "CacheSwapMetadata",
    "CacheTensorSpec",
    "CopyEvent",
    "HostAllocationFailed",
    "HostAllocator",
    "HostCache",
    "LayerDoneCounter",
    "NoHostTier",
    "NumpyCopier",
    "OutOfBlocks",
    "PlainAllocator",
    "PrefixMatch",
    "PrefixNode",
    "PrefixTree",
    "TensorKey",
    "Tier",
    "TierBlocks",
    "TransferFailed",
    "TransferTimeout",
    "UnknownBlock",
    "UnknownTable",
    "WindowBlocks",
    "WindowRoom",
    "WritePolicy",
    "WrongState",
    "cache_bytes",
    "most_blocks",
    "ordered_keys",
]
