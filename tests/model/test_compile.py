"""`--compile` compiles layer by layer; here without generating code, which takes a minute."""

from __future__ import annotations

import pytest
import torch

from model.kernels import fused
from training.losses import NextTokenLoss


def test_compiled_layers_give_the_same_loss_and_gradients(tiny_model):
    ids = torch.randint(0, 61, (2, 24))
    batch, found = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}, []
    for compiled in (False, True):
        model = tiny_model(num_hidden_layers=1).train()  # a dense layer, and MTP's with experts
        if compiled:
            for layer in [*model.model.layers, *model.mtp]:
                layer.compile(dynamic=False, backend="aot_eager")
        total, _, _ = NextTokenLoss()(model, batch)
        total.backward()
        found.append((total.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (plain, gradient), (compiled, compiled_gradient) = found
    assert compiled == pytest.approx(plain, rel=1e-5)
    torch.testing.assert_close(compiled_gradient, gradient, atol=1e-4, rtol=1e-3)


def test_the_trainer_compiles_every_layer_and_nothing_else(make, monkeypatch):
    compiled = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda self, **how: compiled.append((type(self).__name__, how)))
    make("run", compile=True, max_steps=1).run()
    assert compiled == [("DecoderLayer", {"dynamic": False})] * 3 + [("MTPLayer", {"dynamic": False})]


def test_a_compiled_graph_has_pytorchs_own_operations():
    x = torch.zeros(2, 16)
    found = torch.compile(lambda x: x + fused.available(x), backend="eager", fullgraph=True)
    assert fused.available(x) and not found(x).any()
