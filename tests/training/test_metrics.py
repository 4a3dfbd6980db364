"""FLOPs of a step are those of what runs and what is trained; MaxVio is the worst load."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.costs import count
from training.losses import NextTokenLoss
from training.metrics import FlopsCounter, max_violation

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
