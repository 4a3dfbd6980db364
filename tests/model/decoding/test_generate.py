"""Generation: greedy and sampled, in batches, with stop tokens, streamed, and speculative with the same tokens."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch

import eval.answering
from errors import UserError
from eval.answering import Answerer
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.cache import LatentCache
from model.decoding.greedy_pass import GreedyPass
from model.decoding.sampling import Sampling
from model.decoding.speculative import Verifier, _DraftChain, stream_speculative
from text.chats.chat_template import encode_chat
from text.tokenizer import Tokenizer
from training.losses import NextTokenLoss

VOCAB = 61
GREEDY = Sampling(temperature=0.0)


def by_hand(model: MiniDeepSeek, prompt: list[int], new: int) -> list[int]:
    """Greedy without any cache: the whole text anew for each token."""
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


def test_padding_is_refused_where_drafts_cannot_see_it(tiny_model):
    model, prompt = tiny_model(num_nextn_predict_layers=1), prompt_of(4)
    mask = torch.ones_like(prompt)
    model.generate(prompt, max_new_tokens=2, speculative=True, attention_mask=mask)
    mask[0, 0] = 0
    with pytest.raises(UserError, match="without padding only; leave the mask out"):
        model.generate(prompt, max_new_tokens=2, speculative=True, attention_mask=mask)


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


@pytest.mark.parametrize("k", [1, 3, 60, 200])
def test_top_k_is_transformers(k, their_processors):
    logits = torch.randn(4, VOCAB)
    logits[0, :10] = 3.0  # ties at the edge stay in
    want = their_processors.TopKLogitsWarper(k)(None, logits.clone())
    torch.testing.assert_close(Sampling(top_k=k).truncate(logits), want)


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_is_transformers(p, their_processors):
    logits = 3 * torch.randn(8, VOCAB)
    want = their_processors.TopPLogitsWarper(p)(None, logits.clone())
    torch.testing.assert_close(Sampling(top_p=p).truncate(logits), want)


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p_is_transformers(p, their_processors):
    logits = 3 * torch.randn(8, VOCAB)
    want = their_processors.MinPLogitsWarper(p)(None, logits.clone())
    torch.testing.assert_close(Sampling(min_p=p).truncate(logits), want)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_transformers(penalty, their_processors):
    logits, seen = torch.randn(3, VOCAB), torch.randint(VOCAB, (3, 20))
    want = their_processors.RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
    torch.testing.assert_close(Sampling(repetition_penalty=penalty).penalise(logits, seen), want)


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


def rule(rows: int, time: int) -> torch.Tensor:
    """Text in which each token follows from the one before, now and then interrupted: half predictable."""
    ids = torch.randint(VOCAB, (rows, time))
    for t in range(1, time):
        ids[:, t] = torch.where(torch.rand(rows) < 0.97, (ids[:, t - 1] * 3 + 1) % VOCAB, ids[:, t])
    return ids


@pytest.fixture(scope="module")
def half_trained() -> Callable[[int], MiniDeepSeek]:
    """A model of D MTP layers trained until its drafts are right now and then, but not always."""
    made: dict[int, MiniDeepSeek] = {}

    def make(depth: int) -> MiniDeepSeek:
        if depth not in made:
            torch.manual_seed(depth)
            shape = LMConfig.preset("demo", num_hidden_layers=2, hidden_size=64, vocab_size=VOCAB, intermediate_size=96)
            model = MiniDeepSeek(LMConfig(**{**vars(shape), "num_nextn_predict_layers": depth}))
            optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
            for _ in range(40):
                ids = rule(16, 24)
                total, count, _ = NextTokenLoss(mtp_weight=1.0)(model, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
                optimizer.zero_grad()
                (total / count).backward()
                optimizer.step()
            made[depth] = model.eval()
        return made[depth]

    return make


@pytest.mark.parametrize("length", [1, 2, 5, 40])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_speculative_decoding_gives_the_greedy_tokens(depth, length, half_trained, tiny_model):
    for model in half_trained(depth), tiny_model(num_nextn_predict_layers=depth):
        prompt = prompt_of(length)
        plain = model.generate(prompt, max_new_tokens=20)
        for drafts in (0, 1, 2, 5):
            options = dict(max_new_tokens=20, speculative=True, draft_tokens=drafts)
            assert torch.equal(model.generate(prompt, **options), plain)
        stop = int(plain[0, length + 9])
        options = dict(max_new_tokens=20, eos_token_id=stop)
        assert torch.equal(model.generate(prompt, speculative=True, **options), model.generate(prompt, **options))


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("most", [1, 2, 3, 5])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_drafts_do_not_depend_on_the_passes_before(depth, most, length, half_trained, monkeypatch):
    """Each pass drafts what a chain would draft that reads all tokens so far at once."""
    model, drafted, draft = half_trained(depth), [], _DraftChain.draft

    def spy(chain: _DraftChain, states: torch.Tensor, tokens: list[int]) -> tuple[list[int], list[None]]:
        drafts = draft(chain, states, tokens)
        drafted.append((list(tokens), drafts))
        return drafts

    monkeypatch.setattr(_DraftChain, "draft", spy)
    monkeypatch.setattr("model.decoding.speculative.greedy_pass", lambda *_: None)
    list(stream_speculative(model, prompt_of(length), 24, draft_tokens=most))
    monkeypatch.undo()
    assert len(drafted) > 24 / (most + 1) - 1
    assert max(len(drafts) for _, (drafts, _) in drafted) <= most
    for tokens, drafts in drafted:
        cache = LatentCache(model.config, 1, len(tokens) + most + 1, torch.float32, "cpu", mtp=True)
        with torch.no_grad():
            states = model(torch.tensor([tokens[:-1]])).state
            assert _DraftChain(model, cache, Verifier(GREEDY, None), most).draft(states, tokens) == drafts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [1, 3, 6])
def test_a_pass_in_one_call_drafts_and_keeps_what_several_calls_do(most, dtype, half_trained, monkeypatch):
    model, run, calls, found = copy.deepcopy(half_trained(1)).to(dtype), GreedyPass.run, [], []
    with torch.no_grad():  # or, after so simple a text, all drafts were right
        weight = model.mtp[0].shared_head.norm.weight
        weight.mul_(1 + 2.5 * torch.randn(weight.shape))
    monkeypatch.setattr(GreedyPass, "run", lambda self: calls.append(run(self)) or calls[-1])
    monkeypatch.setattr("model.decoding.greedy_pass._light", lambda model, mtp, cache: mtp)  # the same weights for both
    prompts = [rule(1, length) for length in (1, 2, 150)]
    for threads in (1, 2, 0):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads or 1)
        if not threads:
            monkeypatch.setattr("model.decoding.speculative.greedy_pass", lambda *_: None)
        passes: list[tuple[int, int]] = []
        run_all = [list(stream_speculative(model, p, 40, accepted=passes, draft_tokens=most)) for p in prompts]
        found.append((run_all, passes))
    assert found[0] == found[1] == found[2]
    assert len(calls) == 2 * len(passes) and 0 < sum(kept for kept, _ in passes) < sum(drafts for _, drafts in passes)


def test_further_drafts_follow_from_the_last_layers_own_state(half_trained):
    model, tokens = half_trained(1).requires_grad_(False), rule(1, 12)[0].tolist()
    cache = LatentCache(model.config, 1, 16, torch.float32, "cpu", mtp=True)
    states = model(torch.tensor([tokens[:-1]])).state
    drafts, _ = _DraftChain(model, cache, Verifier(GREEDY, None), 3).draft(states, tokens)
    assert len(drafts) > 1
    line = list(tokens)
    for _ in drafts:  # by hand: each time the whole line anew, the layer's own states behind the main model's
        fresh = LatentCache(model.config, 1, 16, torch.float32, "cpu", mtp=True)
        found, own = model.draft(states, torch.tensor([line[1:]]), 1, fresh)
        line.append(int(found[0, -1].argmax()))
        states = torch.cat((states, own[:, -1:]), dim=1)
    assert line[len(tokens) :] == drafts


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_drafts_that_come_true_save_passes(depth, half_trained):
    passes: list[tuple[int, int]] = []
    tokens = list(stream_speculative(half_trained(depth), rule(1, 10), 60, accepted=passes))
    accepted = [kept for kept, _ in passes]
    assert len(tokens) == 60 and sum(accepted) > 10
    assert all(0 <= kept <= depth for kept in accepted)
    # The first token comes from reading the prompt, each later pass gives its drafts and one more.
    assert 60 <= 1 + sum(accepted) + len(accepted) <= 60 + depth
    if depth > 1:
        assert max(accepted) > 1


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.1}, {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}])
def test_what_speculative_decoding_cannot_do_is_said(options, tiny_model):
    with pytest.raises(UserError, match="without repetition penalty and for a single prompt only"):
        tiny_model().generate(**{"input_ids": prompt_of(3), "speculative": True, **options})
    with pytest.raises(UserError, match="no MTP layer"):
        tiny_model(num_nextn_predict_layers=0).generate(prompt_of(3), speculative=True)


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
    with pytest.raises(UserError, match=r"the model reads 64; start anew with /reset"):
        next(answerer.stream_reply([{"role": "user", "content": "嗯🙂" * 80}], GREEDY, 10))


def test_answers_in_a_batch_are_those_of_each_question_alone(pretrained):
    answerer = Answerer.open(str(pretrained / "final"), "cpu", "fp32")
    asked = [[{"role": "user", "content": text}] for text in ("你好", "What is 2 + 3?", "月牙镇在哪里？谁住在那里？")]
    together = answerer.reply(asked, 16)
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
