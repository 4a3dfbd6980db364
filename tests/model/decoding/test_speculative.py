"""Sampling with drafts: the distribution is that of plain sampling, however bad the drafts are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import product

import pytest
import torch

from model.decoding.sampling import Sampling
from model.decoding.speculative import Verifier, stream_speculative

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


def kept_always(verifier, drafts, probabilities, choice, logits):
    return [*drafts, int(verifier._draw(verifier.sampling.probabilities(logits[0])[-1]))]


def replaced_from_p(verifier, drafts, probabilities, choice, logits):
    targets = verifier.sampling.probabilities(logits[0])
    for i, (token, q) in enumerate(zip(drafts, probabilities, strict=True)):
        if torch.rand((), generator=verifier.generator) * q[token] >= targets[i, token]:
            return [*drafts[:i], int(verifier._draw(targets[i]))]
    return [*drafts, int(verifier._draw(targets[-1]))]


@pytest.mark.parametrize("wrong", [kept_always, replaced_from_p])
def test_a_wrong_rule_is_noticed(wrong, monkeypatch):
    monkeypatch.setattr(Verifier, "accept", wrong)
    assert judged(KINDS["free"]) > 10


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


def test_equal_distributions_keep_every_draft():
    verifier = Verifier(Sampling(), torch.Generator().manual_seed(0))
    logits = torch.randn(1, 3, 11)
    probabilities = verifier.sampling.probabilities(logits[0])
    for first, second in product(range(11), range(11)):
        kept = verifier.accept([first, second], list(probabilities[:2]), logits.argmax(-1), logits)
        assert kept[:2] == [first, second] and len(kept) == 3
