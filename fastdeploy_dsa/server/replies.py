"""How answers are worded: OpenAI's objects, whole and in chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from time import time
from typing import Any
from uuid import uuid4

from fastdeploy_dsa.engine import RequestDelta
from fastdeploy_dsa.engine.outputs import Logprobs
from fastdeploy_dsa.engine.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass
class Choice:
    """What a sequence has brought so far.

    Attributes:
        text: Of all its deltas.
        token_ids: Of all its deltas.
        logprobs: One entry per token, if asked for.
        finish_reason: None while it goes on.
        num_cached_tokens: Prompt tokens that the cache had.
        num_characters: Of the texts of its tokens, one by one.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs = field(default_factory=list)
    finish_reason: str | None = None
    num_cached_tokens: int = 0
    num_characters: int = 0

    def extend(self, delta: RequestDelta) -> None:
        """Take a delta over."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        self.finish_reason = delta.finish_reason
        self.num_cached_tokens = delta.num_cached_tokens


class Reply(ABC):
    """The answer to one HTTP request; sequence i is choice i.

    Attributes:
        choices: One per sequence.
    """

    id_prefix: str
    name: str
    chunk_name: str

    def __init__(
        self,
        *,
        model: str,
        prompt_token_ids: list[list[int]],
        num_choices: int,
        tokenizer: Tokenizer | None,
        has_token_ids: bool,
        has_logprobs: bool,
        includes_usage: bool,
    ) -> None:
        """Begin an answer.

        Args:
            model: The name the model is served under.
            prompt_token_ids: One list per prompt.
            num_choices: Per prompt.
            tokenizer: For the texts of single tokens.
            has_token_ids: Whether they were asked for; without a tokenizer they are always there.
            has_logprobs: Whether they were asked for.
            includes_usage: Whether chunks say so.
        """
        self._model = model
        self._prompt_token_ids = prompt_token_ids
        self._num_choices = num_choices
        self._tokenizer = tokenizer
        self._has_token_ids = has_token_ids or tokenizer is None
        self._has_logprobs = has_logprobs
        self._includes_usage = includes_usage
        self._id = f"{self.id_prefix}-{uuid4().hex}"
        self._created = int(time())
        self.choices = [Choice() for _ in range(len(prompt_token_ids) * num_choices)]

    def whole(self) -> dict[str, Any]:
        """The answer, when every choice has ended."""
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(self.choices)]
        return self._object(self.name, choices) | {"usage": self._usage()}

    def first_chunks(self) -> Iterable[dict[str, Any]]:
        """What a streamed answer begins with."""
        return (self._chunk(part) for index in range(len(self.choices)) for part in self._first_parts(index))

    def chunk(self, delta: RequestDelta) -> dict[str, Any] | None:
        """What a delta adds; None if there is nothing to see."""
        choice = self.choices[delta.index]
        choice.extend(delta)
        is_seen = delta.text or delta.finish_reason is not None or delta.logprobs is not None or self._has_token_ids
        if not is_seen:
            return None
        return self._chunk(self._next_part(delta))

    def last_chunk(self) -> dict[str, Any] | None:
        """What a streamed answer ends with."""
        return self._object(self.chunk_name, []) | {"usage": self._usage()} if self._includes_usage else None

    @abstractmethod
    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]: ...

    @abstractmethod
    def _first_parts(self, index: int) -> list[dict[str, Any]]: ...

    @abstractmethod
    def _next_part(self, delta: RequestDelta) -> dict[str, Any]: ...

    def _chunk(self, part: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self._includes_usage else {}
        return self._object(self.chunk_name, [part]) | usage

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": name, "created": self._created, "model": self._model, "choices": choices}

    def _usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self._prompt_token_ids))
        completion = sum(len(choice.token_ids) for choice in self.choices)
        # The other choices of a prompt find all of it; a prompt counts once.
        cached = sum(choice.num_cached_tokens for choice in self.choices[:: self._num_choices])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _prompt_ids(self, index: int) -> dict[str, list[int]]:
        """The prompt of a choice, under FastDeploy's name."""
        if not self._has_token_ids:
            return {}
        return {"prompt_token_ids": self._prompt_token_ids[index // self._num_choices]}

    def _completion_ids(self, token_ids: list[int]) -> dict[str, list[int]]:
        return {"completion_token_ids": token_ids} if self._has_token_ids else {}

    def _token_text(self, token: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode([token], skip_special_tokens=False)


class CompletionReply(Reply):
    """Of POST /v1/completions."""

    id_prefix, name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, *, echoed: list[str], **common: Any) -> None:
        """Begin an answer.

        Args:
            echoed: What the text of each prompt's choices begins with; "" without echo.
            common: As Reply says.
        """
        super().__init__(**common)
        self._echoed = [text for text in echoed for _ in range(self._num_choices)]

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text = self._echoed[index] + choice.text
        logprobs = self._logprobs(choice, choice.token_ids, choice.logprobs)
        ids = self._prompt_ids(index) | self._completion_ids(choice.token_ids)
        return self._part(index, text, logprobs, choice.finish_reason) | ids

    def _first_parts(self, index: int) -> list[dict[str, Any]]:
        if not self._echoed[index] and not self._has_token_ids:
            return []
        return [self._part(index, self._echoed[index], None, None) | self._prompt_ids(index)]

    def _next_part(self, delta: RequestDelta) -> dict[str, Any]:
        logprobs = self._logprobs(self.choices[delta.index], delta.token_ids, delta.logprobs or [])
        part = self._part(delta.index, delta.text, logprobs, delta.finish_reason)
        return part | self._completion_ids(delta.token_ids)

    @staticmethod
    def _part(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, choice: Choice, token_ids: list[int], logprobs: Logprobs) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        texts = [self._token_text(token) for token in token_ids]
        offsets = []
        for text in texts:
            offsets.append(choice.num_characters)
            choice.num_characters += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [
                _finite(entry[token].logprob) for token, entry in zip(token_ids, logprobs, strict=True)
            ],
            # Most likely last, so that of tokens with the same text that one stays.
            "top_logprobs": [
                {self._token_text(token): _finite(found.logprob) for token, found in reversed(entry.items())}
                for entry in logprobs
            ],
            "text_offset": offsets,
        }


class ChatReply(Reply):
    """Of POST /v1/chat/completions."""

    id_prefix, name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *, num_top_logprobs: int, **common: Any) -> None:
        """Begin an answer.

        Args:
            num_top_logprobs: Tokens that each place lists besides its own.
            common: As Reply says.
        """
        super().__init__(**common)
        self._num_top_logprobs = num_top_logprobs

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        ids = self._prompt_ids(index) | self._completion_ids(choice.token_ids)
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None, **ids},
            "logprobs": self._logprobs(choice.token_ids, choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def _first_parts(self, index: int) -> list[dict[str, Any]]:
        return [self._part(index, {"role": "assistant", "content": "", **self._prompt_ids(index)}, None, None)]

    def _next_part(self, delta: RequestDelta) -> dict[str, Any]:
        logprobs = self._logprobs(delta.token_ids, delta.logprobs or [])
        content: dict[str, Any] = {"content": delta.text} if delta.text else {}
        return self._part(delta.index, content | self._completion_ids(delta.token_ids), logprobs, delta.finish_reason)

    @staticmethod
    def _part(
        index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, token_ids: list[int], logprobs: Logprobs) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        content = [
            self._token(token, entry[token].logprob)
            | {
                "top_logprobs": [
                    self._token(other, found.logprob)
                    for other, found in entry.items()
                    if found.rank <= self._num_top_logprobs
                ]
            }
            for token, entry in zip(token_ids, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        # A token that is not whole characters has no text of its own, and its bytes are not told by the tokenizer.
        is_whole = _REPLACEMENT not in text
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if is_whole else None}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
