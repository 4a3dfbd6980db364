"""A teacher behind an OpenAI-compatible endpoint: many questions at a time, with retries.

httpx2 speaks asynchronously, so that no question on its way holds up the end, and reads HTTP_PROXY, HTTPS_PROXY,
ALL_PROXY and NO_PROXY. The retries are ours: the openai client asks again neither after a reply that breaks off or
holds an error under status 200, nor where a server names a long wait.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from urllib.parse import urlsplit

import httpx2
from socksio import SOCKSError

from errors import UserError, one_line
from training.distill.answers import Answer, Ask, Failure
from training.distill.curation import AnswerSettings
from training.distill.reply import NoAnswer, read_reply

CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 60.0  # seconds between two attempts, unless the server names more
LONGEST_WAIT = 900.0  # seconds that a server may ask for
MOST_BYTES = 1 << 25  # of a reply
TRANSIENT = {200, 408, 409, 425, 429}  # and all from 500 on; 200 is of a reply without an answer
FATAL = {401, 403, 404, 405}  # no question will be answered


class _Transient(Exception):
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
        sleep: how it pauses. reported: attempts whose failure was reported.
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
    reported: set[int] = field(default_factory=set, compare=False)

    def answers(self, asks: Sequence[Ask]) -> Generator[tuple[Ask, Answer | Failure], None, None]:
        """Yield each question with its answer as it comes, in no order. Raises `UserError` when the server wants none.

        Closing the generator gives up the questions on their way at once.
        """
        client, loop = self._client(), asyncio.new_event_loop()
        left, waiting = iter(asks), {}
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

    async def ask(self, client: httpx2.AsyncClient, ask: Ask) -> Answer | Failure:
        """Put one question, with as many attempts as it needs."""
        for attempt in range(1, self.attempts + 1):
            try:
                return await self._attempt(client, ask)
            except _Transient as error:
                reason, after = str(error), error.after
            if attempt < self.attempts:
                # Equal pauses would bring all questions back at the same moment.
                pause = min(self.first_pause * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
                await self._pause(attempt, reason, max(pause, after))
        return Failure(f"{reason}, {self.attempts} attempts")

    async def _pause(self, attempt: int, reason: str, seconds: float) -> None:
        if attempt not in self.reported:  # of many questions at a time the first stands for all
            self.reported.add(attempt)
            again = f"attempt {attempt + 1} of {self.attempts} in {seconds:.0f} s"
            print(f"notice: --teacher {self.url}: {one_line(reason)}; {again}", file=sys.stderr, flush=True)
        await self.sleep(seconds)

    def _client(self) -> httpx2.AsyncClient:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        timeout = httpx2.Timeout(self.timeout, connect=min(CONNECT_SECONDS, self.timeout))
        try:
            _ = urlsplit(self.url).port  # above 65535 it would come as an exception group
        except ValueError as error:
            raise self._no_address(error) from None
        try:
            return httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits)
        except (httpx2.InvalidURL, ValueError) as error:
            raise UserError(
                f"HTTP_PROXY, HTTPS_PROXY or ALL_PROXY: no address of a proxy ({error}); "
                "write http://host:port or socks5://host:port"
            ) from None

    def _no_address(self, error: Exception) -> UserError:
        return UserError(f"--teacher {self.url}: no address ({error}); write http://host:port/v1")

    async def _attempt(self, client: httpx2.AsyncClient, ask: Ask) -> Answer | Failure:
        body = {"model": self.model, "messages": list(ask.messages)}
        body |= {"temperature": self.temperature, "max_tokens": self.max_new_tokens}
        content = bytearray()
        try:
            async with client.stream("POST", f"{self.url.rstrip('/')}/chat/completions", json=body) as response:
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > MOST_BYTES:
                        raise _Transient(f"a reply of more than {MOST_BYTES:,} bytes")
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise self._no_address(error) from None
        # Time-outs, refused and broken connections, and what is not compressed as its header says.
        except (httpx2.TransportError, httpx2.DecodingError, SOCKSError) as error:
            raise _Transient(f"{type(error).__name__} {error}".strip()) from error
        try:
            return read_reply(response.status_code, content)
        except NoAnswer as error:
            if error.status in TRANSIENT or error.status >= 500:
                raise _Transient(str(error), seconds_to_wait(response.headers.get("Retry-After"))) from None
            if error.status in FATAL:
                remedy = "check the address" if error.status in (404, 405) else "set OPENAI_API_KEY"
                raise UserError(f"--teacher {self.url}: {error}; {remedy} and --teacher_model {self.model}") from None
            return Failure(str(error))


def seconds_to_wait(header: str | None) -> float:
    """Return what a Retry-After header asks for, in seconds or as a date; 0 where it says nothing."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT) if seconds == seconds else 0.0


async def _give_up(tasks: list[asyncio.Task], client: httpx2.AsyncClient) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, client.aclose(), return_exceptions=True)


def is_endpoint(teacher: str) -> bool:
    """Return whether a teacher is named by its address."""
    return teacher.startswith(("http://", "https://"))


def open_endpoint(url: str, settings: AnswerSettings, temperature: float, max_new_tokens: int) -> Endpoint:
    """Return the teacher of an address; its key is OPENAI_API_KEY in the environment."""
    if not settings.teacher_model:
        raise UserError(f"--teacher {url}: give the name that it serves the model under, --teacher_model NAME")
    key = os.environ.get("OPENAI_API_KEY", "").strip()  # a key read from a file often ends with its line
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY: has a character that no HTTP header can hold; set it again")
    own = settings.concurrency, settings.timeout
    return Endpoint(url, settings.teacher_model, key, temperature, max_new_tokens, *own)
