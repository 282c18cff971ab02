"""The engine's loop: schedule, run, sample, detokenize; one call is one step."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt

from cache_manager import CacheManager, TransferFailed
from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.runner import StepInputs, StepRunner
from fastdeploy_dsa.engine.sampler import SamplingRow, sample, top_logprobs
from fastdeploy_dsa.engine.scheduler import Chunk, Scheduler, SchedulerLimits
from fastdeploy_dsa.engine.swap_cost import SwapCost


@dataclass
class TimeSplit:
    """Seconds by what they were spent on; `model` includes the step's tensors and the logits on the host."""

    model: float = 0.0
    schedule: float = 0.0
    sample: float = 0.0
    detokenize: float = 0.0
    num_steps: int = 0

    @property
    def engine(self) -> float:
        """Everything but the model."""
        return self.schedule + self.sample + self.detokenize


class EngineCore:
    """Requests in, tokens out. Whoever calls `step` advances every request, not only his own.

    Attributes:
        scheduler: Owns the requests.
        times: Since the start.
    """

    def __init__(
        self,
        *,
        runner: StepRunner,
        cache: CacheManager,
        limits: SchedulerLimits,
        eos_token_ids: tuple[int, ...],
        bytes_per_block: int,
        checks_integrity: bool = False,
    ) -> None:
        """Start without requests.

        Args:
            runner: The model with its cache.
            cache: The cache's blocks.
            limits: Of a step and of a request.
            eos_token_ids: The model's end tokens.
            bytes_per_block: Of the cache, over all its tensors.
            checks_integrity: Whether every step ends with a check of all blocks.
        """
        self._runner = runner
        self._cache = cache
        self._swap_cost = SwapCost(bytes_per_block)
        self._checks_integrity = checks_integrity
        self._block_size = limits.block_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self.scheduler = Scheduler(limits, cache, self._swap_cost)
        self.times = TimeSplit()
        self._num_added = 0

    def add(self, request: Request) -> None:
        """Queue a request behind the others.

        Raises:
            ValueError: As Scheduler.add.
        """
        request.number = self._num_added
        self._num_added += 1
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """End a request that may have ended already, or was never added; what it has so far stays."""
        if request.finish_reason is None:
            request.finish_reason = "abort"
            if request.number is not None:
                self.scheduler.remove(request)

    def step(self) -> int:
        """Run one step.

        Returns:
            Tokens generated. 0 is normal while long prompts are computed, and when a load from the host has failed, so
            that the next step computes what it should have brought.

        Raises:
            NonFiniteLogitsError: As sample. No request has changed; the same step would follow.
            TransferTimeout: A load from the host takes too long. As above.
        """
        try:
            return self._step()
        finally:
            if self._checks_integrity:
                self.scheduler.check_integrity()

    def _step(self) -> int:
        begin = perf_counter()
        chunks = self.scheduler.schedule()
        if not chunks:
            return 0
        inputs = StepInputs.from_chunks(chunks, self.scheduler.block_table, self._block_size)
        scheduled = perf_counter()
        try:
            logits = self._runner.run(inputs, before_layer=self._cache.wait_for_layer)
        except TransferFailed:
            if not self.scheduler.recover():
                raise
            return 0
        computed = perf_counter()
        self._swap_cost.observe(computed - scheduled, len(inputs.token_ids))
        requests = [chunk.request for chunk in chunks if chunk.is_last]
        tokens = self._sample(logits, requests)
        sampled = perf_counter()
        self._advance(chunks, requests, tokens)
        times = self.times
        times.schedule += scheduled - begin
        times.model += computed - scheduled
        times.sample += sampled - computed
        times.detokenize += perf_counter() - sampled
        times.num_steps += 1
        return len(tokens)

    def _sample(self, logits: npt.NDArray[np.float32], requests: list[Request]) -> list[int]:
        if not requests:
            return []
        rows = [SamplingRow(request.params, request.random_key, request.num_tokens) for request in requests]
        tokens = sample(logits, rows)
        for line, (request, token) in enumerate(zip(requests, tokens, strict=True)):
            if request.params.logprobs is not None:
                request.logprobs.append(top_logprobs(logits[line], token, request.params.logprobs))
        return tokens

    def _advance(self, chunks: list[Chunk], requests: list[Request], tokens: list[int]) -> None:
        self.scheduler.commit(chunks)
        for request, token in zip(requests, tokens, strict=True):
            request.append(token)
            self._end_if_complete(request, token)
            if request.finish_reason is not None:
                self.scheduler.remove(request)

    def _end_if_complete(self, request: Request, token: int) -> None:
        """Give the token to the detokenizer and set the finish reason, if there is one now."""
        params = request.params
        is_eos = token in self._eos_token_ids and not params.ignore_eos
        if is_eos or token in params.stop_token_ids:
            request.finish_reason = "stop"
            request.stop_reason = None if is_eos else token
        if request.detokenizer is not None and (request.finish_reason is None or params.include_stop_str_in_output):
            stop = request.detokenizer.push(token)
            if stop is not None and request.finish_reason is None:
                request.finish_reason = "stop"
                request.stop_reason = stop
        if request.finish_reason is None and request.num_tokens == request.num_prompt + request.max_tokens:
            request.finish_reason = "length"
