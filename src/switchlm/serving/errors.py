"""Errors as responses in the format of the OpenAI API, without internals of the program."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from switchlm.errors import ConfigError, DataError, UserError
from switchlm.serving.requests import RequestError

SERVED = "POST /v1/completions, /v1/fill or /v1/route, or GET /v1/models"
MOST_SHOWN = 80  # characters of an address


def error_body(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: Any = None
) -> dict[str, Any]:
    """Return an error in the format of the OpenAI API."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def add_error_handlers(app: FastAPI) -> None:
    """Return every error of the application in that format."""

    def respond(
        status: int, message: str, *, param: str | None = None, headers: Any = None
    ) -> JSONResponse:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return JSONResponse(error_body(message, kind, param, status), status, headers=headers)

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> JSONResponse:
        # A damaged checkpoint is no mistake of the client.
        status = 400 if isinstance(error, DataError | ConfigError) else 500
        return respond(status, str(error))

    @app.exception_handler(RequestError)
    async def failed(_: Request, error: RequestError) -> JSONResponse:
        return respond(error.status, str(error), param=error.param, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def known(request: Request, error: HTTPException) -> JSONResponse:
        return respond(error.status_code, _explain(request, error), headers=error.headers)

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return respond(500, f"The server failed at this request: {type(error).__name__}.")


def _explain(request: Request, error: HTTPException) -> str:
    """Return what an error of the framework means, which for most clients is a wrong address."""
    address = ascii(request.scope["path"][:MOST_SHOWN])[1:-1]
    if error.status_code == 404:
        return f"There is no {address} here, and no chat: use {SERVED}."
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"{address} does not take {request.method[:MOST_SHOWN]}: use {allowed}."
    return str(error.detail)
