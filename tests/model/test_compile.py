"""`--compile` compiles layer by layer; here without generating code, which takes a minute."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from kernel_cases import far
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from varlen_cpu import varlen_on_cpu

import model.kernels as kernels
from grpo_train import GRPOSettings
from lora_sft import LoraSFTSettings
from model.kernels import attention, fused
from training.losses import NextTokenLoss
from training.settings import StageSettings


def test_compiled_layers_give_the_same_loss_and_gradients(tiny_model):
    ids = torch.randint(0, 61, (2, 24))
    batch, found = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}, []
    for compiled in (False, True):
        model = tiny_model(num_hidden_layers=1).train()  # a dense layer, and MTP's with experts
        if compiled:
            for layer in [*model.model.layers, *model.mtp]:
                layer.compile(dynamic=False, backend="eager")
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


@pytest.mark.parametrize("asked", [True, None])
def test_the_trainer_compiles_every_layer_and_nothing_else(asked, make, monkeypatch):
    """Where a person asked for it, what cannot be compiled ends the run; else it runs as it is."""
    compiled = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda self, **how: compiled.append((type(self).__name__, how)))
    if not asked:
        monkeypatch.setattr("training.settings.StageSettings.compiles", lambda self, device: True)
    with torch._dynamo.config.patch(suppress_errors=False):
        make("run", compile=asked, max_steps=1).run()
        assert torch._dynamo.config.suppress_errors == (asked is None)
    assert compiled == [("DecoderLayer", {"dynamic": False})] * 3 + [("MTPLayer", {"dynamic": False})]


@pytest.mark.parametrize(
    ("settings", "said", "on_cpu", "on_cuda"),
    [
        (StageSettings, None, False, True),
        (StageSettings, False, False, False),
        (StageSettings, True, True, True),
        (LoraSFTSettings, None, False, False),
        (LoraSFTSettings, True, True, True),
        (GRPOSettings, None, False, False),
    ],
)
def test_layers_are_compiled_where_a_person_says_so_or_on_cuda(settings, said, on_cpu, on_cuda):
    needed = {"ckpt": "c", "tokenizer": "t", "data": "d"}
    named = {field.name: needed[field.name] for field in fields(settings) if field.name in needed}
    made = settings(out="run", compile=said, **named)
    assert [made.compiles(torch.device(kind)) for kind in ("cpu", "cuda")] == [on_cpu, on_cuda]


def test_a_compiled_graph_has_pytorchs_own_operations():
    x = torch.zeros(2, 16)
    found = torch.compile(lambda x: x + fused.available(x), backend="eager", fullgraph=True)
    assert fused.available(x) and not found(x).any()
