"""The dropout of adapters: a share of zeros, the rest scaled, the same mask for the gradient."""

from __future__ import annotations

import shutil

import pytest
import torch
from forked import on_ranks
from toy_stage import TIME

from model import MiniDeepSeek
from training.adapters.dropout import Dropout
from training.parallel.ranks import Ranks


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


class Dropping(torch.nn.Module):
    """A model whose only random numbers are those of a dropout on its output."""

    def __init__(self, model: MiniDeepSeek) -> None:
        super().__init__()
        self.model, self.dropout, self.drawn = model, Dropout(0.5), []

    def forward(self, *inputs: object, **named: object) -> object:
        out = self.model(*inputs, **named)
        hidden = self.dropout(out.hidden)
        self.drawn.append((hidden == 0).flatten().tolist())
        return out._replace(hidden=hidden)


def masks(make, ranks: Ranks | None = None, **options: object) -> list[list[bool]]:
    """What dropout left out, by micro-batch, in a run of one process or of this rank."""
    trainer = make(ranks=ranks, micro_tokens=2 * TIME, **options)
    loss, seen = trainer.loss, []

    def dropping(model: torch.nn.Module, batch: dict) -> tuple:
        kept = Dropping(model)
        result = loss(kept, batch)
        seen.extend(kept.drawn)
        return result

    trainer.loss = dropping
    trainer.run()
    return seen


def test_every_step_micro_batch_and_rank_draws_masks_of_its_own(make, tmp_path):
    """Four micro-batches a step on one process, two on each of two ranks, which once drew the same."""
    alone = masks(make, max_steps=3)
    assert len(alone) == 12 and len(set(map(tuple, alone))) == 12

    def of_rank(rank: int) -> None:
        torch.save(masks(make, Ranks.start("cpu", timeout=30.0), out="two", max_steps=3), tmp_path / f"{rank}.pt")

    assert [rank.code for rank in on_ranks(2, of_rank, tmp_path)] == [0, 0]
    both = [mask for rank in (0, 1) for mask in torch.load(tmp_path / f"{rank}.pt")]
    assert len(both) == 12 and len(set(map(tuple, both))) == 12


def test_masks_are_a_function_of_the_seed_and_the_step(make):
    """Not of what was drawn before: a resumed run needs no random state."""
    whole = masks(make, out="whole", max_steps=3, save_every=2)
    shutil.rmtree(make.folder / "whole" / "final")
    torch.rand(5)
    assert masks(make, out="whole", max_steps=3, resume=True) == whole[8:]
    assert masks(make, out="other", max_steps=1, seed=1) != whole[:4]
