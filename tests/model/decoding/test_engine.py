"""Continuous batching: every request gets what it would get alone, whatever else runs, and slots never stand empty."""

from __future__ import annotations

import pytest
import torch

from model import MiniDeepSeek
from model.decoding import native
from model.decoding.engine import Engine
from model.decoding.sampling import GREEDY, Sampling
from model.decoding.scheduler import Request

VOCAB, STOP, LONGEST = 61, 2, 64
PATHS = {"C": native.MOST_TOKENS, "PyTorch": 0}


def requests(count: int, sampling: Sampling = GREEDY) -> list[Request]:
    """Prompts of 1 to 40 tokens, 1 to 24 new ones, some prompts twice."""
    draw = torch.Generator().manual_seed(5)

    def one() -> Request:
        length, new = (int(torch.randint(1, most, (1,), generator=draw)) for most in (41, 25))
        prompt = torch.randint(VOCAB, (length,), generator=draw).tolist()
        return Request(prompt, new, sampling, (STOP,), torch.rand(new, generator=draw).tolist())

    made = [one() for _ in range(count - count // 4)]
    twice = [Request(each.prompt, 7, sampling, (STOP,), torch.rand(7, generator=draw)) for each in made[: count // 4]]
    return [*made, *twice]


def stopping(tiny_model, **changes) -> MiniDeepSeek:
    """A model that ends some of its completions before the limit."""
    model = tiny_model(**changes)
    with torch.no_grad():
        model.lm_head.weight[STOP] *= 2
    return model


def alone(model: MiniDeepSeek, request: Request) -> list[int]:
    """Greedy tokens of one request, by the plain generator."""
    ids = torch.tensor([request.prompt])
    new = model.generate(ids, max_new_tokens=request.max_new_tokens, eos_token_id=request.stop)
    return new[0, len(request.prompt) :].tolist()


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> None:
    """Decoding in C, or in PyTorch alone."""
    monkeypatch.setattr(native, "MOST_TOKENS", PATHS[request.param])


@pytest.mark.parametrize(("slots", "tokens"), [(1, 1), (3, 64), (20, 4096)])
def test_greedy_tokens_are_those_of_each_request_alone(slots, tokens, path, tiny_model):
    model, asked = stopping(tiny_model), requests(12)
    made = list(Engine(model, slots, LONGEST, tokens).run(asked))
    assert [each.tokens for each in made] == [alone(model, request) for request in asked]
    assert {each.finish for each in made} == {"stop", "length"}
    for each, request in zip(made, asked, strict=True):
        ids = torch.tensor([[*request.prompt, *each.tokens]])
        with torch.no_grad():
            log_p = model(ids).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
        expected = log_p.gather(1, torch.tensor(each.tokens).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(each.log_probs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.3)]
)
def test_a_sampled_completion_depends_on_its_own_uniforms_only(sampling, path, tiny_model):
    model, asked = stopping(tiny_model), requests(8, sampling)
    single = [next(Engine(model, 1, LONGEST).run([request])) for request in asked]
    mixed = [*asked[::-1], *requests(4)]
    together = list(Engine(model, 5, LONGEST, 100).run(mixed))[: len(asked)][::-1]
    assert [each.tokens for each in together] == [each.tokens for each in single]
    other = [Request(each.prompt, each.max_new_tokens, sampling, each.stop) for each in asked]
    assert [each.tokens for each in Engine(model, 5, LONGEST).run(other)] != [each.tokens for each in single]


def test_each_token_is_drawn_by_its_own_uniform(path, tiny_model):
    model, asked = stopping(tiny_model), requests(8, Sampling(temperature=0.8))
    for made in Engine(model, 3, LONGEST).run(asked):
        for place, token in enumerate(made.tokens):
            ids = torch.tensor([[*made.request.prompt, *made.tokens[:place]]])
            with torch.no_grad():
                cumulative = (model(ids).logits[0, -1] / 0.8).softmax(-1).cumsum(-1)
            assert token == int((cumulative <= made.request.uniforms[place]).sum())


def test_requests_that_come_and_go_at_any_time_change_nothing_for_others(path, tiny_model):
    model, asked = stopping(tiny_model), requests(16)
    engine, running, finished = Engine(model, 4, LONGEST), [], {}
    for number in range(200):
        if number % 3 == 0 and number // 3 < len(asked):
            running.append(engine.submit(asked[number // 3]))
        if number in (7, 8, 20):
            engine.cancel(running[{7: 2, 8: 1, 20: 6}[number]])
        for event in engine.step():
            assert event.completion.tokens[-1] == event.token and event.completion.finish == event.finish
            if event.finish:
                finished[event.completion] = event.completion.tokens
        assert len(engine.scheduler.running) == engine.cache.used <= 4
    assert not engine.busy and not engine.step() and len(running) == len(asked)
    assert not engine.scheduler._prompts  # each is forgotten with the last that waits for it
    cancelled = [each for each in running if each.finish == "cancelled"]
    assert 1 <= len(cancelled) <= 3 and not set(cancelled) & set(finished)
    for each, request in zip(running, asked, strict=True):
        assert each.tokens == (alone(model, request)[: len(each.tokens)] if each in cancelled else finished[each])
        assert each in cancelled or each.tokens == alone(model, request)
    engine.cancel(running[-1])
    assert running[-1].finish in ("stop", "length")


def test_a_waiting_request_can_be_cancelled_before_its_prompt_is_read(tiny_model):
    model, asked = stopping(tiny_model), requests(6)
    engine = Engine(model, 1, LONGEST, 1)
    first, second, third = (engine.submit(request) for request in (asked[0], asked[1], asked[0]))
    engine.cancel(second)
    engine.cancel(first)
    while engine.busy:
        engine.step()
    assert (first.tokens, second.tokens) == ([], []) and third.tokens == alone(model, asked[0])


def test_a_slot_is_taken_in_the_step_after_it_is_free(tiny_model):
    """Short requests behind a long one: with two slots they need as many steps as they have tokens."""
    engine = Engine(tiny_model(), 2, LONGEST)
    completions = [engine.submit(Request([1, place], new)) for place, new in enumerate([12, 4, 4, 4])]
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
    assert steps == 12 and [len(each.tokens) for each in completions] == [12, 4, 4, 4]


def test_a_prompt_is_read_once_for_all_that_wait_with_it(tiny_model):
    model, read = tiny_model(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: read.append(tuple(inputs[0].shape)))
    list(Engine(model, 2, LONGEST).run([Request([1, 5, 9], 3)] * 5 + [Request([4] * 12, 2)] * 2))
    assert [shape for shape in read if shape[1] > 1] == [(2, 16)]


@pytest.mark.parametrize(("prompt", "new"), [([], 3), ([1, 2], 0), ([1] * 60, 5)])
def test_what_cannot_be_asked_is_said(prompt, new, tiny_model):
    engine = Engine(tiny_model(), 2, LONGEST)
    with pytest.raises(ValueError, match=rf"a prompt of {len(prompt)} tokens and {new} new ones: .* 64 together"):
        engine.submit(Request(prompt, new))
    with pytest.raises(ValueError, match="2 uniforms for 3 tokens"):
        engine.submit(Request([1], 3, Sampling(), (), [0.5, 0.5]))
    assert not engine.busy
