"""What a request asks of its continuation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastdeploy_dsa.engine.validation import require_bool, require_int, require_number

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends. Names and defaults are vLLM's.

    Attributes:
        max_tokens: Tokens to generate at most; None: as many as the model's length and the cache allow.
        temperature: 0 takes the most likely token (ties: the smallest id); else logits are divided by it.
        top_k: Keep the k most likely tokens (ties: smaller ids first); 0 or -1 keeps all.
        top_p: Keep the fewest most likely tokens whose probabilities sum to top_p or more, in (0, 1].
        min_p: Keep tokens whose probability is at least min_p times the largest, in [0, 1]; applied before top_k.
        seed: Equal seeds give equal tokens, whatever else runs; None: derived from the engine's seed and the number of
            the request.
        stop: Strings that end the text; the text stops before the first of them.
        stop_token_ids: Tokens that end the request, besides the model's end tokens.
        ignore_eos: Go on after the model's end tokens.
        logprobs: For every token, the log-probabilities of this many most likely tokens and of the token itself,
            before temperature and filters; None: none.
        include_stop_str_in_output: Leave the stop string, or the text of the stop token, in the text.
        skip_special_tokens: Leave special tokens out of the text.

    Raises:
        ValueError: A value is out of its range; the message names it.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        normal = {
            "max_tokens": None if self.max_tokens is None else require_int("max_tokens", self.max_tokens, low=1),
            "temperature": require_number("temperature", self.temperature, low=0.0, high=float("inf")),
            "top_k": max(0, require_int("top_k", self.top_k, low=-1)),
            "top_p": require_number("top_p", self.top_p, low=0.0, high=1.0, low_is_allowed=False),
            "min_p": require_number("min_p", self.min_p, low=0.0, high=1.0),
            "seed": None if self.seed is None else require_int("seed", self.seed, low=0, high=MAX_SEED),
            "stop": _stop_strings(self.stop),
            "stop_token_ids": _stop_token_ids(self.stop_token_ids),
            "logprobs": None if self.logprobs is None else require_int("logprobs", self.logprobs, low=0),
        }
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            require_bool(name, getattr(self, name))
        for name, value in normal.items():
            object.__setattr__(self, name, value)


def _stop_strings(value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(text, str) and text for text in strings):
        raise ValueError(f"stop: expected a string or strings, none of them empty, got {value!r}")
    return tuple(strings)


def _stop_token_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ValueError(f"stop_token_ids: expected a sequence of token ids, got {value!r}")
    return tuple(require_int("stop_token_ids", token, low=0) for token in value)
