"""The routes: from a body to an answer, and from an error to OpenAI's error object."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fastdeploy_dsa.engine import LLM
from fastdeploy_dsa.engine.prompts import Prompt, PromptLike, PromptTooLongError
from fastdeploy_dsa.server import metrics
from fastdeploy_dsa.server.chat_template import ChatTemplate
from fastdeploy_dsa.server.engine_thread import EngineThread, Generation
from fastdeploy_dsa.server.errors import ApiError, client_left, engine_failure, refused, unknown_model
from fastdeploy_dsa.server.protocol import Body, ChatBody, CompletionBody, GenerationBody, parse_body
from fastdeploy_dsa.server.replies import ChatReply, CompletionReply, Reply

MAX_BODY_BYTES = 32 << 20

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """What the routes need besides the engine.

    Attributes:
        name: What clients call the model.
        llm: Only its methods that any thread may use.
        chat_template: None if the model has none.
        created: Unix time.
    """

    name: str
    llm: LLM
    chat_template: ChatTemplate | None
    created: int

    def card(self) -> dict[str, Any]:
        """An entry of GET /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "fastdeploy_dsa",
            "max_model_len": self.llm.max_model_len,
        }


def make_app(engine: EngineThread, model: ServedModel) -> Starlette:
    """The server's application; it stops the engine when it ends.

    Args:
        engine: Started.
        model: Served by it.
    """
    endpoints = _Endpoints(engine, model)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.stop)

    return Starlette(
        routes=[
            Route("/health", endpoints.health),
            Route("/metrics", endpoints.metrics),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.one_model),
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
            Route("/v1/chat/completions", endpoints.chat_completions, methods=["POST"]),
        ],
        exception_handlers={
            ApiError: _answer_api_error,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_disconnect,
            Exception: _answer_bug,
        },
        lifespan=lifespan,
    )


class _Endpoints:
    """One method per route."""

    def __init__(self, engine: EngineThread, model: ServedModel) -> None:
        self._engine = engine
        self._model = model

    async def health(self, _request: Request) -> Response:
        if self._engine.failure:
            return JSONResponse({"status": "unhealthy", "reason": self._engine.failure}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, _request: Request) -> Response:
        content = metrics.exposition(await self._engine.statistics())
        return Response(content, media_type=metrics.MEDIA_TYPE)

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model.card()]})

    async def one_model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model.card())

    async def completions(self, request: Request) -> Response:
        body = await self._read(request, CompletionBody)
        prompts = await self._encode(body.prompts(), param="prompt")
        echoed = [self._text_of(prompt) if body.echo else "" for prompt in prompts]
        reply = CompletionReply(echoed=echoed, **self._common(body, prompts))
        return await self._answer(request, body, prompts, reply)

    async def chat_completions(self, request: Request) -> Response:
        body = await self._read(request, ChatBody)
        template = self._model.chat_template
        if template is None:
            message = f"messages: {self._model.name!r} has no chat template; the server takes one with --chat-template"
            raise ApiError(400, message, param="messages", code="no_chat_template")
        messages = [message.for_template() for message in body.messages]
        try:
            text = await asyncio.to_thread(template.render, messages, body.chat_template_kwargs or {})
        except ValueError as error:
            raise refused(error) from None
        prompts = await self._encode([text], param="messages", add_special_tokens=False)
        reply = ChatReply(num_top_logprobs=body.top_logprobs or 0, **self._common(body, prompts))
        return await self._answer(request, body, prompts, reply)

    async def _read(self, request: Request, kind: type[Body]) -> Body:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > MAX_BODY_BYTES:
                raise ApiError(413, f"the body: expected at most {MAX_BODY_BYTES} bytes", code="body_too_large")
        body = parse_body(content, kind)
        self._check_name(body.model)
        return body

    def _check_name(self, name: str) -> None:
        if name != self._model.name:
            raise unknown_model(name, self._model.name)

    async def _encode(
        self, prompts: Sequence[PromptLike], *, param: str, add_special_tokens: bool = True
    ) -> list[Prompt]:
        try:
            return await asyncio.to_thread(self._model.llm.read, prompts, add_special_tokens=add_special_tokens)
        except PromptTooLongError as error:
            raise refused(error, param=param, code="context_length_exceeded") from None
        except ValueError as error:
            raise refused(error, param=param) from None

    def _text_of(self, prompt: Prompt) -> str:
        tokenizer = self._model.llm.tokenizer
        if prompt.text is not None or tokenizer is None:
            return prompt.text or ""
        return tokenizer.decode(prompt.token_ids.tolist())

    def _common(self, body: GenerationBody, prompts: Sequence[Prompt]) -> dict[str, Any]:
        return {
            "model": self._model.name,
            "prompt_token_ids": [prompt.token_ids.tolist() for prompt in prompts],
            "num_choices": body.num_choices,
            "tokenizer": self._model.llm.tokenizer,
            "has_token_ids": bool(body.return_token_ids),
            "has_logprobs": body.num_logprobs is not None,
            "includes_usage": body.includes_usage,
        }

    async def _answer(
        self, request: Request, body: GenerationBody, prompts: Sequence[Prompt], reply: Reply
    ) -> Response:
        if len(reply.choices) > self._engine.capacity:
            message = f"n: expected at most {self._engine.capacity} sequences in a request, got {len(reply.choices)}"
            raise ApiError(400, message, param="n")
        params = body.sampling_params()
        sequences = [prompt for prompt in prompts for _ in params]
        generation = await self._engine.submit(sequences, params * len(prompts))
        if body.stream:
            return _EventStream(self._engine, generation, reply)
        watcher = asyncio.create_task(_end_when_the_client_leaves(request, generation))
        try:
            async for delta in generation.deltas():
                reply.choices[delta.index].extend(delta)
        finally:
            watcher.cancel()
            self._engine.close(generation)
        return JSONResponse(reply.whole())


async def _end_when_the_client_leaves(request: Request, generation: Generation) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    generation.put(client_left())


class _EventStream(StreamingResponse):
    """Server-sent events; however it ends, the generation is closed."""

    def __init__(self, engine: EngineThread, generation: Generation, reply: Reply) -> None:
        super().__init__(_events(generation, reply), media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self._engine = engine
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._engine.close(self._generation)


async def _events(generation: Generation, reply: Reply) -> AsyncIterator[bytes]:
    for chunk in reply.first_chunks():
        yield _event(chunk)
    try:
        async for delta in generation.deltas():
            if (chunk_or_none := reply.chunk(delta)) is not None:
                yield _event(chunk_or_none)
    except ApiError as error:
        # The status is sent; a stream without [DONE] is not complete.
        yield _event(error.body)
        return
    if (last := reply.last_chunk()) is not None:
        yield _event(last)
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n".encode()


async def _answer_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101 - Starlette's table of handlers knows no types
    headers = {"retry-after": "1"} if error.status == 503 else None
    return JSONResponse(error.body, error.status, headers=headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)  # noqa: S101 - as above
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, headers=error.headers)


async def _answer_disconnect(_request: Request, _error: Exception) -> Response:
    return PlainTextResponse("", client_left().status)  # nobody reads it


async def _answer_bug(_request: Request, error: Exception) -> Response:
    """Ours; the caller of this handler logs it."""
    body = engine_failure(f"{type(error).__name__}: {error}", is_final=False).body
    return JSONResponse(body, 500)
