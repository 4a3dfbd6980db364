"""A request's replies, from its jobs in the worker to what is sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from errors import UserError
from eval.serving.reply_text import Piece, ReplyText
from eval.serving.requests import ChatRequest, SampledRequest
from eval.serving.worker import Job, Served, Token, Worker
from model.decoding.scheduler import Request
from text.chats.chat_template import Message, encode_chat
from text.chats.conversations import with_system
from text.chats.turns import read_turn
from text.sources.row_report import RowError

ENDED = "the server's worker has ended; see its log"
INSPECTED = 8  # alternatives of each token where none are asked for


class ApiError(Exception):
    """Becomes OpenAI's error object. `param`: the field that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Step(NamedTuple):
    """What one token adds to one reply. `finish` as OpenAI has it, with the last one."""

    index: int
    pieces: list[Piece]
    token: Token
    finish: str


@dataclass
class Reply:
    """One of a request's replies so far."""

    text: ReplyText
    prompt: list[int]
    calls: int = 0  # of tools, in the chunks sent
    tokens: list[Token] = field(default_factory=list)


class Generation:
    """A request being answered: iterate over `steps` once, and `close` it however that ends. `made`: tokens so far.

    Args:
        prompts: token ids of each; every one is answered `body.n` times.
        tools: see `ReplyText`.
    """

    def __init__(
        self,
        worker: Worker,
        body: SampledRequest,
        prompts: Sequence[list[int]],
        tools: Sequence[str] | None = None,
    ) -> None:
        self.worker, self.body, self.served = worker, body, worker.models[body.model]
        self.begun, self.loop = time.monotonic(), asyncio.get_running_loop()
        self.arrived: asyncio.Queue[tuple[int, Token]] = asyncio.Queue()
        tokenizer = self.served.answerer.tokenizer
        self.replies = [Reply(ReplyText(tokenizer, body.stop, tools), ids) for ids in prompts for _ in range(body.n)]
        jobs = [self._job(index, reply.prompt) for index, reply in enumerate(self.replies)]
        self.jobs = {index: job for index, job in enumerate(jobs) if job.request.max_new_tokens}
        self.unfinished = set(self.jobs)
        self.prompt_tokens, self.made = sum(map(len, prompts)), 0
        if len(self.jobs) > (most := worker.slots + worker.queue_size):
            raise ApiError(400, f"n: {len(self.jobs)} replies in one request; this server takes at most {most}", "n")
        if not worker.submit(list(self.jobs.values())):
            if worker.failure:
                raise ApiError(500, ENDED)
            raise ApiError(429, f"{worker.queue_size} requests wait already; try again", code="queue_full")
        worker.metrics.prompt.labels(body.model).inc(self.prompt_tokens)

    async def steps(self) -> AsyncIterator[Step]:
        """Yield what comes, of all replies as they grow."""
        while self.unfinished:
            index, token = await self.arrived.get()
            if token.finish == "error":
                raise ApiError(500, ENDED)
            if index not in self.unfinished:
                continue
            if not self.made:
                self.worker.metrics.first.labels(self.body.model).observe(time.monotonic() - self.begun)
            self.made += 1
            reply = self.replies[index]
            reply.tokens.append(token)
            pieces, finish = reply.text.push(token.id, token.finish)
            if finish:
                self.unfinished.discard(index)
                self.worker.cancel(self.jobs[index])  # a stop text ends it here
            yield Step(index, pieces, token, finish)

    def close(self) -> None:
        """Give up what is unfinished; its slots are free before the next step."""
        for index in self.unfinished:
            self.worker.cancel(self.jobs[index])

    def _job(self, index: int, ids: list[int]) -> Job:
        body, context = self.body, self.served.context
        if not ids:
            raise ApiError(400, "prompt: is empty", "prompt")
        if len(ids) >= context:
            param = "messages" if isinstance(body, ChatRequest) else "prompt"
            message = f"{param}: {len(ids)} tokens are too long; {body.model} reads at most {context}, reply included"
            raise ApiError(400, message, param, "context_length_exceeded")
        room = context - len(ids)
        limit = room if body.limit is None else min(body.limit, room)  # 0: an echo alone
        generator = torch.Generator()
        if body.seed is None:
            generator.seed()
        else:
            generator.manual_seed((body.seed + index) % 2**63)
        request = Request(
            ids, limit, body.sampling, (self.served.answerer.tokenizer.eos_id,), torch.rand(limit, generator=generator)
        )
        top = max(body.top or 0, INSPECTED) if body.inspect else body.top
        return Job(body.model, request, lambda token: self._arrive(index, token), top, body.inspect)

    def _arrive(self, index: int, token: Token) -> None:
        """Hand a token over; called in the worker's thread."""
        with suppress(RuntimeError):  # the server is ending, its loop is closed
            self.loop.call_soon_threadsafe(self.arrived.put_nowait, (index, token))


def chat_prompt(served: Served, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[int]:
    """Return the token ids of a conversation up to where the reply begins, as in training."""
    try:
        turns: list[Message] = [read_turn(number, _turn(one)) for number, one in enumerate(messages, start=1)]
        turns = with_system({"tools": list(tools)} if tools else {}, _joined(turns))
        return encode_chat(served.answerer.tokenizer, turns, add_generation_prompt=True)[0]
    except (RowError, UserError) as error:
        raise ApiError(400, f"messages: {error}", "messages") from None


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message of a client as data has it: newer ones call the system `developer`, cut replies have no text."""
    kept = {name: value for name, value in message.items() if name not in ("name", "tool_call_id", "refusal", "audio")}
    if kept.get("role") == "assistant" and not kept.get("content") and not kept.get("tool_calls"):
        return {"role": "assistant", "content": ""}
    return {**kept, "role": "system"} if kept.get("role") == "developer" else kept


def _joined(turns: Sequence[Message]) -> list[Message]:
    """Join turns of a person, or of the system, that follow each other: clients leave out replies that failed."""
    joined: list[Message] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"] in ("user", "system"):
            turn = {**turn, "content": f"{joined.pop()['content']}\n\n{turn['content']}"}
        joined.append(turn)
    return joined


def tool_names(tools: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the functions that a reply may call."""
    names = []
    for number, tool in enumerate(tools):
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise ApiError(400, f"tool {number} is no function with a name", f"tools.{number}.function.name")
        names.append(name)
    return names
