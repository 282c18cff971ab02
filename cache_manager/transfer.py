"""Copies between the tiers: what is to move, how far it got, and the thread that does it.

A transfer ends in exactly one of two states, and everything that waits for it hears of it at once:

    pending ──> done             every layer's bytes are there; with nothing to move at once
            └─> failed(cause)    layers that were done before stay done

A wait that takes longer than its time-out raises TransferTimeout; the transfer itself goes on and keeps its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Condition, Thread
from time import monotonic

from cache_manager.copier import CopyEvent
from cache_manager.errors import TransferFailed, TransferTimeout

BlockPairs = tuple[Sequence[int], Sequence[int]]
"""Source blocks, and destination blocks in the same order."""


@dataclass
class CacheSwapMetadata:
    """Which blocks move: a load has host blocks as sources, an eviction device blocks. Names are FastDeploy's.

    Attributes:
        src_block_ids: Sources in the main pool.
        dst_block_ids: Destinations, in the same order.
        windows: Sources and destinations in the window pools, by name.
        success: Whether the transfer is done; False while it is under way.
        error_message: Why it failed; None if it did not.
    """

    src_block_ids: Sequence[int] = ()
    dst_block_ids: Sequence[int] = ()
    success: bool = False
    error_message: str | None = None
    windows: Mapping[str, BlockPairs] = field(default_factory=dict)

    @property
    def mapping(self) -> dict[int, int]:
        """Source to destination in the main pool after success, empty before."""
        return dict(zip(self.src_block_ids, self.dst_block_ids, strict=True)) if self.success else {}


class LayerDoneCounter:
    """How far a transfer got, layer by layer. Every method may be called from any thread."""

    def __init__(self, layer_ids: Sequence[int], *, timeout: float, metadata: CacheSwapMetadata | None = None) -> None:
        """Make the counter of a pending transfer; without layers it is done.

        Args:
            layer_ids: In the order in which they are copied.
            timeout: Seconds that a wait takes at most unless it says otherwise.
            metadata: Receives the outcome before anything that waits goes on.
        """
        self._timeout = timeout
        self._metadata = metadata
        self._changed = Condition()
        self._events: dict[int, Sequence[CopyEvent] | None] = dict.fromkeys(layer_ids)
        self._num_pending = len(self._events)
        self._failure: BaseException | None = None
        if metadata is not None:
            metadata.success, metadata.error_message = self.is_all_done(), None

    @property
    def is_settled(self) -> bool:
        """Whether it is done or failed."""
        return self._num_pending == 0 or self._failure is not None

    @property
    def failure(self) -> BaseException | None:
        """Why it failed; None while pending and when done."""
        return self._failure

    def mark_layer_done(self, layer_id: int, events: Sequence[CopyEvent] = ()) -> None:
        """A layer's copies are done, or will be at these events, which live as long as the counter."""
        with self._changed:
            if self._events[layer_id] is None:
                self._num_pending -= 1
            self._events[layer_id] = tuple(events)
            if self._metadata is not None:
                self._metadata.success = self.is_all_done()
            self._changed.notify_all()

    def mark_failed(self, cause: BaseException) -> None:
        """The layers that are not done will never be; without effect on a settled counter."""
        with self._changed:
            if not self.is_settled:
                self._failure = cause
                if self._metadata is not None:
                    self._metadata.error_message = str(cause) or type(cause).__name__
            self._changed.notify_all()

    @property
    def has_events(self) -> bool:
        """Whether a copy was only started."""
        return any(self._events.values())

    def is_layer_done(self, layer_id: int) -> bool:
        """Whether the layer needs no wait; a layer that the transfer does not touch never does."""
        return self._events.get(layer_id, []) is not None

    def is_all_done(self) -> bool:
        """Whether every layer is done."""
        return self._num_pending == 0

    def get_completed_count(self) -> int:
        """Layers that are done."""
        return len(self._events) - self._num_pending

    def get_pending_layers(self) -> list[int]:
        """Layers that are not."""
        return [layer for layer, events in self._events.items() if events is None]

    def wait_for_layer(self, layer_id: int, timeout: float | None = None) -> None:
        """Return when compute that is given from now on may read the layer.

        Raises:
            TransferFailed: The transfer failed before the layer was done; its cause is chained.
            TransferTimeout: It took longer than timeout seconds (None: the counter's own).
        """
        self._wait(lambda: self.is_layer_done(layer_id), timeout)
        self._for_events([layer_id], lambda event: event.wait())

    def wait_all(self, timeout: float | None = None) -> None:
        """Return when compute that is given from now on may read every layer. Raises: as wait_for_layer."""
        self._wait(self.is_all_done, timeout)
        self._for_events(self._events, lambda event: event.wait())

    def synchronize(self, timeout: float | None = None) -> None:
        """Return when no copy touches its blocks any more. Raises: as wait_for_layer."""
        self._wait(self.is_all_done, timeout)
        self._for_events(self._events, lambda event: event.synchronize())

    def _wait(self, is_done: Callable[[], bool], timeout: float | None) -> None:
        limit = self._timeout if timeout is None else timeout
        with self._changed:
            self._changed.wait_for(lambda: is_done() or self.is_settled, limit)
            if is_done():
                return
            if self._failure is None:
                raise TransferTimeout(f"layers {self.get_pending_layers()} were not copied within {limit:g} s")
        raise TransferFailed(f"a copy failed: {self._failure}") from self._failure

    def _for_events(self, layer_ids: Iterable[int], action: Callable[[CopyEvent], None]) -> None:
        for layer in layer_ids:
            for event in self._events.get(layer) or ():
                try:
                    action(event)
                except Exception as cause:
                    raise TransferFailed(f"a copy failed: {cause}") from cause


@dataclass(frozen=True)
class Transfer:
    """What the thread is to do.

    Attributes:
        counter: Says which layers, and takes the outcome.
        copy_layer: Copies one layer and returns the events of its end; what it raises is the transfer's failure.
        after: A transfer without whose success this one must not begin.
    """

    counter: LayerDoneCounter
    copy_layer: Callable[[int], Sequence[CopyEvent]]
    after: LayerDoneCounter | None = None

    def run(self) -> None:
        """Copy layer by layer, to the end or to a failure."""
        try:
            if self.after is not None:
                self.after.wait_all()
            for layer in self.counter.get_pending_layers():
                self.counter.mark_layer_done(layer, self.copy_layer(layer))
        except Exception as cause:  # noqa: BLE001 - the counter hands it to whoever waits
            self.counter.mark_failed(cause)


class TransferQueue:
    """Runs transfers one after the other, in the order of submission, on a thread of its own.

    The thread is a daemon: a copy that hangs cannot keep the process from ending.
    """

    def __init__(self) -> None:
        """Make a queue; its thread starts with the first transfer."""
        self._transfers: SimpleQueue[Transfer | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._unfinished: list[LayerDoneCounter] = []

    @property
    def num_pending(self) -> int:
        """Transfers that are neither done nor failed."""
        return sum(not counter.is_settled for counter in self._unfinished)

    def start(self) -> None:
        """Start the thread; a second call does nothing."""
        if self._thread is None:
            self._thread = Thread(target=self._run, name="cache-transfer", daemon=True)
            self._thread.start()

    def submit(self, transfer: Transfer) -> None:
        """Queue a transfer."""
        self._unfinished = [counter for counter in self._unfinished if not counter.is_settled or counter.has_events]
        self._unfinished.append(transfer.counter)
        self.start()
        self._transfers.put(transfer)

    def drain(self, timeout: float) -> None:
        """Return when no transfer touches a block any more, done or failed.

        Raises:
            TransferTimeout: One does after timeout seconds.
        """
        deadline = monotonic() + timeout
        while self._unfinished:
            with suppress(TransferFailed):  # it has ended, and whoever submitted it reads why from the counter
                self._unfinished[0].synchronize(max(0.0, deadline - monotonic()))
            del self._unfinished[0]

    def stop(self, timeout: float) -> None:
        """Drain, then end the thread; a second call does nothing, and a later submit starts another thread.

        Raises:
            TransferTimeout: As drain; the thread goes on.
        """
        self.drain(timeout)
        if self._thread is not None:
            self._transfers.put(None)
            self._thread.join(timeout)
            self._thread = None

    def _run(self) -> None:
        while (transfer := self._transfers.get()) is not None:
            transfer.run()
