"""A server of two small models in this process, on a port of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
import uvicorn
from openai import OpenAI

from eval.answering import Answerer
from eval.serving.app import create_app
from eval.serving.metrics import Metrics
from eval.serving.worker import Worker
from LMConfig import LMConfig
from model import MiniDeepSeek

SIZES = dict(
    hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
    n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=24, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, max_position_embeddings=96, num_nextn_predict_layers=1,
    initializer_range=0.3,
)  # fmt: skip


class Server(NamedTuple):
    """A server that runs. `url` without a slash at its end."""

    url: str
    worker: Worker

    def client(self, **options: object) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, **options)


@pytest.fixture(scope="module")
def answerers(tokenizer) -> dict[str, Answerer]:
    """Two models whose replies are noise, so that bytes and ends come in every order."""
    made = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = LMConfig(vocab_size=tokenizer.vocab_size, **SIZES)
        made[name] = Answerer(MiniDeepSeek(config).eval(), tokenizer)
    return made


@pytest.fixture(scope="module")
def serving(answerers) -> Callable[..., Iterator[Server]]:
    """`with serving(slots=4, queue=8, **options of create_app) as server`."""

    @contextmanager
    def serve(slots: int = 4, queue: int = 8, **options: object) -> Iterator[Server]:
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
