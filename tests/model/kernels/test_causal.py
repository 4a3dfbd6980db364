"""Causal attention in C, for training and for prefill, equals the plain equations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_cases import TYPES, attention, far, numbers
from torch import Tensor

from LMConfig import LMConfig
from model import MiniDeepSeek
from model.attention import AttentionMask
from model.attention import causal as causal_mask
from model.cache import LatentCache
from model.decoding.runner import runner_for
from model.kernels import causal

NOPE, ROPE, VALUE, HEADS = 32, 16, 64, 3
needs_dots = pytest.mark.skipif(causal.prefill_library() is None, reason="no dot products of bfloat16 here")


@pytest.fixture(autouse=True)
def a_compiler_is_there() -> None:
    assert all(causal.library(dtype) is not None for dtype in TYPES)


def inputs(
    batch: int, queries: int, keys: int, dtype: torch.dtype, sizes: tuple[int, int, int] = (NOPE, ROPE, VALUE)
) -> tuple[list[Tensor], Tensor]:
    """q, kv and a latent whose last part is k_rope, as in the cache; angles of another start in each row."""
    nope, rope, value = sizes
    q = numbers(batch, queries, HEADS, nope + rope, dtype=dtype)
    kv = numbers(batch, keys, HEADS, nope + value, dtype=dtype, seed=1)
    latent, angles = numbers(batch, keys, 24 + rope, seed=2), numbers(batch, queries, 1, rope // 2, seed=3) * 3
    return [q, kv, latent.to(dtype)], torch.stack((angles.cos(), angles.sin()), dim=-1)


def equations(
    q: Tensor, kv: Tensor, latent: Tensor, rope: Tensor, scale: float, allowed: Tensor | None = None
) -> Tensor:
    """softmax(q k^T * scale) v in float64."""
    q, kv, k_rope = q.double(), kv.double(), latent[..., 24:].double()
    nope = q.shape[-1] - k_rope.shape[-1]
    pairs = torch.view_as_complex(q[..., nope:].unflatten(-1, (-1, 2)).contiguous()) * torch.view_as_complex(
        rope.double()
    )
    q = torch.cat((q[..., :nope], torch.view_as_real(pairs).flatten(-2)), dim=-1)
    k = torch.cat((kv[..., :nope], k_rope.unsqueeze(2).expand(-1, -1, HEADS, -1)), dim=-1)
    allowed = causal_mask(q.shape[1], k.shape[1], q.device) if allowed is None else allowed
    return attention(q, k, kv[..., nope:], scale, allowed)


def attend(q: Tensor, kv: Tensor, latent: Tensor, rope: Tensor, scale: float) -> Tensor:
    return causal.CausalAttention.apply(q, kv, latent[..., 24:], rope, scale)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (64, 64), (65, 65), (150, 150), (3, 200), (71, 97)])
def test_it_and_its_gradients_are_those_of_float64(dtype: torch.dtype, batch: int, queries: int, keys: int) -> None:
    parts, rope = inputs(batch, queries, keys, dtype)
    exact = [part.double().requires_grad_() for part in parts]
    out, want = attend(*(part.requires_grad_() for part in parts), rope, 0.3), equations(*exact, rope, 0.3)
    grad = numbers(batch, queries, HEADS, VALUE, dtype=dtype, seed=5)
    out.backward(grad)
    want.backward(grad.double())
    limit = 1e-6 if dtype == torch.float32 else 6e-3
    assert out.dtype == dtype and far(out, want) < limit
    for part, true in zip(parts, exact, strict=True):
        assert far(part.grad, true.grad) < limit


def test_large_scores_do_not_overflow() -> None:
    (q, kv, latent), rope = inputs(1, 70, 70, torch.float32)
    parts = (q * 100, kv * 100, latent)
    assert far(attend(*parts, rope, 1.0), equations(*parts, rope, 1.0)) < 1e-5


def test_a_nan_reaches_the_queries_that_see_it_and_not_the_queries_before() -> None:
    (q, kv, latent), rope = inputs(1, 90, 90, torch.float32)
    kv[0, 70] = torch.nan
    out = attend(q, kv, latent, rope, 0.3)
    assert out[0, 70:].isnan().all() and not out[0, :64].isnan().any()


def test_nothing_of_the_size_of_the_scores_is_kept() -> None:
    time, kept = 300, []
    parts, rope = inputs(1, time, time, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attend(*(part.requires_grad_() for part in parts), rope, 0.3)
    assert kept and max(kept) <= time * HEADS * (NOPE + VALUE)


def test_what_it_cannot_compute_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "multiplies", lambda dtype: True)
    q, kv, k_rope = numbers(1, 4, 2, 48), numbers(1, 4, 2, 96), numbers(1, 4, 16)
    assert causal.fits(q, kv, k_rope)
    for other in (
        (q, kv[..., :-1], k_rope), (q, kv, k_rope[..., :8]), (q.double(), kv.double(), k_rope.double()),
        (q, kv.bfloat16(), k_rope), (q.to("meta"), kv.to("meta"), k_rope.to("meta")), (q[:0], kv[:0], k_rope[:0]),
    ):  # fmt: skip
        assert not causal.fits(*other)
    monkeypatch.setattr(causal, "multiplies", lambda dtype: False)
    assert not causal.fits(q, kv, k_rope)


def test_prefill_is_compiled_where_the_processor_multiplies_bfloat16() -> None:
    facts = Path("/proc/cpuinfo")
    assert (causal.prefill_library() is not None) == (facts.exists() and "avx512_bf16" in facts.read_text())


@needs_dots
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("span", [(70, 70), (45, 400), (600, 600)])
@pytest.mark.parametrize("sizes", [(64, 32, 64), (16, 8, 80), (6, 10, 20)])
def test_prefill_is_that_of_float64(sizes: tuple[int, int, int], span: tuple[int, int], padded: bool) -> None:
    padding = torch.tensor([span[1] - 30, 0, 61]) if padded else None
    (q, kv, latent), angles = inputs(3, *span, torch.bfloat16, sizes)
    angles = angles if padded else angles[:1]
    out = causal.prefill(q, kv, latent[..., 24:], angles, 0.3, padding)
    mask = AttentionMask() if padding is None else AttentionMask.left_padded(*span, padding)
    want = equations(q, kv, latent, angles, 0.3, mask.as_bool(*span, q.device))
    assert far(out, want) < 5e-3
    assert (out.double() - want).abs().max() < 0.03  # no single position is off


@needs_dots
def test_a_row_of_prefill_does_not_depend_on_the_rows_and_threads_beside_it() -> None:
    (q, kv, latent), angles = inputs(3, 90, 90, torch.bfloat16)
    together, threads = causal.prefill(q, kv, latent[..., 24:], angles[:1], 0.1, None), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        alone = causal.prefill(q[1:2], kv[1:2], latent[1:2, :, 24:], angles[:1], 0.1, None)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together[1:2])


@needs_dots
@pytest.mark.parametrize("padded", [False, True])
@torch.inference_mode()
def test_a_prefill_in_bfloat16_stays_near_float32_with_and_without_it(padded: bool, monkeypatch) -> None:
    """The fast attention is no further from float32 than the plain one, and it is the one that runs."""
    # Every expert is chosen: rounding cannot choose another one.
    model = MiniDeepSeek(LMConfig.preset("demo", vocab_size=300, num_experts_per_tok=8, topk_group=4)).eval()
    ids, padding = torch.randint(0, 300, (3, 150)), torch.tensor([0, 40, 149]) if padded else None
    calls, original = [], causal.prefill

    def read() -> Tensor:
        cache = LatentCache(model.config, 3, 150, torch.float32, "cpu", padding)
        return runner_for(model, cache).prefill(ids).double()

    exact = read()
    monkeypatch.setattr(causal, "prefill", lambda *given: calls.append(1) or original(*given))
    model.bfloat16()
    fast = read()
    assert len(calls) == model.config.num_hidden_layers - 1  # of the last layer one position is asked for
    monkeypatch.setattr(causal, "prefill_library", lambda: None)
    plain = read()
    assert len(calls) == model.config.num_hidden_layers - 1
    assert far(fast, exact) < min(1.1 * far(plain, exact) + 1e-3, 0.03)
