"""The engine's loop: schedule, run, sample, detokenize; one call is one step."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt

from cache_manager import CacheManager, TransferFailed
from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.runner import StepRunner
from fastdeploy_dsa.engine.sampler import SamplingRow, top_logprobs
from fastdeploy_dsa.engine.scheduler import Scheduler
from fastdeploy_dsa.engine.speculative.acceptance import accept
from fastdeploy_dsa.engine.speculative.proposer import Proposer
from fastdeploy_dsa.engine.step_inputs import StepInputs
from fastdeploy_dsa.engine.step_plan import SchedulerLimits
from fastdeploy_dsa.engine.swap_cost import SwapCost


@dataclass
class TimeSplit:
    """Seconds by what they were spent on.

    Attributes:
        model: The target, with the step's tensors and the logits on the host.
        draft: The draft model, likewise, and what chooses its tokens.
    """

    model: float = 0.0
    draft: float = 0.0
    schedule: float = 0.0
    sample: float = 0.0
    detokenize: float = 0.0
    num_steps: int = 0

    @property
    def engine(self) -> float:
        """Everything but the models."""
        return self.schedule + self.sample + self.detokenize

    def table(self) -> str:
        """One line, for people."""
        parts = {"target": self.model, "drafts": self.draft, "engine": self.engine}
        whole = sum(parts.values()) or 1.0
        shares = ", ".join(f"{name} {seconds:.3g} s ({seconds / whole:.0%})" for name, seconds in parts.items())
        return f"time    {self.num_steps} steps: {shares}\n"


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
        swap_cost: SwapCost,
        proposer: Proposer | None = None,
        checks_integrity: bool = False,
    ) -> None:
        """Start without requests.

        Args:
            runner: The model with its cache.
            cache: The cache's blocks.
            limits: Of a step and of a request.
            eos_token_ids: The model's end tokens.
            swap_cost: Decides whether a request that gives way goes to the host.
            proposer: Drafts for the requests; None: nobody does.
            checks_integrity: Whether every step ends with a check of all blocks.
        """
        self._runner = runner
        self._cache = cache
        self._swap_cost = swap_cost
        self._proposer = proposer
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
        if self._proposer is not None:
            self._proposer.add(request)
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
            NonFiniteLogitsError: As accept. No request has changed, and the same step would follow; if it was the
                draft model, requests have got their tokens and no drafts.
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
        for chunk in chunks:
            if chunk.request.num_cached_tokens is None:
                chunk.request.num_cached_tokens = chunk.request.num_computed
        inputs = StepInputs.from_chunks(chunks, self.scheduler.tables, self._block_size)
        scheduled = perf_counter()
        try:
            outputs = self._runner.run(inputs, before_layer=self._cache.wait_for_layer)
            for layer in self._proposer.layer_ids if self._proposer is not None else ():
                self._cache.wait_for_layer(layer)
        except TransferFailed:
            if not self.scheduler.recover():
                raise
            return 0
        computed = perf_counter()
        self._swap_cost.observe(computed - scheduled, len(inputs.token_ids))
        ending = [chunk.request for chunk in chunks if chunk.is_last]
        accepted = self._accept(outputs.logits, ending)
        sampled = perf_counter()
        num_tokens = self._take_over(outputs.logits, ending, accepted)
        detokenized = perf_counter()
        try:
            if self._proposer is not None:
                self._proposer.propose(chunks, outputs.hidden, self.scheduler.tables)
        finally:
            drafted = perf_counter()
            self.scheduler.commit(chunks)
            for request in ending:
                if request.finish_reason is not None:
                    self.scheduler.remove(request)
        times = self.times
        times.schedule += scheduled - begin + perf_counter() - drafted
        times.model += computed - scheduled
        times.sample += sampled - computed
        times.detokenize += detokenized - sampled
        times.draft += drafted - detokenized
        times.num_steps += 1
        return num_tokens

    @staticmethod
    def _accept(logits: npt.NDArray[np.float32], requests: list[Request]) -> list[list[int]]:
        if not requests:
            return []
        rows = [SamplingRow(request.params, request.random_key, request.num_tokens) for request in requests]
        return accept(logits, rows, [request.drafts for request in requests])

    def _take_over(self, logits: npt.NDArray[np.float32], requests: list[Request], accepted: list[list[int]]) -> int:
        """Give requests their tokens, none behind one that ends the request; their drafts are used up.

        Returns:
            Tokens taken over.
        """
        line = num_taken = 0
        for request, tokens in zip(requests, accepted, strict=True):
            num_drafts = len(request.drafts)
            request.drafts = []
            if self._proposer is not None:
                self._proposer.observe(request, num_drafts, len(tokens) - 1)
            for place, token in enumerate(tokens):
                if request.params.logprobs is not None:
                    request.logprobs.append(top_logprobs(logits[line + place], token, request.params.logprobs))
                request.append(token)
                num_taken += 1
                self._end_if_complete(request, token)
                if request.finish_reason is not None:
                    break
            line += 1 + num_drafts
        return num_taken

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
