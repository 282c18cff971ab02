"""Transfers end as done or failed, everything that waits hears of it, and a wait has an end."""

from __future__ import annotations

import threading
from time import monotonic, sleep

import numpy as np
import pytest

from cache_manager import CacheSwapMetadata, LayerDoneCounter, NumpyCopier, TransferFailed, TransferTimeout
from cache_manager.transfer import Transfer, TransferQueue


class Event:
    """Of a copy that was only started; may fail."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.calls: list[str] = []
        self.failure = failure

    def wait(self) -> None:
        self.calls.append("wait")
        if self.failure:
            raise self.failure

    def synchronize(self) -> None:
        self.calls.append("synchronize")


def counter(*layers: int, timeout: float = 0.05) -> LayerDoneCounter:
    return LayerDoneCounter(layers, timeout=timeout)


def test_a_transfer_of_nothing_is_done() -> None:
    metadata = CacheSwapMetadata()
    empty = LayerDoneCounter((), timeout=1, metadata=metadata)
    empty.wait_all()
    empty.wait_for_layer(3)
    assert (empty.is_settled, empty.is_all_done(), metadata.success) == (True, True, True)


def test_layers_are_done_one_by_one() -> None:
    progress = counter(4, 5)
    assert (progress.get_pending_layers(), progress.get_completed_count()) == ([4, 5], 0)
    progress.mark_layer_done(4)
    progress.wait_for_layer(4)
    assert (progress.is_layer_done(4), progress.is_layer_done(5), progress.is_settled) == (True, False, False)
    with pytest.raises(TransferTimeout, match=r"layers \[5\] were not copied within 0.05 s"):
        progress.wait_for_layer(5)
    with pytest.raises(TransferTimeout):
        progress.wait_all(0.0)
    progress.mark_layer_done(5)
    progress.mark_layer_done(5)
    progress.wait_all()
    assert progress.get_completed_count() == 2


def test_a_failure_ends_every_wait_at_once_and_carries_its_cause() -> None:
    metadata = CacheSwapMetadata([1], [2])
    progress = LayerDoneCounter([0, 1], timeout=60, metadata=metadata)
    progress.mark_layer_done(0)
    cause = OSError("no such device")
    threading.Timer(0.05, lambda: progress.mark_failed(cause)).start()
    begin = monotonic()
    with pytest.raises(TransferFailed, match="a copy failed: no such device") as failure:
        progress.wait_for_layer(1)
    assert monotonic() - begin < 5
    assert failure.value.__cause__ is cause
    progress.wait_for_layer(0)  # was there before
    assert (metadata.success, metadata.error_message, metadata.mapping) == (False, "no such device", {})


def test_a_settled_transfer_does_not_fail_any_more() -> None:
    metadata = CacheSwapMetadata([1], [2])
    progress = LayerDoneCounter([0], timeout=1, metadata=metadata)
    progress.mark_layer_done(0)
    progress.mark_failed(OSError("late"))
    progress.wait_all()
    assert (metadata.success, metadata.error_message, metadata.mapping) == (True, None, {1: 2})


def test_a_late_reader_still_waits_for_the_event_of_its_layer() -> None:
    event, progress = Event(), counter(0)
    progress.mark_layer_done(0, [event])
    progress.wait_for_layer(0)
    progress.wait_for_layer(0)
    progress.synchronize()
    assert event.calls == ["wait", "wait", "synchronize"]


def test_an_event_that_fails_is_a_failed_copy() -> None:
    progress = counter(0)
    progress.mark_layer_done(0, [Event(OSError("lost"))])
    with pytest.raises(TransferFailed, match="a copy failed: lost"):
        progress.wait_for_layer(0)


def test_a_load_slower_than_a_second_succeeds() -> None:
    queue, progress = TransferQueue(), counter(0, timeout=30)

    def slow(layer: int) -> list[Event]:
        sleep(1.2)
        return []

    queue.submit(Transfer(progress, slow))
    progress.wait_for_layer(0)
    queue.stop(5)


def test_transfers_run_in_order_and_a_failure_does_not_stop_the_next() -> None:
    queue, ran = TransferQueue(), list[tuple[str, int]]()

    def copy(name: str) -> Transfer:
        def layer(number: int) -> list[Event]:
            ran.append((name, number))
            if name == "bad":
                raise ValueError(name)
            return []

        return Transfer(counter(0, 1, timeout=5), layer)

    first, bad, last = copy("first"), copy("bad"), copy("last")
    for transfer in (first, bad, last):
        queue.submit(transfer)
    queue.drain(5)
    assert ran == [("first", 0), ("first", 1), ("bad", 0), ("last", 0), ("last", 1)]
    assert (first.counter.failure, last.counter.failure, queue.num_pending) == (None, None, 0)
    assert isinstance(bad.counter.failure, ValueError)
    queue.stop(5)


def test_a_transfer_does_not_begin_if_the_one_before_it_failed() -> None:
    failed, progress = counter(0), counter(0)
    failed.mark_failed(OSError("full"))
    Transfer(progress, lambda layer: pytest.fail("it began"), after=failed).run()
    with pytest.raises(TransferFailed, match="full"):
        progress.wait_all()


def test_draining_has_an_end_and_waits_for_events() -> None:
    queue, gate, event = TransferQueue(), threading.Event(), Event()

    def copy(layer: int) -> list[Event]:
        gate.wait(10)
        return [event]

    queue.submit(Transfer(counter(0), copy))
    with pytest.raises(TransferTimeout):
        queue.drain(0.05)
    with pytest.raises(TransferTimeout):
        queue.stop(0.05)
    assert queue.num_pending == 1
    gate.set()
    queue.drain(5)
    assert event.calls == ["synchronize"]


def test_draining_waits_for_events_of_transfers_that_are_settled_already() -> None:
    queue, event = TransferQueue(), Event()
    first, second = counter(0, timeout=5), counter(0, timeout=5)
    queue.submit(Transfer(first, lambda layer: [event]))
    first.wait_all()
    queue.submit(Transfer(second, lambda layer: []))
    queue.drain(5)
    assert event.calls == ["wait", "synchronize"]


def test_stopping_is_idempotent_and_a_stopped_queue_starts_again() -> None:
    queue = TransferQueue()
    queue.stop(1)
    queue.start()
    queue.start()
    queue.stop(5)
    queue.stop(5)
    progress = counter(0, timeout=5)
    queue.submit(Transfer(progress, lambda layer: []))
    progress.wait_all()
    queue.stop(5)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int16])
def test_blocks_of_any_type_and_size_are_copied_as_bytes(dtype: type) -> None:
    rng = np.random.default_rng(0)
    for shape in ((6, 132), (6, 1, 3, 7), (6, 1), (6, 0)):
        src = rng.integers(0, 100, shape).astype(dtype)
        dst = np.zeros((9, src[0].nbytes), np.uint8)
        src_ids, dst_ids = np.array([0, 1, 2, 5, 3]), np.array([4, 5, 6, 0, 1])
        NumpyCopier().copy(src=src, dst=dst, src_block_ids=src_ids, dst_block_ids=dst_ids)
        expected = np.zeros_like(dst)
        expected[dst_ids] = src.reshape(6, -1)[src_ids].view(np.uint8).reshape(5, -1)
        assert np.array_equal(dst, expected)


def test_a_copy_of_impossible_blocks_is_refused() -> None:
    copier, ids = NumpyCopier(), np.array([0])
    array = np.zeros((2, 8), np.uint8)
    for src, dst, src_ids, dst_ids, message in (
        (array, np.zeros((2, 9), np.uint8), ids, ids, "dst: expected blocks of 8 bytes, got 9"),
        (array, array, ids, np.array([2]), "dst_block_ids: expected 0 .. 1, got 2 .. 2"),
        (array, array, np.array([-1]), ids, "src_block_ids: expected 0 .. 1, got -1 .. -1"),
        (array[:, ::2], array, ids, ids, "expected a contiguous array"),
    ):
        with pytest.raises(ValueError, match=message):
            copier.copy(src=src, dst=dst, src_block_ids=src_ids, dst_block_ids=dst_ids)
