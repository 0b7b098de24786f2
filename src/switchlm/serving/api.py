"""The HTTP interface: OpenAI's completions, filling of blanks, routing, and the page.

All computation is in the engine's thread or in others, never in the event loop.
"""

import asyncio
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route as FixedRoute

from switchlm import __version__
from switchlm.errors import DataError, UserError
from switchlm.generation.answer import TOKENS_PER_BLANK, count_blanks, put_into_blanks, read_spans
from switchlm.generation.decode import check_vocabulary
from switchlm.generation.route import route
from switchlm.generation.sampling import seeds_from
from switchlm.serving.engine import Engine, EventBridge, events
from switchlm.serving.middleware import App, Guard, error_body, page_files
from switchlm.serving.requests import (
    Completion,
    Fill,
    Generation,
    Numbered,
    Output,
    RequestError,
    Route,
    collect,
)
from switchlm.serving.requests import Request as EngineRequest
from switchlm.serving.statistics import CONTENT_TYPE

Result = TypeVar("Result")
Chunks = AsyncGenerator[dict[str, Any], None]
DEFAULT_TOKENS = 64


def create_app(
    engine: Engine,
    *,
    name: str,
    key: str | None = None,
    report: str | None = None,
    seconds: float | None = None,
    default_tokens: int | None = None,
) -> App:
    """Return the ASGI application for a started engine.

    name: of the model.
    key: the API key, needed for all routes but /health and the files of the page; None: no key.
    report: the HTML of the run's report.
    seconds: how long a request may take.
    default_tokens: the longest output of requests that give none.
    """
    interface = _Interface(engine, name, report, seconds, default_tokens or DEFAULT_TOKENS)
    app = FastAPI(
        title="switchlm",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        routes=[
            FixedRoute(address, file, methods=["GET"])
            for address, file in page_files(report).items()
        ],
    )
    app.get("/health")(interface.health)
    app.get("/metrics")(interface.metrics)
    app.get("/v1/models")(interface.models)
    app.post("/v1/completions", response_model=None)(interface.completions)
    app.post("/v1/fill", response_model=None)(interface.fill)
    app.post("/v1/route")(interface.route)
    _add_error_handlers(app)
    return Guard(app, key=key, count=engine.statistics.count_response)


class _Interface:
    """The routes of one engine."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        report: str | None,
        seconds: float | None,
        default_tokens: int,
    ) -> None:
        self._engine, self._name, self._seconds = engine, name, seconds
        self._default_tokens = default_tokens
        self._has_report = report is not None
        self._created = int(time.time())
        self._bridge: EventBridge | None = None

    async def health(self) -> Response:
        if not self._engine.is_alive:
            return JSONResponse({"status": "the engine has ended"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self) -> Response:
        engine = self._engine
        gauges = {
            "switchlm_waiting_requests": ("Requests in the queue.", engine.num_waiting),
            "switchlm_active_requests": ("Requests in slots.", engine.num_active),
            "switchlm_slots": ("Slots.", engine.num_slots),
        }
        return PlainTextResponse(engine.statistics.text(gauges), media_type=CONTENT_TYPE)

    async def models(self) -> dict[str, Any]:
        engine = self._engine
        model = {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "switchlm",
            "num_experts": engine.model.config.num_experts,
            "capacity": "dropless",
            "max_input_tokens": engine.max_source - 1,
            "max_output_tokens": engine.max_target,
            "report": self._has_report,
        }
        return {"object": "list", "data": [model]}

    async def completions(self, body: Completion, request: Request) -> Response:
        self._check_model(body.model)
        requests = await self._parse(body, body.prompts, self._default_tokens, copies=body.n)
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._name,
        }
        prompt_tokens = sum(len(one.ids) for one in requests[:: body.n])
        event_stream = self._events(requests)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            chunks = _chunks(event_stream, head, len(requests), prompt_tokens, usage)
            return await _stream(request, chunks)
        outputs = await _until_disconnect(request, collect(event_stream, len(requests)))
        choices = [
            _choice(place, output.text, output.reason) for place, output in enumerate(outputs)
        ]
        return JSONResponse({**head, "choices": choices, "usage": _usage(prompt_tokens, outputs)})

    async def fill(self, body: Fill, request: Request) -> Response:
        self._check_model(body.model)
        blanks = count_blanks(body.text, self._engine.tokenizer)
        (prompt,) = await self._parse(body, [body.text], TOKENS_PER_BLANK * blanks)
        event_stream = self._events([prompt])

        def result(output: Output) -> dict[str, Any]:
            spans = read_spans(output.tokens, self._engine.tokenizer, len(output.text))
            return {
                "text": body.text,
                "filled": put_into_blanks(body.text, spans),
                "output": output.text,
                "spans": {str(number): span for number, span in spans.items()},
                "finished": output.reason == "stop",
                "usage": _usage(len(prompt.ids), [output]),
            }

        if body.stream:
            return await _stream(request, _outputs(event_stream, result))
        (output,) = await _until_disconnect(request, collect(event_stream, 1))
        return JSONResponse(result(output))

    async def route(self, body: Route, request: Request) -> dict[str, Any]:
        self._check_model(body.model)
        engine = self._engine

        def check() -> None:
            self._prompt(body.text)
            if body.output and len(engine.tokenizer.encode(body.output)) >= engine.max_target:
                raise DataError(f"The output may have {engine.max_target - 1:,} tokens at most.")

        await asyncio.to_thread(check)
        future = engine.call(
            lambda: route(
                engine.model,
                engine.tokenizer,
                body.text,
                body.output,
                max_new_tokens=min(self._default_tokens, engine.max_target),
                enforce_capacity=body.enforce_capacity,
            )
        )
        found = await _until_disconnect(request, asyncio.wrap_future(future))
        return {"model": self._name, **dataclasses.asdict(found)}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._name:
            raise HTTPException(404, f"There is no model {name!r} here, only {self._name!r}.")

    async def _parse(
        self, body: Generation, prompts: Sequence[str], default_limit: int, copies: int = 1
    ) -> list[EngineRequest]:
        """Tokenize the prompts, outside of the event loop; `copies` of each, with different seeds.

        Raises DataError for a prompt that is empty or too long, and for too many tokens or outputs.
        """
        queue, max_tokens = self._engine.queue, self._engine.max_target
        if len(prompts) * copies > queue:
            raise DataError(
                f"The request is for {len(prompts) * copies} outputs, but the server's queue "
                f"takes {queue}: send fewer prompts at a time, or a smaller n."
            )
        limit = body.max_tokens or min(default_limit, max_tokens)
        if limit > max_tokens:
            raise DataError(
                f"max_tokens is {limit:,}, but this server generates at most {max_tokens:,}."
            )
        encoded = await asyncio.to_thread(lambda: [self._prompt(text) for text in prompts])
        each = [ids for ids in encoded for _ in range(copies)]
        return [
            EngineRequest(
                ids=ids,
                limit=limit,
                sampling=body.sampling,
                seed=seed,
                stops=body.stops,
                seconds=self._seconds,
            )
            for ids, seed in zip(each, seeds_from(body.seed, len(each)), strict=True)
        ]

    def _prompt(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a prompt, completed by the end token.

        Raises DataError for a prompt that is empty or too long.
        """
        engine = self._engine
        ids = engine.tokenizer.encode(text)
        if not ids:
            raise DataError("The text is empty: there is nothing to generate from.")
        if len(ids) >= engine.max_source:
            raise DataError(
                f"The text has {len(ids):,} tokens; this server takes at most "
                f"{engine.max_source - 1:,}."
            )
        check_vocabulary(max(ids), engine.model.config.vocabulary_size)
        return tuple(engine.tokenizer.complete(ids, engine.model.config.end_id))

    def _events(self, requests: list[EngineRequest]) -> Numbered:
        """Yield the events of the engine; one bridge to the server's event loop serves all."""
        if self._bridge is None:
            self._bridge = EventBridge(asyncio.get_running_loop())
        return events(self._engine, self._bridge, requests)


async def _until_disconnect(request: Request, work: Awaitable[Result]) -> Result:
    """Return the result of the work; cancel it when the client disconnects."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError("The client closed the connection.", 499)
        return task.result()
    finally:
        task.cancel()
        disconnected.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(request: Request, chunks: Chunks) -> Response:
    """Return server-sent events; an error before the first one is an ordinary response."""
    first = await _until_disconnect(request, anext(chunks))

    async def lines() -> AsyncIterator[str]:
        try:
            async with aclosing(chunks):
                yield f"data: {json.dumps(first)}\n\n"
                async for chunk in chunks:
                    yield f"data: {json.dumps(chunk)}\n\n"
        except RequestError as error:
            body = error_body(str(error), "server_error", code=error.status)
            yield f"data: {json.dumps(body)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _chunks(
    event_stream: Numbered, head: dict[str, Any], number: int, prompt_tokens: int, usage: bool
) -> Chunks:
    """Yield the chunks of a completion; empty pieces are not sent."""
    outputs = [Output() for _ in range(number)]
    async with aclosing(event_stream):
        async for place, event in event_stream:
            outputs[place].add(event)
            outputs[place].pieces.clear()
            if event.piece or event.reason:
                yield {**head, "choices": [_choice(place, event.piece, event.reason)]}
    if usage:
        yield {**head, "choices": [], "usage": _usage(prompt_tokens, outputs)}


async def _outputs(event_stream: Numbered, result: Callable[[Output], dict[str, Any]]) -> Chunks:
    """Yield the output so far after every new piece, and the result at the end."""
    output = Output()
    async with aclosing(event_stream):
        async for _, event in event_stream:
            output.add(event)
            if event.piece and event.reason is None:
                yield {"output": output.text}
    yield result(output)


def _choice(place: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": place, "text": text, "logprobs": None, "finish_reason": reason}


def _usage(prompt_tokens: int, outputs: list[Output]) -> dict[str, int]:
    new = sum(len(output.tokens) for output in outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new,
        "total_tokens": prompt_tokens + new,
    }


def _add_error_handlers(app: FastAPI) -> None:
    """Return every error in the format of the OpenAI API, without internals of the program."""

    def respond(
        status: int, message: str, *, param: str | None = None, headers: Any = None
    ) -> JSONResponse:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return JSONResponse(error_body(message, kind, param, status), status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()
        # A field of several possible types has an error for each; the message has all.
        same = [one for one in found if one["loc"][:2] == found[0]["loc"][:2]]
        loc = found[0]["loc"] if len(same) == 1 else found[0]["loc"][:2]
        parts = [str(part) for part in loc if part != "body"]
        where = ".".join(part for part in parts if part.isidentifier() or part.isdigit())[:100]
        what = ", or: ".join(dict.fromkeys(one["msg"] for one in same))
        return respond(400, f"{where or 'The body'}: {what}"[:500], param=where or None)

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> JSONResponse:
        return respond(400, str(error))

    @app.exception_handler(RequestError)
    async def failed(_: Request, error: RequestError) -> JSONResponse:
        wait = error.retry_after
        headers = None if wait is None else {"Retry-After": str(wait)}
        return respond(error.status, str(error), headers=headers)

    @app.exception_handler(HTTPException)
    async def known(_: Request, error: HTTPException) -> JSONResponse:
        return respond(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return respond(500, f"The server failed at this request: {type(error).__name__}.")
