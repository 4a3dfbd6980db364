"""A teacher behind an OpenAI-compatible endpoint: many questions at a time, and patience with its moods.

httpx2 does the talking: it speaks asynchronously, so that no question on its way holds up the end, and has time-outs
of every kind. It reads HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY. The retries are ours: the openai client asks
again neither after a reply that breaks off or holds an error under status 200, nor where a server names a long wait.
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
from urllib.request import getproxies

import httpx2
from socksio import SOCKSError

from errors import UserError, one_line
from training.distill.answers import Answer, Ask, Failure
from training.distill.reply import NoAnswer, read_reply

CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 60.0  # seconds between two attempts, unless the server names more
MOST_BYTES = 1 << 25  # of a reply
LONGEST_WISH = 900.0  # seconds that a server may ask for
PASSING = {200, 408, 409, 425, 429}  # and all from 500 on; 200 is of a reply without an answer
HOPELESS = {401, 403, 404, 405}  # no question will be answered
PROXIES = ("http", "https", "all")  # of HTTP_PROXY and so on, also in small letters


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
        sleep: how it pauses. told: attempts whose failure a person has read of.
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
    told: set[int] = field(default_factory=set, compare=False)

    def answers(self, asks: Sequence[Ask]) -> Generator[tuple[Ask, Answer | Failure], None, None]:
        """Each question with its answer as it comes, in no order. Raises `UserError` when the server wants none.

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
        """One question, with as many attempts as it needs."""
        for attempt in range(self.attempts):
            try:
                return await self._attempt(client, ask)
            except _Passing as error:
                said = str(error)
                if attempt + 1 < self.attempts:
                    # Equal pauses would bring all questions back at the same moment.
                    pause = min(self.first_pause * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
                    pause = max(pause, error.after)
                    if attempt not in self.told:  # of many questions at a time the first stands for all
                        self.told.add(attempt)
                        again = f"attempt {attempt + 2} of {self.attempts} in {pause:.0f} s"
                        print(f"notice: --teacher {self.url}: {one_line(said)}; {again}", file=sys.stderr, flush=True)
                    await self.sleep(pause)
        return Failure(f"{said}, {self.attempts} attempts")

    def _client(self) -> httpx2.AsyncClient:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        timeout = httpx2.Timeout(self.timeout, connect=min(CONNECT_SECONDS, self.timeout))
        try:
            _check_port(self.url)
        except ValueError as error:
            raise self._no_address(error) from None
        try:
            for scheme in PROXIES:
                _check_port(getproxies().get(scheme, ""))
            return httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits)
        except (httpx2.InvalidURL, ValueError) as error:
            variables = [f"{scheme}_proxy" for scheme in PROXIES]
            names = ", ".join(name for name in os.environ if name.lower() in variables) or "the system's proxy"
            raise UserError(
                f"{names}: no address of a proxy ({error}); write http://host:port or socks5://host:port"
            ) from None

    def _no_address(self, error: Exception) -> UserError:
        return UserError(f"--teacher {self.url}: no address ({error}); write http://host:port/v1")

    async def _attempt(self, client: httpx2.AsyncClient, ask: Ask) -> Answer | Failure:
        body = {
            "model": self.model,
            "messages": list(ask.messages),
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
        }
        try:
            async with client.stream("POST", f"{self.url.rstrip('/')}/chat/completions", json=body) as response:
                content = await _read(response)
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise self._no_address(error) from None
        # Time-outs, refused and broken connections, and what is not packed as its header says.
        except (httpx2.TransportError, httpx2.DecodingError, SOCKSError) as error:
            raise _Passing(f"{type(error).__name__} {error}".strip()) from error
        try:
            return read_reply(response.status_code, content)
        except NoAnswer as error:
            if error.status in PASSING or error.status >= 500:
                raise _Passing(str(error), seconds_to_wait(response.headers.get("Retry-After"))) from None
            if error.status in HOPELESS:
                remedy = "check the address" if error.status in (404, 405) else "set OPENAI_API_KEY"
                raise UserError(f"--teacher {self.url}: {error}; {remedy} and --teacher_model {self.model}") from None
            return Failure(str(error))


def _check_port(address: str) -> None:
    """Raises `ValueError` for a port above 65535, which the event loop would meet with an exception of another kind."""
    _ = urlsplit(address if "://" in address else f"//{address}").port


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


async def _give_up(tasks: list[asyncio.Task], client: httpx2.AsyncClient) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, client.aclose(), return_exceptions=True)


async def _read(response: httpx2.Response) -> bytes:
    """The reply's content. Raises `_Passing` for one that does not end."""
    parts, size = [], 0
    async for part in response.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise _Passing(f"a reply of more than {MOST_BYTES:,} bytes")
    return b"".join(parts)
