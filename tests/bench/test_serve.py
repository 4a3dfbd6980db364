"""The load that servers are compared under: every request is asked once, and replies that end early do not count."""

from __future__ import annotations

import asyncio
import runpy
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from errors import UserError

SERVE = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[2] / "bench" / "serve.py")))


@pytest.fixture(scope="module")
def asked() -> list[dict]:
    return []


@pytest.fixture(scope="module")
def url(asked) -> Iterator[str]:
    """A server that says what it was asked for; a prompt names how its reply ends."""
    app = FastAPI()

    @app.post("/v1/completions")
    async def complete(body: dict) -> StreamingResponse:
        asked.append(body)
        lines = ['{"choices": [{"text": ""}]}', '{"choices": [{"text": "a"}]}']
        lines.append(f'{{"choices": [{{"text": "", "finish_reason": "{body["prompt"].split()[0]}"}}]}}')
        return StreamingResponse((f"data: {line}\n\n" for line in [*lines, "[DONE]"]), media_type="text/event-stream")

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def test_each_prompt_is_asked_for_once_and_has_its_time(url, asked):
    texts = [f"length {number}" for number in range(7)]
    firsts = asyncio.run(SERVE.crowd(url, "one", texts, 3, 5))
    assert len(firsts) == 7 and all(first > 0 for first in firsts)
    assert sorted(body["prompt"] for body in asked) == texts
    assert all((body["max_tokens"], body["temperature"], body["stream"]) == (5, 0, True) for body in asked)


def test_a_reply_that_ends_by_itself_is_refused(url):
    with pytest.raises(UserError, match="ended by 'stop'"):
        asyncio.run(SERVE.crowd(url, "one", ["stop"], 1, 5))


def test_the_summary_is_of_all_requests():
    found = SERVE.summary([0.001 * number for number in range(1, 101)], new=8, seconds=4.0)
    assert (found["tokens/s"], found["requests/s"]) == (200, 25)
    assert (found["first text, ms"], found["first text, p95, ms"]) == (pytest.approx(50.5), pytest.approx(96))


def test_prompts_differ_and_have_their_length(tokenizer):
    texts = SERVE.prompts(tokenizer, 12, 30)
    assert len(set(texts)) == 12 and all(30 <= len(tokenizer.encode(text)) < 120 for text in texts)
