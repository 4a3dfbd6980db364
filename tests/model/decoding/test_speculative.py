"""Speculative decoding: plain decoding's greedy tokens, and its distribution, however bad the drafts."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from errors import UserError
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.cache import LatentCache
from model.decoding.eager import EagerRunner
from model.decoding.native import Drafter, GreedyPass, NativeRunner
from model.decoding.runner import runner_for
from model.decoding.sampling import GREEDY, Sampling
from model.decoding.speculative import DraftChain, Verifier, stream_speculative
from model.kernels import decode
from model.quantized import Int8Weight, QuantizedLinear
from training.losses import NextTokenLoss

VOCAB = 61


def prompt_of(length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (1, length))


def rule(rows: int, time: int) -> torch.Tensor:
    """Text in which each token follows from the one before, now and then interrupted: half predictable."""
    ids = torch.randint(VOCAB, (rows, time))
    for t in range(1, time):
        ids[:, t] = torch.where(torch.rand(rows) < 0.97, (ids[:, t - 1] * 3 + 1) % VOCAB, ids[:, t])
    return ids


@pytest.fixture(scope="module")
def half_trained(once) -> Callable[[int], MiniDeepSeek]:
    """`half_trained(D)`: trained until the drafts of its D MTP layers, of three, are right now and then."""

    def train(folder: Path) -> None:
        torch.manual_seed(1)
        shape = LMConfig.preset("demo", num_hidden_layers=2, hidden_size=64, vocab_size=VOCAB, intermediate_size=96)
        model = MiniDeepSeek(replace(shape, num_nextn_predict_layers=3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(40):
            ids = rule(16, 24)
            total, count, _ = NextTokenLoss(mtp_weight=1.0)(model, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
            optimizer.zero_grad()
            (total / count).backward()
            optimizer.step()
        model.save_pretrained(folder)

    def make(depth: int) -> MiniDeepSeek:
        model = MiniDeepSeek.from_pretrained(once("half_trained", train)).eval()
        model.mtp, model.config = model.mtp[:depth], replace(model.config, num_nextn_predict_layers=depth)
        return model

    return make


@pytest.mark.parametrize("length", [1, 2, 40])
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


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_drafts_do_not_depend_on_the_passes_before(depth, most, length, half_trained, monkeypatch):
    """Each pass drafts what a chain would draft that reads all tokens so far at once."""
    model, drafted, draft = half_trained(depth), [], DraftChain.draft

    def spy(chain: DraftChain, states: torch.Tensor, tokens: list[int]) -> tuple[list[int], list[None]]:
        drafts = draft(chain, states, tokens)
        drafted.append((list(tokens), drafts))
        return drafts

    monkeypatch.setattr(DraftChain, "draft", spy)
    monkeypatch.setattr(NativeRunner, "greedy_pass", EagerRunner.greedy_pass)
    list(stream_speculative(model, prompt_of(length), 24, draft_tokens=most))
    monkeypatch.undo()
    assert len(drafted) > 24 / (most + 1) - 1
    assert max(len(drafts) for _, (drafts, _) in drafted) <= most
    for tokens, drafts in drafted:
        cache = LatentCache(model.config, 1, len(tokens) + most + 1, torch.float32, "cpu", mtp=True)
        with torch.no_grad():
            states = model(torch.tensor([tokens[:-1]])).state
            chain = DraftChain(runner_for(model, cache), Verifier(GREEDY, None), most)
            assert chain.draft(states, tokens) == drafts


@pytest.mark.parametrize(("most", "dtype"), [(1, torch.float32), (3, torch.bfloat16), (6, torch.float32)])
def test_a_pass_in_one_call_drafts_and_accepts_what_several_calls_do(most, dtype, half_trained, monkeypatch):
    model, run, calls, found = copy.deepcopy(half_trained(1)).to(dtype), GreedyPass.run, [], []
    with torch.no_grad():  # or, after so simple a text, all drafts were right
        weight = model.mtp[0].shared_head.norm.weight
        weight.mul_(1 + 2.5 * torch.randn(weight.shape))
    monkeypatch.setattr(GreedyPass, "run", lambda self: calls.append(run(self)) or calls[-1])
    prompts = [rule(1, length) for length in (1, 2, 150)]
    for threads in (1, 2, 0):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads or 1)
        if not threads:
            monkeypatch.setattr(NativeRunner, "greedy_pass", EagerRunner.greedy_pass)
        passes: list[tuple[int, int]] = []
        run_all = [list(stream_speculative(model, p, 24, accepted=passes, draft_tokens=most)) for p in prompts]
        found.append((run_all, passes))
    assert found[0] == found[1] == found[2]
    assert len(calls) == 2 * len(passes) and 0 < sum(kept for kept, _ in passes) < sum(drafts for _, drafts in passes)


def test_further_drafts_follow_from_the_last_layers_own_state(half_trained):
    model, tokens = half_trained(1).requires_grad_(False), rule(1, 12)[0].tolist()
    cache = LatentCache(model.config, 1, 16, torch.float32, "cpu", mtp=True)
    states = model(torch.tensor([tokens[:-1]])).state
    chain = DraftChain(runner_for(model, cache), Verifier(GREEDY, None), 3)
    drafts, _ = chain.draft(states, tokens)
    assert len(drafts) > 1
    line = list(tokens)
    for _ in drafts:  # by hand: each time the whole line again, the layer's own states behind the main model's
        fresh = LatentCache(model.config, 1, 16, torch.float32, "cpu", mtp=True)
        step = EagerRunner(model, fresh).draft(states, torch.tensor([line[1:]]), 1)
        line.append(int(step.choice))
        states = torch.cat((states, step.states[:, -1:]), dim=1)
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


def test_padding_is_refused_where_drafts_cannot_see_it(tiny_model):
    model, prompt = tiny_model(num_nextn_predict_layers=1), prompt_of(4)
    mask = torch.ones_like(prompt)
    model.generate(prompt, max_new_tokens=2, speculative=True, attention_mask=mask)
    mask[0, 0] = 0
    with pytest.raises(UserError, match="without padding only; leave the mask out"):
        model.generate(prompt, max_new_tokens=2, speculative=True, attention_mask=mask)


in_c = pytest.mark.skipif(decode.library(torch.float32) is None, reason="no C compiler: PyTorch drafts with the layer")


def test_the_light_copy_is_the_layer_rounded(tiny_model):
    def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Every weight by its name, quantized ones dense."""
        found = {name.removesuffix(".quantized"): m.dense(torch.float32) for name, m in module.named_modules()
                 if isinstance(m, Int8Weight)}  # fmt: skip
        return {name.removesuffix(".weight"): weight for name, weight in module.named_parameters()} | found

    model = tiny_model(initializer_range=0.3)
    layer, drafter = model.mtp[0], Drafter(model)
    want, got = weights_of(layer), weights_of(drafter.layer)
    assert want.keys() == got.keys()
    for name, weight in want.items():
        torch.testing.assert_close(got[name], weight, atol=weight.abs().max().item() / 127, rtol=0)
    torch.testing.assert_close(drafter.head.dense(torch.float32), model.lm_head.weight, atol=0.02, rtol=0)
    assert sum(isinstance(module, QuantizedLinear) for module in drafter.layer.modules()) > 5
    assert not any(isinstance(module, (QuantizedLinear, Int8Weight)) for module in layer.modules())


@in_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_however_wrong_the_light_copy_the_tokens_are_right(dtype, tiny_model):
    model, prompt = tiny_model(initializer_range=0.3).to(dtype), torch.randint(1, VOCAB, (1, 9))
    plain, light, passes = model.generate(prompt, max_new_tokens=30)[0, 9:].tolist(), Drafter(model), []
    assert 0 not in plain
    options = dict(accepted=passes, draft_tokens=2, drafter=light)
    assert list(stream_speculative(model, prompt, 30, **options)) == plain
    passes.clear()
    light.head.codes.zero_()  # of equally likely tokens the first is drafted: token 0
    assert list(stream_speculative(model, prompt, 30, **options)) == plain
    assert sum(accepted for accepted, _ in passes) == 0 < sum(drafted for _, drafted in passes)


SHARPER = Sampling(temperature=0.7, top_k=4)
KINDS = {
    "free": Sampling(temperature=1.0),
    "top-k": SHARPER,
    "top-p": Sampling(temperature=1.5, top_p=0.6),
    "min-p": Sampling(temperature=1.2, min_p=0.3),
}


def surprise(seen: Iterable[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Pearson's chi-square, in standard deviations above what chance gives; infinite for what cannot be."""
    counts = Counter(seen)
    if any(not expected.get(text) for text in counts):
        return float("inf")
    total, freedom = counts.total(), sum(chance > 0 for chance in expected.values()) - 1
    chi2 = sum((counts[text] - total * p) ** 2 / (total * p) for text, p in expected.items() if p)
    return (chi2 - freedom) / (2 * freedom) ** 0.5


def judged(sampling: Sampling, samples: int = 3000) -> float:
    """The surprise of the first two tokens of passes with two drafts, over six tokens and with unlike distributions."""
    verifier = Verifier(sampling, torch.Generator().manual_seed(1))
    logits, guesses = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2))
    p, q = sampling.probabilities(logits), sampling.probabilities(guesses)
    seen = []
    for _ in range(samples):
        drafts = [int(verifier._draw(q[i])) for i in range(2)]
        text = verifier.accept(drafts, [q[0], q[1]], logits.argmax(-1)[None], logits[None])
        text += [int(verifier._draw(p[1]))] * (len(text) == 1)  # the next pass would draw it
        seen.append(tuple(text[:2]))
    return surprise(seen, {(a, b): float(p[0, a] * p[1, b]) for a, b in product(range(6), repeat=2)})


@pytest.mark.parametrize("kind", KINDS)
def test_judging_drafts_keeps_the_distribution(kind):
    assert judged(KINDS[kind]) < 4


def test_sampled_texts_come_as_often_as_the_model_says(tiny_model):
    model, prompt, sampling = tiny_model(), torch.tensor([[5, 17, 3]]), Sampling(temperature=1.3, top_k=3)
    expected = {(): 1.0}
    for _ in range(2):
        longer = {}
        for text, chance in expected.items():
            with torch.no_grad():
                logits = model(torch.cat((prompt, torch.tensor([text], dtype=torch.int64)), dim=1)).logits[:, -1]
            shares = sampling.probabilities(logits)[0].tolist()
            longer |= {(*text, token): chance * share for token, share in enumerate(shares) if share}
        expected = longer
    run = dict(max_new_tokens=2, draft_tokens=2, sampling=sampling)
    seen = [tuple(stream_speculative(model, prompt, seed=seed, **run)) for seed in range(150)]
    assert surprise(seen, expected) < 4


def test_the_token_after_all_drafts_is_drawn_where_it_stands():
    verifier = Verifier(Sampling(), torch.Generator().manual_seed(1))
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    p = verifier.sampling.probabilities(logits)  # drafts from p itself are all kept
    seen = [verifier.accept([0, 1], [p[0], p[1]], logits.argmax(-1)[None], logits[None]) for _ in range(3000)]
    assert all(text[:2] == [0, 1] for text in seen)
    assert surprise([tuple(text[2:]) for text in seen], {(token,): float(p[2, token]) for token in range(6)}) < 4


def test_generate_hands_the_sampling_on(tiny_model):
    model, prompt = tiny_model(), torch.tensor([[5, 17, 3]])
    options = dict(max_new_tokens=24, speculative=True, temperature=1.3, top_k=3)
    first = model.generate(prompt, seed=1, **options)
    assert torch.equal(first, model.generate(prompt, seed=1, **options))
    assert not torch.equal(first, model.generate(prompt, seed=2, **options))
    assert not torch.equal(first, model.generate(prompt, max_new_tokens=24))
