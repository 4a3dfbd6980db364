"""Optimisers beside plain AdamW: what their states become in a checkpoint, and rates by name."""

from __future__ import annotations

import copy
import importlib.util
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from errors import UserError
from training.optim.build import (
    OptimSettings,
    build_optimizer,
    set_learning_rate,
    state_tensors,
    step_scaled,
)
from training.run.state import load_state_tensors


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96))


def test_moments_in_8_bits_survive_a_file(model, tmp_path):
    from torchao.optim.subclass_8bit import OptimState8bit

    first, second = (build_optimizer(model, OptimSettings(kind="adamw8bit")) for _ in range(2))
    weight = model[0].weight
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        moment = first._new_buffer(weight, signed)
        moment.copy_(torch.randn(weight.shape) * 1e-3 if signed else torch.rand(weight.shape) * 1e-6)
        assert isinstance(moment, OptimState8bit)
        first.state[weight][key] = moment
    first.state[weight]["step"] = torch.tensor(3.0)
    save_file(state_tensors(first, model), tmp_path / "state.safetensors")
    load_state_tensors(second, model, load_file(tmp_path / "state.safetensors"))
    for key, wanted in first.state[weight].items():
        got = second.state[weight][key]
        assert type(got) is type(wanted) and got.shape == wanted.shape
        if isinstance(wanted, OptimState8bit):
            assert got.signed == wanted.signed and got.dequantize().abs().max() > 0
            assert torch.equal(got.dequantize(), wanted.dequantize())
        else:
            assert torch.equal(got, wanted)


def test_counters_that_are_plain_numbers_come_back_as_such(model, tmp_path):
    first, second = (build_optimizer(model, OptimSettings()) for _ in range(2))
    weight = model[0].weight
    first.state[weight] = {"step": 7, "state1": torch.arange(4, dtype=torch.uint8)}
    save_file(state_tensors(first, model), tmp_path / "state.safetensors")
    load_state_tensors(second, model, load_file(tmp_path / "state.safetensors"))
    assert second.state[weight]["step"] == 7 and isinstance(second.state[weight]["step"], int)
    assert torch.equal(second.state[weight]["state1"], first.state[weight]["state1"])


@pytest.mark.parametrize("kind", ["adamw", "adamw_bf16", "muon"])
def test_scaling_within_the_update_of_cuda_equals_scaling_before_it(kind, model, on_cuda, monkeypatch):
    passes, multiply = [], torch._foreach_mul_
    ours, theirs = model, copy.deepcopy(model)
    optimizers = [build_optimizer(each, OptimSettings(kind=kind, eps=1e-3)) for each in (ours, theirs)]
    for factor in (0.37, 1.0, 2.5):
        inputs = torch.randn(3, 64)
        for each, optimizer in zip((ours, theirs), optimizers, strict=True):
            each(inputs).square().sum().backward()
            gradients = [p.grad for p in each.parameters()]
            if each is theirs:
                multiply(gradients, factor)
                optimizer.step()
            else:
                with monkeypatch.context() as patch:
                    patch.setattr(torch, "_foreach_mul_", lambda *given: passes.append(given[1]) or multiply(*given))
                    step_scaled(optimizer, gradients, factor)
            optimizer.zero_grad()
    assert (0.37 in passes) == (kind != "adamw")
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_rates_and_decay_go_by_name_and_shape(model):
    optimizer = build_optimizer(model, OptimSettings(weight_decay=0.3), {"0.weight": 4.0})
    set_learning_rate(optimizer, 0.5)
    found = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    wanted = {"0.weight": (2.0, 0.3), "0.bias": (0.5, 0.0), "1.weight": (0.5, 0.0), "1.bias": (0.5, 0.0)}
    assert {name: found[p] for name, p in model.named_parameters()} == wanted


def test_decay_is_on_matrices_only_and_the_routers_bias_is_no_parameter(tiny_model):
    model = tiny_model(attention_bias=True)
    decayed, free = ([*group["params"]] for group in build_optimizer(model, OptimSettings()).param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    ends = ("norm.weight", "layernorm.weight", "bias")
    assert not any(names[id(p)].endswith(ends) for p in decayed) and all(names[id(p)].endswith(ends) for p in free)
    assert len(decayed) + len(free) == len(names)
    assert not any(name.endswith("e_score_correction_bias") for name in names.values())


def test_a_rate_that_is_a_tensor_is_changed_in_place(model):
    """torchao compiles its step for the tensor, not for the number."""
    optimizer = build_optimizer(model, OptimSettings(kind="adamw8bit"))
    rates = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.25)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        assert group["lr"] is rate and rate.item() == 0.25


def test_moments_of_another_kind_are_not_taken_for_these(model):
    rough = build_optimizer(model, OptimSettings(kind="adamw_bf16"))
    model(torch.randn(2, 64)).sum().backward()
    rough.step()
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        load_state_tensors(build_optimizer(model, OptimSettings()), model, state_tensors(rough, model))


def test_moments_in_bfloat16_that_could_not_move_are_refused():
    OptimSettings(kind="adamw_bf16", betas=(0.9, 0.99))
    with pytest.raises(UserError, match=r"--optim.betas \[0.9, 0.999\]: adamw_bf16 would round"):
        OptimSettings(kind="adamw_bf16", betas=(0.9, 0.999))


def test_a_kind_that_is_not_there_is_named(model, monkeypatch):
    with pytest.raises(UserError, match=r"--optim.kind adam: one of adamw, adamw_bf16, adamw8bit"):
        build_optimizer(model, OptimSettings(kind="adam"))
    if importlib.util.find_spec("bitsandbytes"):
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        build_optimizer(model, OptimSettings(kind="paged_adamw8bit"))
