"""`--compile` compiles layer by layer; here without generating code, which takes a minute."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import far, varlen_on_cpu
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from model import kernels
from model.kernels import attention, fused
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


def packed(segments: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 61, (2, 25))
    ends = torch.arange(48).view(2, 24) * segments // 48
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "segment_ids": ends, "position_ids": ends * 0 + 1}


@pytest.mark.parametrize(("capability", "backend"), [(9, "aot_eager"), (8, "eager")])
def test_for_cuda_each_kind_of_layer_is_one_graph_without_breaks_whatever_the_rows_hold(
    capability, backend, tiny_model, on_cuda, monkeypatch
):
    varlen_on_cpu()
    monkeypatch.setattr(attention, "flash_attention", lambda: None)
    monkeypatch.setattr(kernels, "capability", lambda device: capability)
    torch._dynamo.reset()
    counters.clear()
    graphs, found = CompileCounterWithBackend(backend), []
    for compiled in (True, False):
        model = tiny_model(num_hidden_layers=4, first_k_dense_replace=2, qk_nope_head_dim=16, v_head_dim=16).train()
        for layer in [*model.model.layers, *model.mtp] if compiled else []:
            layer.compile(dynamic=False, backend=graphs)
        torch.manual_seed(0)
        for segments in (3, 40, 11):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                total, _, _ = NextTokenLoss()(model, packed(segments))
            total.backward()
        found.append((total.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert not counters["graph_break"] and not counters["unimplemented"]
    assert graphs.frame_count == 3  # a dense layer, one with experts, MTP's
    (loss, gradient), (plain, plain_gradient) = found
    torch.testing.assert_close(loss, plain, rtol=1e-3, atol=0)
    assert far(gradient, plain_gradient) < 2e-2


def test_the_trainer_compiles_every_layer_and_nothing_else(make, monkeypatch):
    compiled = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda self, **how: compiled.append((type(self).__name__, how)))
    make("run", compile=True, max_steps=1).run()
    assert compiled == [("DecoderLayer", {"dynamic": False})] * 3 + [("MTPLayer", {"dynamic": False})]


def test_a_compiled_graph_has_pytorchs_own_operations():
    x = torch.zeros(2, 16)
    found = torch.compile(lambda x: x + fused.available(x), backend="eager", fullgraph=True)
    assert fused.available(x) and not found(x).any()
