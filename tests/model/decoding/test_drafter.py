"""Drafts from weights in 8 bits: nearly as many are kept, and the tokens are exactly those of plain decoding."""

from __future__ import annotations

import pytest
import torch
from decoding_steps import shaken

from model.decoding import native
from model.decoding.drafter import drafter
from model.decoding.speculative import stream_speculative
from model.quantized import Int8Weight, QuantizedLinear
from training.optim.build import OptimSettings, build_optimizer


@pytest.fixture
def model(tiny_model):
    return shaken(tiny_model(initializer_range=0.3, num_nextn_predict_layers=1))


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every weight by its name, packed ones unfolded."""
    found = {name.removesuffix(".quantized"): m.dense(torch.float32) for name, m in module.named_modules()
             if isinstance(m, Int8Weight)}  # fmt: skip
    return {name.removesuffix(".weight"): weight for name, weight in module.named_parameters()} | found


def test_the_copy_is_the_layer_rounded(model):
    layer, (light, head, _) = model.mtp[0], drafter(model)
    want, got = weights_of(layer), weights_of(light)
    assert want.keys() == got.keys()
    for name, weight in want.items():
        torch.testing.assert_close(got[name], weight, atol=weight.abs().max().item() / 127, rtol=0)
    torch.testing.assert_close(head.dense(torch.float32), model.lm_head.weight, atol=0.02, rtol=0)
    assert sum(isinstance(module, QuantizedLinear) for module in light.modules()) > 5
    assert not any(isinstance(module, (QuantizedLinear, Int8Weight)) for module in layer.modules())


@pytest.mark.parametrize("kind", ["adamw", "adamw_bf16"])
def test_it_is_made_once_and_anew_when_weights_change(kind, model):
    first = drafter(model)
    assert drafter(model) is first
    optimizer = build_optimizer(model, OptimSettings(kind=kind, lr=0.1))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    second = drafter(model)
    assert second is not first
    assert not torch.equal(second.head.codes, first.head.codes)


def test_it_is_made_anew_for_another_type(model):
    """Also where the numbers say nothing: bfloat16 holds all of these."""
    model.bfloat16().float()
    assert drafter(model).layer.hnorm.weight.dtype == torch.float32
    assert drafter(model.bfloat16()).layer.hnorm.weight.dtype == torch.bfloat16


@pytest.mark.skipif(native.library(torch.float32) is None, reason="no C compiler: PyTorch drafts with the layer itself")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_however_wrong_the_copy_the_tokens_are_right(dtype, model):
    model, prompt = model.to(dtype), torch.randint(1, 61, (1, 9))
    wanted, passes = model.generate(prompt, max_new_tokens=30)[0, 9:].tolist(), []
    assert 0 not in wanted
    drafter(model).head.codes.zero_()  # of equal chances the first is drafted: token 0
    assert list(stream_speculative(model, prompt, 30, accepted=passes, draft_tokens=2)) == wanted
    assert sum(kept for kept, _ in passes) == 0 < sum(drafted for _, drafted in passes)
