"""Sums of a step take one exchange; FLOPs are those of what runs and what is trained; MaxVio is the worst load."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.costs import count
from training.losses import NextTokenLoss
from training.metrics import FlopsCounter, Tally, max_violation
from training.parallel.ranks import Ranks

TIME = 32


@pytest.fixture
def model(tiny_model):
    return tiny_model(num_nextn_predict_layers=1)


def of(model, passes: int):
    return count(replace(model.config, num_nextn_predict_layers=passes), TIME)


def test_the_mtp_layer_counts_while_it_runs_and_as_often(model):
    loss = NextTokenLoss()
    counter = FlopsCounter(model, loss, TIME)
    assert counter.flops() == of(model, 1).flops
    loss.mtp_weight = 0.0
    assert counter.flops() == of(model, 0).flops
    assert FlopsCounter(model, NextTokenLoss(mtp_steps=3), TIME).flops() == of(model, 3).flops
    assert FlopsCounter(model, NextTokenLoss(mtp=False), TIME).flops() == of(model, 0).flops


def test_a_loss_without_mtp_and_a_model_without_it_count_none(model):
    assert FlopsCounter(model, lambda model, batch: None, TIME).flops() == of(model, 0).flops
    loss = NextTokenLoss()
    del model.mtp[0]
    assert FlopsCounter(model, loss, TIME).flops() == of(model, 0).flops


def test_frozen_weights_have_no_gradients_to_compute(model):
    model.requires_grad_(False)
    costs = of(model, 1)
    assert FlopsCounter(model, NextTokenLoss(), TIME).flops() == round(costs.flops - costs.products / 3)


def test_max_violation_is_the_worst_load_over_the_mean():
    assert max_violation(torch.tensor([[4.0, 4.0, 4.0, 4.0], [8.0, 2.0, 2.0, 4.0]])) == [0.0, 1.0]


class Doubled(Ranks):
    """Two ranks that measure the same. Attributes: exchanges: how many there were."""

    exchanges = 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        Doubled.exchanges += 1
        return tensor.mul_(2)


def test_a_tally_is_exchanged_once_and_gives_sums_means_and_loads():
    ranks, tally = Doubled(0, 2, torch.device("cpu")), Tally()
    for part in (1.0, 2.0):
        loads = torch.tensor([[part, 0.0], [1.0, 3.0]])
        tally.add(
            {
                "loss": torch.tensor(part, requires_grad=True),
                "count": torch.tensor(2**30 + 1),  # no float32
                "own": (torch.tensor(6.0), torch.tensor(2)),
                "nothing": (torch.tensor(0.0), torch.tensor(0)),
                "counts": loads,
            }
        )
    sums = tally.gather(ranks, norm=torch.tensor(0.1), seconds=1.5)
    assert Doubled.exchanges == 1
    assert torch.equal(sums.on_device["counts"], torch.tensor([[6.0, 0.0], [4.0, 12.0]], dtype=torch.float64))
    assert torch.equal(sums.on_host.pop("counts"), sums.on_device["counts"])
    assert sums.take("count") == 4 * (2**30 + 1) and sums.take("seconds") == 3.0
    assert sums.take("norm") == 2 * torch.tensor(0.1).item()
    assert sums.means(12.0) == {"loss": 0.5, "own": 3.0, "nothing": 0.0}
