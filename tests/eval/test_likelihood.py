"""Likelihoods from the latent cache are those of plain passes over whole rows."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from errors import UserError
from eval.answering import Answerer
from eval.likelihood import CacheScorer, rolling
from model.decoding.sampling import Sampling


@pytest.fixture
def scorer(answerer) -> CacheScorer:
    return CacheScorer(answerer)


def line(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(13, 600) for _ in range(length)]


def plain(scorer: CacheScorer, context: list[int], scored: list[int]) -> tuple[float, bool]:
    """In one pass, without any cache: the log-likelihood, and whether each token is the likeliest."""
    with torch.no_grad():
        log_probs = scorer.answerer.model(torch.tensor([[*context, *scored[:-1]]])).logits[0].float().log_softmax(-1)
    log_probs, ids = log_probs[len(context) - 1 :], torch.tensor(scored)
    return log_probs.gather(1, ids[:, None]).sum().item(), bool((log_probs.argmax(-1) == ids).all())


def greedy(scorer: CacheScorer, context: list[int], count: int) -> list[int]:
    return scorer.answerer.model.generate(torch.tensor([context]), max_new_tokens=count)[0, len(context) :].tolist()


def scores(scorer: CacheScorer, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Of the pairs in their order; each is scored once."""
    found = list(scorer.score_pairs(pairs))
    assert sorted(place for place, _ in found) == list(range(len(pairs)))
    return [score for _, score in sorted(found)]


def check(scorer: CacheScorer, pairs: list[tuple[list[int], list[int]]]) -> None:
    for (context, scored), (nats, is_greedy) in zip(pairs, scores(scorer, pairs), strict=True):
        want, best = plain(scorer, context, scored)
        assert nats == pytest.approx(want, rel=1e-4) and is_greedy is best


def test_continuations_have_the_likelihood_of_one_pass_over_the_whole_row(scorer):
    """Contexts of many lengths, and continuations of one token and of several, some of the same beginning."""
    rng = random.Random(0)
    items = [(line(rng, n), [line(rng, 1), line(rng, 5), line(rng, 1), line(rng, 20)]) for n in (1, 40, 7, 33, 90)]
    items.append((line(rng, 5), [line(rng, 1), line(rng, 1)]))
    begun = line(rng, 4)
    items += [(begun, [[20, 21, 22]]), ([*begun, 20], [[21, 23], [24]])]  # rows that are the beginnings of others
    check(scorer, [(context, choice) for context, choices in items for choice in choices])


def test_what_the_model_would_say_itself_is_greedy(scorer):
    for context in ([20, 30, 40], [50] * 40):
        said = greedy(scorer, context, 6)
        other = [*said[:5], (said[5] + 1) % 600]
        pairs = [(context, said), (context, other), (context, said[:1]), ([*context, 7], said[:1])]
        assert [best for _, best in scores(scorer, pairs)][:3] == [True, False, True]
        check(scorer, pairs)
        assert [best for _, best in scores(scorer, [(context, said[:1])])] == [True]


def test_windows_have_the_likelihood_of_one_pass(scorer, monkeypatch):
    rng = random.Random(1)
    windows = [(line(rng, given), line(rng, scored)) for given, scored in [(1, 59), (4, 5), (1, 1)]]
    want = [plain(scorer, *window)[0] for window in windows]
    assert scorer.score_windows(windows) == pytest.approx(want, rel=1e-4)
    monkeypatch.setattr("eval.likelihood.LOGITS", 1)  # a row at a time
    assert scorer.score_windows(windows) == pytest.approx(want, rel=1e-4)
    assert scorer.score_windows([]) == []


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(2, 8, 4), (9, 8, 4), (50, 8, 4), (50, 8, 8), (50, 8, 1), (51, 64, 32)]
)
def test_windows_score_every_token_once_with_the_context_that_the_stride_leaves(length, window, stride):
    scored = []
    for context, ids in rolling(list(range(length)), window, stride):
        assert len(context) + len(ids) <= window + 1 and context[-1] + 1 == ids[0]
        # Its own first window aside, each token has window - stride tokens before it, or all there are.
        assert ids[0] == 1 or len(context) > window - stride
        scored += ids
    assert scored == list(range(1, length))


def reads(monkeypatch: pytest.MonkeyPatch, scorer: CacheScorer) -> list[tuple[int, ...]]:
    """The shapes of what the model reads from now on."""
    shapes, forward = [], type(scorer.answerer.model).forward
    spy = lambda self, ids, **rest: shapes.append(tuple(ids.shape)) or forward(self, ids, **rest)  # noqa: E731
    monkeypatch.setattr(type(scorer.answerer.model), "forward", spy)
    return shapes


def test_a_context_is_read_once_for_all_its_choices(scorer, monkeypatch):
    read = reads(monkeypatch, scorer)
    scores(scorer, [([20] * 64, choice) for choice in ([21, 22], [23, 24], [25, 26], [27, 28])])
    assert read == [(1, 64), (4, 16)]
    read.clear()
    scores(scorer, [([20] * 64, [letter]) for letter in (21, 22, 23, 24)])  # letters need nothing but the context
    assert read == [(1, 64)]


def test_what_contexts_have_in_common_is_read_once(scorer, monkeypatch):
    """Questions after the same worked ones, in two subjects: the likelihoods of whole rows, from fewer tokens."""
    rng = random.Random(2)
    subjects, letters = [line(rng, 200), line(rng, 90), line(rng, 10)], [[20], [21], [22], [23]]
    contexts = [subjects[number % 3] + line(rng, 5 + number) for number in range(9)] + [subjects[0]]
    pairs = [(context, letter) for context in contexts for letter in letters]
    want = [plain(scorer, *pair)[0] for pair in pairs]
    read = reads(monkeypatch, scorer)
    assert [nats for nats, _ in scores(scorer, pairs)] == pytest.approx(want, rel=1e-4)
    tokens = sum(rows * width for rows, width in read)
    assert tokens < 199 + 90 + 16 * 4 + 16 * 3 + 32 * 3 + 1 < sum(map(len, contexts))


def test_a_pair_is_encoded_as_one_text_and_cut_where_the_context_ends(scorer):
    encode = scorer.answerer.tokenizer.encode
    assert scorer.encode_pair("Question: x\nAnswer: ", "yes") == (encode("Question: x\nAnswer:"), encode(" yes"))
    assert scorer.encode_pair("", "yes") == ([scorer.answerer.tokenizer.bos_id], encode("yes"))
    # Two letters that are one token: the context would leave nothing to score.
    tokens = map(scorer.answerer.tokenizer.decode, ([token] for token in range(300, 600)))
    word = next(text for text in tokens if len(text) > 1 and text.strip() == text and len(encode(text[0])) == 1)
    assert scorer.encode_pair(word[0], word[1:]) == (encode(word[0]), encode(word[1:]))


def test_a_conversation_that_was_rendered_keeps_its_ids(scorer):
    turns = [{"role": "user", "content": "月牙镇在哪里？"}]
    text = scorer.render(turns)
    assert text.startswith("<s><|user|>") and scorer.encode(text) != scorer.answerer.tokenizer.encode(text)
    context, choice = scorer.encode_pair(text, "在")
    assert context == scorer.encode(text) and choice == scorer.encode("在")
    ((_, answer),) = scorer.answers([scorer.encode(text)], 8)
    assert [answer] == list(scorer.answerer.replies([turns], 8))


def test_an_endless_context_loses_its_beginning_and_is_counted(scorer, monkeypatch):
    context, choices, cut = line(random.Random(3), 3000), [[20], [21, 22]], scorer.cut
    asked, score = [], CacheScorer._scores
    monkeypatch.setattr(CacheScorer, "_scores", lambda self, items: asked.extend(items) or score(self, items))
    found = scores(scorer, [(context, choice) for choice in choices])
    assert len(asked[0][0]) + len(choices[1]) == scorer.context + 1  # the last token is scored, not read
    want = [plain(scorer, context[-(scorer.context - 1) :], choice)[0] for choice in choices]
    assert [nats for nats, _ in found] == pytest.approx(want, rel=1e-4) and scorer.cut == cut + 1
    with pytest.raises(UserError, match=f"a choice has 1025 tokens, the model reads {scorer.context}; drop it"):
        scores(scorer, [([20], [21] * 1025)])


def test_answers_are_those_of_generate_and_stop_at_a_text(scorer):
    tokenizer, prompts = scorer.answerer.tokenizer, [[20, 30, 40], [50] * 20, []]
    found = [text for _, text in scorer.answers(prompts, 8)]
    for ids, text in zip([*prompts[:2], [tokenizer.eos_id]], found, strict=True):
        said = greedy(scorer, ids, 8)
        said = said[: said.index(tokenizer.eos_id)] if tokenizer.eos_id in said else said
        assert text == tokenizer.decode(said, skip_special_tokens=False)
    end = found[0][1:2]
    assert list(scorer.answers(prompts[:1], 8, until=["never", end])) == [(0, found[0].partition(end)[0])]
    sampled = [[text for _, text in scorer.answers(prompts[:1] * 4, 8, Sampling(temperature=1.5))] for _ in range(2)]
    assert sampled[0] == sampled[1] and len(set(sampled[0])) > 1  # samples of one prompt differ, and repeat


def test_an_answer_ends_before_its_end_token_and_a_question_without_room_gets_none(scorer):
    """The end token is here whatever the model says fourth."""
    model, tokenizer = scorer.answerer.model, scorer.answerer.tokenizer
    said = greedy(scorer, [20, 30, 40], 6)
    ends = SimpleNamespace(eos_id=said[3], decode=tokenizer.decode)
    (answer,) = Answerer(model, ends).completions([[20, 30, 40]], 6)
    assert answer == tokenizer.decode(said[: said.index(said[3])], skip_special_tokens=False)
    ((place, answer),) = scorer.answers([[20] * 1020, [20]], 20)
    assert place == 1 and answer
    with pytest.raises(UserError, match="max_new_tokens 1024: the model reads 1024 tokens in all; lower it"):
        list(scorer.answers([[20]], 1024))
