"""Sampling groups: a completion depends on weights, prompt and its own uniforms, and its log-probabilities hold."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from model import MiniDeepSeek
from model.decoding.generate import generate
from model.decoding.sampling import inverse_cumulative
from training.alignment.sampler import Completions, Sampler, sample_groups, uniforms
from training.log_probs import log_probs_and_entropy
from training.losses import IGNORE
from training.machine import autocast
from training.run.interrupt import Watch

STOP, NEW, GROUP = 2, 12, 5
PROMPTS = [[1, 9, 17, 30, 4], [1, 8], [1, 40, 40, 7]]


def stopping(tiny_model) -> MiniDeepSeek:
    """A model that ends some of its completions before the limit."""
    model = tiny_model(initializer_range=0.05)
    with torch.no_grad():
        model.lm_head.weight[STOP] *= 12
    return model


def keys(count: int) -> list[tuple[int, ...]]:
    return [(3, prompt) for prompt in range(count)]


def joined(groups: Iterable[Completions]) -> Completions:
    parts = zip(*((made.tokens, made.lengths, made.log_probs, made.ended) for made in groups), strict=True)
    return Completions(*map(torch.cat, parts))


def sampled(model: MiniDeepSeek, prompts: list[list[int]], **options: float) -> Completions:
    return joined(sample_groups(model, prompts, uniforms(keys(len(prompts)), GROUP, NEW), STOP, **options))


def trainer_log_probs(model: MiniDeepSeek, made: Completions, temperature: float = 1.0) -> torch.Tensor:
    """What one pass over prompts and completions, each row for itself, says of the sampled tokens."""
    out = torch.zeros_like(made.log_probs)
    for row, (tokens, length) in enumerate(zip(made.tokens, made.lengths.tolist(), strict=True)):
        prompt = PROMPTS[row // GROUP]
        ids = torch.tensor([prompt + tokens[:length].tolist()])
        result = model(ids[:, :-1])
        labels = ids[:, 1:].clone()
        labels[:, : len(prompt) - 1] = IGNORE
        found, _ = log_probs_and_entropy(result.hidden, result.head, labels, temperature)
        out[row, :length] = found[labels != IGNORE]
    return out.detach()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_log_probabilities_are_the_trainers(temperature, tiny_model):
    model = stopping(tiny_model)
    made = sampled(model, PROMPTS, temperature=temperature)
    assert 0 < made.ended.sum() < len(made.ended) and len(set(made.lengths.tolist())) > 3
    torch.testing.assert_close(made.log_probs, trainer_log_probs(model, made, temperature), atol=1e-4, rtol=0)
    assert (made.log_probs <= 0).all() and made.log_probs.min() < -0.5
    for tokens, log_probs, length, ended in zip(
        made.tokens, made.log_probs, made.lengths.tolist(), made.ended, strict=True
    ):
        assert (tokens[: length - 1] != STOP).all() and not tokens[length:].any() and not log_probs[length:].any()
        assert bool(ended) == (tokens[length - 1] == STOP) and (ended or length == NEW)


def test_a_completion_does_not_depend_on_its_batch(tiny_model):
    """Alone, without padding and with another group, the same prompt and uniforms give the same tokens."""
    model = stopping(tiny_model)
    together = sampled(model, PROMPTS)
    drawn = uniforms(keys(3), GROUP, NEW)
    for place, prompt in enumerate(PROMPTS):
        alone = joined(sample_groups(model, [prompt], drawn[place : place + 1, 1:4], STOP))
        rows = slice(place * GROUP + 1, place * GROUP + 4)
        assert torch.equal(alone.tokens, together.tokens[rows]) and torch.equal(alone.lengths, together.lengths[rows])
        torch.testing.assert_close(alone.log_probs, together.log_probs[rows], atol=1e-5, rtol=0)


def test_near_temperature_zero_every_completion_is_the_greedy_one(tiny_model):
    model = stopping(tiny_model)
    made = sampled(model, PROMPTS, temperature=1e-4)
    for row in range(len(made.tokens)):
        prompt = torch.tensor([PROMPTS[row // GROUP]])
        greedy = generate(model, prompt, NEW, eos_token_id=STOP)[0, prompt.shape[1] :]
        assert made.tokens[row, : made.lengths[row]].tolist() == greedy.tolist()


@pytest.mark.parametrize("vocab", [64, 1000])
def test_the_token_of_a_chance_is_where_the_running_sum_passes_it(vocab):
    p, chance = (torch.randn(500, vocab) * 3).softmax(-1), torch.rand(500)
    p[:, ::3] = 0
    p /= p.sum(-1, keepdim=True)
    cumulative = p.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, chance.double().unsqueeze(1), right=True).squeeze(1)
    clear = ((cumulative - chance.unsqueeze(1)).abs() > 1e-6).all(-1)  # where no rounding decides
    assert clear.sum() > 450 and torch.equal(inverse_cumulative(p, chance)[clear], expected[clear])
    for extreme in (0.0, 1 - 2**-24):
        assert (p.gather(1, inverse_cumulative(p, torch.full((500,), extreme)).unsqueeze(1)) > 0).all()


def test_the_random_numbers_are_a_function_of_the_key():
    one, two = uniforms([(1, 2), (1, 3)], 4, 6), uniforms([(1, 3)], 4, 6)
    assert torch.equal(one[1], two[0]) and not torch.equal(one[0], one[1]) and one.shape == (2, 4, 6)


def test_the_bf16_sampler_follows_the_policy_and_rounds_as_training_does(tiny_model):
    model = stopping(tiny_model)
    sampler = Sampler(model, torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
        model.routers()[0].e_score_correction_bias.uniform_(-1, 1)
    policy = sampler.refresh()
    assert policy.lm_head.weight.dtype == torch.bfloat16 and policy.routers()[0].weight.dtype == torch.float32
    assert torch.equal(policy.routers()[0].e_score_correction_bias, model.routers()[0].e_score_correction_bias)
    ids = torch.randint(61, (10, 16))  # for fewer positions the head's logits are not rounded
    with torch.no_grad(), autocast(torch.bfloat16, torch.device("cpu")):
        trained = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(policy(ids).logits, trained, atol=1e-6, rtol=0)
    assert Sampler(model, torch.float32).refresh() is model


def test_sampling_shows_how_far_it_is_and_ends_at_a_signal(tiny_model):
    model, shown = stopping(tiny_model), []
    watch = Watch(show=lambda *what: shown.append(what))
    drawn = uniforms(keys(3), GROUP, NEW)
    assert len(list(sample_groups(model, PROMPTS[:3], drawn, STOP, watch=watch))) == 3
    assert shown[0] == ("sampling completions", 0, 3 * GROUP) and shown[-1] == ("", 0, 0)
    done = [share for _, share, _ in shown[:-1]]
    assert done == sorted(done) and len(set(done)) == len(done)  # it moves with every token
    assert 3 * GROUP - 1 < done[-1] < 3 * GROUP
    watch.asked = True
    assert not list(sample_groups(model, PROMPTS[:3], drawn, STOP, watch=watch))
