"""The routes: OpenAI's chats and completions, a tokenizer for lm-eval, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from errors import one_line
from eval.answering import Answerer
from eval.serving.generation import ApiError, Generation, chat_prompt, tool_names
from eval.serving.replies import ChatReplies, CompletionReplies, respond
from eval.serving.requests import ChatRequest, CompletionRequest, DetokenizeRequest, SampledRequest, TokenizeRequest
from eval.serving.worker import Alternatives, Served, Worker, score_prompt
from text.corpus.infilling import question

PAGE = Path(__file__).parents[1] / "web"
OPEN = ("/health", "/", "/page")  # without a key: the page asks for it
LARGEST = 16 * 2**20  # bytes of a body
RETRY_AFTER = 1  # seconds
POLICY = "default-src 'self'; img-src data:; frame-ancestors 'none'"


def create_app(worker: Worker, api_key: str = "", cors: Sequence[str] = (), hosts: Sequence[str] = ("*",)) -> FastAPI:
    """Make the application around a worker, which it starts and ends.

    Args:
        api_key: what requests must bring as their bearer; empty: nothing.
        cors: origins whose pages may read replies. hosts: names that a request may call this server.
    """

    started = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title="Mini DeepSeek-V3", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, worker=worker, api_key=api_key)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"])

    app.add_exception_handler(ApiError, lambda _, error: failure(error))
    app.add_exception_handler(RequestValidationError, lambda _, error: failure(_invalid(error)))
    app.add_exception_handler(HTTPException, lambda _, error: failure(ApiError(error.status_code, str(error.detail))))
    app.add_exception_handler(Exception, lambda *_: failure(ApiError(500, "the server failed; see its log")))

    def served(name: str) -> Served:
        if name not in worker.models:
            known = ", ".join(worker.models)
            raise ApiError(404, f"there is no model {one_line(name)!r}; there are {known}", "model", "model_not_found")
        return worker.models[name]

    def described(name: str, one: Served) -> dict[str, Any]:
        made = {"object": "model", "created": started, "owned_by": "mini-deepseek-v3"}
        return {"id": name, **made, "max_model_len": one.context}

    def check(body: SampledRequest) -> None:
        served(body.model)
        if refused := body.refused:
            raise ApiError(400, f"{refused} is not supported here; leave it out", refused)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(*both) for both in worker.models.items()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return described(name, served(name))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        check(body)
        tools = body.tools if body.tool_choice == "auto" else []
        names = tool_names(tools)
        # In a thread: a text of megabytes takes seconds, in which all other streams would stand still.
        prompt = await asyncio.to_thread(chat_prompt, served(body.model), body.messages, tools)
        return await respond(request, ChatReplies(Generation(worker, body, [prompt], names)))

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        check(body)
        answerer = served(body.model).answerer
        prompts = body.prompts
        if isinstance(prompts[0], str):
            prompts = await asyncio.to_thread(answerer.tokenizer.encode_batch, prompts)
        if body.suffix:
            after = await asyncio.to_thread(answerer.tokenizer.encode, body.suffix)
            prompts = [question(answerer.tokenizer, ids, after) for ids in prompts]
        prompts = [ids or [answerer.tokenizer.bos_id] for ids in prompts]
        if (most := max(map(max, prompts))) >= answerer.tokenizer.vocab_size:
            raise ApiError(
                400, f"there is no token {most}; the tokenizer has {answerer.tokenizer.vocab_size}", "prompt"
            )
        generation, scored = Generation(worker, body, prompts), body.echo and body.top is not None
        try:
            echoed = [await score(answerer, ids, body.top) if scored else [] for ids in prompts]
        except BaseException:
            generation.close()
            raise
        return await respond(request, CompletionReplies(generation, echoed))

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        one = served(body.model or next(iter(worker.models)))
        ids = chat_prompt(one, body.messages, []) if body.messages else one.answerer.tokenizer.encode(body.prompt)
        return {"tokens": ids, "count": len(ids), "max_model_len": one.context}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        one = served(body.model or next(iter(worker.models)))
        known = [token for token in body.tokens if token < one.answerer.tokenizer.vocab_size]
        return {"prompt": one.answerer.tokenizer.decode(known, skip_special_tokens=False)}

    @app.get("/tokenizer_info")
    async def tokenizer_info(model: str = "") -> dict[str, Any]:
        tokenizer = served(model or next(iter(worker.models))).answerer.tokenizer
        return tokenizer.settings()

    @app.get("/health")
    async def health() -> Response:
        return PlainTextResponse("the worker has ended" if worker.failure else "ok", 500 if worker.failure else 200)

    async def score(answerer: Answerer, ids: list[int], top: int) -> list[Alternatives]:
        return await asyncio.wrap_future(worker.call(lambda: score_prompt(answerer, ids, top)))

    @app.get("/metrics")
    async def metrics() -> Response:
        worker.count()
        return Response(generate_latest(worker.metrics.registry), media_type="text/plain; version=0.0.4")

    app.mount("/page", StaticFiles(directory=PAGE), name="page")

    @app.get("/")
    async def page() -> Response:
        content = (PAGE / "index.html").read_bytes()
        return Response(content, headers={"Content-Security-Policy": POLICY}, media_type="text/html; charset=utf-8")

    return app


class Guard:
    """Ask for the key, bound the size of bodies, count replies by status. Plain ASGI, which leaves streams alone."""

    def __init__(self, app: ASGIApp, worker: Worker, api_key: str) -> None:
        self.app, self.worker, self.api_key = app, worker, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        size = 0

        async def counted_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST:
                raise HTTPException(413, f"a request may have {LARGEST:,} bytes")
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self.worker.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        if self.api_key and not self._open(scope) and not self._has_key(scope):
            wrong = failure(ApiError(401, "the API key is missing or wrong", code="invalid_api_key"))
            return await wrong(scope, receive, counted_send)
        await self.app(scope, counted_receive, counted_send)

    def _open(self, scope: Scope) -> bool:
        return scope["path"] in OPEN or scope["path"].startswith("/page/")

    def _has_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        return hmac.compare_digest(given, self.api_key.encode())


def failure(error: ApiError) -> JSONResponse:
    """Return the response that holds OpenAI's error object."""
    headers = {429: {"Retry-After": str(RETRY_AFTER)}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return JSONResponse(error.body, error.status, headers)


def _invalid(error: RequestValidationError) -> ApiError:
    """Return the error of the first field that is wrong, by its name."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}")
    if first["loc"] == ("body",):
        return ApiError(400, "the body is not a JSON object; send one, as Content-Type: application/json")
    field = ".".join(str(part) for part in first["loc"][1:] if not _is_type(part))
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{field or 'the body'}: {message}", field or None)


def _is_type(part: str | int) -> bool:
    """Return whether a part of a place names one of several types that a value may have, as `list[str]`."""
    return isinstance(part, str) and ("[" in part or part in ("str", "function-after"))
