"""An OpenAI-compatible server over one engine (design: serving.md 2).

The handlers run in an event loop; the engine's thread hands pieces of answers over to it. Bodies
are parsed, images fetched and prompts built in other threads, so that the loop is never held up.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.inference.engine import Closed, Engine, Piece, QueueFull
from internvlx_jax.inference.remote_images import ImageRules
from internvlx_jax.inference.requests import Answer
from internvlx_jax.inference.server_metrics import Metrics
from internvlx_jax.inference.server_replies import DONE, Reply, event
from internvlx_jax.inference.server_requests import (
    Completion,
    RequestError,
    parse_completion,
    parse_json,
)

log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "assets" / "chat.html"
CLIENT_LEFT = 499  # what proxies write into their logs for it
RETRY_SECONDS = 1


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Says how a server answers.

    Attributes:
        model: name of the model in replies.
        images: which images are read.
        api_key: what clients have to send; None lets everybody in.
        max_body: most bytes of a request.
    """

    model: str
    images: ImageRules = ImageRules()
    api_key: str | None = None
    max_body: int = 64 * 2**20


class Server:
    """Answers requests once its engine is ready.

    Attributes:
        failure: why the engine could not be made, or None.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        config: ServerConfig,
        on_failure: Callable[[], None] = lambda: None,
    ):
        """Remembers how to start.

        Args:
            make_engine: loads the model and returns its engine, started. It runs in a thread,
                while `/health` says that the server is loading.
            config: how the server answers.
            on_failure: called if `make_engine` raises.
        """
        self.config, self.failure = config, None
        self._make_engine, self._on_failure = make_engine, on_failure
        self._engine: Engine | None = None
        self._metrics = Metrics()
        self._created = int(time.time())

    def app(self) -> Starlette:
        """Returns the application, for any ASGI server."""
        return Starlette(
            routes=[
                Route("/", self._page),
                Route("/health", self._health),
                Route("/metrics", self._report),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._models),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
            ],
            lifespan=self._lifespan,
            exception_handlers={
                RequestError: _refuse,
                HTTPException: _refuse_route,
                Exception: _refuse_fault,
            },
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        threading.Thread(target=self._load, name="load", daemon=True).start()
        yield
        if self._engine is not None:
            await to_thread.run_sync(self._engine.close)

    def _load(self) -> None:
        try:
            self._engine = self._make_engine()
        except Exception as error:
            self.failure = error
            self._on_failure()

    async def _page(self, http: HttpRequest) -> Response:
        return FileResponse(PAGE)

    async def _health(self, http: HttpRequest) -> Response:
        if self._engine is None:
            return JSONResponse({"status": "failed" if self.failure else "loading"}, 503)
        return JSONResponse({"status": "ready"})

    async def _report(self, http: HttpRequest) -> Response:
        state = None if self._engine is None else self._engine.state()
        return PlainTextResponse(
            self._metrics.text(state), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def _models(self, http: HttpRequest) -> Response:
        self._authorize(http)
        model = {
            "id": self.config.model,
            "object": "model",
            "created": self._created,
            "owned_by": "internvlx-jax",
        }
        name = http.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != self.config.model:
            raise RequestError(f"there is no model {name!r}", "model", status=404)
        return JSONResponse(model)

    async def _complete(self, http: HttpRequest) -> Response:
        call = _Call(self.config.model)
        try:
            self._authorize(http)
            engine = self._ready()
            body = await self._body(http)
            completion = await to_thread.run_sync(self._parse, body)
            pieces = _Pieces(engine, completion)
            return await self._reply(http, call, completion, pieces)
        except RequestError as error:
            self._finish(call, error.status)
            raise
        except ClientDisconnect:
            self._finish(call, CLIENT_LEFT)
            return Response(status_code=CLIENT_LEFT)

    async def _reply(
        self, http: HttpRequest, call: _Call, completion: Completion, pieces: _Pieces
    ) -> Response:
        """Answers once the first piece, or the error of the prompt, is there."""
        gone = asyncio.create_task(_left(http))
        try:
            first = await pieces.next(gone)
            call.first_seconds = time.monotonic() - call.begun
            if completion.stream:
                body = self._stream(call, completion, pieces, first)
                return StreamingResponse(
                    body, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
                )
            piece = first
            while piece.answer is None:
                piece = await pieces.next(gone)
            call.answer = piece.answer
            self._finish(call, 200)
            return JSONResponse(call.reply.whole(piece.answer))
        except BaseException:
            pieces.cancel()
            raise
        finally:
            gone.cancel()

    async def _stream(
        self, call: _Call, completion: Completion, pieces: _Pieces, piece: Piece
    ) -> AsyncIterator[bytes]:
        reply, status = call.reply, CLIENT_LEFT
        try:
            yield event(reply.chunk({"role": "assistant", "content": ""}))
            while True:
                if piece.text:
                    yield event(reply.chunk({"content": piece.text}))
                if piece.answer is not None:
                    break
                piece = await pieces.next()
            call.answer = piece.answer
            yield event(reply.chunk({}, piece.answer.finish))
            if completion.include_usage:
                yield event(reply.usage_chunk(piece.answer))
            status = 200
        except RequestError as error:  # under way, the status is sent already
            status = error.status
            yield event(error.body())
        finally:
            pieces.cancel()
            self._finish(call, status)
        yield DONE

    def _authorize(self, http: HttpRequest) -> None:
        key = self.config.api_key
        sent = http.headers.get("authorization", "")
        if key is not None and not hmac.compare_digest(sent.encode(), f"Bearer {key}".encode()):
            raise RequestError(
                "send the API key of this server as `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )

    def _ready(self) -> Engine:
        if self._engine is None:
            raise RequestError("the model is loading", status=503, code="loading")
        return self._engine

    async def _body(self, http: HttpRequest) -> bytes:
        """Returns the body, as far as it is allowed to be long."""
        body, most = bytearray(), self.config.max_body
        too_long = RequestError(f"the body has more than {most} bytes", status=413)
        if http.headers.get("content-length", "0").strip() > "" and _length(http) > most:
            raise too_long
        async for chunk in http.stream():
            body += chunk
            if len(body) > most:
                raise too_long
        return bytes(body)

    def _parse(self, body: bytes) -> Completion:
        assert self._engine is not None
        tiles, rules = self._engine.prompts.processor.tiles, self.config.images
        try:
            return parse_completion(
                parse_json(body),
                model=self.config.model,
                tiles=tiles,
                max_tiles=self._engine.buckets.max_tiles,
                read_image=rules.read,
                read_video=lambda url, field, frames: rules.read_video(url, field, frames, tiles),
            )
        except (ConfigError, SampleError) as error:
            raise RequestError(str(error)) from None

    def _finish(self, call: _Call, status: int) -> None:
        """Counts a call and writes its line into the log."""
        seconds = time.monotonic() - call.begun
        self._metrics.count(status, call.first_seconds, seconds)
        answer = call.answer
        line: dict[str, Any] = {
            "id": call.reply.id,
            "status": status,
            "seconds": round(seconds, 3),
            "first_seconds": None if call.first_seconds is None else round(call.first_seconds, 3),
            "prompt_tokens": None if answer is None else answer.prompt_tokens,
            "tiles": None if answer is None else answer.tiles,
            "new_tokens": None if answer is None else answer.new_tokens,
            "finish": None if answer is None else answer.finish,
        }
        log.info("%s", json.dumps(line))


@dataclasses.dataclass
class _Call:
    """What is known of one call, for its reply and its line in the log."""

    model: str
    begun: float = dataclasses.field(default_factory=time.monotonic)
    first_seconds: float | None = None
    answer: Answer | None = None

    def __post_init__(self):
        self.reply = Reply(self.model)


class _Pieces:
    """The pieces of one answer, for the event loop.

    Raises:
        RequestError: the queue is full, or the engine is closing.
    """

    def __init__(self, engine: Engine, completion: Completion):
        loop, self._arrived = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        self._engine = engine

        def deliver(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody waits
                loop.call_soon_threadsafe(self._arrived.put_nowait, piece)

        try:
            self._ticket = engine.submit(completion.request, completion.spec, deliver)
        except QueueFull:
            raise RequestError(
                "too many requests wait; send it again", status=429, code="queue_full"
            ) from None
        except Closed:
            raise RequestError("the server is closing", status=503, code="closing") from None

    async def next(self, gone: asyncio.Task[None] | None = None) -> Piece:
        """Returns the next piece.

        Args:
            gone: ends when the client has left.

        Raises:
            RequestError: the request ended with an error.
            ClientDisconnect: the client has left.
        """
        arrival = asyncio.create_task(self._arrived.get())
        waited = [arrival] if gone is None else [arrival, gone]
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not arrival.done():
                raise ClientDisconnect
            piece = arrival.result()
        finally:
            arrival.cancel()
        if piece.fault:
            raise RequestError("the server failed at this request; send it again", status=500)
        if piece.answer is not None and piece.answer.error is not None:
            error = piece.answer.error
            raise RequestError(str(error), "messages", code=error.reason)
        return piece

    def cancel(self) -> None:
        """Frees the slot, if the answer is not complete."""
        self._engine.cancel(self._ticket)


async def _left(http: HttpRequest) -> None:
    """Returns when the client has left; its body was read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _length(http: HttpRequest) -> int:
    try:
        return int(http.headers.get("content-length", "0"))
    except ValueError:
        raise RequestError("Content-Length is no number") from None


async def _refuse(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


async def _refuse_route(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = RequestError(f"{error.detail}: {http.method} {http.url.path}", status=error.status_code)
    return JSONResponse(found.body(), error.status_code, error.headers)


async def _refuse_fault(http: HttpRequest, error: Exception) -> Response:
    return JSONResponse(RequestError("the server failed", status=500).body(), 500)
