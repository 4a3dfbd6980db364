"""POST /v1/chat/completions by OpenAI's own client: the chat's tokens, every option, every refusal in its terms."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from serving.conftest import QUESTIONS, asked
from text.chats.chat_template import encode_chat
from text.stream_decoder import StreamDecoder


def test_replies_are_the_chats_to_the_token_whatever_runs_beside_them(server, answerers, direct):
    client = server.client()

    def ask(job: tuple[str, str]) -> str:
        name, question = job
        made = client.chat.completions.create(model=name, messages=asked(question), temperature=0, max_tokens=24)
        return made.choices[0].message.content

    jobs = [(name, question) for question in QUESTIONS for name in answerers]
    with ThreadPoolExecutor(len(jobs)) as pool:
        for (name, question), reply in zip(jobs, pool.map(ask, jobs), strict=True):
            assert reply == direct(name, question)


def test_a_stream_is_the_whole_reply_in_pieces_of_whole_characters(server, direct):
    client = server.client()
    stream = client.chat.completions.create(
        model="one", messages=asked("你好"), temperature=0, max_tokens=40, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason in ("stop", "length")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == direct("one", "你好", 40)
    assert last.choices == [] and last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


def test_many_async_streams_with_several_choices_each(server):
    from openai import AsyncOpenAI

    async def ask(client: AsyncOpenAI, seed: int) -> list[str]:
        texts = ["", "", ""]
        stream = await client.chat.completions.create(
            model="two", messages=asked("a"), n=3, seed=seed, max_tokens=12, stream=True, temperature=1.0
        )
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        return texts

    async def all_of_them() -> list[list[str]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=20) as client:
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


def test_a_reply_ends_before_a_stop_text(server, direct):
    whole = direct("one", QUESTIONS[1], 40)
    stop = whole[6:8]
    made = server.client().chat.completions.create(
        model="one", messages=asked(QUESTIONS[1]), temperature=0, max_tokens=40, stop=["never there", stop]
    )
    assert made.choices[0].message.content == whole[: whole.index(stop)]
    assert made.choices[0].finish_reason == "stop"
    assert server.settled()


def test_an_inspected_reply_is_the_same_and_shows_what_the_network_did(server, answerers):
    body = {"model": "one", "messages": asked("你好"), "temperature": 0, "max_tokens": 12}
    plain, inspected = (
        server.post("/v1/chat/completions", body | more).json()["choices"][0] for more in ({}, {"inspect": True})
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
    found = server.post("/tokenize", {"messages": written}).json()
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
        found = server.post("/v1/chat/completions", body | more)
        assert found.status_code == 200, found.text
        if not stream:
            return found.json()["choices"][0]["message"]["content"]
        chunks = [json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: {")]
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    assert answer(**NEUTRAL) == answer() != ""


@pytest.mark.parametrize(
    ("error", "param", "body"),
    [
        ("NotFoundError", "model", {"model": "three"}),
        ("BadRequestError", "temperature", {"temperature": -1}),
        ("BadRequestError", "temperature", {"temperature": "warm"}),
        ("BadRequestError", "top_p", {"top_p": 0}),
        ("BadRequestError", "n", {"n": 0}),
        ("BadRequestError", "stop", {"stop": [""]}),
        ("BadRequestError", "max_tokens", {"max_tokens": 0}),
        ("BadRequestError", "presence_penalty", {"presence_penalty": 1}),
        ("BadRequestError", "response_format", {"response_format": {"type": "json_object"}}),
        ("BadRequestError", "frequency_penalty", {"frequency_penalty": 0.5}),
        ("BadRequestError", "modalities", {"modalities": ["text", "audio"]}),
        ("BadRequestError", "tool_choice", {"tool_choice": "required"}),
        ("BadRequestError", "tools.0.function.name", {"tools": [{"type": "web_search"}]}),
        ("BadRequestError", "messages", {"messages": []}),
        ("BadRequestError", "messages", {"messages": [{"role": "robot", "content": "a"}]}),
        ("BadRequestError", "messages", {"messages": [{"role": "assistant", "content": "a"}]}),
        ("BadRequestError", "messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("BadRequestError", "messages", {"messages": asked("word " * 200)}),
    ],
)
def test_what_is_wrong_is_refused_by_name(server, error, param, body):
    import openai

    good = {"model": "one", "messages": asked("a"), "max_tokens": 2}
    with pytest.raises(getattr(openai, error)) as caught:
        server.client().chat.completions.create(**{**good, **body})
    assert caught.value.param == param and param.rpartition(".")[2] in str(caught.value)
