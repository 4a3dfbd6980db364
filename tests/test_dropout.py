"""The dropout of adapters: a share of zeros, the rest scaled, the same mask for the gradient."""

from __future__ import annotations

import pytest
import torch

from training.adapters.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_a_share_goes_and_the_rest_is_scaled(dtype, p):
    torch.manual_seed(0)
    x = torch.randn(400, 601).to(dtype)
    out = Dropout(p).train()(x)
    gone = out == 0
    # Five standard deviations of a binomial distribution of 240,400 draws.
    assert abs(gone.float().mean().item() - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(out[~gone], x[~gone] * (1 / (1 - p)))
    # Neither rows nor columns, nor neighbours, which come from one draw of 64 bits, go together.
    for axis in (0, 1):
        assert (gone.float().mean(axis) - p).abs().max() < 6 * (p * (1 - p) / 400) ** 0.5
    flat = gone.flatten().float() - p
    for distance in (1, 2, 3, 4):
        correlation = (flat[:-distance] * flat[distance:]).mean() / (p * (1 - p))
        assert abs(correlation) < 0.012


def test_the_gradient_goes_through_what_stayed():
    torch.manual_seed(0)
    x = torch.randn(30, 7, requires_grad=True)
    out = Dropout(0.3).train()(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, (out != 0).float() / 0.7)


def test_the_seed_decides_and_evaluation_changes_nothing():
    x, dropout = torch.randn(50, 50), Dropout(0.5)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(dropout.train()(x))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert dropout.eval()(x) is x or torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)
