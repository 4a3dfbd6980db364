"""Each divergence is its formula, its gradient is autograd's, and how it is computed changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from divergence_formulas import NAIVE, divergence

import training.losses
from training.distill.distillation import LOSSES, Logits, distillation_sum
from training.distill.divergences import (
    forward_kl,
    logit_gradient,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
)
from training.losses import IGNORE, cross_entropy_sum

N, HIDDEN, WIDER, VOCAB = 150, 24, 40, 61


@pytest.fixture(params=[64 * VOCAB, 100 * VOCAB, 2**22], ids=["chunks of 64", "chunks of 100", "one chunk"])
def chunks(request, monkeypatch) -> None:
    monkeypatch.setattr(training.losses, "CHUNK_ELEMENTS", request.param)


NAMES = sorted(NAIVE)
assert set(LOSSES) == set(NAIVE)


def distributions(scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple((torch.randn(N, VOCAB) * scale).log_softmax(-1) for _ in range(2))


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Logits]:
    """A student's states, head and labels, of which some do not count, and what a wider teacher says at the others."""
    hidden = torch.randn(2, N // 2, HIDDEN).to(dtype).requires_grad_()
    head = (0.3 * torch.randn(VOCAB, HIDDEN)).requires_grad_()
    labels = torch.randint(VOCAB, (2, N // 2)).masked_fill(torch.rand(2, N // 2) >= 0.7, IGNORE)
    states = torch.randn(int((labels != IGNORE).sum()), WIDER).to(dtype)
    return hidden, head, labels, Logits(states, 0.3 * torch.randn(VOCAB, WIDER))


def plain(hidden, head, labels, said: Logits, name: str, temperature: float, ce_weight: float) -> torch.Tensor:
    """The same loss from whole logits, by autograd."""
    counted = labels != IGNORE
    z = hidden.float()[counted] @ head.t()
    p = (said.hidden.float() @ said.head.t() / temperature).softmax(-1)
    distance = NAIVE[name](p, (z / temperature).softmax(-1)).sum()
    hard = F.cross_entropy(z, labels[counted], reduction="sum")
    return (1 - ce_weight) * temperature**2 * distance + ce_weight * hard


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_the_formula(name):
    log_p, _ = distributions()
    z = torch.randn(N, VOCAB, requires_grad=True)
    want = NAIVE[name](log_p.exp(), z.softmax(-1))
    log_q = z.detach().log_softmax(-1)
    value, flow = divergence(name)(log_p, log_q)
    assert (value > 0).all()
    torch.testing.assert_close(value, want.detach(), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(want.sum(), z)
    torch.testing.assert_close(logit_gradient(log_q, flow), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("skewed", "plain"), [(skewed_forward_kl, forward_kl), (skewed_reverse_kl, reverse_kl)])
def test_a_skewed_kl_is_the_plain_one_at_lambda_0_and_nothing_at_1(skewed, plain):
    log_p, log_q = distributions()
    (value, flow), (want, plain_flow) = skewed(log_p, log_q, 0), plain(log_p, log_q)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(logit_gradient(log_q, flow), logit_gradient(log_q, plain_flow))
    value, flow = skewed(log_p, log_q, 1)
    assert not value.any()
    torch.testing.assert_close(logit_gradient(log_q, flow), torch.zeros(N, VOCAB), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_improbable_tokens_make_no_nan(name):
    """Logits 300 apart: probabilities of 0 in float32."""
    log_p, log_q = ((300 * torch.randn(N, VOCAB)).log_softmax(-1) for _ in range(2))
    value, flow = divergence(name)(log_p, log_q)
    assert value.isfinite().all() and logit_gradient(log_q, flow).isfinite().all()


@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (1.0, 0.25), (2.5, 0.25)])
@pytest.mark.parametrize("name", NAMES)
def test_the_chunked_loss_is_the_plain_one_with_its_gradients(name, temperature, ce_weight, chunks):
    hidden, head, labels, said = problem()
    want = plain(hidden, head, labels, said, name, temperature, ce_weight)
    got, distance, hard = distillation_sum(hidden, head, labels, said, divergence(name), temperature, ce_weight)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got, (1 - ce_weight) * temperature**2 * distance + ce_weight * hard)
    torch.testing.assert_close(hard, cross_entropy_sum(hidden, head, labels).detach())
    # The gradient arrives scaled, as from a loss that is divided by a count.
    ours, naive = (torch.autograd.grad(value * 0.037, (hidden, head)) for value in (got, want))
    torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-5)


def test_what_a_teacher_forbids_is_improbable_not_infinite():
    logits = torch.randn(4, VOCAB)
    logits[:, 7] = -torch.inf
    log_p = Logits(logits, None).log_probs(slice(4), 1.0)
    value, flow = reverse_kl(log_p, torch.randn(4, VOCAB).log_softmax(-1))
    assert log_p[:, 7].exp().sum() == 0 and value.isfinite().all() and flow.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_it_is_the_same_but_for_rounding_and_what_does_not_count_changes_nothing(name):
    hidden, head, labels, said = problem(torch.bfloat16)
    want = plain(hidden, head, labels, said, name, 2.0, 0.25)
    wild = hidden.detach().masked_fill((labels == IGNORE)[..., None], 1e4).requires_grad_()
    got, _, _ = distillation_sum(wild, head, labels, said, divergence(name), 2.0, 0.25)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    ours, naive = torch.autograd.grad(got, (wild, head)), torch.autograd.grad(want, (hidden, head))
    assert not ours[0][labels == IGNORE].any()
    for one, other in zip(ours, naive, strict=True):
        assert one.dtype == other.dtype
        assert F.cosine_similarity(one.float().flatten(), other.float().flatten(), dim=0) > 0.999


@pytest.mark.parametrize("frozen", [None, "hidden", "head"])
def test_what_is_frozen_gets_no_gradient_and_no_labels_give_zero(frozen):
    hidden, head, labels, said = problem()
    nothing = Logits(said.hidden[:0], said.head), torch.full_like(labels, IGNORE)
    parts = {"hidden": hidden, "head": head}
    if frozen:
        parts[frozen].requires_grad_(False)
        loss, _, _ = distillation_sum(hidden, head, labels, said, divergence("jsd"))
    else:
        loss, _, _ = distillation_sum(hidden, head, nothing[1], nothing[0], divergence("jsd"), 1.0, 0.5)
        assert loss.item() == 0
    loss.backward()
    for name, tensor in parts.items():
        assert tensor.grad is None if name == frozen else tensor.grad.any() == bool(frozen)
