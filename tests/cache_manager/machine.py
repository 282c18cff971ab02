"""Random use of a CacheManager beside a model of plain dicts: which tokens each request has, and nothing else.

After every step: the laws of check_integrity hold, every request and every cached block holds the bytes that its
tokens decide, and a call that raised has changed no table and no reference count.

Every rule draws the same values whatever the state, and lets the copies end (or keeps all of them waiting) before the
next one: a failing run can be repeated although there is a second thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cache_manager import (
    BlockId,
    BlockTable,
    CacheInUse,
    HostAllocationFailed,
    NoHostTier,
    OutOfBlocks,
    TransferFailed,
    TransferTimeout,
    UnknownTable,
    WrongState,
)
from tests.cache_manager.kit import SHAPES, WINDOWED, Cache, CountingAllocator

NUM_BLOCKS, BLOCK_SIZE = 12, 4
INDEX = st.integers(0, 30)
# Two kinds of token and few places where they change: many prefixes are shared, in whole blocks or up to their middle.
PROMPTS = st.builds(
    lambda num_equal, num_other: [1] * num_equal + [2] * num_other,
    st.sampled_from([3, 4, 8, 8, 9, 12, 16]),
    st.sampled_from([0, 0, 1, 4, 9]),
)


class CacheMachine(RuleBasedStateMachine):
    """See the module. `events` counts what happened in all runs, for the report of a long run."""

    events: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.cache: Cache | None = None
        self.requests: dict[BlockTable, list[int]] = {}
        self.failed_copy = False
        self.committed: set[tuple[bytes, tuple[int, ...]]] = set()

    @initialize(
        shape=st.sampled_from([*SHAPES, *WINDOWED, *WINDOWED]),
        num_host_blocks=st.sampled_from([0, 4, 9, 20, 20]),
        write_policy=st.sampled_from(["write_back", "write_through", "write_through_selective"]),
        is_prefix_cached=st.sampled_from([True, True, True, False]),
        fails_at=st.sampled_from([None, 0, 1]),
    )
    def make(
        self, shape: str, num_host_blocks: int, write_policy: str, is_prefix_cached: bool, fails_at: int | None
    ) -> None:
        """Allocate; a host allocation that fails half-way leaves nothing, and can be repeated."""
        options = {"write_policy": write_policy, "is_prefix_cached": is_prefix_cached, "transfer_timeout": 0.01}
        options |= {"num_blocks": NUM_BLOCKS, "num_host_blocks": num_host_blocks}
        allocator = CountingAllocator(fails_at)
        try:
            self.cache = Cache(shape, allocator=allocator, **options)  # type: ignore[arg-type]
        except HostAllocationFailed:
            self.count("host allocation failed")
            assert allocator.live == []
            self.cache = Cache(shape, allocator=allocator, **options)  # type: ignore[arg-type]
        self.manager = self.cache.manager
        self.copier = self.cache.copier

    # Requests

    @rule(tokens=PROMPTS, salt=st.sampled_from([b"", b"", b"other"]), spare=st.integers(0, 5))
    def open(self, tokens: list[int], salt: bytes, spare: int) -> None:
        match = self.manager.match(tokens, num_tokens=len(tokens) + spare, salt=salt)
        held = [
            len(table.path) * BLOCK_SIZE
            for table, known in self.requests.items()
            if table.is_on_device
            and table.salt == salt
            and self.cached_tokens(table) == tokens[: self.cached_length(table)]
        ]
        # A hit on all blocks may give up the last one, see matching.py.
        least = min(max(held, default=0), (len(tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE)
        if self.manager.pools:
            least = self.cache.longest_start(tokens, salt)
        assert match.num_tokens >= least, "a block that a request holds is no hit"
        table = self.attempt(
            lambda: self.manager.open(tokens, num_tokens=len(tokens) + spare, salt=salt),
            (OutOfBlocks, TransferFailed, TransferTimeout),
        )
        if table is None:
            return
        assert match.fits or table.num_computed == 0, "open succeeded although match said that it would not"
        length = len(table.path) * BLOCK_SIZE
        assert length == 0 or (salt, tuple(tokens[:length])) in self.committed, "a hit on what was never computed"
        assert len(table.blocks) == -(-(len(tokens) + spare) // BLOCK_SIZE)
        self.count("opened", bool(table.num_device_hits) * "device hit", bool(table.num_host_hits) * "host hit")
        if self.manager.pools:
            self.count(
                bool(length) * "started at a snapshot",
                bool(table.load and not table.num_host_hits) * "snapshot from the host",
                bool(match.num_unusable_tokens) * "hit shortened",
            )
        self.requests[table] = list(tokens)

    def serve(self, tokens: list[int], num_new: int, ends: bool) -> None:
        """Open a request and compute it, as most requests go; the oldest ones give way."""
        for table in list(self.requests)[:-4]:
            self.close_table(table)
        before = set(self.requests)
        self.open(tokens, b"", 0)
        for table in set(self.requests) - before:
            self.compute(table, [1] * num_new, num_drafts=num_new % 3, rejected=True)
            if ends:
                self.close_table(table)

    # Several rules, because a run chooses some rules and does without the others.
    serve_one = rule(tokens=PROMPTS, num_new=st.integers(0, 5), ends=st.booleans())(serve)
    serve_another = rule(tokens=PROMPTS, num_new=st.integers(0, 5), ends=st.booleans())(serve)
    come_and_go = rule(tokens=PROMPTS, num_new=st.integers(0, 5), ends=st.just(True))(serve)

    @rule(
        which=INDEX,
        new=st.lists(st.integers(1, 2), max_size=6),
        num_drafts=st.integers(0, 6),
        rejected=st.booleans(),
        lag=st.sampled_from([0, 0, 1, 3]),
    )
    def step(self, which: int, new: list[int], num_drafts: int, rejected: bool, lag: int) -> None:
        """Compute the known tokens and drafts; confirm the tokens; give the drafts' blocks back."""
        self.compute(self.pick(which, is_on_device=True), new, num_drafts=num_drafts, rejected=rejected, lag=lag)

    def compute(
        self, table: BlockTable | None, new: list[int], *, num_drafts: int, rejected: bool, lag: int = 0
    ) -> None:
        if table is None or not table.is_on_device:
            return
        tokens = self.requests[table] + new
        first = self.attempt(
            lambda: self.manager.extend(table, len(tokens) + num_drafts),
            (OutOfBlocks, TransferFailed, TransferTimeout),
        )
        if first is None or not self.waited():
            return
        begin = table.num_computed
        before = list(table.blocks)
        self.cache.write(table, tokens + [99] * num_drafts, begin, len(tokens) + num_drafts)
        changed = self.manager.commit(table, np.array(tokens), num_complete=len(tokens) - min(lag, len(tokens)))
        assert before[:changed] == table.blocks[:changed]
        self.requests[table] = tokens
        self.commit_model(table)
        self.count("computed", (changed < len(table.blocks)) * "took the cached block")
        if rejected:
            self.manager.truncate(table, len(tokens))
            assert len(table.blocks) == -(-len(tokens) // BLOCK_SIZE)
            self.count("draft blocks given back")

    @rule(which=INDEX)
    def fork(self, which: int) -> None:
        table = self.pick(which)
        if table is None or len(self.requests) > 8:
            return
        child = self.attempt(lambda: self.manager.fork(table), (WrongState, TransferFailed, TransferTimeout))
        if child is not None:
            self.count("forked")
            self.requests[child] = list(self.requests[table])

    @rule(which=INDEX)
    def close(self, which: int) -> None:
        table = self.pick(which)
        if table is not None:
            self.close_table(table)

    @rule(which=INDEX)
    def swap_out(self, which: int) -> None:
        table = self.pick(which, is_on_device=True)
        if table is None:
            return
        ok, _ = self.manager.can_swap_out(table)
        errors = (WrongState, NoHostTier, OutOfBlocks, TransferFailed, TransferTimeout)
        if self.attempt(lambda: self.manager.swap_out(table) or True, errors):
            assert ok
            assert not table.is_on_device
            self.count("swapped out")
        elif ok:
            assert not table.is_on_device or self.failed_copy, "a request that had room on the host did not get there"

    @rule(which=INDEX, tokens=PROMPTS)
    def preempt(self, which: int, tokens: list[int]) -> None:
        """Move a request to the host, serve another one in its place, and bring it back."""
        self.swap_out(which)
        self.serve(tokens, 1, ends=True)
        self.swap_in(which, 2, waits=True)

    @rule(which=INDEX, spare=st.integers(0, 5), waits=st.booleans())
    def swap_in(self, which: int, spare: int, waits: bool) -> None:
        table = self.pick(which, is_on_device=False)
        if table is None:
            return
        num_tokens = table.num_computed + spare
        if self.attempt(lambda: self.manager.swap_in(table, num_tokens=num_tokens) or True, (WrongState, OutOfBlocks)):
            self.count("swapped in")
            if waits:
                self.waited()

    # The pool and the cache

    @rule(num_blocks=st.sampled_from([NUM_BLOCKS] * 4 + [NUM_BLOCKS + 1, 9, 6, 3, 0, -1]))
    def resize(self, num_blocks: int) -> None:
        owned = {block for table in self.requests for block in table.blocks}
        if self.attempt(lambda: self.manager.resize(num_blocks) or True, (CacheInUse, ValueError)):
            assert all(block < num_blocks for block in owned)
            assert self.manager.num_blocks == num_blocks
            self.count("resized")

    @rule(is_meant=st.sampled_from([False] * 3 + [True]))
    def reset(self, is_meant: bool) -> None:
        if is_meant:
            self.manager.reset()
            self.committed.clear()
            assert self.manager.match([1] * 9).num_tokens == 0
            self.count("reset")

    # Failures

    @rule(copies=st.integers(0, 12))
    def let_a_copy_fail(self, copies: int) -> None:
        self.copier.fails_in = copies

    @rule(is_closed=st.sampled_from([False, False, True]))
    def let_copies_wait(self, is_closed: bool) -> None:
        (self.copier.gate.clear if is_closed else self.copier.gate.set)()

    @rule(which=INDEX, mistake=st.sampled_from(["truncate", "extend", "commit", "more", "foreign", "closed", "empty"]))
    def misuse(self, which: int, mistake: str) -> None:
        table = self.pick(which)
        if table is None:
            return
        capacity = len(table.blocks) * BLOCK_SIZE
        calls: dict[str, tuple[Callable[[], object], tuple[type[Exception], ...]]] = {
            "truncate": (lambda: self.manager.truncate(table, -1), (ValueError,)),
            "extend": (lambda: self.manager.extend(table, table.num_computed - 1), (ValueError,)),
            "commit": (lambda: self.manager.commit(table, [1] * (table.num_computed - 1)), (ValueError,)),
            "more": (lambda: self.manager.commit(table, [1] * (capacity + 1)), (ValueError,)),
            "foreign": (lambda: self.manager.extend(BlockTable(b"", [BlockId(0)]), 1), (UnknownTable,)),
            "closed": (lambda: self.manager.close(BlockTable(b"")), (UnknownTable,)),
            "empty": (lambda: self.manager.open([]), (ValueError,)),
        }
        call, errors = calls[mistake]
        if mistake == "commit" and table.num_computed == 0:
            return
        late = (WrongState, TransferFailed, TransferTimeout) if mistake not in ("foreign", "closed", "empty") else ()
        before = self.snapshot()
        with pytest.raises(errors + late):
            call()
        assert self.snapshot() == before
        self.count("misuse")

    # After every rule

    @invariant()
    def laws_hold(self) -> None:
        if self.cache is None:
            return
        if self.copier.gate.is_set():
            self.cache.controller.drain(5)
            self.take_failed()
        self.manager.check_integrity()
        self.cache.check_cached()
        self.cache.check_snapshots()
        for table, tokens in self.requests.items():
            if table.load is None:
                self.cache.check_table(table, tokens)
        CacheMachine.events["steps"] += 1

    def teardown(self) -> None:
        """Everything can be given back."""
        if self.cache is None:
            return
        self.copier.gate.set()
        self.manager.drain(5)
        for table in list(self.requests):
            self.manager.close(table)
        self.manager.check_integrity()
        stats = self.manager.stats()
        assert stats.device.num_owned == stats.host.num_owned == 0
        self.manager.reset()
        assert self.manager.stats().device.num_free == self.manager.num_blocks
        assert self.cache.controller.free_cache()
        assert self.cache.allocator.live == []
        self.cache.controller.stop()

    # Helpers

    def close_table(self, table: BlockTable) -> None:
        self.manager.close(table)
        del self.requests[table]
        assert not table.blocks
        self.count("closed")

    def count(self, *events: str) -> None:
        CacheMachine.events.update(event for event in events if event)

    def pick(self, which: int, is_on_device: bool | None = None) -> BlockTable | None:
        """One of the requests, mostly of those on one tier; None if there is none."""
        tables = list(self.requests)
        if is_on_device is not None and which % 8:
            tables = [table for table in tables if table.is_on_device == is_on_device]
        return tables[which % len(tables)] if tables else None

    def cached_length(self, table: BlockTable) -> int:
        return len(table.path) * BLOCK_SIZE

    def cached_tokens(self, table: BlockTable) -> list[int]:
        return self.requests[table][: self.cached_length(table)]

    def commit_model(self, table: BlockTable) -> None:
        tokens = self.requests[table]
        for end in range(BLOCK_SIZE, table.num_computed + 1, BLOCK_SIZE):
            if not table.is_closed_to_cache:
                self.committed.add((table.salt, tuple(tokens[:end])))

    def waited(self) -> bool:
        """Wait as an engine does before a step; whether everybody may run."""
        try:
            self.manager.wait_for_layer(0)
            self.manager.wait_for_loads()
        except TransferTimeout:
            self.count("load timed out")
            return False
        except TransferFailed:
            assert self.take_failed()
            return False
        return not self.take_failed()

    def take_failed(self) -> bool:
        failed = self.manager.take_failed()
        self.count(*["load failed"] * len(failed))
        return bool(failed)

    def attempt(self, call: Callable[[], object], errors: tuple[type[Exception], ...]) -> object:
        """The call's result; None if it raised one of these and, as it must, changed nothing."""
        self.take_failed()
        before = self.snapshot()
        may_end = self.copier.gate.is_set() and bool(self.manager._tables.loads._loads)  # a load, during the call
        try:
            return call()
        except errors as caught:
            error = caught
        self.count(type(error).__name__)
        self.failed_copy = isinstance(error, (TransferFailed, TransferTimeout))
        if not may_end:
            assert self.snapshot() == before, f"{error!r} changed the state"
        return None

    def snapshot(self) -> object:
        """What a failed call may not change."""
        device, windows = self.manager._tiers.device, self.manager._tiers.windows.device
        return (
            [
                (id(table), list(table.blocks), list(table.host_blocks), table.num_computed, table.is_on_device)
                for table in self.requests
            ],
            deepcopy([table.windows for table in self.requests]),
            [device.num_owners(BlockId(block)) for block in range(device.num_blocks)],
            [
                pool.num_owners(BlockId(block)) - windows.num_kept(name, BlockId(block))
                for name, pool in windows.pools.items()
                for block in range(pool.num_blocks)
            ],
        )


def run_steps(num_steps: int, *, num_runs: int, steps_per_run: int, on_progress: Callable[[], object] = int) -> None:
    """Take at least num_steps steps; a failing run is printed as it is, because shrinking it takes minutes."""
    budget = settings(
        max_examples=num_runs,
        stateful_step_count=steps_per_run,
        deadline=None,
        database=None,
        derandomize=False,  # where CI is set hypothesis would repeat the same runs until the steps are full
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    while CacheMachine.events["steps"] < num_steps:
        run_state_machine_as_test(CacheMachine, settings=budget)
        on_progress()
