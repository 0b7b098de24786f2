"""The HTTP interface: OpenAI's completions, filling of blanks, routing, and the page.

All computation is in the engine's thread or in others, never in the event loop.
"""

import asyncio
import dataclasses
import json
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Sequence,
)
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route as FixedRoute

from switchlm import __version__
from switchlm.errors import DataError
from switchlm.generation.answer import TOKENS_PER_BLANK, count_blanks, put_into_blanks, read_spans
from switchlm.generation.decode import before_end
from switchlm.generation.route import (
    RoutedText,
    TokenTexts,
    decoder_tokens,
    encode_alone,
    encoder_tokens,
    route_tokens,
)
from switchlm.generation.sampling import seeds_from
from switchlm.generation.text_stream import texts_of_tokens, tokens_of_text
from switchlm.serving.bodies import (
    Completion,
    Fill,
    Generation,
    Prompt,
    Route,
    parse,
    schema,
)
from switchlm.serving.engine import Engine, EventBridge, events
from switchlm.serving.errors import add_error_handlers, error_body
from switchlm.serving.middleware import App, Guard, page_files
from switchlm.serving.receive import Bodies
from switchlm.serving.requests import LATE, Numbered, Output, RequestError, collect
from switchlm.serving.requests import Request as EngineRequest
from switchlm.serving.statistics import CONTENT_TYPE
from switchlm.serving.texts import Texts

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
    hosts: Collection[str] | None = None,
    bodies: Bodies | None = None,
) -> App:
    """Return the ASGI application for a started engine.

    name: of the model.
    key: the API key, needed for all routes but /health and the files of the page; None: no key.
    report: the HTML of the run's report.
    seconds: how long a request may take.
    default_tokens: the longest output of requests that give none.
    hosts: see Guard.
    bodies: limits on bodies; None: the usual ones.
    """
    interface = _Interface(engine, name, report is not None, seconds, default_tokens, bodies)
    app = FastAPI(
        title="switchlm",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        routes=[
            FixedRoute(address, file, methods=["GET"])
            for address, file in page_files(report).items()
        ],
    )
    app.get("/health")(interface.health)
    app.get("/metrics")(interface.metrics)
    app.get("/v1/models")(interface.models)
    app.get("/v1/models/{model:path}")(interface.model)
    for kind, function in (
        (Completion, interface.completions),
        (Fill, interface.fill),
        (Route, interface.route),
    ):
        app.post(f"/v1/{function.__name__}", response_model=None, openapi_extra=schema(kind))(
            function
        )
    add_error_handlers(app)
    return Guard(app, key=key, hosts=hosts, count=engine.statistics.count_response)


class _Interface:
    """The routes of one engine."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        has_report: bool,
        seconds: float | None,
        default_tokens: int | None,
        bodies: Bodies | None,
    ) -> None:
        self._engine, self._name, self._has_report = engine, name, has_report
        self._seconds, self._default_tokens = seconds, default_tokens or DEFAULT_TOKENS
        self._bodies = bodies or Bodies()
        self._created = int(time.time())
        self._bridge: EventBridge | None = None
        self._texts = Texts(engine)
        # Encoded texts of /v1/route take as much memory as slots.
        self._routes = asyncio.Semaphore(engine.num_slots)

    async def health(self) -> Response:
        if self._engine.ended.done():
            return JSONResponse({"status": "the engine has ended"}, 503)
        if self._texts.are_stuck:
            return JSONResponse({"status": "too many texts take too long to tokenize"}, 503)
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
        return {"object": "list", "data": [self._model()]}

    async def model(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        return self._model()

    def _model(self) -> dict[str, Any]:
        engine = self._engine
        return {
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

    async def completions(self, request: Request) -> Response:
        def prepare(content: bytearray) -> tuple[Completion, list[EngineRequest]]:
            body = parse(Completion, content)
            limit = self._default_tokens
            return body, self._requests(body, body.prompt, limit, copies=body.copies)

        body, requests = await self._prepare(request, prepare)
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._name,
        }
        prompt_tokens = sum(len(one.ids) for one in requests[:: body.copies])
        event_stream = self._events(requests)
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            chunks = _chunks(event_stream, head, len(requests), prompt_tokens, usage)
            return await _stream(request, chunks)
        outputs = await _until_disconnect(request, collect(event_stream, len(requests)))
        choices = [
            _choice(place, output.text, output.reason) for place, output in enumerate(outputs)
        ]
        return JSONResponse({**head, "choices": choices, "usage": _usage(prompt_tokens, outputs)})

    async def fill(self, request: Request) -> Response:
        def prepare(content: bytearray) -> tuple[Fill, list[EngineRequest]]:
            body = parse(Fill, content)
            blanks = count_blanks(body.text, self._engine.tokenizer)
            return body, self._requests(body, [body.text], TOKENS_PER_BLANK * blanks)

        body, (prompt,) = await self._prepare(request, prepare)
        event_stream = self._events([prompt])

        def read(output: Output) -> dict[str, Any]:
            spans = read_spans(output.tokens, self._engine.writer, len(output.text))
            return {
                "text": body.text,
                "filled": put_into_blanks(body.text, spans),
                "output": output.text,
                "spans": {str(number): span for number, span in spans.items()},
                "finished": output.reason == "stop",
                "usage": _usage(len(prompt.ids), [output]),
            }

        def result(output: Output) -> Awaitable[dict[str, Any]]:
            return self._texts.run(lambda: read(output))

        if body.stream:
            return await _stream(request, _outputs(event_stream, result))
        (output,) = await _until_disconnect(request, collect(event_stream, 1))
        return JSONResponse(await result(output))

    async def route(self, request: Request) -> Response:
        engine, tokenizer = self._engine, self._engine.tokenizer
        config = engine.model.config

        def prepare(content: bytearray) -> tuple[Route, EngineRequest, TokenTexts, TokenTexts]:
            body = parse(Route, content)
            self._check_model(body.model)
            prompt = EngineRequest(
                ids=self._texts.prompt(body.text),
                limit=min(self._default_tokens, engine.max_target),
                seconds=self._seconds,
            )
            output = body.output or ""
            if len(self._texts.encode(output, engine.max_target)) >= engine.max_target:
                raise DataError(f"The output may have {engine.max_target - 1:,} tokens at most.")
            source = encoder_tokens(body.text, tokenizer, config.end_id)
            target = decoder_tokens(tokens_of_text(output, tokenizer), tokenizer, config.start_id)
            return body, prompt, source, target

        async def routed() -> Response:
            body, prompt, source, target = await self._prepare(request, prepare)
            async with self._routes:
                if body.output is None:
                    target = await self._generate(prompt, body.enforce_capacity)
                found = await self._call(
                    lambda: route_tokens(engine.model, source, target, body.enforce_capacity)
                )
            content = await self._texts.run(lambda: self._written(found))
            return Response(content, media_type="application/json")

        return await _until_disconnect(request, self._in_time(routed()))

    async def _generate(self, prompt: EngineRequest, enforce_capacity: bool) -> TokenTexts:
        """Return the decoder's inputs of the greedy output, generated in a slot like any other."""
        model, tokenizer = self._engine.model, self._engine.tokenizer
        config = model.config
        if enforce_capacity:
            encoded_SD = await self._call(lambda: encode_alone(model, prompt.ids))
            prompt = dataclasses.replace(prompt, encoded_SD=encoded_SD)
        (output,) = await collect(self._events([prompt]), 1)
        ids = before_end(output.tokens, config.end_ids)

        def target() -> TokenTexts:
            return decoder_tokens(
                (ids, texts_of_tokens(ids, tokenizer)), tokenizer, config.first_id
            )

        return await self._texts.run(target)

    async def _call(self, function: Callable[[], Result]) -> Result:
        return await asyncio.wrap_future(self._engine.call(function))

    def _written(self, found: RoutedText) -> str:
        return json.dumps({"model": self._name, **dataclasses.asdict(found)}, allow_nan=False)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._name:
            raise RequestError(f"There is no model {name!r} here, only {self._name!r}.", 404)

    async def _prepare(self, request: Request, prepare: Callable[[bytearray], Result]) -> Result:
        """Receive the body of a request, and prepare it outside of the event loop."""
        async with self._bodies.receive(request) as content:
            work = self._texts.prepare(lambda: prepare(content))
            return await _until_disconnect(request, self._in_time(work))

    async def _in_time(self, work: Awaitable[Result]) -> Result:
        try:
            async with asyncio.timeout(self._seconds):
                return await work
        except TimeoutError:
            raise RequestError(LATE, 504) from None

    def _requests(
        self, body: Generation, prompts: Sequence[Prompt], default_limit: int, copies: int = 1
    ) -> list[EngineRequest]:
        """Tokenize the prompts; `copies` of each, with different seeds.

        Raises DataError for a prompt that is empty or too long, and for too many tokens or outputs.
        """
        self._check_model(body.model)
        queue, max_tokens = self._engine.queue, self._engine.max_target
        if len(prompts) * copies > queue:
            raise DataError(
                f"The request is for {len(prompts) * copies} outputs, but the server's queue "
                f"takes {queue}: send fewer prompts at a time, or a smaller n."
            )
        limit = body.limit or min(default_limit, max_tokens)
        if limit > max_tokens:
            raise DataError(
                f"max_tokens is {limit:,}, but this server generates at most {max_tokens:,}."
            )
        each = [ids for ids in map(self._texts.prompt, prompts) for _ in range(copies)]
        sampling = body.sampling
        return [
            EngineRequest(
                ids=ids,
                limit=limit,
                sampling=sampling,
                seed=seed,
                stops=body.stops,
                seconds=self._seconds,
            )
            for ids, seed in zip(each, seeds_from(body.seed, len(each)), strict=True)
        ]

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


async def _outputs(
    event_stream: Numbered, result: Callable[[Output], Awaitable[dict[str, Any]]]
) -> Chunks:
    """Yield the output so far after every new piece, and the result at the end."""
    output = Output()
    async with aclosing(event_stream):
        async for _, event in event_stream:
            output.add(event)
            if event.piece and event.reason is None:
                yield {"output": output.text}
    yield await result(output)


def _choice(place: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": place, "text": text, "logprobs": None, "finish_reason": reason}


def _usage(prompt_tokens: int, outputs: list[Output]) -> dict[str, int]:
    new = sum(len(output.tokens) for output in outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new,
        "total_tokens": prompt_tokens + new,
    }
