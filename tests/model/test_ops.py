"""A training step and a model's parts are the same through a kernel as in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import TYPES, far, training_step

from LMConfig import LMConfig
from model import MiniDeepSeek, ops
from model.attention import AttentionMask
from model.cache import LatentCache
from model.experts import Experts
from model.kernels import causal, fused, products
from model.moe import Router
from model.norm import RMSNorm


def without(kernel: str, patch: pytest.MonkeyPatch, off: bool) -> None:
    """As on a processor where this kernel is the faster way, or where it is not."""
    if kernel == "fused":
        patch.setattr(fused, "library", (lambda dtype: None) if off else fused.library)
    elif kernel == "causal":
        patch.setattr(causal, "multiplies", lambda dtype: not off)
    else:
        patch.setattr(products, "not_intel", lambda: not off)
        patch.setattr(products, "multiplies", lambda dtype: not off)


@pytest.mark.parametrize(
    ("kernel", "call", "dtype"),
    [
        ("fused", (fused.SwiGLU, "apply"), TYPES[0]),
        ("causal", (causal.CausalAttention, "apply"), TYPES[0]),
        ("causal", (causal.CausalAttention, "apply"), TYPES[1]),
        ("products", (products, "gradient_in_c"), TYPES[0]),
    ],
)
def test_a_training_step_has_the_same_loss_and_gradients_either_way(kernel, call, dtype, monkeypatch) -> None:
    config = LMConfig.preset("demo", num_hidden_layers=2, vocab_size=300)
    calls, original = [], getattr(*call)
    monkeypatch.setattr(*call, lambda *given, **named: calls.append(1) or original(*given, **named))
    without(kernel, monkeypatch, off=False)
    loss, gradients = training_step(config, dtype, 91)
    used = len(calls)
    without(kernel, monkeypatch, off=True)
    plain, want = training_step(config, dtype, 91)
    assert used > 0 and len(calls) == used
    if dtype == torch.float32:
        torch.testing.assert_close(loss, plain)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6, msg=name)
    else:
        torch.testing.assert_close(loss, plain, rtol=1e-3, atol=0)
        flat, other = (torch.cat([g.flatten() for g in each.values()]) for each in (gradients, want))
        assert far(flat, other) < 5e-2


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("normalise", [True, False])
@torch.inference_mode()
def test_the_router_in_c_chooses_and_weighs_as_pytorch(dtype: torch.dtype, groups: tuple, normalise: bool) -> None:
    config = LMConfig(
        hidden_size=64, n_routed_experts=20, num_experts_per_tok=8, n_group=groups[0], topk_group=groups[1],
        norm_topk_prob=normalise, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = Router(config)
    torch.nn.init.normal_(router.weight, std=0.2)
    router.e_score_correction_bias.normal_(std=0.5)  # negative sums too, in groups that are kept
    x = torch.randn(203, 64).to(dtype)
    weights, indices, scores = router(x)
    fast_weights, fast_indices = ops.route(router, x)
    assert torch.equal(fast_indices.sort().values, indices.sort().values)
    found, want = (torch.zeros_like(scores).scatter_(1, *w) for w in ((fast_indices, fast_weights), (indices, weights)))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_a_router_that_is_watched_or_trained_goes_through_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    router, x, seen = Router(LMConfig(hidden_size=32)), torch.randn(9, 32), []
    torch.nn.init.normal_(router.weight)
    monkeypatch.setattr(fused, "route", lambda *_: pytest.fail("computed in C"))
    assert ops.route(router, x)[0].requires_grad
    router.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        ops.route(router, x)
    assert seen == [1]


@pytest.mark.parametrize("tokens", [8, 40, 700])
def test_experts_one_after_the_other_give_the_bits_of_all_at_once(tokens: int) -> None:
    config = LMConfig(hidden_size=64, moe_intermediate_size=32)
    for dtype, weight_dtype in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)):
        experts = Experts(config).to(weight_dtype)
        for weight in experts.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        x, indices = torch.randn(tokens, 64).to(dtype), torch.rand(tokens, 16).topk(4).indices
        weights = torch.rand(tokens, 4)
        with torch.no_grad():
            in_turn = experts(x, weights, indices)
        assert torch.equal(in_turn, experts(x, weights, indices).detach())


@pytest.mark.skipif(causal.prefill_library() is None, reason="no dot products of bfloat16 here")
def test_attention_without_gradients_has_the_bits_of_training_unless_a_cache_is_read() -> None:
    """Log-probabilities of samples are computed in both ways, and their ratio is 1 at first."""
    model = MiniDeepSeek(LMConfig.preset("demo", vocab_size=300)).bfloat16()
    attention, rope = model.model.layers[0].self_attn, model.rotary(torch.arange(70)[None])
    x = torch.randn(2, 70, model.config.hidden_size).bfloat16()
    trained = attention(x, rope, AttentionMask())
    with torch.no_grad():
        assert torch.equal(attention(x, rope, AttentionMask()), trained)
        cache = LatentCache(model.config, 2, 70, torch.bfloat16, "cpu")
        assert not torch.equal(attention(x, rope, AttentionMask(), cache), trained)  # so the line above can fail


def test_a_norm_with_bfloat16_weights_is_the_same_in_one_pass() -> None:
    norm, x = RMSNorm(64).bfloat16(), (torch.randn(50, 64) * 3).bfloat16()
    torch.nn.init.normal_(norm.weight)
    fast = norm(x)
    assert type(fast.grad_fn).__name__ == "RMSNormBackward"
    assert far(fast, F.rms_norm(x.double(), (64,), norm.weight.double(), norm.eps)) < 3e-3
