"""What the bodies of requests may hold. Names are OpenAI's, and vLLM's for what this engine can do besides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fastdeploy_dsa.engine import SamplingParams
from fastdeploy_dsa.engine.prompts import PromptLike
from fastdeploy_dsa.engine.sampling_params import MAX_SEED
from fastdeploy_dsa.server.errors import ApiError, refused
from fastdeploy_dsa.wording import shown

MAX_LOGPROBS = 20
_MAX_CHOICES = 128
# The engine looks at these after every token, for all who wait for it.
MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 256

# Parameters that say nothing about the tokens.
_WITHOUT_EFFECT = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
}
# Parameters of OpenAI and vLLM that this server does not have, and what they may be all the same, besides null.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# Fields of a body that are fields of SamplingParams.
_SAMPLING = (
    "ignore_eos",
    "include_stop_str_in_output",
    "min_p",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "temperature",
    "top_k",
    "top_p",
)


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class GenerationBody(BaseModel, ABC):
    """What both endpoints take. Ranges are checked by SamplingParams; null is a parameter's default."""

    model_config = ConfigDict(strict=True, extra="allow")

    default_max_tokens: ClassVar[int | None]

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=_MAX_CHOICES)
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = Field(None, ge=-(2**63), le=MAX_SEED)
    stop: list[str] | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_is_short(cls, stop: object) -> object:
        if stop is None:
            return None
        strings = [stop] if isinstance(stop, str) else stop
        if not isinstance(strings, list) or not all(isinstance(text, str) and text for text in strings):
            raise ValueError(f"expected a string or a list of strings, none of them empty, got {shown(stop)}")
        if len(strings) > MAX_STOP_STRINGS:
            raise ValueError(f"expected at most {MAX_STOP_STRINGS} strings, got {len(strings)}")
        longest = max(map(len, strings), default=0)
        if longest > MAX_STOP_LENGTH:
            raise ValueError(f"expected strings of at most {MAX_STOP_LENGTH} characters, got one of {longest}")
        return strings

    @property
    def num_choices(self) -> int:
        """Continuations of each prompt."""
        return self.n or 1

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """As SamplingParams.logprobs."""

    @property
    def includes_usage(self) -> bool:
        """Whether a streamed answer ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Refuse what pydantic cannot see.

        Raises:
            ApiError: A parameter is unknown, not supported, or contradicts another one.
        """
        for name, value in (self.model_extra or {}).items():
            if name in _WITHOUT_EFFECT:
                continue
            if name not in _UNSUPPORTED:
                raise ApiError(400, f"{shown(name)}: unknown parameter", param=name, code="unknown_parameter")
            if value is not None and value not in _UNSUPPORTED[name]:
                message = f"{name}: not supported by this server, got {shown(value)}"
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: expected only with stream", param="stream_options")

    def sampling_params(self) -> list[SamplingParams]:
        """Of the choices of one prompt. Choice i of a request with a seed has seed + i, or all would be equal.

        Raises:
            ApiError: A value is out of its range.
        """
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        given["max_tokens"] = self.default_max_tokens if self.max_tokens is None else self.max_tokens
        given["logprobs"] = self.num_logprobs
        seeds = [None] * self.num_choices if self.seed is None else range(self.seed, self.seed + self.num_choices)
        try:
            return [
                SamplingParams(**given | {"seed": None if seed is None else seed & MAX_SEED})  # 64 bits of any sign
                for seed in seeds
            ]
        except ValueError as error:
            raise refused(error) from None


class CompletionBody(GenerationBody):
    """Of POST /v1/completions."""

    default_max_tokens = 16

    prompt: Any
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """As SamplingParams.logprobs."""
        return self.logprobs

    def prompts(self) -> list[PromptLike]:
        """One text, one list of token ids, or a list of such; the engine checks them further.

        Raises:
            ApiError: It is something else.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list) and prompt:
            if all(isinstance(part, (str, list)) for part in prompt):
                return prompt
            if not any(isinstance(part, (str, list)) for part in prompt):
                return [prompt]
        message = f"prompt: expected a text, token ids, or a list of texts or token ids, got {shown(prompt)}"
        raise ApiError(400, message, param="prompt")

    def check(self) -> None:
        """As GenerationBody says."""
        super().check()
        if self.best_of not in {None, self.num_choices}:
            raise ApiError(400, f"best_of: not supported other than n, got {self.best_of}", param="best_of")
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "logprobs: not supported together with echo", param="logprobs")


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None

    @field_validator("content")
    @classmethod
    def _is_text(cls, content: object) -> object:
        if content is None or isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise ValueError(f"expected text or a list of parts, got {shown(content)}")
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"expected parts of the type 'text' only, got {shown(part)}")
        return content

    def for_template(self) -> dict[str, str]:
        """Role and text; parts are joined by newlines, and a developer is the system to older templates."""
        role = "system" if self.role == "developer" else self.role
        content = self.content or ""
        return {
            "role": role,
            "content": content if isinstance(content, str) else "\n".join(p["text"] for p in content),
        }


class ChatBody(GenerationBody):
    """Of POST /v1/chat/completions."""

    default_max_tokens = None  # as many as fit

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """As SamplingParams.logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """As GenerationBody says."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: expected only with logprobs", param="top_logprobs")
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens  # the newer name
        for place, message in enumerate(self.messages):
            for name, value in (message.model_extra or {}).items():
                if value not in (None, [], {}) and name not in {"name", "annotations"}:
                    param = f"messages[{place}].{name}"
                    raise ApiError(400, f"{param}: not supported by this server, got {shown(value)}", param=param)


Body = TypeVar("Body", bound=GenerationBody)


def parse_body(content: bytes | bytearray, kind: type[Body]) -> Body:
    """A checked body.

    Raises:
        ApiError: It is not JSON, or a parameter is missing, wrong or not supported; the message names it.
    """
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        first: Mapping[str, Any] = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is not JSON: {first['msg']}", code="invalid_json") from None
        param = ".".join(map(str, first["loc"][:3]))  # what follows are the kinds a value could have been
        message = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] in {"missing", "value_error"} else f", got {shown(first['input'])}"
        raise ApiError(400, f"{param or 'the body'}: {message}{got}", param=param or None) from None
    body.check()
    return body
