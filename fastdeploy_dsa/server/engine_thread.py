"""The one thread that uses the LLM, and the event loop's side of it.

                event loop                                    engine thread
    submit ──── messages (a queue of calls) ───────────────>  add to the LLM
    close ─────────────────────────────────────────────────>  abort, if it has not ended
                                                              step, while anything is unfinished
    Generation <── deltas and failures, once per step ──────

Messages are handled in their order between two steps. So a generation that is closed has given its blocks back before
anything that was submitted later is added, and the number of unfinished sequences is known on the loop's side alone.

The thread also loads the model: the number of threads of Paddle's matrix products is a setting of the thread that
computes (row_invariance.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from cache_manager import TransferTimeout
from fastdeploy_dsa.engine import LLM, EngineCacheStats, RequestDelta, SamplingParams, TimeSplit
from fastdeploy_dsa.engine.prompts import Prompt
from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.sampler import NonFiniteLogitsError
from fastdeploy_dsa.server.errors import ApiError, engine_failure, overloaded, refused, shutting_down, timed_out

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStatistics:
    """The engine between two steps.

    Attributes:
        num_running: Requests that hold blocks on the device.
        num_waiting: Requests that do not.
        num_generated_tokens: Since the start.
        num_finished: Sequences since the start, by finish reason; "abort" are those that were closed or failed.
        cache: Of the LLM.
        times: Of the LLM.
    """

    num_running: int
    num_waiting: int
    num_generated_tokens: int
    num_finished: dict[str, int]
    cache: EngineCacheStats
    times: TimeSplit


class Generation:
    """The sequences of one HTTP request, on the event loop's side; `EngineThread.submit` makes it."""

    def __init__(self, num_sequences: int) -> None:
        """Expect nothing yet."""
        self.num_sequences = num_sequences
        self.timer: asyncio.TimerHandle | None = None
        self.is_closed = False
        self._arrived: asyncio.Queue[RequestDelta | ApiError | None] = asyncio.Queue()

    def put(self, item: RequestDelta | ApiError | None) -> None:
        """What has arrived: None when the engine has taken the request, then deltas; an error ends it."""
        self._arrived.put_nowait(item)

    async def accepted(self) -> None:
        """Wait until the engine has taken the request.

        Raises:
            ApiError: It has not.
        """
        item = await self._arrived.get()
        if isinstance(item, ApiError):
            raise item

    async def deltas(self) -> AsyncIterator[RequestDelta]:
        """What comes, until every sequence has ended; RequestDelta.index tells the sequence.

        Raises:
            ApiError: The engine failed, the time is over, or whatever else was `put`.
        """
        num_unfinished = self.num_sequences
        while num_unfinished:
            item = await self._arrived.get()
            if isinstance(item, ApiError):
                raise item
            if item is not None:
                num_unfinished -= item.finish_reason is not None
                yield item


class EngineThread:
    """Owns an LLM in a thread of its own. All methods but `start` and `stop` belong to one event loop.

    Attributes:
        failure: Why the engine cannot go on; empty while it can.
        capacity: Sequences that may be unfinished at a time.
        num_unfinished: Sequences of generations that are not closed.
    """

    def __init__(self, make_llm: Callable[[], LLM], *, max_waiting: int, timeout: float | None = None) -> None:
        """Do nothing yet.

        Args:
            make_llm: Called in the thread.
            max_waiting: Sequences that may wait besides those that run; more are refused.
            timeout: Seconds a request may take from `submit` to its end; None: as long as it takes.
        """
        self.failure = ""
        self.capacity = max_waiting
        self.num_unfinished = 0
        self._make_llm = make_llm
        self._timeout = timeout
        self._loaded: Future[LLM] = Future()
        self._messages: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._is_stopping = False
        self._stopping = Lock()  # a message that was let in comes before the thread's last look at the queue
        self._loop: asyncio.AbstractEventLoop | None = None
        # The engine thread's own.
        self._unfinished: dict[Generation, list[Request]] = {}
        self._outbox: list[tuple[Generation, RequestDelta | ApiError | None]] = []
        self._num_generated_tokens = 0
        self._num_finished: Counter[str] = Counter()
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> LLM:
        """Load the model and wait for it.

        Returns:
            The LLM, of which the caller may use what any thread may use.

        Raises:
            Exception: What loading raised; the thread has ended.
        """
        self._thread.start()
        llm = self._loaded.result()
        self.capacity += llm.max_num_seqs
        return llm

    def stop(self) -> None:
        """End what is unfinished and the thread; a second call does nothing more."""
        with self._stopping:
            self._is_stopping = True
        self._messages.put(lambda: None)
        self._thread.join()

    async def submit(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> Generation:
        """Hand sequences to the engine, one per prompt; whoever gets the Generation closes it.

        Raises:
            ApiError: The queue is full, the engine has failed, or it refuses a sequence: none is queued.
        """
        if self.failure:
            raise engine_failure(self.failure, is_final=True)
        if self.num_unfinished + len(prompts) > self.capacity:
            raise overloaded(len(prompts), self.capacity)
        self._loop = asyncio.get_running_loop()
        generation = Generation(len(prompts))
        self.num_unfinished += len(prompts)
        if self._timeout is not None:
            generation.timer = self._loop.call_later(self._timeout, generation.put, timed_out(self._timeout))
        try:
            self._post(partial(self._add, generation, prompts, params))
            await generation.accepted()
        except BaseException:
            self.close(generation)
            raise
        return generation

    def close(self, generation: Generation) -> None:
        """Nobody wants more of it; a second call does nothing."""
        if generation.is_closed:
            return
        generation.is_closed = True
        if generation.timer is not None:
            generation.timer.cancel()
        self.num_unfinished -= generation.num_sequences
        self._messages.put(partial(self._abort, generation))

    async def statistics(self) -> EngineStatistics:
        """As of the end of the step that runs now.

        Raises:
            ApiError: The server is shutting down.
            Exception: What asking the LLM raised.
        """
        answer: Future[EngineStatistics] = Future()
        self._post(partial(self._answer, answer))
        return await asyncio.wrap_future(answer)

    def _post(self, message: Callable[[], None]) -> None:
        """A message that somebody waits for."""
        with self._stopping:
            if self._is_stopping:
                raise shutting_down()
            self._messages.put(message)

    def _run(self) -> None:
        try:
            self._llm = self._make_llm()
        except BaseException as error:  # noqa: BLE001 - `start` raises it
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(self._llm)
        while not self._is_stopping:
            try:
                self._handle_messages()
                if self._unfinished:
                    self._step()
            except Exception as error:
                _LOGGER.exception("the engine cannot go on")
                self._give_up(f"{type(error).__name__}: {error}")
            self._send()
        with suppress(Empty):  # whoever waits for an answer gets one
            while True:
                self._messages.get_nowait()()
        for generation in tuple(self._unfinished):
            self._fail(generation, shutting_down())
        self._send()

    def _handle_messages(self) -> None:
        """Those that are there; if there is nothing to do, wait for one."""
        with suppress(Empty):
            self._messages.get(block=not self._unfinished)()
            while True:
                self._messages.get_nowait()()

    def _add(self, generation: Generation, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> None:
        if self.failure:
            self._outbox.append((generation, engine_failure(self.failure, is_final=True)))
            return
        self._unfinished[generation] = []  # if anything but a refusal happens, it is failed with the others
        try:
            self._unfinished[generation] = self._llm.add(prompts, params)
        except ValueError as error:
            del self._unfinished[generation]
            self._outbox.append((generation, refused(error)))
        else:
            self._outbox.append((generation, None))

    def _abort(self, generation: Generation) -> None:
        requests = self._unfinished.pop(generation, [])
        self._num_finished["abort"] += sum(request.finish_reason is None for request in requests)
        self._llm.abort(requests)

    def _answer(self, answer: Future[EngineStatistics]) -> None:
        if not answer.set_running_or_notify_cancel():
            return
        try:
            answer.set_result(self._statistics())
        except Exception as error:  # noqa: BLE001 - `statistics` raises it
            answer.set_exception(error)

    def _statistics(self) -> EngineStatistics:
        return EngineStatistics(
            num_running=self._llm.num_running,
            num_waiting=self._llm.num_waiting,
            num_generated_tokens=self._num_generated_tokens,
            num_finished=dict(self._num_finished),
            cache=self._llm.cache_stats(),
            times=self._llm.time_split(),
        )

    def _step(self) -> None:
        try:
            self._num_generated_tokens += self._llm.step()
        except (NonFiniteLogitsError, TransferTimeout) as error:
            # No request has changed, and the same step would fail again.
            _LOGGER.warning("a step failed: %s", error)
            for generation in self._running() or tuple(self._unfinished):
                self._fail(generation, engine_failure(str(error), is_final=False))
        for generation, requests in tuple(self._unfinished.items()):
            for request in requests:
                delta = request.take_delta()
                if delta is not None:
                    self._outbox.append((generation, delta))
                    if delta.finish_reason is not None:
                        self._num_finished[delta.finish_reason] += 1
            if all(request.finish_reason is not None for request in requests):
                del self._unfinished[generation]

    def _running(self) -> list[Generation]:
        """Generations with a request that the last step may have computed."""
        return [
            generation
            for generation, requests in self._unfinished.items()
            if any(request.line is not None for request in requests)
        ]

    def _fail(self, generation: Generation, error: ApiError) -> None:
        self._abort(generation)
        self._outbox.append((generation, error))

    def _give_up(self, reason: str) -> None:
        """The LLM's state is unknown: nothing is asked of it any more."""
        self.failure = reason
        for generation in self._unfinished:
            self._outbox.append((generation, engine_failure(reason, is_final=False)))
        self._unfinished.clear()

    def _send(self) -> None:
        """Everything of a step at once: waking the loop up costs more than an item."""
        if self._outbox and self._loop is not None:
            # A loop that is closed has no readers.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_deliver, self._outbox)
        self._outbox = []


def _deliver(items: list[tuple[Generation, RequestDelta | ApiError | None]]) -> None:
    for generation, item in items:
        generation.put(item)
