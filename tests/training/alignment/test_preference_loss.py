"""The losses over pairs: the values and gradients of TRL, only answers counted, and how pairs are packed and summed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from errors import UserError
from model import MiniDeepSeek
from text.chats.packing import write_row
from training.alignment.preference import (
    HeldOutPairs,
    Pairs,
    PreferenceLoss,
    PreferenceSettings,
    sigmoid_dpo,
    simpo,
    whole,
)
from training.log_probs import label_log_probs, log_probs_and_entropy
from training.losses import Batch, token_losses
from training.parallel.ranks import Ranks
from training.run.interrupt import Watch

PROMPTS_AND_ANSWERS = [(5, 6, 4), (3, 2, 7), (4, 5, 5)]


def pairs_of(chosen, rejected, lengths=((1, 1, 1),) * 2):
    zero = (0, 0, 0)
    return Pairs(*(torch.tensor(value, dtype=torch.float32) for value in (chosen, rejected, zero, zero, *lengths)))


def given_pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """Three prompts with two answers each, of several lengths."""
    torch.manual_seed(7)
    draw = [[torch.randint(3, 61, (length,)).tolist() for length in lengths] for lengths in PROMPTS_AND_ANSWERS]
    return [(prompt, chosen, rejected) for prompt, chosen, rejected in draw]


def packed(pairs: list[tuple[list[int], list[int], list[int]]], length: int = 64) -> Batch:
    """The pairs in one row."""
    sides = [
        (np.array(prompt + answer), np.array([0] * len(prompt) + [1] * len(answer)))
        for prompt, *answers in pairs
        for answer in answers
    ]
    return {name: torch.from_numpy(value)[None] for name, value in write_row(sides, length, 0).items()}


@pytest.fixture
def models(tiny_model) -> tuple[MiniDeepSeek, MiniDeepSeek]:
    """A policy and a reference that is near it, with the same router biases."""
    policy, reference = (tiny_model(seed, num_nextn_predict_layers=0) for seed in (0, 1))
    with torch.no_grad():
        for ours, theirs in zip(policy.parameters(), reference.parameters(), strict=True):
            theirs.copy_(ours + 0.1 * (theirs - ours))
        for ours, theirs in zip(policy.routers(), reference.routers(), strict=True):
            theirs.e_score_correction_bias.copy_(ours.e_score_correction_bias)
    return policy, reference.requires_grad_(False)


def test_label_smoothing_is_that_of_trl():
    """TRL 1.16.0: `CPOTrainer.cpo_loss` (alpha 0, beta 0.1, label_smoothing 0.1, sigmoid), given log-ratios."""
    pairs = pairs_of([1.5, -2.0, 0.25], [-0.5, 1.0, 0.5])
    losses, *_ = sigmoid_dpo(pairs, PreferenceSettings(beta=0.1, label_smoothing=0.1))
    assert losses.tolist() == pytest.approx([0.6181388, 0.8243552, 0.7032253], abs=1e-6)


@pytest.mark.parametrize(
    ("smoothing", "want"),
    [(0.0, [3.0485873, 0.3132617, 0.9740770]), (0.1, [2.7485871, 0.4132617, 0.9240770])],
)
def test_simpo_is_that_of_trl(smoothing, want):
    """TRL 1.16.0: `CPOTrainer.cpo_loss` (loss_type simpo, beta 2, simpo_gamma 1), given means over the tokens."""
    lengths = [[4, 2, 8], [3, 6, 5]]
    chosen, rejected = (
        [mean * tokens for mean, tokens in zip(means, side, strict=True)]
        for means, side in zip(([-3.0, -0.5, -2.0], [-2.0, -1.5, -2.25]), lengths, strict=True)
    )
    settings = PreferenceSettings(loss="simpo", beta=2.0, gamma=1.0, label_smoothing=smoothing)
    losses, *_ = simpo(pairs_of(chosen, rejected, lengths=lengths), settings)
    assert losses.tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "beta", "want", "norm"),
    [
        ("sigmoid", 0.1, 0.7276369, 2.9844580),
        ("sigmoid", 0.5, 0.8870029, 17.5427933),
        ("ipo", 0.1, 26.8501186, 125.73917),
    ],
)
def test_loss_and_gradient_from_a_folder_equal_those_of_trl(loss, beta, want, norm, models):
    """TRL 1.16.0, transformers 5.23.0: `DPOTrainer(loss_type=[loss], beta=beta)._compute_loss(...).backward()` over
    `given_pairs`, with `models` opened by AutoModelForCausalLM; the norm is that of all gradients."""
    policy, reference = models
    settings = PreferenceSettings(loss=loss, beta=beta, nll_weight=0.0)
    total, count, metrics = PreferenceLoss(settings, whole(reference))(policy, packed(given_pairs()))
    (total / count).backward()
    assert (total / count).item() == pytest.approx(want, rel=1e-4)
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(norm, rel=1e-4)
    if (loss, beta) == ("sigmoid", 0.1):  # rewards/chosen less rewards/rejected, and rewards/accuracies
        assert metrics["margin"].item() / 3 == pytest.approx(-0.0489867 - 0.0178110, abs=1e-5)
        assert metrics["accuracy"].item() == 1


def test_loss_and_gradient_equal_plain_transformers(models, tmp_path):
    """Unpacked, unpadded, with full logits; with the term of the chosen answer."""
    from transformers import AutoModelForCausalLM

    policy, reference = models
    theirs = []
    for name, model in (("policy", policy), ("reference", reference)):
        model.save_pretrained(tmp_path / name)
        theirs.append(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval())

    def log_prob(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[range(len(answer)), answer].sum()

    want = torch.zeros(())
    for prompt, *answers in given_pairs():
        ratios = [log_prob(theirs[0], prompt, a) - log_prob(theirs[1], prompt, a).detach() for a in answers]
        nll = -log_prob(theirs[0], prompt, answers[0]) / len(answers[0])
        want = want + (0.3 * nll - F.logsigmoid(0.1 * (ratios[0] - ratios[1]))) / 3
    want.backward()
    loss = PreferenceLoss(PreferenceSettings(beta=0.1, nll_weight=0.3), whole(reference))
    total, count, _ = loss(policy, packed(given_pairs()))
    (total / count).backward()
    assert (total / count).item() == pytest.approx(want.item(), abs=1e-4)
    expected = {name: p.grad for name, p in theirs[0].named_parameters()}
    compared = 0
    for name, p in policy.named_parameters():
        if name in expected:  # stacked experts have their own test in tests/model/test_parity.py
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-4)
            compared += 1
    assert compared > 30


def test_log_probs_and_their_gradient_are_those_of_full_logits():
    """At a temperature, over several chunks, each position with a weight of its own."""
    hidden, head = torch.randn(3, 300, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(50, (3, 300)).masked_fill(torch.rand(3, 300) < 0.3, -100)
    weights = torch.randn(3, 300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.losses.CHUNK_ELEMENTS", 50 * 100)
        ours, entropy = log_probs_and_entropy(hidden, head, labels, temperature=0.7)
        (ours * weights).sum().backward()
    grads = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    log_p = (hidden @ head.t() / 0.7).log_softmax(-1)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1) * (labels >= 0), rtol=1e-3, atol=1e-4)
    plain = log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    plain = plain.masked_fill(labels < 0, 0.0)
    (plain * weights).sum().backward()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(grads, (hidden.grad, head.grad), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(label_log_probs(hidden, head, labels), -token_losses(hidden, head, labels))


def test_the_prompt_and_the_padding_have_no_part_and_the_end_token_has(models):
    policy, reference = models
    loss = PreferenceLoss(PreferenceSettings(), whole(reference))
    row = packed(given_pairs())
    _, _, metrics = loss(policy, row)
    short = {name: value[:, :50] for name, value in row.items()}  # less padding
    torch.testing.assert_close(loss(policy, short)[2]["chosen_log_prob"], metrics["chosen_log_prob"])
    prompt, chosen, rejected = given_pairs()[0]
    out = policy(torch.tensor([prompt + chosen]))
    each = out.logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(prompt + chosen)[1:, None])[:, 0]
    _, count, one = loss(policy, packed([(prompt, chosen, rejected)]))
    assert count == 1
    assert one["chosen_log_prob"].item() == pytest.approx(each[len(prompt) - 1 :].sum().item(), abs=1e-4)


def test_how_pairs_share_rows_changes_nothing(models):
    """Three pairs in one row, and in rows of two, of one and of none: the same sums, so also the same gradient."""
    policy, reference = models
    loss, pairs = PreferenceLoss(PreferenceSettings(nll_weight=0.2), whole(reference)), given_pairs()
    uneven = [packed(pairs[:2]), packed(pairs[2:]), packed([])]
    together = {name: torch.cat([row[name] for row in uneven]) for name in uneven[0]}
    results = [loss(policy, packed(pairs)), loss(policy, together)]
    for total, count, metrics in results:
        assert count == 3
        torch.testing.assert_close(total, results[0][0])
        for name, value in metrics.items():
            torch.testing.assert_close(value, results[0][2][name])


def test_held_out_pairs_are_shared_among_ranks_and_counted_once(models, monkeypatch):
    """Three batches on two ranks: the rank that has one less adds nothing in its last turn."""
    policy, reference = models
    batches = [packed([pair]) for pair in given_pairs()]
    loss = PreferenceLoss(PreferenceSettings(), whole(reference))
    measure = HeldOutPairs(loss, batches, [], np.zeros(61))
    alone, shown = measure(policy, torch.float32, Ranks(0, 1, torch.device("cpu"))), []
    watch = Watch(show=lambda *what: shown.append(what))
    assert measure(policy, torch.float32, Ranks(0, 1, torch.device("cpu"), watch=watch)) == alone
    assert shown == [*(("validating pairs", done, 3) for done in range(3)), ("", 0, 0)]
    watch.asked = True  # which ends it, and what it returns is not used
    assert measure(policy, torch.float32, Ranks(0, 1, torch.device("cpu"), watch=watch)) and len(shown) == 6
    assert alone.keys() >= {"val_loss", "val_accuracy", "val_margin", "val_chosen_log_prob", "val_kl"}
    sums: list[list[torch.Tensor]] = []
    for rank in (0, 1):
        sums.append([])
        monkeypatch.setattr(Ranks, "sum", lambda _, tensor: sums[-1].append(tensor.clone()) or tensor)
        measure(policy, torch.float32, Ranks(rank, 2, torch.device("cpu")))
    assert len(sums[0]) == len(sums[1])
    both = iter([a + b for a, b in zip(*sums, strict=True)])
    monkeypatch.setattr(Ranks, "sum", lambda _, tensor: tensor.copy_(next(both)))
    assert measure(policy, torch.float32, Ranks(0, 2, torch.device("cpu"))) == pytest.approx(alone)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"loss": "kto"}, "loss kto: one of sigmoid, ipo, simpo"),
        ({"beta": 0.0}, "beta 0.0: must be positive"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "ipo has none"),
        ({"nll_weight": -1.0}, "nll_weight -1.0: must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, what):
    with pytest.raises(UserError, match=what):
        PreferenceSettings(**wrong)
