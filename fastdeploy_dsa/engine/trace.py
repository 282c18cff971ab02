"""Logits and selections of one prompt, for comparing implementations; runs through the engine's own runner."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from cache_manager import WindowRoom
from fastdeploy_dsa.cache_plan import default_block_size
from fastdeploy_dsa.device import CPU, use_device
from fastdeploy_dsa.engine.loading import CacheOptions, LoadedModel, load_runner, read_cache_dtype, read_model_config
from fastdeploy_dsa.engine.prompts import check_token_ids
from fastdeploy_dsa.engine.sampler import NonFiniteLogitsError
from fastdeploy_dsa.engine.step_inputs import StepInputs
from fastdeploy_dsa.engine.validation import require_int
from fastdeploy_dsa.ops import IndexSelection


@dataclass(frozen=True)
class Trace:
    """T prompt tokens and N greedy decode steps.

    Attributes:
        logits_prompt: [T, vocab_size] float32.
        decode_ids: [N + 1] int64; the first follows the prompt, the last is not fed.
        logits_decode: [N, vocab_size] float32, row j after feeding decode_ids[j].
        topk: By layer that selects by itself, [T + N, index_topk] int32 positions, ascending, -1 padded.
    """

    logits_prompt: npt.NDArray[np.float32]
    decode_ids: npt.NDArray[np.int64]
    logits_decode: npt.NDArray[np.float32]
    topk: Mapping[int, npt.NDArray[np.int32]]

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """By their names in a file."""
        return {
            "logits_prompt": self.logits_prompt,
            "decode_ids": self.decode_ids,
            "logits_decode": self.logits_decode,
            **{f"topk.{layer}": rows for layer, rows in self.topk.items()},
        }

    def save(self, path: Path) -> None:
        """Write a safetensors file.

        Raises:
            OSError: As writing raises it.
        """
        path.write_bytes(save({name: np.ascontiguousarray(array) for name, array in self.tensors().items()}))


class _Tracer:
    """Feeds one request's tokens in order and collects what the layers selected."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Give the request all blocks: no window moves on."""
        self._runner = loaded.runner
        self._block_table = _all_blocks(loaded.num_blocks)
        counts = loaded.cache_controller.window_blocks
        self._window_tables = {pool: _all_blocks(count) for pool, count in counts.items()}
        self._selected: dict[int, list[npt.NDArray[np.int32]]] = {}
        self._num_fed = 0

    def feed(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits of every token.

        Raises:
            NonFiniteLogitsError: A logit is NaN or infinite.
        """
        count = len(token_ids)
        inputs = StepInputs(
            token_ids=token_ids,
            positions=np.arange(self._num_fed, self._num_fed + count, dtype=np.int32),
            request_ids=np.zeros(count, np.int32),
            block_table=self._block_table,
            logits_rows=np.arange(count),
            window_tables=self._window_tables,
        )
        logits = self._runner.run(inputs, on_selection=self._collect).logits
        finite = np.isfinite(logits).all(axis=1)
        if not finite.all():
            position = self._num_fed + int(finite.argmin())
            raise NonFiniteLogitsError(f"the model's logits at position {position} are not all finite")
        self._num_fed += count
        return logits

    def topk(self) -> dict[int, npt.NDArray[np.int32]]:
        return {layer: np.concatenate(pieces) for layer, pieces in self._selected.items()}

    def _collect(self, layer: int, selection: IndexSelection) -> None:
        self._selected.setdefault(layer, []).append(selection.positions.numpy())


def _all_blocks(num_blocks: int) -> npt.NDArray[np.int32]:
    return np.arange(num_blocks, dtype=np.int32)[None]


def trace(
    model: str | Path,
    token_ids: Sequence[int],
    *,
    device: str = CPU,
    cache_dtype: str = "auto",
    chunk_size: int | None = None,
    steps: int = 0,
    num_threads: int = 0,
    hf_overrides: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Trace:
    """Run a prompt and then greedy decode steps.

    Args:
        model: A model folder.
        token_ids: The prompt.
        device: As LLM.
        cache_dtype: As LLM.
        chunk_size: Prompt tokens of a step; None: all.
        steps: Decode steps.
        num_threads: As LLM.
        hf_overrides: As LLM.
        progress: As LLM.

    Raises:
        ValueError: An argument or the model is refused.
        NonFiniteLogitsError: A logit is NaN or infinite.
    """
    device = use_device(device)
    cache_format = read_cache_dtype(cache_dtype, device)
    chunk = None if chunk_size is None else require_int("chunk_size", chunk_size, low=1)
    require_int("steps", steps, low=0)
    folder = Path(model)
    config = read_model_config(folder, hf_overrides)
    prompt = check_token_ids("token_ids", token_ids, vocab_size=config.vocab_size)
    length = len(prompt) + steps
    if length > config.max_position_embeddings:
        raise ValueError(
            f"token_ids: expected at most max_position_embeddings ({config.max_position_embeddings}) "
            f"tokens and steps, got {len(prompt)} + {steps}"
        )
    block_size = default_block_size(config)
    options = CacheOptions(
        cache_dtype=cache_format,
        block_size=block_size,
        num_threads=require_int("num_threads", num_threads, low=0),
        device=device,
        num_blocks=-(-length // block_size),
        room=WindowRoom(num_requests=1, num_step_tokens=length, has_snapshots=False),
    )
    loaded = load_runner(folder, config=config, options=options, progress=progress)
    tracer = _Tracer(loaded)
    chunk = chunk or len(prompt)
    pieces = [tracer.feed(prompt[begin : begin + chunk]) for begin in range(0, len(prompt), chunk)]
    prompt_logits = np.concatenate(pieces)
    decode_ids = [int(prompt_logits[-1].argmax())]  # the first of equals is the smallest id, as in the sampler
    decode_logits = np.empty((steps, config.vocab_size), np.float32)
    for step in range(steps):
        decode_logits[step] = tracer.feed(np.array(decode_ids[-1:], np.int64))[0]
        decode_ids.append(int(decode_logits[step].argmax()))
    return Trace(prompt_logits, np.array(decode_ids, np.int64), decode_logits, tracer.topk())


def read_token_ids(path: Path) -> list[int]:
    """A JSON file that holds one list of token ids; their range is checked by `trace`.

    Raises:
        ValueError: It does not exist or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: expected a JSON list of token ids, got {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON list of token ids, got a file that is not JSON: {error}") from None
    if not isinstance(content, list) or not content:
        shown = "an empty list" if content == [] else type(content).__name__
        raise ValueError(f"{path}: expected a list of at least one token id, got {shown}")
    for place, value in enumerate(content):
        require_int(f"{path}: place {place}", value, low=0, noun="a token id")
    return content


def check_save_path(path: Path) -> None:
    """Find out before the work whether its result can be written.

    Raises:
        ValueError: It cannot.
    """
    try:
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be written, got {error.strerror}") from None
