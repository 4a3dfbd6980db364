"""Replies as OpenAI's objects, and how they are sent: whole, or in chunks as server-sent events."""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from eval.serving.generation import ApiError, Generation, Reply, Step
from eval.serving.reply_text import Piece
from eval.serving.requests import CompletionRequest
from eval.serving.worker import Alternatives, Token
from model import MiniDeepSeek
from text.stream_decoder import StreamDecoder

GONE = 499  # nginx's status for a client that hung up; nobody reads it


class TokenObjects:
    """Makes objects of a model's tokens."""

    def __init__(self, model: MiniDeepSeek, decoder: StreamDecoder) -> None:
        self.model, self.decoder = model, decoder

    def text(self, token: int) -> str:
        """Return a token as text; where its bytes are no whole characters, as OpenAI spells it: `bytes:\\\\xe4`."""
        data = self.decoder.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def named(self, token: int, log_prob: float) -> dict[str, Any]:
        return {"token": self.text(token), "logprob": log_prob, "bytes": list(self.decoder.bytes_of(token))}

    def chat_entry(self, token: Token, top: int) -> dict[str, Any]:
        """Return one element of a chat's `logprobs.content`, with `top` alternatives."""
        found = token.alternatives
        return {**self.named(token.id, found.log_prob), "top_logprobs": [self.named(*one) for one in found.top[:top]]}

    def legacy(self, tokens: Sequence[int], found: Sequence[Alternatives | None], start: int = 0) -> dict[str, Any]:
        """Return a completion's `logprobs`; a prompt's first token has none. start: of the text's offsets."""
        texts = [self.text(token) for token in tokens]
        offsets = [start]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        top = [
            None if one is None else {self.text(other): log_prob for other, log_prob in one.top} | {text: one.log_prob}
            for text, one in zip(texts, found, strict=True)
        ]
        log_probs = [None if one is None else one.log_prob for one in found]
        return {"tokens": texts, "token_logprobs": log_probs, "top_logprobs": top, "text_offset": offsets[:-1]}

    def inspected(self, token: Token) -> dict[str, Any]:
        """Return what a request with `inspect` gets beside each token."""
        found, inside = token.alternatives, token.inside
        top = [{"token": self.text(id), "id": id, "prob": math.exp(log_prob)} for id, log_prob in found.top]
        draft = None
        if inside.draft is not None:
            draft = {"token": self.text(inside.draft), "id": inside.draft, "accepted": inside.draft == token.id}
        return {
            "token": self.text(token.id),
            "id": token.id,
            "prob": math.exp(found.log_prob),
            "alternatives": top,
            "experts": inside.experts,
            "draft": draft,
            "cache": inside.cache(self.model),
        }


class Replies(ABC):
    """A generation in one of the two forms of OpenAI's API."""

    kind: str
    prefix: str

    def __init__(self, generation: Generation) -> None:
        self.generation, answerer = generation, generation.served.answerer
        self.objects = TokenObjects(answerer.model, StreamDecoder(answerer.tokenizer, skip_special_tokens=False))
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def envelope(self, choices: list[dict[str, Any]], chunk: bool = False) -> dict[str, Any]:
        kind = f"{self.kind}.chunk" if chunk and self.kind == "chat.completion" else self.kind
        model = self.generation.body.model
        return {"id": self.id, "object": kind, "created": self.created, "model": model, "choices": choices}

    def usage(self) -> dict[str, int]:
        prompt, made = self.generation.prompt_tokens, self.generation.made
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def choice(self, index: int, finish: str) -> dict[str, Any]:
        """Return what both forms, whole or in chunks, have of a reply: the rest is the caller's."""
        return {"index": index, "finish_reason": finish or None}

    def inspected(self, reply: Reply, last: int = 0) -> dict[str, Any]:
        """Return the `inspect` field of the last tokens, by default all, where it was asked for."""
        if not self.generation.body.inspect:
            return {}
        return {"inspect": [self.objects.inspected(token) for token in reply.tokens[-last:]]}

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """Return the choices of the chunks before the first token."""

    @abstractmethod
    def chunk(self, step: Step) -> dict[str, Any] | None:
        """Return the choice of a step's chunk; None where nothing is to be sent yet."""

    @abstractmethod
    def whole(self, index: int, pieces: list[Piece], finish: str) -> dict[str, Any]:
        """Return the choice of a reply that is complete."""

    async def gather(self) -> dict[str, Any]:
        """Wait for all replies, and return them as one object."""
        pieces: list[list[Piece]] = [[] for _ in self.generation.replies]
        finishes = [""] * len(pieces)
        async for step in self.generation.steps():
            pieces[step.index] += step.pieces
            finishes[step.index] = step.finish
        choices = [self.whole(index, *both) for index, both in enumerate(zip(pieces, finishes, strict=True))]
        return {**self.envelope(choices), "usage": self.usage()}

    async def events(self) -> AsyncIterator[str]:
        """Yield the same as server-sent events."""
        try:
            for choice in self.opening():
                yield event(self.envelope([choice], chunk=True))
            async for step in self.generation.steps():
                if choice := self.chunk(step):
                    yield event(self.envelope([choice], chunk=True))
            if self.generation.body.stream_options.include_usage:
                yield event({**self.envelope([], chunk=True), "usage": self.usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield event(error.body)


class ChatReplies(Replies):
    """POST /v1/chat/completions."""

    kind, prefix = "chat.completion", "chatcmpl"

    def opening(self) -> list[dict[str, Any]]:
        role = {"role": "assistant", "content": ""}
        return [{**self.choice(index, ""), "delta": role} for index in range(len(self.generation.replies))]

    def chunk(self, step: Step) -> dict[str, Any] | None:
        reply = self.generation.replies[step.index]
        delta = spoken(step.pieces)
        for call in delta.get("tool_calls", []):
            call["index"] = reply.calls
            reply.calls += 1
        logprobs = self._logprobs(reply, 1)
        if not (delta or step.finish or logprobs or self.generation.body.inspect):
            return None
        return {**self.choice(step.index, step.finish), "delta": delta, **logprobs, **self.inspected(reply, 1)}

    def whole(self, index: int, pieces: list[Piece], finish: str) -> dict[str, Any]:
        reply, message = self.generation.replies[index], {"role": "assistant", "content": "", **spoken(pieces)}
        if message.get("tool_calls") and not message["content"]:
            message["content"] = None
        return {**self.choice(index, finish), "message": message, **self._logprobs(reply), **self.inspected(reply)}

    def _logprobs(self, reply: Reply, last: int = 0) -> dict[str, Any]:
        body = self.generation.body
        if body.top is None:
            return {}
        entries = [self.objects.chat_entry(token, body.top) for token in reply.tokens[-last:]]
        return {"logprobs": {"content": entries}}


class CompletionReplies(Replies):
    """POST /v1/completions. echoed: of each prompt, where it is asked for, its tokens' alternatives (or nothing)."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, generation: Generation, echoed: Sequence[Sequence[Alternatives]]) -> None:
        super().__init__(generation)
        self.body: CompletionRequest = generation.body
        self.echoed = echoed
        self.offsets = [len(self._echo(index)) for index in range(len(generation.replies))]

    def opening(self) -> list[dict[str, Any]]:
        if not self.body.echo:
            return []
        choices = []
        for index, reply in enumerate(self.generation.replies):
            logprobs = self.objects.legacy(reply.prompt, self._prompt_log_probs(index), 0) if self._scored else None
            choices.append({**self.choice(index, ""), "text": self._echo(index), "logprobs": logprobs})
        return choices

    def chunk(self, step: Step) -> dict[str, Any] | None:
        reply = self.generation.replies[step.index]
        text, logprobs = spoken(step.pieces).get("content", ""), None
        if self._scored:
            logprobs = self.objects.legacy([step.token.id], [step.token.alternatives], self.offsets[step.index])
            self.offsets[step.index] += len(logprobs["tokens"][0])
        elif not (text or step.finish or self.body.inspect):
            return None
        choice = {**self.choice(step.index, step.finish), "text": text, "logprobs": logprobs}
        return {**choice, **self.inspected(reply, 1)}

    def whole(self, index: int, pieces: list[Piece], finish: str) -> dict[str, Any]:
        reply, logprobs = self.generation.replies[index], None
        tokens, found = [token.id for token in reply.tokens], [token.alternatives for token in reply.tokens]
        if self._scored:
            before = reply.prompt if self.body.echo else []
            logprobs = self.objects.legacy([*before, *tokens], [*self._prompt_log_probs(index), *found])
        text = self._echo(index) + spoken(pieces).get("content", "")
        choice = {**self.choice(index, finish or "length"), "text": text, "logprobs": logprobs}
        return {**choice, **self.inspected(reply)}

    @property
    def _scored(self) -> bool:
        return self.body.logprobs is not None

    def _echo(self, index: int) -> str:
        ids = self.generation.replies[index].prompt
        tokenizer = self.generation.served.answerer.tokenizer
        return tokenizer.decode(ids, skip_special_tokens=False) if self.body.echo else ""

    def _prompt_log_probs(self, index: int) -> list[Alternatives | None]:
        return [None, *self.echoed[index // self.body.n]] if self.body.echo else []


def spoken(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return pieces as the fields of a message."""
    fields: dict[str, Any] = {}
    for piece in pieces:
        if piece.kind == "tool_calls":
            fields.setdefault("tool_calls", []).append(dict(piece.text))
        else:
            fields[piece.kind] = fields.get(piece.kind, "") + piece.text
    return fields


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events of a generation, which is closed when they end or the client hangs up."""

    def __init__(self, replies: Replies) -> None:
        super().__init__(replies.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.generation = replies.generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.close()


async def respond(request: Request, replies: Replies) -> Response:
    """Answer a request as it asks: whole, or in events. A client that hangs up frees its slots."""
    if replies.generation.body.stream:
        return EventStream(replies)
    answer, gone = asyncio.ensure_future(replies.gather()), asyncio.ensure_future(hung_up(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(answer.result()) if answer.done() else Response(status_code=GONE)
    finally:
        for task in (answer, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
        replies.generation.close()


async def hung_up(request: Request) -> None:
    """Wait until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
