"""What a user passes as prompts, checked and as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastdeploy_dsa.engine.tokenizer import Tokenizer
from fastdeploy_dsa.engine.validation import require_int


class Prompt(NamedTuple):
    """A checked prompt; text is None if it came as token ids."""

    text: str | None
    token_ids: npt.NDArray[np.int64]


PromptLike = str | Sequence[int] | Prompt


class PromptTooLongError(ValueError):
    """A prompt leaves no room for a token within max_model_len."""


class PromptReader:
    """Turns prompts into token ids of one model."""

    def __init__(
        self, tokenizer: Tokenizer | None, no_tokenizer_reason: str, *, vocab_size: int, max_model_len: int
    ) -> None:
        """Keep what prompts are checked against.

        Args:
            tokenizer: The model's, if it has one.
            no_tokenizer_reason: Why it has none.
            vocab_size: Of the model.
            max_model_len: Tokens of a request, prompt and continuation.
        """
        self._tokenizer = tokenizer
        self._no_tokenizer_reason = no_tokenizer_reason
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len

    def read(self, prompts: str | Sequence[PromptLike], *, add_special_tokens: bool = True) -> list[Prompt]:
        """Check all prompts; any thread may call it.

        Args:
            prompts: Texts, token ids, and what an earlier call has returned, which is not checked again.
            add_special_tokens: Whether texts get the special tokens that the model expects around a prompt.

        Raises:
            ValueError: One is neither text nor token ids, is empty, too long (PromptTooLongError) or has ids outside
                the vocabulary; the message names it.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, (Sequence, np.ndarray)):
            raise ValueError(f"prompts: expected a string or a sequence of prompts, got {type(prompts).__name__}")
        names = (f"prompts[{index}]" for index in range(len(prompts)))
        return [
            prompt if isinstance(prompt, Prompt) else self._read_one(name, prompt, add_special_tokens)
            for name, prompt in zip(names, prompts, strict=True)
        ]

    def _read_one(self, name: str, prompt: object, add_special_tokens: bool) -> Prompt:
        if isinstance(prompt, str):
            text, token_ids = prompt, self._encode(name, prompt, add_special_tokens)
        elif isinstance(prompt, (Sequence, np.ndarray)) and not isinstance(prompt, (bytes, bytearray)):
            text, token_ids = None, check_token_ids(name, prompt, vocab_size=self._vocab_size)
        else:
            hint = (
                "; token ids of one prompt go into a list of their own"
                if isinstance(prompt, (int, np.integer))
                else ""
            )
            raise ValueError(f"{name}: expected text or a sequence of token ids, got {prompt!r}{hint}")
        if len(token_ids) >= self._max_model_len:
            raise PromptTooLongError(
                f"{name}: expected at most {self._max_model_len - 1} tokens, one less than max_model_len, "
                f"got {len(token_ids)}"
            )
        return Prompt(text, token_ids)

    def _encode(self, name: str, text: str, add_special_tokens: bool) -> npt.NDArray[np.int64]:
        if self._tokenizer is None:
            raise ValueError(f"{name}: expected token ids, got text, and {self._no_tokenizer_reason}")
        if not text:
            raise ValueError(f"{name}: expected text or token ids, got an empty prompt")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: expected Unicode text, got {text[error.start]!r} at {error.start}") from None
        try:
            token_ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return check_token_ids(name, token_ids, vocab_size=self._vocab_size)


def check_token_ids(name: str, values: Sequence[Any] | npt.NDArray[Any], *, vocab_size: int) -> npt.NDArray[np.int64]:
    """Token ids as [T] int64.

    Raises:
        ValueError: There is none, one is not an int (a bool is not) or not of 0 .. vocab_size - 1.
    """
    if len(values) == 0:
        raise ValueError(f"{name}: expected at least one token id, got an empty sequence")
    token_ids = [
        require_int(f"{name}[{place}]", value, low=0, high=vocab_size - 1, noun="a token id")
        for place, value in enumerate(values)
    ]
    return np.array(token_ids, np.int64)
