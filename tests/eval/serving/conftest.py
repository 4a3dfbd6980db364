"""Two small models behind a server that runs, and what the tests of all its endpoints ask of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx2 as httpx
import pytest
import torch

from eval.answering import Answerer
from eval.serving.app import create_app
from eval.serving.metrics import Metrics
from eval.serving.worker import Worker
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.decoding.sampling import GREEDY

if TYPE_CHECKING:
    import openai

SIZES = dict(
    hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
    n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=24, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, max_position_embeddings=96, num_nextn_predict_layers=1,
    initializer_range=0.3,
)  # fmt: skip


QUESTIONS = [
    "你好",
    "Tell me, what animal is Taotao?",
    "算一算，6加51等于几？",
    "a",
    "谁在广场？",
    "Where is the bear?",
]


def asked(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


@dataclass(frozen=True)
class Server:
    """A server that runs. `url` without a slash at its end."""

    url: str
    worker: Worker

    def client(self, **options: object) -> openai.OpenAI:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, **options)

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(self.url + path, **options)

    def post(self, path: str, body: dict) -> httpx.Response:
        return httpx.post(self.url + path, json=body)

    def settled(self, seconds: float = 20.0) -> bool:
        """Whether all slots become free."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not self.worker._unfinished and not any(one.engine.busy for one in self.worker.models.values()):
                return True
            time.sleep(0.01)
        return False

    def slow_down(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Let a reply take longer than any client waits; returns the steps as they are made."""
        steps, step = [], self.worker._step

        def slowly(name, served):
            if served.engine.busy or served.inspected:
                steps.append(name)
                time.sleep(0.02)
            step(name, served)

        monkeypatch.setattr(self.worker, "_step", slowly)
        return steps


@pytest.fixture(scope="session")
def answerers(tokenizer) -> dict[str, Answerer]:
    """Two models whose replies are noise, so that bytes and ends come in every order."""
    made = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = LMConfig(vocab_size=tokenizer.vocab_size, **SIZES)
        made[name] = Answerer(MiniDeepSeek(config).eval(), tokenizer)
    return made


@pytest.fixture
def direct(answerers) -> Callable[..., str]:
    """`direct(name, question, tokens)`: the chat's reply of a model, with no server."""

    def reply(name: str, question: str, tokens: int = 24) -> str:
        return "".join(piece for piece, _ in answerers[name].stream_reply(asked(question), GREEDY, tokens))

    return reply


@pytest.fixture(scope="session")
def serving(answerers) -> Callable[..., Iterator[Server]]:
    """`with serving(slots=4, queue=8, **options of create_app) as server`."""

    @contextmanager
    def serve(slots: int = 4, queue: int = 8, **options: object) -> Iterator[Server]:
        import uvicorn

        listening = socket.create_server(("127.0.0.1", 0))
        worker = Worker(answerers, slots, queue, Metrics())
        app = create_app(worker, **options)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", worker)
        finally:
            server.should_exit = True
            thread.join()

    return serve


@pytest.fixture(scope="module")
def server(serving) -> Iterator[Server]:
    with serving() as running:
        yield running
