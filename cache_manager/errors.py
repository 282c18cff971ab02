"""Errors of the cache manager.

After any of them requests, owners and reference counts are what they were before the call. What may be gone is content
that nobody owned: cached blocks that had to give way before a copy failed.
"""


class CacheError(Exception):
    """Base of every error the cache manager raises for a call it did not carry out."""


class OutOfBlocks(CacheError):
    """Fewer blocks are free or evictable than were asked for."""


class UnknownBlock(CacheError):
    """A block id that the pool does not have, or that is not in the state the call needs."""


class UnknownTable(CacheError):
    """A block table that this manager did not open, or has closed."""


class WrongState(CacheError):
    """The block table is on the other tier than the call needs."""


class CacheInUse(CacheError):
    """The call would replace or cut off something that is still in use."""


class CacheMoved(CacheError):
    """A cache tensor is not where it was when a graph was captured: the graph must not be replayed."""


class NoHostTier(CacheError):
    """The call needs host memory, and there is none."""


class HostAllocationFailed(CacheError):
    """The host tier could not be allocated; what had been allocated for it is freed again."""


class TransferFailed(CacheError):
    """A copy between the tiers failed; the cause is chained."""


class TransferTimeout(CacheError):
    """A copy between the tiers did not end in time; it keeps its blocks until it does."""
