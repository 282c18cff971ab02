"""Which tokens run in the next step: continuous batching under a token budget, over a paged cache.

A step holds, in this order,

    decode rows      of every running request that has only its newest token left to compute: that, and its drafts
    prefill chunks   of running requests with more left, oldest first, as far as the budget goes
    admissions       waiting requests, oldest first, with their first chunk

A request gets the blocks of all its known tokens when it is admitted, cached ones as far as there are any, so only
decode rows can find the cache full. Then the youngest running request gives way: it goes to the host if there is room
and that is cheaper (swap_cost.py), else its blocks are given up and its tokens are computed again later. A request
whose prefix a running one is just computing waits for it: the tokens are computed once.

In window pools a request gets blocks for every step. They are large enough for all that run, unless a load that nobody
waits for any more holds some: a prefill for which there are none gets on in a later step.

Why everything ends: the oldest running request never gives way unless it is alone, and alone every request fits, which
was checked when it came; and every step computes a token of it, or takes back a load from the host that has failed,
after which the tokens of that load are computed.

Example: 4 blocks of 2 tokens, a budget of 4 tokens, A has 3 prompt tokens and generates 4, B has 4 and generates 1:

    step  A       B        available after it
    1     0 1 2   -        2             B needs 2 blocks, and one more must be left for A: it waits
    2     3       -        2             A's second block is full now
    3     4       -        1             A takes a third block
    4     5       -        4             A has its 4 tokens; the last is never computed; full blocks stay cached
    5             0 1 2 3  4             B needs no further token; it took the free block and A's last one
"""

# ruff: noqa: S101 - asserts here are for bugs of this file

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

import numpy as np

from cache_manager import (
    BlockTable,
    CacheManager,
    NoHostTier,
    OutOfBlocks,
    TransferFailed,
    TransferTimeout,
    WrongState,
)
from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.request_lines import RequestLines
from fastdeploy_dsa.engine.step_inputs import BlockTables
from fastdeploy_dsa.engine.step_plan import Chunk, SchedulerLimits
from fastdeploy_dsa.engine.swap_cost import SwapCost


@dataclass
class SchedulerCounts:
    """Events since the start.

    Attributes:
        num_computed_tokens: Tokens that the model has computed; a token that is computed again counts again.
        num_preemptions: Requests that had to give way.
        num_swap_outs: Those of them that went to the host.
        num_failed_swap_outs: Those that should have gone there, but the copy failed or took too long.
        num_failed_loads: Running requests that have to compute what a load from the host should have brought.
    """

    num_computed_tokens: int = 0
    num_preemptions: int = 0
    num_swap_outs: int = 0
    num_failed_swap_outs: int = 0
    num_failed_loads: int = 0


class Scheduler:
    """Owns the waiting and the running requests and the block table.

    Attributes:
        counts: See SchedulerCounts.
    """

    def __init__(self, limits: SchedulerLimits, cache: CacheManager, swap_cost: SwapCost) -> None:
        """Start without requests.

        Args:
            limits: See SchedulerLimits.
            cache: The blocks; the scheduler is their only user.
            swap_cost: Decides whether a request that gives way goes to the host.

        Raises:
            ValueError: A window pool is too small for max_num_seqs requests.
        """
        self._limits = limits
        self._cache = cache
        self._swap_cost = swap_cost
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._lines = RequestLines(limits, cache.pools)
        self._has_windows = bool(cache.pools)
        room = limits.window_room(has_snapshots=False)
        for pool in cache.pools:
            if cache.num_window_blocks[pool.name] < room.needed(pool):
                raise ValueError(
                    f"window_blocks: expected {room.needed(pool)} or more of pool {pool.name} for "
                    f"{limits.max_num_seqs} requests, got {cache.num_window_blocks[pool.name]}"
                )
        self.counts = SchedulerCounts()

    @property
    def tables(self) -> BlockTables:
        """Blocks by request line, for the chunks that `schedule` returned."""
        return self._lines.tables

    @property
    def num_running(self) -> int:
        """Requests that hold blocks on the device."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that do not."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Queue a request; requests come in the order of their numbers.

        Raises:
            ValueError: `fits` refuses it.
        """
        ok, reason = self.fits(request)
        if not ok:
            raise ValueError(reason)
        self._waiting.append(request)

    def fits(self, request: Request) -> tuple[bool, str]:
        """Whether the request could run if it were alone, and why not."""
        needed = self._limits.num_blocks(request.max_cached_tokens)
        return needed <= self._cache.num_blocks, (
            f"expected a request that fits into the cache of {self._cache.num_blocks} blocks, "
            f"got {request.num_prompt} + {request.max_tokens} tokens (prompt + max_tokens), which need {needed}"
        )

    def schedule(self) -> list[Chunk]:
        """Choose the tokens of the next step and give them blocks.

        Returns:
            Decode rows first; empty only if no request is left. Nothing counts as computed until `commit`.

        Raises:
            TransferTimeout: A copy holds blocks without which nothing can run.
        """
        self.recover()
        chunks = self._choose()
        while self.recover() or self._waits_for_copies(chunks):
            chunks = self._choose()
        return chunks

    def commit(self, chunks: list[Chunk]) -> None:
        """The chunks of `schedule` are computed, and the requests have got their new tokens; drop rejected drafts."""
        for chunk in chunks:
            request = chunk.request
            assert request.table is not None, "a scheduled request has a table"
            self.counts.num_computed_tokens += chunk.num_confirmed
            num_computed = request.num_computed + chunk.num_confirmed
            changed = self._cache.commit(
                request.table,
                request.known_tokens,
                num_computed=num_computed,
                num_complete=num_computed - request.num_undrafted,
            )
            self._lines.write_main(request, changed)
            has_more = len(request.blocks) > self._limits.num_blocks(num_computed) or self._has_windows
            if chunk.is_last and has_more:
                self._cache.truncate(request.table, num_computed)
                self._lines.cut_main(request)

    def recover(self) -> bool:
        """Take back what running requests were to get from loads that have failed; they compute it instead.

        Returns:
            Whether there were any: what `schedule` returned is void then.
        """
        failed = self._cache.take_failed()
        for request in [request for request in self._running if request.table in failed]:
            self.counts.num_failed_loads += 1
            assert request.table is not None, "a running request has a table"
            if not request.table.is_on_device:  # it was to come back as a whole
                self._running.remove(request)
                self._lines.leave(request)
                self._close(request)
                insort(self._waiting, request, key=_age)
        return bool(failed)

    def remove(self, request: Request) -> None:
        """Forget a request, finished or not; its full blocks stay cached."""
        if request.line is not None:
            self._running.remove(request)
            self._lines.leave(request)
        else:
            self._waiting.remove(request)
        self._close(request)

    def check_integrity(self) -> None:
        """Assert that every block is accounted for, and that the block table says what the requests hold."""
        self._cache.check_integrity()
        self._lines.check_integrity(self._running)
        for request in self._running:
            assert request.num_computed < request.num_tokens, "a running request has nothing to compute"
        assert not any(request.blocks for request in self._waiting), "a waiting request holds blocks on the device"
        tables = [request.table for request in (*self._running, *self._waiting) if request.table is not None]
        assert len(tables) == self._cache.stats().num_tables, "a table has no request"
        for requests in (self._running, self._waiting):
            ages = [_age(request) for request in requests]
            assert ages == sorted(ages), "requests are out of order"

    def _choose(self) -> list[Chunk]:
        chunks = [Chunk(request, 1, len(request.drafts), is_last=True) for request in self._decode_requests()]
        budget = self._limits.max_num_batched_tokens - sum(chunk.num_rows for chunk in chunks)
        for request in self._running:
            if request.num_tokens - request.num_computed > 1:
                budget = self._append(chunks, request, budget)
        while budget > 0 and self._can_admit() and (admitted := self._admit()) is not None:
            budget = self._append(chunks, admitted, budget)
        return chunks

    def _append(self, chunks: list[Chunk], request: Request, budget: int) -> int:
        """Schedule as much of a request as the budget allows; its newest token only with all its drafts.

        Returns:
            What is left of the budget.
        """
        num_left, num_drafts = request.num_tokens - request.num_computed, len(request.drafts)
        if num_left + num_drafts <= budget:
            chunk = Chunk(request, num_left, num_drafts, is_last=True)
        elif (num_tokens := min(num_left - 1, budget)) > 0:
            chunk = Chunk(request, num_tokens, 0, is_last=False)
        else:
            return budget
        if self._has_windows and not self._extend_windows(chunk):
            return budget
        chunks.append(chunk)
        return budget - chunk.num_rows

    def _extend_windows(self, chunk: Chunk) -> bool:
        """Whether a request has blocks for a prefill chunk in window pools now, as it has in the main one."""
        request = chunk.request
        assert request.table is not None, "a running request has a table"
        num_tokens = request.num_computed + chunk.num_tokens
        if chunk.is_last:
            num_tokens = self._limits.num_tokens_to_hold(request)
        try:
            changed = self._cache.extend(request.table, num_tokens)
        except (OutOfBlocks, WrongState):
            return False
        self._lines.write(request, changed)
        return True

    def _waits_for_copies(self, chunks: list[Chunk]) -> bool:
        """Whether nothing could be chosen because of blocks that loads of requests that are gone still hold."""
        if chunks or not (self._waiting or self._running):
            return False
        self._cache.drain()
        assert self._running or self._cache.num_available == self._cache.num_blocks, (
            "nothing runs and blocks are missing"
        )
        return True

    def _decode_requests(self) -> list[Request]:
        ready = []
        for request in tuple(self._running):
            # A request that lost its line gave way to an older one of this loop.
            if request.line is not None and request.num_tokens - request.num_computed == 1 and self._grow(request):
                ready.append(request)
        return ready

    def _grow(self, request: Request) -> bool:
        """Make room for the newest token and drafts; False if the request gave way, or its load has just failed."""
        assert request.table is not None, "a running request has a table"
        while True:
            try:
                changed = self._cache.extend(request.table, self._limits.num_tokens_to_hold(request))
            except OutOfBlocks:
                youngest = self._running.pop()
                self._preempt(youngest)
                if youngest is request:
                    return False
            except WrongState:
                return False
            else:
                self._lines.write(request, changed)
                return True

    def _preempt(self, request: Request) -> None:
        self._lines.leave(request)
        request.num_preemptions += 1
        self.counts.num_preemptions += 1
        if not self._swap_out(request):
            self._close(request)
        insort(self._waiting, request, key=_age)

    def _swap_out(self, request: Request) -> bool:
        """Whether the request is on the host now; if not, it must be computed again."""
        assert request.table is not None, "a running request has a table"
        num_blocks = self._limits.num_blocks(request.num_computed)
        has_room, _ = self._cache.can_swap_out(request.table)
        is_cheaper, _ = self._swap_cost.is_swap_cheaper(num_blocks=num_blocks, num_tokens=request.num_computed)
        if not has_room or not is_cheaper:
            return False
        try:
            self._cache.swap_out(request.table)
        except (NoHostTier, OutOfBlocks, WrongState):  # the last one if a load has just failed
            return False
        except (TransferFailed, TransferTimeout):
            self.counts.num_failed_swap_outs += 1
            return False
        self.counts.num_swap_outs += 1
        return True

    def _can_admit(self) -> bool:
        """Blocks are left for the next step of running requests: one that gives way at once only wastes its work."""
        if not self._waiting or not self._lines.num_free:
            return False
        request = self._waiting[0]
        num_tokens = self._limits.num_tokens_to_hold(request)
        if request.table is not None:
            needed = self._limits.num_blocks(num_tokens)
        else:
            match = self._cache.match(request.known_tokens, num_tokens=num_tokens)
            if self._is_being_computed(request, match.num_tokens):
                return False
            needed = match.num_blocks_needed
        return needed + self._limits.num_growth_blocks * len(self._running) <= self._cache.num_available

    def _is_being_computed(self, request: Request, num_hits: int) -> bool:
        """Whether a running request's prefill will soon let this one skip more tokens than now."""
        if not self._cache.is_prefix_cached:
            return False
        for other in self._running:
            length = min(request.num_tokens, other.num_prompt)
            if other.num_computed >= length or length - self._limits.block_size < num_hits:
                continue
            differences = np.flatnonzero(request.tokens[:length] != other.tokens[:length])
            common = int(differences[0]) if len(differences) else length
            if self._has_windows:  # the last token is computed, and requests start at boundaries of blocks
                common = min(common, request.num_tokens - 1)
            common -= common % self._limits.block_size
            if other.num_computed < common and min(common, request.num_tokens - 1) > num_hits:
                return True
        return False

    def _admit(self) -> Request | None:
        """The oldest waiting request, running now; None if a load that ended meanwhile has taken its blocks away."""
        request = self._waiting[0]
        try:
            if request.table is None:
                request.table = self._open(request)
            else:
                self._cache.swap_in(request.table, num_tokens=self._limits.num_tokens_to_hold(request))
        except OutOfBlocks:
            return None
        self._waiting.popleft()
        self._lines.enter(request)
        insort(self._running, request, key=_age)
        return request

    def _open(self, request: Request) -> BlockTable:
        tokens, num_tokens = request.known_tokens, self._limits.num_tokens_to_hold(request)
        try:
            return self._cache.open(tokens, num_tokens=num_tokens)
        except TransferFailed:
            # Only the last block of a prompt that is cached as a whole is copied; without it there is nothing to copy.
            last = (len(tokens) - 1) // self._limits.block_size * self._limits.block_size
            return self._cache.open(tokens[: last + 1], num_tokens=num_tokens)

    def _close(self, request: Request) -> None:
        if request.table is not None:
            self._cache.close(request.table)
            request.drop_table()


def _age(request: Request) -> int:
    return request.number or 0
