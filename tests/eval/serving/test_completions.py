"""POST /v1/completions: prompts as text and tokens, echoes, and a queue that is full or left."""

from __future__ import annotations

import httpx2 as httpx
import pytest
import torch

from serving.conftest import QUESTIONS, asked


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


def test_a_suffix_is_asked_for_as_training_shows_it(server, answerers):
    tokenizer, create = answerers["two"].tokenizer, server.client().completions.create
    prefix, suffix, middle = (tokenizer.special_ids[f"<|fim_{part}|>"] for part in ("prefix", "suffix", "middle"))
    ids = [prefix, *tokenizer.encode("小猫"), suffix, *tokenizer.encode("公园。"), middle]
    given = {"model": "two", "temperature": 0, "max_tokens": 8}
    made, same = create(prompt="小猫", suffix="公园。", **given), create(prompt=ids, **given)
    assert made.choices[0].text == same.choices[0].text and made.usage.prompt_tokens == len(ids)


def test_sampling_inspected_or_not_gives_the_same_tokens(server):
    body = {"model": "two", "prompt": "你好", "seed": 5, "max_tokens": 16, "top_p": 0.9, "repetition_penalty": 1.2}
    plain, inspected = (
        server.post("/v1/completions", body | more).json()["choices"][0]["text"] for more in ({}, {"inspect": True})
    )
    assert plain == inspected


def test_too_long_a_prompt_is_refused_with_both_lengths(server):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match=r"200 tokens .* at most 96") as caught:
        server.client().completions.create(model="one", prompt=[20] * 200)
    assert caught.value.code == "context_length_exceeded"
    made = server.client().completions.create(model="one", prompt=[20] * 90, max_tokens=4000, temperature=0)
    assert made.usage.completion_tokens <= 6


def test_a_full_queue_says_when_to_come_again(serving, monkeypatch):
    with serving(slots=1, queue=1) as server:
        server.slow_down(monkeypatch)
        client = server.client()
        streams = [
            client.chat.completions.create(model="one", messages=asked(q), stream=True, max_tokens=60, temperature=0)
            for q in QUESTIONS[:2]
        ]
        full = server.post("/v1/completions", {"model": "one", "prompt": "a"})
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full"
        never = server.post("/v1/completions", {"model": "one", "prompt": "a", "n": 3})
        assert never.status_code == 400 and "at most 2" in never.json()["error"]["message"]
        for stream in streams:
            list(stream)
        assert server.settled()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("inspect", [False, True])
def test_a_client_that_hangs_up_frees_its_slot(server, stream, inspect, monkeypatch):
    steps = server.slow_down(monkeypatch)
    body = {"model": "one", "prompt": "a", "n": 3, "max_tokens": 90, "stream": stream, "inspect": inspect}
    with httpx.Client(timeout=0.5) as client:
        if stream:
            with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{server.url}/v1/completions", json=body)
    assert server.settled() and len(steps) < 80


def test_a_worker_that_fails_says_so_to_all_who_wait(serving, monkeypatch):
    from openai import InternalServerError

    with serving() as server:
        monkeypatch.setattr(server.worker.models["one"].engine, "step", lambda: 1 / 0)
        monkeypatch.setattr("threading.excepthook", lambda _: None)
        with pytest.raises(InternalServerError):
            server.client().completions.create(model="one", prompt="a")
        assert server.get("/health").status_code == 500
        with pytest.raises(InternalServerError):
            server.client().completions.create(model="two", prompt="a")
