"""A model that is only its cache: it finds the tokens of a request through the block table, as attention would."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Event
from time import sleep
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_manager import (
    MAIN_POOL,
    CacheConfig,
    CacheController,
    CacheManager,
    CachePool,
    CacheTensorSpec,
    NumpyCopier,
    TensorKey,
)
from fastdeploy_dsa.engine.core import EngineCore
from fastdeploy_dsa.engine.detokenizer import Detokenizer
from fastdeploy_dsa.engine.request import Request
from fastdeploy_dsa.engine.runner import StepOutputs
from fastdeploy_dsa.engine.sampling_params import SamplingParams
from fastdeploy_dsa.engine.speculative.config import SpeculativeConfig
from fastdeploy_dsa.engine.speculative.proposer import Proposer
from fastdeploy_dsa.engine.step_inputs import StepInputs
from fastdeploy_dsa.engine.step_plan import SchedulerLimits
from fastdeploy_dsa.engine.swap_cost import SwapCost
from tests.engine.draft_fakes import NUM_LAYERS, VOCAB_SIZE, CacheDrafter, Drafting, next_logits
from tests.engine.window_fakes import DRAFTED, write_and_check_windows


def greedy_continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What the engine must generate."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(next_logits(np.array(tokens)).argmax()))
    return tokens[len(prompt) :]


class TokenCache:
    """Owner of a cache that holds the tokens themselves, in windows too; no layer writes to another's tensor."""

    def __init__(self, block_size: int, pools: tuple[CachePool, ...] = ()) -> None:
        self._block_size = block_size
        self._pools = pools

    def cache_spec(
        self, layer_ids: tuple[int, ...], cache_dtype: str | None = None, kv_cache_quant_type: str | None = None
    ) -> tuple[CacheTensorSpec, ...]:
        main = CacheTensorSpec("tokens", "token_caches", layer_ids, (self._block_size,), "int64", 8, "tokens")
        windows = (
            CacheTensorSpec(
                pool.name,
                f"{pool.name}_caches",
                tuple(layer for layer in layer_ids if layer < NUM_LAYERS or pool.name in DRAFTED),
                (pool.block_tokens,),
                "int64",
                8,
                "tokens",
                pool.name,
            )
            for pool in self._pools
        )
        return (main, *windows)

    def cache_pools(self) -> tuple[CachePool, ...]:
        return self._pools

    def create_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        cache_dtype: str | None = None,
        kv_cache_quant_type: str | None = None,
        layer_offset: int = 0,
        window_blocks: Mapping[str, int] | None = None,
    ) -> Mapping[TensorKey, npt.NDArray[np.int64]]:
        counts = {MAIN_POOL: num_blocks, **(window_blocks or {})}
        return {
            (spec.role, layer): np.full((counts[spec.pool], *spec.block_shape), -1, np.int64)
            for spec in self.cache_spec(tuple(range(layer_offset, layer_offset + num_layers)))
            for layer in spec.layer_ids
        }


class FaultyCopier(NumpyCopier):
    """Fails at some copies, takes its time for some, and lets all wait at a gate.

    Attributes:
        fails: Number of a copy since the start to whether it fails.
        is_slow: The same to whether it takes 5 ms.
        gate: Open at first.
        num_copies: Since the start.
    """

    def __init__(
        self, fails: Callable[[int], bool] = lambda _: False, is_slow: Callable[[int], bool] = lambda _: False
    ) -> None:
        self.fails = fails
        self.is_slow = is_slow
        self.gate = Event()
        self.gate.set()
        self.num_copies = 0

    def copy(self, **arguments: Any) -> None:
        if not self.gate.wait(20):
            raise RuntimeError("the test left the gate closed")
        self.num_copies += 1
        if self.is_slow(self.num_copies - 1):
            sleep(0.005)
        if self.fails(self.num_copies - 1):
            raise OSError("injected failure")
        super().copy(**arguments)


class CacheModel:
    """A StepRunner. A slot that was never written, or was overwritten by another request, changes the result.

    Attributes:
        steps: Rows of every step that was computed to its end.
    """

    def __init__(self, caches: Mapping[TensorKey, npt.NDArray[np.int64]], block_size: int) -> None:
        self._block_size = block_size
        self._caches = caches
        self.steps: list[StepInputs] = []

    def run(self, inputs: StepInputs, *, before_layer: Callable[[int], None] | None = None) -> StepOutputs:
        blocks = inputs.block_table[inputs.request_ids, inputs.positions // self._block_size]
        assert (blocks >= 0).all(), "a token has no block"
        slots = blocks.astype(np.int64) * self._block_size + inputs.positions % self._block_size
        assert len(set(slots.tolist())) == len(slots), "two tokens share a slot"
        rows = [np.empty((0, VOCAB_SIZE), np.float32)]
        for (role, layer), cache in self._caches.items():
            if layer >= NUM_LAYERS or role != "tokens":
                continue  # the draft model's, and windows
            if before_layer is not None:
                before_layer(layer)
            cache.reshape(-1)[slots] = inputs.token_ids
            write_and_check_windows(self._caches, inputs, layer, cache)
            rows.append(np.array([self._row(cache, inputs, row) for row in inputs.logits_rows]))
        assert all(np.array_equal(row, rows[1]) for row in rows[2:]), "layers have other tokens in their caches"
        self.steps.append(inputs)
        return StepOutputs(rows[1].reshape(-1, VOCAB_SIZE), inputs)

    @staticmethod
    def _row(cache: npt.NDArray[np.int64], inputs: StepInputs, row: int) -> np.ndarray:
        length = inputs.positions[row] + 1
        blocks = inputs.block_table[inputs.request_ids[row], : -(-length // cache.shape[1])]
        return next_logits(cache[blocks].reshape(-1)[:length])


def make_core(
    *,
    num_blocks: int,
    block_size: int = 2,
    max_num_batched_tokens: int = 8,
    max_num_seqs: int = 4,
    max_model_len: int = 64,
    eos_token_ids: tuple[int, ...] = (),
    is_prefix_cached: bool = True,
    num_host_blocks: int = 0,
    copier: NumpyCopier | None = None,
    transfer_timeout: float = 20.0,
    drafting: Drafting | None = None,
    pools: tuple[CachePool, ...] = (),
) -> tuple[EngineCore, CacheModel]:
    """An engine over a CacheModel; with drafting, over a CacheDrafter as well."""
    limits = SchedulerLimits(
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        block_size=block_size,
        num_speculative_tokens=0 if drafting is None else drafting.num_speculative_tokens,
    )
    room = limits.window_room(has_snapshots=is_prefix_cached)
    cache_config = CacheConfig(
        num_layers=NUM_LAYERS,
        num_host_blocks=num_host_blocks,
        transfer_timeout=transfer_timeout,
        window_blocks=room.device_blocks(pools, num_blocks),
        host_window_blocks=room.host_blocks(pools, num_host_blocks),
    )
    controller = CacheController(cache_config, copier=copier or NumpyCopier())
    controller.initialize_kv_cache(TokenCache(block_size, pools), num_blocks)
    if drafting is not None:
        controller.initialize_mtp_kv_cache(TokenCache(block_size, pools), num_blocks, 1, NUM_LAYERS)
    controller.initialize_host_cache()
    cache = CacheManager(
        controller,
        num_blocks=num_blocks,
        block_size=block_size,
        is_prefix_cached=is_prefix_cached,
        num_lookahead_tokens=0 if drafting is None else 1,
    )
    proposer = None
    if drafting is not None:
        drafter = CacheDrafter(controller.caches, block_size, drafting.drafts)
        config = SpeculativeConfig("mtp", drafting.num_speculative_tokens, adaptive=drafting.adaptive)
        proposer = Proposer(drafter, config, block_size=block_size)
    model = CacheModel(controller.caches, block_size)
    core = EngineCore(
        runner=model,
        cache=cache,
        limits=limits,
        eos_token_ids=eos_token_ids,
        swap_cost=SwapCost.of(controller),
        proposer=proposer,
        checks_integrity=True,
    )
    return core, model


def make_request(
    prompt: Sequence[int],
    max_tokens: int,
    *,
    params: SamplingParams | None = None,
    detokenizer: Detokenizer | None = None,
    random_key: tuple[int, int] = (0, 0),
) -> Request:
    return Request(
        request_id="0",
        index=0,
        prompt=None,
        prompt_token_ids=prompt,
        params=params or SamplingParams(temperature=0.0),
        max_tokens=max_tokens,
        random_key=random_key,
        detokenizer=detokenizer,
    )


def finish(core: EngineCore, *requests: Request, max_steps: int = 10_000) -> None:
    """Step until all are done."""
    for _ in range(max_steps):
        if all(request.finish_reason is not None for request in requests):
            return
        core.step()
    raise AssertionError(f"unfinished after {max_steps} steps")
