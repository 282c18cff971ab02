"""What goes wrong, as OpenAI's error object says it."""

from __future__ import annotations

from typing import Any, Literal

ErrorType = Literal["invalid_request_error", "server_error"]


class ApiError(Exception):
    """A request ends with an error.

    Attributes:
        status: HTTP status; 499 if there is nobody left to read it.
        body: OpenAI's error object.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: ErrorType = "invalid_request_error",  # noqa: A002 - the key's name
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        """Word an error.

        Args:
            status: HTTP status.
            message: For people.
            type: Whose fault it is.
            param: The parameter that is wrong.
            code: For programs.
        """
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"error": {"message": message, "type": type, "param": param, "code": code}}


def refused(error: ValueError, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400 for what the engine refuses; its messages begin with the name of the argument."""
    name, colon, _ = str(error).partition(":")
    return ApiError(400, str(error), param=param or (name if colon and name.isidentifier() else None), code=code)


def unknown_model(name: str, served: str) -> ApiError:
    message = f"model: {name!r} is not served here, {served!r} is"
    return ApiError(404, message, param="model", code="model_not_found")


def overloaded(num_sequences: int, capacity: int) -> ApiError:
    message = f"the queue is full: {capacity} sequences are running or waiting, no room for {num_sequences} more"
    return ApiError(503, message, type="server_error", code="overloaded")


def engine_failure(reason: str, *, is_final: bool) -> ApiError:
    """500 for a request that a failed step took with it; 503 for all that follow if the engine cannot go on."""
    return ApiError(503 if is_final else 500, f"the engine failed: {reason}", type="server_error", code="engine_error")


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", type="server_error", code="shutting_down")


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"not finished within {seconds:g} s", type="server_error", code="timeout")


def client_left() -> ApiError:
    return ApiError(499, "the client closed the connection", code="client_closed_request")
