"""The HTTP interface: OpenAI's completions, blanks to fill, who took which token, and the page.

Everything slow happens in the engine's thread or in others; the event loop only passes on.
"""

import asyncio
import dataclasses
import json
import secrets
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
from switchlm.serving.engine import Engine, EventBridge, events
from switchlm.serving.middleware import App, Guard, error_body, page_files
from switchlm.serving.requests import (
    LARGEST_SEED,
    Completion,
    Fill,
    Generation,
    Numbered,
    Output,
    RequestError,
    Route,
    collected,
)
from switchlm.serving.requests import Request as EngineRequest
from switchlm.serving.statistics import CONTENT_TYPE

Answer = TypeVar("Answer")
Chunks = AsyncGenerator[dict[str, Any], None]
USUAL_TOKENS = 64


def create_app(
    engine: Engine,
    *,
    name: str,
    key: str | None = None,
    report: str | None = None,
    seconds: float | None = None,
) -> App:
    """Return the ASGI application for a started engine.

    name: of the model.
    key: that every route asks for but the page's own files and /health; None asks for none.
    report: the HTML of the run's report.
    seconds: a request may take.
    """
    interface = _Interface(engine, name, report, seconds)
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
    _explain_errors(app)
    return Guard(app, key=key, count=engine.statistics.answered)


class _Interface:
    """The routes of one engine."""

    def __init__(
        self, engine: Engine, name: str, report: str | None, seconds: float | None
    ) -> None:
        self._engine, self._name, self._seconds = engine, name, seconds
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
        asked = await self._requests(body, body.prompts, USUAL_TOKENS, copies=body.n)
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._name,
        }
        prompt_tokens = sum(len(one.ids) for one in asked[:: body.n])
        told = self._events(asked)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            chunks = _chunks(told, head, len(asked), prompt_tokens, usage)
            return await _stream(request, chunks)
        outputs = await _while_wanted(request, collected(told, len(asked)))
        choices = [
            _choice(place, output.text, output.reason) for place, output in enumerate(outputs)
        ]
        return JSONResponse({**head, "choices": choices, "usage": _usage(prompt_tokens, outputs)})

    async def fill(self, body: Fill, request: Request) -> Response:
        self._check_model(body.model)
        blanks = count_blanks(body.text, self._engine.tokenizer)
        (asked,) = await self._requests(body, [body.text], TOKENS_PER_BLANK * blanks)
        told = self._events([asked])

        def result(output: Output) -> dict[str, Any]:
            spans = read_spans(output.tokens, self._engine.tokenizer, len(output.text))
            return {
                "text": body.text,
                "filled": put_into_blanks(body.text, spans),
                "output": output.text,
                "spans": {str(number): span for number, span in spans.items()},
                "finished": output.reason == "stop",
                "usage": _usage(len(asked.ids), [output]),
            }

        if body.stream:
            return await _stream(request, _growing(told, result))
        (output,) = await _while_wanted(request, collected(told, 1))
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
                max_new_tokens=min(USUAL_TOKENS, engine.max_target),
                enforce_capacity=body.enforce_capacity,
            )
        )
        found = await _while_wanted(request, asyncio.wrap_future(future))
        return {"model": self._name, **dataclasses.asdict(found)}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._name:
            raise HTTPException(404, f"There is no model {name!r} here, only {self._name!r}.")

    async def _requests(
        self, body: Generation, prompts: Sequence[str], usual_limit: int, copies: int = 1
    ) -> list[EngineRequest]:
        """Tokenise the prompts, off the event loop; `copies` of each, with seeds of their own.

        Raises DataError for a prompt that is empty or too long, and for too many tokens or outputs.
        """
        queue, most = self._engine.queue, self._engine.max_target
        if len(prompts) * copies > queue:
            raise DataError(
                f"This asks for {len(prompts) * copies} outputs at once, but the server's queue "
                f"takes {queue}: send fewer prompts, or a smaller n, at a time."
            )
        limit = body.max_tokens or min(usual_limit, most)
        if limit > most:
            raise DataError(f"max_tokens is {limit:,}, but this server gives {most:,}.")
        seed = secrets.randbelow(LARGEST_SEED) if body.seed is None else body.seed
        encoded = await asyncio.to_thread(lambda: [self._prompt(text) for text in prompts])
        return [
            EngineRequest(
                ids=ids,
                limit=limit,
                sampling=body.sampling,
                seed=(seed + copy) % (LARGEST_SEED + 1),
                stops=body.stops,
                seconds=self._seconds,
            )
            for ids in encoded
            for copy in range(copies)
        ]

    def _prompt(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a prompt and the end token.

        Raises DataError for a prompt that is empty or longer than the server takes.
        """
        engine = self._engine
        ids = engine.tokenizer.encode(text)
        if not ids:
            raise DataError("The text is empty: there is nothing to generate from.")
        if len(ids) >= engine.max_source:
            raise DataError(
                f"The text has {len(ids):,} tokens; this server takes {engine.max_source - 1:,}."
            )
        check_vocabulary(max(ids), engine.model.config.vocabulary_size)
        return (*ids, engine.model.config.end_id)

    def _events(self, asked: list[EngineRequest]) -> Numbered:
        """Yield what the engine does; all events come by one bridge, made in the server's loop."""
        if self._bridge is None:
            self._bridge = EventBridge(asyncio.get_running_loop())
        return events(self._engine, self._bridge, asked)


async def _while_wanted(request: Request, work: Awaitable[Answer]) -> Answer:
    """Return the result of the work, which is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError("The client closed the connection.", 499)
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(request: Request, chunks: Chunks) -> Response:
    """Return server-sent events; what goes wrong before the first one is an ordinary error."""
    first = await _while_wanted(request, anext(chunks))

    async def lines() -> AsyncIterator[str]:
        try:
            async with aclosing(chunks):
                yield f"data: {json.dumps(first)}\n\n"
                async for chunk in chunks:
                    yield f"data: {json.dumps(chunk)}\n\n"
        except RequestError as error:
            told = error_body(str(error), "server_error", code=error.status)
            yield f"data: {json.dumps(told)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _chunks(
    told: Numbered, head: dict[str, Any], number: int, prompt_tokens: int, usage: bool
) -> Chunks:
    """Yield the chunks of a completion; pieces that are still empty are not sent."""
    outputs = [Output() for _ in range(number)]
    async with aclosing(told):
        async for place, event in told:
            outputs[place].add(event)
            outputs[place].pieces.clear()
            if event.piece or event.reason:
                yield {**head, "choices": [_choice(place, event.piece, event.reason)]}
    if usage:
        yield {**head, "choices": [], "usage": _usage(prompt_tokens, outputs)}


async def _growing(told: Numbered, result: Callable[[Output], dict[str, Any]]) -> Chunks:
    """Yield the output so far whenever it has grown, and at last the result."""
    output = Output()
    async with aclosing(told):
        async for _, event in told:
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


def _explain_errors(app: FastAPI) -> None:
    """Give every error as the OpenAI API has it, and none of the program's insides."""

    def answer(
        status: int, message: str, *, param: str | None = None, headers: Any = None
    ) -> JSONResponse:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        return JSONResponse(error_body(message, kind, param, status), status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()
        # A field of one type or another has an error for each; all of them say what it may be.
        same = [one for one in found if one["loc"][:2] == found[0]["loc"][:2]]
        loc = found[0]["loc"] if len(same) == 1 else found[0]["loc"][:2]
        parts = [str(part) for part in loc if part != "body"]
        where = ".".join(part for part in parts if part.isidentifier() or part.isdigit())[:100]
        what = ", or: ".join(dict.fromkeys(one["msg"] for one in same))
        return answer(400, f"{where or 'The body'}: {what}"[:500], param=where or None)

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> JSONResponse:
        return answer(400, str(error))

    @app.exception_handler(RequestError)
    async def failed(_: Request, error: RequestError) -> JSONResponse:
        wait = error.retry_after
        headers = None if wait is None else {"Retry-After": str(wait)}
        return answer(error.status, str(error), headers=headers)

    @app.exception_handler(HTTPException)
    async def known(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return answer(500, f"The server failed at this request: {type(error).__name__}.")
