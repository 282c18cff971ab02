"""From options to a running server, and its end."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import time
from typing import Any

import uvicorn

from fastdeploy_dsa.engine import LLM
from fastdeploy_dsa.engine.validation import require_int, require_number
from fastdeploy_dsa.server.app import ServedModel, make_app
from fastdeploy_dsa.server.chat_template import load_chat_template
from fastdeploy_dsa.server.engine_thread import EngineThread

# How long what runs may go on after SIGINT or SIGTERM, and how long the errors of what has not ended may take to send.
_SECONDS_TO_END = 5
_SECONDS_TO_TELL = 5
_BACKLOG = 2048


@dataclass(frozen=True)
class ServerOptions:
    """Of the server; those of the LLM stand apart.

    Attributes:
        host: Address to listen on.
        port: 0: any that is free.
        served_model_name: What clients call the model; None: the name of its folder.
        chat_template: A file to use instead of the model's own template.
        max_waiting: Sequences that may wait besides those that run; more are refused with 503.
        request_timeout: Seconds a request may take; None: as long as it takes.

    Raises:
        ValueError: A value is out of its range; the message names it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    chat_template: Path | None = None
    max_waiting: int = 512
    request_timeout: float | None = None

    def __post_init__(self) -> None:
        require_int("port", self.port, low=0, high=65535)
        require_int("max_waiting", self.max_waiting, low=0)
        if self.request_timeout is not None:
            require_number("request_timeout", self.request_timeout, low=0, high=float("inf"), low_is_allowed=False)
        if self.served_model_name == "":
            raise ValueError("served_model_name: expected a name, got an empty one")


class _HttpServer(uvicorn.Server):
    """Tells clients that the end has come; uvicorn would close their connections without a word."""

    def __init__(self, config: uvicorn.Config, engine: EngineThread) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn.Server says."""
        ending = asyncio.create_task(self._end_answers())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(_SECONDS_TO_END)
        await asyncio.to_thread(self._engine.stop)


class Server:
    """A model on a port. `run` serves until SIGINT, SIGTERM or `stop`."""

    def __init__(self, model: Path, options: ServerOptions, **llm_options: Any) -> None:
        """Take the port and load the model.

        Args:
            model: The model's folder.
            options: Of the server.
            llm_options: As LLM says.

        Raises:
            ValueError: The folder or an option is refused.
            OSError: The address cannot be used.
        """
        chat_template = load_chat_template(model, options.chat_template)
        self._socket = _listen(options.host, options.port)
        try:
            self.engine = EngineThread(
                partial(LLM, model, **llm_options), max_waiting=options.max_waiting, timeout=options.request_timeout
            )
            name = options.served_model_name or model.resolve().name
            served = ServedModel(name, self.engine.start(), chat_template, int(time()))
        except BaseException:
            self._socket.close()
            raise
        config = uvicorn.Config(
            make_app(self.engine, served),
            log_config=None,
            log_level="warning",
            access_log=False,
            backlog=_BACKLOG,
            lifespan="on",
            timeout_graceful_shutdown=_SECONDS_TO_END + _SECONDS_TO_TELL,
        )
        self._server = _HttpServer(config, self.engine)

    @property
    def url(self) -> str:
        """Where OpenAI's clients find it."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def run(self) -> None:
        """Serve; the engine has ended when this returns."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.engine.stop()

    def stop(self) -> None:
        """Let `run` return; any thread may call it."""
        self._server.should_exit = True


def serve(model: Path, options: ServerOptions, **llm_options: Any) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Args, Raises: as Server.
    """
    server = Server(model, options, **llm_options)
    # What goes wrong in an answer is logged, and nothing else is.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.stderr.write(f"serving {model} at {server.url}\n")
    server.run()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; a client that comes before the model is loaded waits."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return bound
