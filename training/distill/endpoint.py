"""A teacher behind an OpenAI-compatible endpoint: many questions at a time, and patience with its moods.

httpx does the talking: it speaks asynchronously, so that no question on its way holds up the end, and has time-outs of
every kind.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import islice

import httpx

from errors import UserError
from training.distill.answers import Answer, Ask, Failure

CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 60.0  # seconds between two attempts, unless the server names more
MOST_BYTES = 1 << 25  # of a reply
LONGEST_WISH = 900.0  # seconds that a server may ask for
PASSING = {408, 409, 425, 429}  # and all from 500 on
HOPELESS = {401, 403, 404, 405}  # no question will be answered


class _Passing(Exception):
    """Worth another attempt. `after`: seconds that the server asks to wait, 0 where it does not say."""

    def __init__(self, what: str, after: float = 0.0) -> None:
        super().__init__(what)
        self.after = after


@dataclass(frozen=True)
class Endpoint:
    """Asks `url`/chat/completions.

    Attributes:
        url: such as http://host:port/v1. model: the name under which it serves the teacher. key: may be empty.
        concurrency: questions at a time. timeout: seconds without a byte before a question is given up.
        attempts: of each question. first_pause: seconds before the second attempt; each later one is twice as long.
        sleep: how it pauses.
    """

    url: str
    model: str
    key: str = ""
    temperature: float = 1.0
    max_new_tokens: int = 256
    concurrency: int = 8
    timeout: float = 120.0
    attempts: int = 6
    first_pause: float = 1.0
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def answers(self, asks: Sequence[Ask]) -> Generator[tuple[Ask, Answer | Failure], None, None]:
        """Each question with its answer as it comes, in no order. Raises `UserError` when the server wants none.

        Closing the generator gives up the questions on their way at once.
        """
        loop = asyncio.new_event_loop()
        left, waiting = iter(asks), {}
        client = self._client()
        try:
            while True:
                for ask in islice(left, self.concurrency - len(waiting)):
                    waiting[loop.create_task(self.ask(client, ask))] = ask
                if not waiting:
                    return
                done, _ = loop.run_until_complete(asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED))
                for task in done:
                    yield waiting.pop(task), task.result()
        finally:
            loop.run_until_complete(_give_up(list(waiting), client))
            loop.close()

    async def ask(self, client: httpx.AsyncClient, ask: Ask) -> Answer | Failure:
        """One question, with as many attempts as it needs."""
        for attempt in range(self.attempts):
            try:
                return await self._attempt(client, ask)
            except _Passing as error:
                said = str(error)
                if attempt + 1 < self.attempts:
                    # Equal pauses would bring all questions back at the same moment.
                    pause = min(self.first_pause * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
                    await self.sleep(max(pause, error.after))
        return Failure(f"{said} ({self.attempts} attempts)")

    def _client(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        timeout = httpx.Timeout(self.timeout, connect=min(CONNECT_SECONDS, self.timeout))
        return httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)

    async def _attempt(self, client: httpx.AsyncClient, ask: Ask) -> Answer | Failure:
        body = {
            "model": self.model,
            "messages": list(ask.messages),
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
        }
        try:
            async with client.stream("POST", f"{self.url.rstrip('/')}/chat/completions", json=body) as response:
                content = await _read(response)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise UserError(f"--teacher {self.url}: no address ({error}); write http://host:port/v1") from None
        # Time-outs, refused and broken connections, and what is not packed as its header says.
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _Passing(f"{type(error).__name__} {error}".strip()) from error
        status = response.status_code
        if status in PASSING or status >= 500:
            raise _Passing(f"status {status}", seconds_to_wait(response.headers.get("Retry-After")))
        if status in HOPELESS:
            remedy = "check the address" if status in (404, 405) else "set OPENAI_API_KEY"
            raise UserError(
                f"--teacher {self.url}: status {status} ({_said(content)}); {remedy} and --teacher_model {self.model}"
            )
        if status != 200:
            return Failure(f"status {status} ({_said(content)})")
        try:
            said = json.loads(content)
            choice = said["choices"][0]
            message = choice["message"]
            text, finish = message.get("content") or "", choice.get("finish_reason") or "stop"
            thoughts = message.get("reasoning_content") or ""
            tokens = int((said.get("usage") or {}).get("completion_tokens") or 0)
            if not all(isinstance(part, str) for part in (text, thoughts, finish)):
                raise TypeError("content is no text")
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise _Passing(f"no answer in the reply ({type(error).__name__}: {error})") from error
        if thoughts.strip():
            text = f"<think>\n{thoughts.strip()}\n</think>\n{text}"
        return Answer(text, finish, tokens)


def seconds_to_wait(header: str | None) -> float:
    """Of a Retry-After header: seconds or a date; 0 where it says nothing."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WISH) if seconds == seconds else 0.0


async def _give_up(tasks: list[asyncio.Task], client: httpx.AsyncClient) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, client.aclose(), return_exceptions=True)


async def _read(response: httpx.Response) -> bytes:
    """The reply's content. Raises `_Passing` for one that does not end."""
    parts, size = [], 0
    async for part in response.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise _Passing(f"a reply of more than {MOST_BYTES:,} bytes")
    return b"".join(parts)


def _said(content: bytes) -> str:
    """The server's own words, in one short line."""
    return " ".join(content.decode("utf8", "replace").split())[:200] or "no message"
