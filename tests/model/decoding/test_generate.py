"""Generation: greedy and sampled, in batches, with stop tokens, and streamed."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

import eval.answering
from errors import UserError
from eval.answering import Answerer
from model import MiniDeepSeek
from model.decoding.sampling import GREEDY, Sampling
from text.chats.chat_template import encode_chat
from text.tokenizer import Tokenizer

VOCAB = 61


def by_hand(model: MiniDeepSeek, prompt: list[int], new: int) -> list[int]:
    """Greedy without any cache: the whole text again for each token."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


def prompt_of(length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (1, length))


def test_greedy_takes_the_likeliest_token_each_time(tiny_model):
    model, prompt = tiny_model(), prompt_of(5)
    assert model.generate(prompt, max_new_tokens=12)[0].tolist() == by_hand(model, prompt[0].tolist(), 12)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("new", [0, 1, 2, 7])
def test_as_many_tokens_as_asked(new, speculative, tiny_model):
    out = tiny_model().generate(prompt_of(4), max_new_tokens=new, speculative=speculative)
    assert out.shape == (1, 4 + new) and out.dtype == torch.int64


@pytest.fixture
def their_processors():
    """transformers' logits processors, without the log lines of importing them."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.generation import logits_process

    return logits_process


@pytest.mark.parametrize(
    ("field", "theirs", "values"),
    [
        ("top_k", "TopKLogitsWarper", [1, 3, 60, 200]),
        ("top_p", "TopPLogitsWarper", [0.01, 0.5, 0.9, 0.999]),
        ("min_p", "MinPLogitsWarper", [0.01, 0.2, 1.0]),
        ("repetition_penalty", "RepetitionPenaltyLogitsProcessor", [1.3, 0.7]),
    ],
)
def test_each_filter_is_transformers(field, theirs, values, their_processors):
    logits, seen = 3 * torch.randn(8, VOCAB), torch.randint(VOCAB, (8, 20))
    logits[0, :10] = 3.0  # ties at the edge stay in
    for value in values:
        want = getattr(their_processors, theirs)(value)(seen, logits.clone())
        sampling = Sampling(**{field: value})
        torch.testing.assert_close(sampling.truncate(sampling.penalise(logits, seen)), want)


def test_the_filters_apply_in_transformers_order(their_processors, monkeypatch):
    logits, seen = 2 * torch.randn(5, VOCAB), torch.randint(VOCAB, (5, 20))
    want = their_processors.RepetitionPenaltyLogitsProcessor(1.2)(seen, logits.clone())
    for warp in ("TemperatureLogitsWarper", 0.6), ("TopKLogitsWarper", 9), ("TopPLogitsWarper", 0.9):
        want = getattr(their_processors, warp[0])(warp[1])(None, want)
    want = their_processors.MinPLogitsWarper(0.05)(None, want).softmax(-1)
    drawn = []
    monkeypatch.setattr(torch, "multinomial", lambda p, *_, **__: drawn.append(p) or p.argmax(-1, keepdim=True))
    chosen = Sampling(1.2, 0.6, 9, 0.9, 0.05).choose(logits, seen, None)
    torch.testing.assert_close(drawn[0], want)
    assert torch.equal(chosen, want.argmax(-1))


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])
    for temperature in (0.5, 1.0, 2.0):
        drawn = Sampling(temperature=temperature).choose(logits.expand(40_000, 5), None, None)
        share = drawn.bincount(minlength=5) / 40_000
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.5}, {"repetition_penalty": 0}],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_seed_repeats_itself_and_leaves_the_global_numbers_alone(tiny_model):
    model, prompt = tiny_model(), prompt_of(3)
    options = dict(max_new_tokens=20, temperature=2.0)
    state = torch.get_rng_state()
    first = model.generate(prompt, seed=7, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, model.generate(prompt, seed=7, **options))
    assert not torch.equal(first, model.generate(prompt, seed=8, **options))
    assert not torch.equal(model.generate(prompt, **options), model.generate(prompt, **options))


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("filler", [0, 17])
def test_a_left_padded_batch_gives_what_each_row_gives_alone(filler, penalty, tiny_model):
    model, rows = tiny_model(), [prompt_of(length)[0].tolist() for length in (1, 4, 9)]
    ids = torch.tensor([[filler] * (9 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (9 - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(ids, max_new_tokens=12, repetition_penalty=penalty, attention_mask=mask)
    for row, together in zip(rows, out[:, 9:].tolist(), strict=True):
        alone = model.generate(torch.tensor([row]), max_new_tokens=12, repetition_penalty=penalty)
        assert together == alone[0, len(row) :].tolist()


def test_padding_on_the_right_is_refused(tiny_model):
    with pytest.raises(UserError, match="padding must be on the left"):
        tiny_model().generate(prompt_of(3), attention_mask=torch.tensor([[1, 1, 0]]))


@pytest.mark.parametrize("several", [False, True])
def test_a_row_ends_with_its_stop_token(several, tiny_model):
    model, prompts = tiny_model(), torch.randint(VOCAB, (3, 6))
    free = model.generate(prompts, max_new_tokens=15)[:, 6:]
    first, second = int(free[0, 3]), int(free[1, 8])
    stop = [first, second] if several else first
    out = model.generate(prompts, max_new_tokens=15, eos_token_id=stop)[:, 6:].tolist()
    stops = stop if several else [stop]
    for row, want in zip(out, free.tolist(), strict=True):
        end = next((place for place, token in enumerate(want) if token in stops), len(want))
        assert row[: end + 1] == want[: end + 1] and set(row[end + 1 :]) <= {first}
    assert len(out[0]) == max(next((i + 1 for i, t in enumerate(row) if t in stops), 15) for row in free.tolist())


@pytest.fixture
def says(tiny_model, tokenizer, monkeypatch) -> Callable[..., list[tuple[str, int]]]:
    """`says(tokens, limit)`: what streaming gives when the model generates these tokens."""

    def says(tokens: list[int], limit: int = 100) -> list[tuple[str, int]]:
        def stream(model, prompt, most, *_):
            yield from (torch.tensor([token]) for token in tokens[:most])

        monkeypatch.setattr(eval.answering, "stream", stream)
        answerer = Answerer(tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=256), tokenizer)
        return list(answerer.stream_reply([{"role": "user", "content": "hi"}], GREEDY, limit))

    return says


ANSWER = "你好🙂，世界🎉 naïve 日本語"


def test_streaming_gives_whole_characters_only(says, tokenizer: Tokenizer):
    ids = tokenizer.encode(ANSWER)
    assert len(ids) > len(ANSWER)  # so some characters come in several tokens
    pieces = says([*ids, tokenizer.eos_id, 99, 99])
    assert "".join(piece for piece, _ in pieces) == ANSWER
    assert not any("\ufffd" in piece for piece, _ in pieces)
    assert [count for _, count in pieces] == list(range(1, len(ids) + 2))


def test_a_character_that_the_limit_cuts_is_left_out(says, tokenizer: Tokenizer):
    ids = tokenizer.encode(ANSWER)
    for limit in range(1, len(ids) + 1):
        pieces = says(ids, limit)
        text = "".join(piece for piece, _ in pieces)
        assert ANSWER.startswith(text) and pieces[-1][1] == limit


def test_special_tokens_in_an_answer_are_shown(says, tokenizer: Tokenizer):
    thinking = tokenizer.special_ids["<think>"]
    assert "".join(piece for piece, _ in says([thinking, *tokenizer.encode("嗯")])) == "<think>嗯"


def test_an_answer_stops_where_the_context_ends(says, tiny_model, tokenizer: Tokenizer):
    prompt, _ = encode_chat(tokenizer, [{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert says([99] * 1000, 1000)[-1][1] == 256 - len(prompt)
    answerer = Answerer(tiny_model(vocab_size=tokenizer.vocab_size), tokenizer)
    with pytest.raises(UserError, match=r"the model reads 64; begin again with /reset"):
        next(answerer.stream_reply([{"role": "user", "content": "嗯🙂" * 80}], GREEDY, 10))


def test_answers_in_a_batch_are_those_of_each_question_alone(pretrained):
    answerer = Answerer.open(str(pretrained / "final"), "cpu", "fp32")
    asked = [[{"role": "user", "content": text}] for text in ("你好", "What is 2 + 3?", "月牙镇在哪里？谁住在那里？")]
    together = list(answerer.replies(asked, 16))
    for conversation, reply in zip(asked, together, strict=True):
        pieces = answerer.stream_reply(conversation, GREEDY, 16)
        assert reply.rstrip("\ufffd") == "".join(piece for piece, _ in pieces).rstrip("\ufffd")


def test_speculative_streaming_gives_the_same_answer(pretrained):
    answerer = Answerer.open(str(pretrained / "final"), "cpu", "fp32")
    asked = [{"role": "user", "content": "你好，月牙镇"}]
    plain, fast = (list(answerer.stream_reply(asked, GREEDY, 30, speculative=kind)) for kind in (False, True))
    assert fast == plain and len(plain) > 1
    with pytest.raises(UserError, match="without repetition penalty"):
        next(answerer.stream_reply(asked, Sampling(1.2), 30, speculative=True))
