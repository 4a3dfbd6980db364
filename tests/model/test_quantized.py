"""Frozen weights in 8 and 4 bits, and how a model is shrunk to them."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from errors import UserError
from LMConfig import LMConfig
from model.experts import Experts
from model.quantized import Int8Weight, QuantizedLinear, QuantizedWeight
from training.adapters.frozen import BLOCK, SCALES, NF4Weight, check_base, int8, nf4, nf4_or_int8, shrink_frozen
from training.adapters.lora import LoraSettings

TYPES = [torch.float32, torch.bfloat16]
IDS = torch.randint(0, 600, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(6, 64, 128, generator=torch.Generator().manual_seed(0)) * 0.02)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("kind", "least", "most", "bits"), [(int8, 1e-3, 0.015, 8.5), (nf4, 0.05, 0.1, 4.3)])
def test_a_quantized_weight_is_small_and_near(weight, kind, least, most, bits, dtype):
    quantized = kind(weight)
    near = quantized.dense(dtype)
    assert near.shape == weight.shape == quantized.shape and near.dtype == dtype
    error = ((near.float() - weight).norm() / weight.norm()).item()
    assert least < error < most
    size = sum(buffer.numel() * buffer.itemsize for buffer in quantized.buffers())
    assert 8 * size / weight.numel() < bits


def test_four_bits_are_unfolded_to_the_numbers_of_torchao(weight):
    from torchao.quantization import to_nf4

    theirs = to_nf4(weight.detach().reshape(1, -1), BLOCK, SCALES).get_original_weight().view_as(weight)
    assert torch.equal(nf4(weight).dense(torch.float32), theirs)


def test_eight_bits_are_half_a_step_from_the_weight(weight):
    near, step = int8(weight).dense(torch.float32), weight.abs().amax(-1, keepdim=True) / 127
    assert ((near - weight).abs() <= 0.51 * step).all()


def test_a_weight_whose_size_has_no_blocks_gets_eight_bits():
    odd = nn.Parameter(torch.randn(5, 7))
    assert isinstance(nf4_or_int8(odd), Int8Weight)
    assert isinstance(nf4_or_int8(nn.Parameter(torch.randn(8, 8))), NF4Weight)


@pytest.mark.parametrize("kind", [int8, nf4])
@pytest.mark.parametrize("bias", [False, True])
def test_a_quantized_layer_equals_the_layer_with_the_unfolded_weight_and_its_gradient(kind, bias):
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=bias)
    quantized = QuantizedLinear(linear, kind(linear.weight))
    with torch.no_grad():
        linear.weight.copy_(quantized.quantized.dense(torch.float32))
    x = torch.randn(3, 5, 64, requires_grad=True)
    results = []
    for layer in (quantized, linear):
        out = layer(x)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        results.append((out, grad))
    torch.testing.assert_close(results[0], results[1])
    with torch.autocast("cpu", torch.bfloat16):
        out = quantized(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), linear(x), rtol=0.05, atol=0.05)


def linear(pack: Callable[[nn.Parameter], QuantizedWeight | nn.Parameter]) -> Callable[[torch.Tensor], torch.Tensor]:
    layer = nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)
    weight = pack(layer.weight)
    layer.weight = weight if isinstance(weight, nn.Parameter) else layer.weight
    return layer if isinstance(weight, nn.Parameter) else QuantizedLinear(layer, weight)


def experts(pack: Callable[[nn.Parameter], QuantizedWeight | nn.Parameter]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Some of them without tokens; one of the sizes is no multiple of what CUDA's products are aligned to."""
    module = Experts(LMConfig(hidden_size=64, moe_intermediate_size=36, n_routed_experts=8, n_group=1, topk_group=1))
    for name, weight in list(module.named_parameters()):
        nn.init.normal_(weight, std=0.1)
        delattr(module, name)
        setattr(module, name, pack(weight))
    indices = torch.arange(48 * 2).view(48, 2) % 5
    weights = torch.rand(48, 2, generator=torch.Generator().manual_seed(2))
    return lambda x: module(x, weights, indices)


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> None:
    if request.param == "cuda":
        request.getfixturevalue("on_cuda")


@pytest.mark.parametrize("kind", [int8, nf4])
@pytest.mark.parametrize(("build", "sizes"), [(linear, [96 * 64]), (experts, [8 * 72 * 64, 8 * 64 * 36])])
def test_a_quantized_weight_is_not_kept_dense_for_the_backward_pass(kind, build, sizes, device, monkeypatch):
    unpacked: list[weakref.ref] = []
    made = {int8: Int8Weight, nf4: NF4Weight}[kind]
    dense = made.dense

    def noted(self: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
        weight = dense(self, dtype)
        unpacked.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(made, "dense", noted)
    forward, saved = build(kind), []
    x = torch.randn(48, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = forward(x)
    assert len(unpacked) == len(sizes) and all(weight() is None for weight in unpacked)
    assert all(tensor.numel() < min(sizes) for tensor in saved), [tensor.shape for tensor in saved]
    out.float().sum().backward()
    assert len(unpacked) == 2 * len(sizes)


@pytest.mark.parametrize("kind", [int8, nf4])
@pytest.mark.parametrize("build", [linear, experts])
def test_gradients_through_a_quantized_weight_have_the_bits_of_those_through_the_unpacked_one(kind, build, device):
    found = []
    for pack in (kind, lambda weight: nn.Parameter(kind(weight).dense(torch.bfloat16), requires_grad=False)):
        torch.manual_seed(0)
        forward = build(pack)
        x = torch.randn(48, 64, dtype=torch.bfloat16, requires_grad=True)
        out = forward(x)
        found.append((out, *torch.autograd.grad(out, x, torch.randn(out.shape).bfloat16())))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize(("base", "near"), [("auto", 0.0), ("int8", 0.1), ("nf4", 0.6)])
def test_a_model_on_a_shrunk_base_stays_near(tiny_model, base, near):
    from training.adapters.adapter import Adapter  # peft takes seconds to import

    model = tiny_model(vocab_size=600)
    Adapter.add(model, LoraSettings(targets="all"), "base")
    model.eval()
    wanted = model(IDS).logits
    shrink_frozen(model, base, torch.float32)
    assert (model(IDS).logits - wanted).norm() <= near * wanted.norm()


def test_what_is_trained_and_what_must_be_exact_keep_float32(tiny_model):
    from training.adapters.adapter import Adapter

    model = tiny_model(vocab_size=600)
    adapter = Adapter.add(model, LoraSettings(targets="all"), "base")
    before = adapter.parameters
    shrink_frozen(model, "nf4", torch.bfloat16)
    assert adapter.parameters == before
    for name, parameter in model.named_parameters():
        exact = parameter.requires_grad or "norm" in name or name.endswith("gate.weight")
        assert parameter.dtype == (torch.float32 if exact else torch.bfloat16), name
    held = {name for name, _ in model.named_parameters() if name.startswith("model.layers.") and "lora" not in name}
    assert all("norm" in name or name.endswith("mlp.gate.weight") for name in held)


def test_a_base_that_is_none_is_named():
    with pytest.raises(UserError, match="--base int4: one of auto, int8, nf4"):
        check_base("int4")
