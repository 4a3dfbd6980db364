"""OpenAI's own client against the server: the same tokens as the chat, every option, every refusal in its terms."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import httpx2 as httpx
import openai
import pytest
import torch
import uvicorn

from eval.answering import Answerer
from eval.serving.app import create_app
from eval.serving.metrics import Metrics
from eval.serving.worker import Worker
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.decoding.sampling import GREEDY
from text.chats.chat_template import encode_chat
from text.stream_decoder import StreamDecoder

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

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, **options)


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


def settled(server, seconds: float = 20.0) -> bool:
    """Whether all slots become free."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not server.worker._unfinished and not any(one.engine.busy for one in server.worker.models.values()):
            return True
        time.sleep(0.01)
    return False


def direct(answerer, question: str, tokens: int = 24) -> str:
    return "".join(piece for piece, _ in answerer.stream_reply(asked(question), GREEDY, tokens))


# Replies


def test_replies_are_the_chats_to_the_token_whatever_runs_beside_them(server, answerers):
    client = server.client()

    def ask(job: tuple[str, str]) -> str:
        name, question = job
        made = client.chat.completions.create(model=name, messages=asked(question), temperature=0, max_tokens=24)
        return made.choices[0].message.content

    jobs = [(name, question) for question in QUESTIONS for name in answerers]
    with ThreadPoolExecutor(len(jobs)) as pool:
        for (name, question), reply in zip(jobs, pool.map(ask, jobs), strict=True):
            assert reply == direct(answerers[name], question)


def test_a_stream_is_the_whole_reply_in_pieces_of_whole_characters(server, answerers):
    client = server.client()
    stream = client.chat.completions.create(
        model="one", messages=asked("你好"), temperature=0, max_tokens=40, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason in ("stop", "length")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == direct(answerers["one"], "你好", 40)
    assert last.choices == [] and last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


def test_many_async_streams_with_several_choices_each(server):
    async def ask(client: openai.AsyncOpenAI, seed: int) -> list[str]:
        texts = ["", "", ""]
        stream = await client.chat.completions.create(
            model="two", messages=asked("a"), n=3, seed=seed, max_tokens=12, stream=True, temperature=1.0
        )
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        return texts

    async def all_of_them() -> list[list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=20) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in (1, 1, 2)))

    first, same, other = asyncio.run(all_of_them())
    assert first == same and first != other and len(set(first)) == 3


def test_log_probabilities_are_the_models_own(server, answerers):
    made = server.client().chat.completions.create(
        model="one", messages=asked("你好"), temperature=0.7, seed=3, max_tokens=6, logprobs=True, top_logprobs=3
    )
    entries = made.choices[0].logprobs.content
    answerer = answerers["one"]
    ids, _ = encode_chat(answerer.tokenizer, asked("你好"), add_generation_prompt=True)
    prompt = len(ids)
    bytes_of = StreamDecoder(answerer.tokenizer, skip_special_tokens=False).bytes_of
    by_bytes = {bytes_of(token): token for token in range(answerer.tokenizer.vocab_size)}
    ids += [by_bytes[bytes(entry.bytes)] for entry in entries]
    with torch.no_grad():
        log_probs = answerer.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for place, entry in enumerate(entries):
        expected = log_probs[prompt - 1 + place]
        assert entry.logprob == pytest.approx(expected[ids[prompt + place]].item(), abs=1e-4)
        top = [one.logprob for one in entry.top_logprobs]
        assert top == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_has_the_log_probabilities_of_one_pass(server, answerers, stream):
    answerer = answerers["two"]
    ids = answerer.tokenizer.encode("你好，Taotao。")
    made = server.client().completions.create(
        model="two", prompt=ids, echo=True, logprobs=1, max_tokens=2, temperature=0, stream=stream
    )
    choices = [chunk.choices[0] for chunk in made] if stream else [made.choices[0]]
    log_probs = [number for choice in choices for number in choice.logprobs.token_logprobs]
    best = [top for choice in choices for top in choice.logprobs.top_logprobs]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    with torch.no_grad():
        expected = answerer.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert log_probs[0] is None and best[0] is None and len(log_probs) == len(ids) + 2
    for place in range(1, len(ids)):
        assert log_probs[place] == pytest.approx(expected[place - 1, ids[place]].item(), abs=1e-4)
        assert max(best[place].values()) == pytest.approx(expected[place - 1].max().item(), abs=1e-4)
        assert log_probs[place] in best[place].values()
    assert offsets[0] == 0 and offsets == sorted(offsets)
    assert "".join(choice.text for choice in choices).startswith("你好，Taotao。")


def test_completions_of_several_prompts_come_in_their_order(server):
    client, prompts = server.client(), ["你好", "a b", "小镇"]
    alone = [client.completions.create(model="one", prompt=one, temperature=0, n=1).choices[0].text for one in prompts]
    made = client.completions.create(model="one", prompt=prompts, temperature=0, n=2)
    assert [choice.index for choice in made.choices] == list(range(6))
    assert [choice.text for choice in made.choices] == [text for text in alone for _ in range(2)]
    nothing = client.completions.create(model="one", prompt="你好", echo=True, max_tokens=0)
    assert (nothing.choices[0].text, nothing.usage.completion_tokens) == ("你好", 0)


def test_a_reply_ends_before_a_stop_text(server, answerers):
    whole = direct(answerers["one"], QUESTIONS[1], 40)
    stop = whole[6:8]
    made = server.client().chat.completions.create(
        model="one", messages=asked(QUESTIONS[1]), temperature=0, max_tokens=40, stop=["never there", stop]
    )
    assert made.choices[0].message.content == whole[: whole.index(stop)]
    assert made.choices[0].finish_reason == "stop"
    assert settled(server)


def test_an_inspected_reply_is_the_same_and_shows_what_the_network_did(server, answerers):
    body = {"model": "one", "messages": asked("你好"), "temperature": 0, "max_tokens": 12}
    plain, inspected = (
        httpx.post(f"{server.url}/v1/chat/completions", json=body | more).json()["choices"][0]
        for more in ({}, {"inspect": True})
    )
    assert inspected["message"] == plain["message"]
    answerer, tokens = answerers["one"], inspected["inspect"]
    ids, _ = encode_chat(answerer.tokenizer, asked("你好"), add_generation_prompt=True)
    prompt, model = len(ids), answerer.model
    ids += [token["id"] for token in tokens]
    inputs = {}
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, given, out, number=number: inputs.update({number: out}))
        for number, layer in enumerate(model.model.layers)
        if layer.is_moe
    ]
    with torch.no_grad():
        out = model(torch.tensor([ids]), mtp=True)
        logits = out.logits[0]
    for hook in hooks:
        hook.remove()
    for place, token in enumerate(tokens):
        assert token["prob"] == pytest.approx(logits[prompt - 1 + place].softmax(-1)[token["id"]].item(), abs=1e-4)
        for layer in token["experts"]:
            weights, indices, scores = (part[prompt - 1 + place] for part in inputs[layer["layer"]])
            assert set(layer["chosen"]) == set(indices.tolist())
            assert layer["scores"] == pytest.approx(scores.tolist(), abs=2e-4)
            assert sorted(layer["weights"]) == pytest.approx(sorted(weights.tolist()), abs=2e-4)
        assert token["cache"]["mha_bytes"] > token["cache"]["mla_bytes"] > 0
        if place:
            assert token["draft"]["accepted"] == (token["draft"]["id"] == token["id"])
    assert tokens[0]["draft"] is None


def test_sampling_inspected_or_not_gives_the_same_tokens(server):
    body = {"model": "two", "prompt": "你好", "seed": 5, "max_tokens": 16, "top_p": 0.9, "repetition_penalty": 1.2}
    plain, inspected = (
        httpx.post(f"{server.url}/v1/completions", json=body | more).json()["choices"][0]["text"]
        for more in ({}, {"inspect": True})
    )
    assert plain == inspected


def test_tools_are_in_the_prompt_as_in_training(server):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    client = server.client()

    def length(**options: object) -> int:
        made = client.chat.completions.create(model="one", messages=asked("a"), max_tokens=1, **options)
        return made.usage.prompt_tokens

    ids, _ = encode_chat(
        server.worker.models["one"].answerer.tokenizer,
        [{"role": "system", "content": json.dumps([tool])}, *asked("a")],
        add_generation_prompt=True,
    )
    assert length(tools=[tool]) == len(ids) > length(tools=[tool], tool_choice="none") == length()


def user(content: object) -> dict:
    return {"role": "user", "content": content}


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
# What clients write -> the conversation that the model reads.
WRITTEN = {
    "parts": ([user([{"type": "text", "text": "你"}, {"type": "text", "text": "好"}])], asked("你好")),
    "a named user": ([{**user("a"), "name": "anna"}], asked("a")),
    "a developer": (
        [{"role": "developer", "content": "x"}, user("a")], [{"role": "system", "content": "x"}, user("a")],
    ),
    "a reply that was stopped": (
        [user("a"), {"role": "assistant", "content": None}, user("b")],
        [user("a"), {"role": "assistant", "content": ""}, user("b")],
    ),
    "a reply that was stopped in its thoughts": (
        [user("a"), {"role": "assistant", "content": "", "reasoning_content": "hm"}, user("b")],
        [user("a"), {"role": "assistant", "content": ""}, user("b")],
    ),
    "a reply that failed": ([user("a"), user("b")], asked("a\n\nb")),
    "two system prompts": (
        [{"role": "system", "content": "x"}, {"role": "system", "content": "y"}, user("a")],
        [{"role": "system", "content": "x\n\ny"}, user("a")],
    ),
    "a tool's answer": (
        [
            user("a"), {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "name": "add", "content": [{"type": "text", "text": "3"}]},
        ],
        [
            user("a"), {"role": "assistant", "content": '{"name": "add", "arguments": {"a": 1}}'},
            {"role": "tool", "content": "3"},
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_messages_as_clients_write_them_are_read_as_in_training(name, server, tokenizer):
    written, read = WRITTEN[name]
    found = httpx.post(f"{server.url}/tokenize", json={"messages": written}).json()
    assert found["tokens"] == encode_chat(tokenizer, read, add_generation_prompt=True)[0]


# What Open WebUI, Cherry Studio and others send along, where it changes nothing here.
NEUTRAL = {
    "user": "anna", "metadata": {"chat": "1"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True,
    "response_format": {"type": "text"}, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0,
    "reasoning_effort": "medium", "enable_thinking": True, "thinking": {"type": "enabled"}, "thinking_budget": 1024,
    "chat_template_kwargs": {"enable_thinking": False}, "incremental_output": True, "verbosity": "low",
    "tools": None, "tool_choice": None, "stop": None, "seed": None, "stream_options": None, "max_tokens": None,
    "logprobs": False, "top_logprobs": 0, "modalities": ["text"], "top_k": -1, "best_of": 1, "num_ctx": 2048,
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_fields_that_clients_send_along_change_nothing(server, stream):
    body = {"model": "one", "messages": asked("你好"), "temperature": 0, "max_completion_tokens": 8, "stream": stream}

    def answer(**more: object) -> str:
        found = httpx.post(f"{server.url}/v1/chat/completions", json=body | more)
        assert found.status_code == 200, found.text
        if not stream:
            return found.json()["choices"][0]["message"]["content"]
        chunks = [json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: {")]
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    assert answer(**NEUTRAL) == answer() != ""


# Refusals


@pytest.mark.parametrize(
    ("error", "param", "body"),
    [
        (openai.NotFoundError, "model", {"model": "three"}),
        (openai.BadRequestError, "temperature", {"temperature": -1}),
        (openai.BadRequestError, "temperature", {"temperature": "warm"}),
        (openai.BadRequestError, "top_p", {"top_p": 0}),
        (openai.BadRequestError, "n", {"n": 0}),
        (openai.BadRequestError, "stop", {"stop": [""]}),
        (openai.BadRequestError, "max_tokens", {"max_tokens": 0}),
        (openai.BadRequestError, "presence_penalty", {"presence_penalty": 1}),
        (openai.BadRequestError, "response_format", {"response_format": {"type": "json_object"}}),
        (openai.BadRequestError, "frequency_penalty", {"frequency_penalty": 0.5}),
        (openai.BadRequestError, "modalities", {"modalities": ["text", "audio"]}),
        (openai.BadRequestError, "tool_choice", {"tool_choice": "required"}),
        (openai.BadRequestError, "tools.0.function.name", {"tools": [{"type": "web_search"}]}),
        (openai.BadRequestError, "messages", {"messages": []}),
        (openai.BadRequestError, "messages", {"messages": [{"role": "robot", "content": "a"}]}),
        (openai.BadRequestError, "messages", {"messages": [{"role": "assistant", "content": "a"}]}),
        (openai.BadRequestError, "messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        (openai.BadRequestError, "messages", {"messages": asked("word " * 200)}),
    ],
)
def test_what_is_wrong_is_refused_by_name(server, error, param, body):
    good = {"model": "one", "messages": asked("a"), "max_tokens": 2}
    with pytest.raises(error) as caught:
        server.client().chat.completions.create(**{**good, **body})
    assert caught.value.param == param and param.rpartition(".")[2] in str(caught.value)


def test_too_long_a_prompt_is_refused_with_both_lengths(server):
    with pytest.raises(openai.BadRequestError, match=r"200 tokens .* at most 96") as caught:
        server.client().completions.create(model="one", prompt=[20] * 200)
    assert caught.value.code == "context_length_exceeded"
    made = server.client().completions.create(model="one", prompt=[20] * 90, max_tokens=4000, temperature=0)
    assert made.usage.completion_tokens <= 6


@pytest.mark.parametrize(
    ("path", "content", "word"),
    [
        ("/v1/chat/completions", b"{", "JSON"),
        ("/v1/chat/completions", b"[]", "JSON object"),
        ("/v1/chat/completions", b'{"model": "one", "messages": [{"role": "user", "content": "\\ud800"}]}', ""),
        ("/v1/chat/completions", b'{"model": "one", "temperature": NaN, "messages": [{}]}', "temperature"),
        ("/v1/completions", b'{"model": "one", "prompt": [5, 600]}', "600"),
        ("/v1/completions", b'{"model": "one", "prompt": []}', "prompt"),
        ("/v1/completions", b'{"model": "one", "prompt": "a", "suffix": "b"}', "suffix"),
        ("/v1/completions", b"[" * 100_000, ""),
        ("/tokenize", b'{"prompt": 5}', "prompt"),
        ("/detokenize", b'{"tokens": [-1]}', "tokens"),
    ],
)
def test_broken_bodies_are_refused_in_one_line(server, path, content, word):
    answer = httpx.post(f"{server.url}{path}", content=content, headers={"content-type": "application/json"})
    if answer.status_code != 200:  # half a character is replaced, as everywhere
        assert answer.status_code == 400 and word in answer.json()["error"]["message"]
        assert "\n" not in answer.json()["error"]["message"]
    assert httpx.get(f"{server.url}/health").text == "ok"


def test_a_key_is_asked_for_everywhere_but_on_the_page(serving):
    with serving(api_key="secret") as server:
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()
        for path in ("/metrics", "/tokenizer_info", "/v1/models/one"):
            assert httpx.get(server.url + path).status_code == 401
        assert [httpx.get(server.url + path).status_code for path in ("/", "/health")] == [200, 200]
        right = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret")
        assert [model.id for model in right.models.list()] == ["one", "two"]


def slowed(server: Server, monkeypatch) -> list[str]:
    """Let a reply take longer than any client waits; returns the steps as they are made."""
    steps, step = [], server.worker._step

    def slowly(name, served):
        if served.engine.busy or served.inspected:
            steps.append(name)
            time.sleep(0.02)
        step(name, served)

    monkeypatch.setattr(server.worker, "_step", slowly)
    return steps


def test_a_full_queue_says_when_to_come_again(serving, monkeypatch):
    with serving(slots=1, queue=1) as server:
        slowed(server, monkeypatch)
        client = server.client()
        streams = [
            client.chat.completions.create(model="one", messages=asked(q), stream=True, max_tokens=60, temperature=0)
            for q in QUESTIONS[:2]
        ]
        full = httpx.post(f"{server.url}/v1/completions", json={"model": "one", "prompt": "a"})
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full"
        never = httpx.post(f"{server.url}/v1/completions", json={"model": "one", "prompt": "a", "n": 3})
        assert never.status_code == 400 and "at most 2" in never.json()["error"]["message"]
        for stream in streams:
            list(stream)
        assert settled(server)


# Hanging up, and what the server says of itself


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("inspect", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(server, stream, inspect, monkeypatch):
    steps = slowed(server, monkeypatch)
    body = {"model": "one", "prompt": "a", "n": 3, "max_tokens": 90, "stream": stream, "inspect": inspect}
    with httpx.Client(timeout=0.5) as client:
        if stream:
            with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{server.url}/v1/completions", json=body)
    assert settled(server) and len(steps) < 80


def test_a_worker_that_fails_says_so_to_all_who_wait(serving, monkeypatch):
    with serving() as server:
        monkeypatch.setattr(server.worker.models["one"].engine, "step", lambda: 1 / 0)
        monkeypatch.setattr("threading.excepthook", lambda _: None)
        with pytest.raises(openai.InternalServerError):
            server.client().completions.create(model="one", prompt="a")
        assert httpx.get(f"{server.url}/health").status_code == 500
        with pytest.raises(openai.InternalServerError):
            server.client().completions.create(model="two", prompt="a")


def test_the_remote_tokenizer_of_lm_eval_finds_what_it_asks_for(server, tokenizer):
    text = "你好，Taotao 😀"
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert ids == tokenizer.encode(text)
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("</s>", "<s>") and "<|assistant|>" in info["chat_template"]
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": asked("a")}).json()["tokens"]
    assert chat == encode_chat(tokenizer, asked("a"), add_generation_prompt=True)[0]


def test_metrics_count_what_happened(serving):
    with serving() as server:
        server.client().completions.create(model="one", prompt=[20] * 7, max_tokens=5, temperature=0)
        server.client().completions.create(model="one", prompt="a", max_tokens=6, extra_body={"inspect": True})
        page = httpx.get(f"{server.url}/metrics").text
        found = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        assert found['mini_deepseek_prompt_tokens_total{model="one"}'] == "8.0"
        assert 2 <= float(found['mini_deepseek_generated_tokens_total{model="one"}']) <= 11
        assert found['mini_deepseek_requests_total{route="/v1/completions",status="200"}'] == "2.0"
        assert found['mini_deepseek_time_to_first_token_seconds_count{model="one"}'] == "2.0"
        assert found["mini_deepseek_running_requests"] == found["mini_deepseek_waiting_requests"] == "0.0"
        drafted = float(found['mini_deepseek_draft_tokens_total{model="one"}'])
        assert 0 <= float(found['mini_deepseek_accepted_draft_tokens_total{model="one"}']) <= drafted <= 5


def test_other_hosts_and_other_origins_are_refused(serving):
    with serving(hosts=["127.0.0.1", "localhost"], cors=["http://friend.example"]) as server:
        for host, status in (("localhost:80", 200), ("evil.example", 400)):
            assert httpx.get(f"{server.url}/v1/models", headers={"host": host}).status_code == status
        for origin, allowed in (("http://friend.example", True), ("http://evil.example", False)):
            headers = httpx.get(f"{server.url}/v1/models", headers={"origin": origin}).headers
            assert ("access-control-allow-origin" in headers) == allowed
