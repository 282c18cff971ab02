"""LLM: a model folder that continues prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache_manager import CacheManager
from fastdeploy_dsa.byte_sizes import read_bytes
from fastdeploy_dsa.cache_plan import DEFAULT_STEP_TOKENS, check_block_size, default_block_size
from fastdeploy_dsa.device import CPU, use_device
from fastdeploy_dsa.engine.cache_stats import EngineCacheStats
from fastdeploy_dsa.engine.core import EngineCore, TimeSplit
from fastdeploy_dsa.engine.decode_graphs import DecodeLimits
from fastdeploy_dsa.engine.detokenizer import Detokenizer
from fastdeploy_dsa.engine.loading import CacheOptions, load_runner, read_cache_dtype, read_model_config
from fastdeploy_dsa.engine.outputs import RequestDelta, RequestOutput
from fastdeploy_dsa.engine.progress import ProgressBar
from fastdeploy_dsa.engine.prompts import Prompt, PromptLike, PromptReader
from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.sampling_params import MAX_SEED, SamplingParams
from fastdeploy_dsa.engine.speculative.config import read_speculative_config
from fastdeploy_dsa.engine.speculative.proposer import Proposer
from fastdeploy_dsa.engine.speculative.stats import SpeculativeStats
from fastdeploy_dsa.engine.step_plan import SchedulerLimits
from fastdeploy_dsa.engine.swap_cost import SwapCost
from fastdeploy_dsa.engine.tokenizer import Tokenizer, load_tokenizer
from fastdeploy_dsa.engine.validation import require_bool, require_int

_DEFAULT_MAX_NUM_SEQS = 32


class LLM:
    """Loads a model once and continues any number of prompts, many at a time.

    On the CPU the tokens of a request depend on its prompt, its sampling parameters and its seed, never on what else
    runs, on the size of the steps or on the number of threads. With drafts, greedy tokens are the same; random ones
    are others.

    One thread at a time may use an LLM. Several `stream` iterators may be open at once; every step advances them all.
    A server that has an event loop of its own uses `add`, `step` and `abort` instead.
    """

    def __init__(  # noqa: PLR0913 - a user's options are flat, as in other engines
        self,
        model: str | Path,
        *,
        device: str = CPU,
        cache_dtype: str = "auto",
        max_model_len: int | None = None,
        block_size: int | None = None,
        num_blocks: int | None = None,
        cache_memory: int | str = "1GiB",
        enable_prefix_caching: bool = True,
        swap_space: int | str = 0,
        max_num_batched_tokens: int = DEFAULT_STEP_TOKENS,
        max_num_seqs: int | None = None,
        num_threads: int = 0,
        seed: int = 0,
        hf_overrides: Mapping[str, Any] | None = None,
        speculative_config: Mapping[str, Any] | str | None = None,
        progress: bool | None = None,
        check_integrity: bool = False,
    ) -> None:
        """Load weights and tokenizer and allocate the cache.

        Args:
            model: A Hugging Face folder: config.json, safetensors files, and tokenizer.json for prompts that are text.
            device: Paddle's name of the device that computes, such as "cpu" or "gpu:0"; for the whole process.
            cache_dtype: "float32", "bfloat16" or "fp8"; "auto" is float32 on the CPU and fp8 on a GPU.
            max_model_len: Tokens of a request, prompt and continuation; None: the model's max_position_embeddings.
            block_size: Tokens of a cache block; None: 64, or 256 for a model with compressed entries, which needs a
                multiple of its largest compression ratio.
            num_blocks: Blocks of the cache; None: enough for max_num_seqs requests of max_model_len tokens, as far as
                cache_memory goes. What a model keeps of each request's last tokens comes in addition.
            cache_memory: Bytes that the cache may take if num_blocks is None, all of it; an int or text such as
                "512MiB".
            enable_prefix_caching: Whether tokens at the beginning of a prompt that the cache still has from other
                requests are not computed again.
            swap_space: Bytes of host memory, an int or text such as "4GiB", for blocks that leave the cache: requests
                that have to give way, and what is cached for later prompts. 0: there is none, they are computed again.
                If it cannot be allocated, a warning is logged and there is none.
            max_num_batched_tokens: Tokens of a step; longer prompts are computed in chunks.
            max_num_seqs: Requests that run at a time, the others wait; None: 32, or as many as max_num_batched_tokens
                has room for, with all their drafts.
            num_threads: Of the CPU ops; 0 means every processor the process may run on.
            seed: For requests without a seed of their own.
            hf_overrides: Keys that replace those of config.json.
            speculative_config: {"method": "mtp", "num_speculative_tokens": 3}, or that as JSON text: the checkpoint's
                MTP layer drafts tokens, which are verified in one step, see docs/mtp.md; None: one token at a time.
            progress: Bars on stderr while loading and generating takes long; None: only if stderr is a terminal.
            check_integrity: For debugging: check after every step that no block is lost or given out twice.

        Raises:
            ValueError: An argument, the folder or a file in it is refused; the message names it.
        """
        folder = Path(model)
        self._seed = require_int("seed", seed, low=0, high=MAX_SEED)
        self._progress = progress
        device = use_device(device)
        cache_format = read_cache_dtype(cache_dtype, device)
        cache_bytes = read_bytes("cache_memory", cache_memory)
        host_bytes = read_bytes("swap_space", swap_space, low=0)
        speculative = read_speculative_config(speculative_config)
        num_drafts = 0 if speculative is None else speculative.num_speculative_tokens
        is_prefix_cached = require_bool("enable_prefix_caching", enable_prefix_caching)
        self.config = read_model_config(folder, hf_overrides)
        if speculative is not None:
            speculative.check_depth(self.config.num_nextn_predict_layers)
        longest = self.config.max_position_embeddings
        if max_model_len is not None:
            longest = require_int("max_model_len", max_model_len, low=2, high=longest)
        budget = require_int("max_num_batched_tokens", max_num_batched_tokens, low=1)
        if max_num_seqs is None:
            max_num_seqs = max(1, min(_DEFAULT_MAX_NUM_SEQS, budget // (1 + num_drafts)))
        if block_size is None:
            block_size = default_block_size(self.config)
        check_block_size(self.config, require_int("block_size", block_size, low=1))
        limits = SchedulerLimits(
            max_num_batched_tokens=budget,
            max_num_seqs=require_int("max_num_seqs", max_num_seqs, low=1),
            max_model_len=longest,
            block_size=block_size,
            num_speculative_tokens=num_drafts,
        )
        options = CacheOptions(
            cache_dtype=cache_format,
            block_size=limits.block_size,
            num_threads=require_int("num_threads", num_threads, low=0),
            device=device,
            num_blocks=None if num_blocks is None else require_int("num_blocks", num_blocks, low=1),
            memory_bytes=cache_bytes,
            wanted_blocks=limits.max_num_seqs * limits.num_blocks(limits.max_model_len),
            host_bytes=host_bytes,
            room=limits.window_room(has_snapshots=is_prefix_cached),
        )
        self._tokenizer, reason = load_tokenizer(folder)
        self._reader = PromptReader(
            self._tokenizer, reason, vocab_size=self.config.vocab_size, max_model_len=limits.max_model_len
        )
        loaded = load_runner(
            folder,
            config=self.config,
            options=options,
            progress=progress,
            drafts=speculative is not None,
            decode_limits=DecodeLimits(limits.max_num_seqs, limits.max_model_len, limits.block_size),
        )
        self._max_cached_tokens = loaded.num_blocks * limits.block_size
        self._max_model_len = limits.max_model_len
        self._max_num_seqs = limits.max_num_seqs
        self._cache = CacheManager(
            loaded.cache_controller,
            num_blocks=loaded.num_blocks,
            block_size=limits.block_size,
            is_prefix_cached=is_prefix_cached,
            # The last of the draft layers makes its entry of a position from the token so far behind it.
            num_lookahead_tokens=0 if speculative is None else self.config.num_nextn_predict_layers,
        )
        self._proposer = None
        if speculative is not None and loaded.draft_runner is not None:
            self._proposer = Proposer(loaded.draft_runner, speculative, block_size=limits.block_size)
        self._core = EngineCore(
            runner=loaded.runner,
            cache=self._cache,
            limits=limits,
            eos_token_ids=self.config.eos_token_ids,
            swap_cost=SwapCost.of(loaded.cache_controller),
            proposer=self._proposer,
            checks_integrity=require_bool("check_integrity", check_integrity),
        )
        self._num_requests = 0

    def generate(
        self,
        prompts: str | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts to their end.

        Args:
            prompts: One text, or any mix of texts and sequences of token ids.
            sampling_params: One for all, or one per prompt; None: the defaults.

        Returns:
            One output per prompt, in order.

        Raises:
            ValueError: A prompt or parameter is refused; nothing ran, and the LLM is as before.
        """
        requests = self.add(prompts, sampling_params)
        most = sum(request.max_tokens for request in requests)
        try:
            with ProgressBar("generating tokens", most, is_wanted=self._progress) as bar:
                generated = 0
                while any(request.finish_reason is None for request in requests):
                    generated += self._core.step()
                    bar.update(generated)
        finally:
            self.abort(requests)
        return [request.output() for request in requests]

    def stream(
        self,
        prompts: str | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestDelta]:
        """Continue prompts and hand out new tokens as they come.

        An iterator that is closed early ends its requests.

        Args, Raises: as `generate`; the checks happen in the call, before the first delta is asked for.
        """
        return self._run(self._read(prompts, sampling_params))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's, if it has one; any thread may use it."""
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        """Tokens of a request, prompt and continuation."""
        return self._max_model_len

    @property
    def max_num_seqs(self) -> int:
        """Requests that run at a time."""
        return self._max_num_seqs

    @property
    def num_running(self) -> int:
        """Requests that hold blocks on the device."""
        return self._core.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that are queued, or had to give way."""
        return self._core.scheduler.num_waiting

    def read(self, prompts: str | Sequence[PromptLike], *, add_special_tokens: bool = True) -> list[Prompt]:
        """Check prompts and turn texts into token ids, for `add`: the one method that any thread may call.

        Args, Raises: as PromptReader.read.
        """
        return self._reader.read(prompts, add_special_tokens=add_special_tokens)

    def add(
        self,
        prompts: str | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Request]:
        """Queue prompts, which `step` advances; `Request.take_delta` tells what is new and whether one has ended.

        Args, Raises: as `generate`.
        """
        requests = self._read(prompts, sampling_params)
        try:
            for request in requests:
                self._core.add(request)
        except BaseException:
            self.abort(requests)
            raise
        return requests

    def step(self) -> int:
        """Advance every request that there is room for; does nothing if there is none.

        Returns, Raises: as EngineCore.step.
        """
        return self._core.step()

    def abort(self, requests: Sequence[Request]) -> None:
        """End requests, some of which may have ended already, and free their blocks."""
        for request in requests:
            self._core.abort(request)

    def time_split(self) -> TimeSplit:
        """What the time of all steps so far was spent on."""
        return replace(self._core.times)

    def cache_stats(self) -> EngineCacheStats:
        """What the cache did so far, and what its blocks are used for now."""
        return EngineCacheStats(replace(self._core.scheduler.counts), self._cache.stats())

    def speculative_stats(self) -> SpeculativeStats:
        """What drafting brought so far; all 0 without it."""
        return SpeculativeStats() if self._proposer is None else deepcopy(self._proposer.stats)

    def _run(self, requests: list[Request]) -> Iterator[RequestDelta]:
        try:
            for request in requests:
                self._core.add(request)
            unfinished = requests
            while unfinished:
                self._core.step()
                # Another iterator may finish a request while this one waits in a yield: only the delta counts.
                remaining = []
                for request in unfinished:
                    delta = request.take_delta()
                    if delta is None or delta.finish_reason is None:
                        remaining.append(request)
                    if delta is not None:
                        yield delta
                unfinished = remaining
        finally:
            self.abort(requests)

    def _read(
        self,
        prompts: str | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Request]:
        """Requests that are sure to run; not queued yet."""
        read = self._reader.read(prompts)
        params = _params_per_prompt(sampling_params, len(read))
        requests = [self._request(index, *pair) for index, pair in enumerate(zip(read, params, strict=True))]
        for request in requests:
            fits, reason = self._core.scheduler.fits(request)
            if not fits:
                raise ValueError(f"prompts[{request.index}]: {reason}")
        self._num_requests += len(requests)
        return requests

    def _request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        number = self._num_requests + index
        if params.stop and self._tokenizer is None:
            raise ValueError(f"stop: expected no strings for a model without a tokenizer, got {params.stop!r}")
        if params.logprobs is not None:
            require_int("logprobs", params.logprobs, low=0, high=self.config.vocab_size)
        for token in params.stop_token_ids:
            require_int("stop_token_ids", token, low=0, high=self.config.vocab_size - 1, noun="a token id")
        detokenizer = None
        if self._tokenizer is not None:
            detokenizer = Detokenizer(
                self._tokenizer,
                prompt_token_ids=prompt.token_ids,
                stop=tuple(params.stop),
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
            )
        room = self._max_model_len - len(prompt.token_ids)
        if params.max_tokens is None:
            # The last token needs no place in the cache.
            max_tokens = max(1, min(room, self._max_cached_tokens + 1 - len(prompt.token_ids)))
        else:
            max_tokens = min(room, params.max_tokens)
        return Request(
            request_id=str(number),
            index=index,
            prompt=prompt.text,
            prompt_token_ids=prompt.token_ids,
            params=params,
            max_tokens=max_tokens,
            random_key=(self._seed, number + 1) if params.seed is None else (params.seed, 0),
            detokenizer=detokenizer,
        )


def _params_per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> Sequence[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    listed: object = params
    if not isinstance(listed, Sequence) or not all(isinstance(one, SamplingParams) for one in listed):
        raise ValueError(f"sampling_params: expected SamplingParams, one or one per prompt, got {params!r}")
    if len(params) != num_prompts:
        raise ValueError(f"sampling_params: expected one per prompt ({num_prompts}), got {len(params)}")
    return params
