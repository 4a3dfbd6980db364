"""Prefill's fast paths on CPU equal the plain ones: attention in one pass, the router, experts one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from LMConfig import LMConfig
from model import MiniDeepSeek, ops
from model.attention import AttentionMask
from model.cache import LatentCache
from model.decoding.runner import runner_for
from model.experts import Experts
from model.kernels import causal, fused
from model.moe import Router
from model.norm import RMSNorm
from model.rope import RotaryEmbedding, rotate

SIZES = {"64m's heads": (64, 32, 64), "wider values": (16, 8, 80), "odd sizes": (6, 10, 20)}
SPANS = {"from nothing": (70, 70), "after others": (45, 400), "over several blocks": (600, 600)}


def far(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


needs_dots = pytest.mark.skipif(causal.prefill_library() is None, reason="no dot products of bfloat16 here")


def test_it_is_compiled_where_the_processor_multiplies_bfloat16() -> None:
    facts = Path("/proc/cpuinfo")
    has = facts.exists() and "avx512_bf16" in facts.read_text()
    assert (causal.prefill_library() is not None) == has


@needs_dots
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("sizes", SIZES)
@torch.inference_mode()
def test_attention_in_one_pass_is_that_of_float64(sizes: str, span: str, padded: bool) -> None:
    (nope, rope, value), (time, held), heads, scale = SIZES[sizes], SPANS[span], 3, 0.3
    config = LMConfig(qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value)
    padding = torch.tensor([held - 30, 0, 61]) if padded else None
    q, kv = (torch.randn(3, t, heads, size).bfloat16() for t, size in ((time, nope + rope), (held, nope + value)))
    shared = torch.randn(3, held, rope + 16).bfloat16()[..., 16:]  # part of a wider row, as in the cache
    angles = RotaryEmbedding(config)(torch.arange(held - time, held).expand(3 if padded else 1, -1))
    out = causal.prefill(q, kv, shared, angles, scale, padding)

    turned = torch.cat((q[..., :nope], rotate(q[..., nope:], angles)), -1).double()
    keys = torch.cat((kv[..., :nope], shared.unsqueeze(2).expand(-1, -1, heads, -1)), -1).double()
    scores = torch.einsum("bthd,bshd->bhts", turned, keys) * scale
    attention_mask = AttentionMask() if padding is None else AttentionMask.left_padded(time, held, padding)
    scores.masked_fill_(~attention_mask.as_bool(time, held, q.device), float("-inf"))
    wanted = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), kv[..., nope:].double())
    assert far(out, wanted) < 5e-3
    assert (out.double() - wanted).abs().max() < 0.03  # no single position is off


@needs_dots
@torch.inference_mode()
def test_a_row_of_attention_does_not_depend_on_the_rows_and_threads_beside_it() -> None:
    config, threads = LMConfig(), torch.get_num_threads()
    q, kv, shared = (torch.randn(*size).bfloat16() for size in ((3, 90, 2, 96), (3, 90, 2, 128), (3, 90, 32)))
    angles = RotaryEmbedding(config)(torch.arange(90)[None])
    together = causal.prefill(q, kv, shared, angles, 0.1, None)
    try:
        torch.set_num_threads(3)
        alone = causal.prefill(q[1:2], kv[1:2], shared[1:2], angles, 0.1, None)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together[1:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
    spread, wanted = (
        torch.zeros_like(scores).scatter_(1, *w) for w in ((fast_indices, fast_weights), (indices, weights))
    )
    torch.testing.assert_close(spread, wanted, rtol=1e-5, atol=1e-6)


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


def test_a_norm_with_bfloat16_weights_is_the_same_in_one_pass() -> None:
    norm, x = RMSNorm(64).bfloat16(), (torch.randn(50, 64) * 3).bfloat16()
    torch.nn.init.normal_(norm.weight)
    exact = torch.nn.functional.rms_norm(x.double(), (64,), norm.weight.double(), norm.eps)
    fast = norm(x)
    assert type(fast.grad_fn).__name__ == "RMSNormBackward"
    assert far(fast.detach(), exact.detach()) < 3e-3


@needs_dots
@pytest.mark.parametrize("padded", [False, True])
@torch.inference_mode()
def test_a_prefill_in_bfloat16_stays_near_float32_with_and_without_it(padded: bool, monkeypatch) -> None:
    """The fast attention is no further from float32 than the plain one, and it is the one that runs."""
    # Every expert is chosen: rounding cannot choose another one.
    config = LMConfig.preset("demo", vocab_size=300, num_experts_per_tok=8, topk_group=4)
    model = MiniDeepSeek(config).eval()
    ids, padding = torch.randint(0, 300, (3, 150)), torch.tensor([0, 40, 149]) if padded else None
    calls, original = [], causal.prefill

    def counted(*args) -> Tensor:
        calls.append(1)
        return original(*args)

    def read() -> Tensor:
        cache = LatentCache(model.config, 3, 150, torch.float32, "cpu", padding)
        return runner_for(model, cache).prefill(ids).double()

    exact = read()
    monkeypatch.setattr(causal, "prefill", counted)
    model.bfloat16()
    fast = read()
    assert len(calls) == model.config.num_hidden_layers - 1  # of the last layer one position is asked for
    monkeypatch.setattr(causal, "prefill_library", lambda: None)
    plain = read()
    assert len(calls) == model.config.num_hidden_layers - 1
    assert far(fast, exact) < 1.1 * far(plain, exact) + 1e-3
    assert far(fast, exact) < 0.03
