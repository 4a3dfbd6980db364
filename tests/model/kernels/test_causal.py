"""Causal attention in C equals the plain equations, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from LMConfig import LMConfig
from model import MiniDeepSeek
from model.kernels import causal
from model.rope import rotate
from training.losses import NextTokenLoss

TYPES = (torch.float32, torch.bfloat16)
NOPE, ROPE, VALUE, HEADS = 32, 16, 64, 3


@pytest.fixture(autouse=True)
def a_compiler_is_there() -> None:
    assert all(causal.library(dtype) is not None for dtype in TYPES)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    """`on(True)`: as on a processor where it is the quicker way; `on(False)`: as on another."""
    return lambda here: monkeypatch.setattr(causal, "multiplies", lambda dtype: here)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(batch: int, queries: int, keys: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, kv and a latent whose last part is k_rope, all with gradients; angles of another start in each row."""
    q = numbers(batch, queries, HEADS, NOPE + ROPE, dtype=dtype)
    kv, latent = numbers(batch, keys, HEADS, NOPE + VALUE, dtype=dtype, seed=1), numbers(batch, keys, 40, seed=2)
    angles = numbers(batch, queries, 1, ROPE // 2, seed=3) * 3
    return [x.requires_grad_() for x in (q, kv, latent.to(dtype))], torch.polar(torch.ones_like(angles), angles)


def equations(q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v in the type of its inputs, float64."""
    queries, keys = q.shape[1], kv.shape[1]
    pairs = torch.view_as_complex(q[..., NOPE:].unflatten(-1, (-1, 2)).contiguous()) * rope
    q = torch.cat((q[..., :NOPE], torch.view_as_real(pairs).flatten(-2)), dim=-1)
    k = torch.cat((kv[..., :NOPE], k_rope.unsqueeze(2).expand(-1, -1, HEADS, -1)), dim=-1)
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), kv[..., NOPE:])


def far(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    return float((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (64, 64), (65, 65), (150, 150), (3, 200), (71, 97)])
def test_it_and_its_gradients_are_those_of_float64(dtype: torch.dtype, batch: int, queries: int, keys: int) -> None:
    parts, rope = inputs(batch, queries, keys, dtype)
    grad = numbers(batch, queries, HEADS, VALUE, dtype=dtype, seed=5)
    out = causal.CausalAttention.apply(*parts[:2], parts[2][..., -ROPE:], rope, 0.3)
    out.backward(grad)
    exact = [part.detach().double().requires_grad_() for part in parts]
    wanted = equations(*exact[:2], exact[2][..., -ROPE:], rope.to(torch.complex128), 0.3)
    wanted.backward(grad.double())
    limit = 1e-6 if dtype == torch.float32 else 6e-3
    assert out.dtype == dtype and far(out, wanted) < limit
    for part, true in zip(parts, exact, strict=True):
        assert far(part.grad, true.grad) < limit


def test_large_scores_do_not_overflow() -> None:
    (q, kv, latent), rope = inputs(1, 70, 70, torch.float32)
    with torch.no_grad():
        out = causal.CausalAttention.apply(q * 100, kv * 100, latent[..., -ROPE:], rope, 1.0)
        wanted = equations(
            *(x.double() for x in (q * 100, kv * 100, latent[..., -ROPE:])), rope.to(torch.complex128), 1.0
        )
    assert far(out, wanted) < 1e-5


def test_a_nan_reaches_the_queries_that_see_it_and_not_the_queries_before() -> None:
    (q, kv, latent), rope = inputs(1, 90, 90, torch.float32)
    with torch.no_grad():
        kv[0, 70] = torch.nan
        out = causal.CausalAttention.apply(q, kv, latent[..., -ROPE:], rope, 0.3)
    assert out[0, 70:].isnan().all() and not out[0, :64].isnan().any()


def test_nothing_of_the_size_of_the_scores_is_kept() -> None:
    time, kept = 300, []
    (q, kv, latent), rope = inputs(1, time, time, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        causal.CausalAttention.apply(q, kv, latent[..., -ROPE:], rope, 0.3)
    assert kept and max(kept) <= time * HEADS * (NOPE + VALUE)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_training_step_has_the_same_loss_and_gradients_either_way(dtype: torch.dtype, on) -> None:
    config = LMConfig.preset("demo", num_hidden_layers=2, vocab_size=300)
    tokens = torch.randint(0, 300, (2, 91), generator=torch.Generator().manual_seed(0))
    calls = []

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = MiniDeepSeek(config)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            total, count, _ = NextTokenLoss()(model, {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]})
        (total / count).backward()
        return total.detach(), {name: p.grad for name, p in model.named_parameters()}

    real = causal.CausalAttention.apply
    on(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal.CausalAttention, "apply", lambda *given: calls.append(len(given)) or real(*given))
        loss, gradients = step()
    assert len(calls) == config.num_hidden_layers + config.num_nextn_predict_layers
    on(False)
    plain, wanted = step()
    if dtype == torch.float32:
        torch.testing.assert_close(loss, plain)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    else:
        torch.testing.assert_close(loss, plain, rtol=1e-3, atol=0)
        flat, other = (torch.cat([g.flatten() for g in each.values()]) for each in (gradients, wanted))
        assert far(flat, other) < 5e-2


def test_what_it_cannot_compute_goes_elsewhere(on) -> None:
    on(True)
    q, kv, k_rope = numbers(1, 4, 2, 48), numbers(1, 4, 2, 96), numbers(1, 4, 16)
    assert causal.fits(q, kv, k_rope)
    assert not causal.fits(q, kv[..., :-1], k_rope)
    assert not causal.fits(q, kv, k_rope[..., :8])
    assert not causal.fits(q.double(), kv.double(), k_rope.double())
    assert not causal.fits(q, kv.bfloat16(), k_rope)
    assert not causal.fits(q.to("meta"), kv.to("meta"), k_rope.to("meta"))
    on(False)
    assert not causal.fits(q, kv, k_rope)


def test_queries_are_turned_as_rotate_turns_them() -> None:
    """With one key each, the weights are 1 whatever the query; with two, they tell how it was turned."""
    (q, kv, latent), rope = inputs(2, 2, 2, torch.float32)
    with torch.no_grad():
        out = causal.CausalAttention.apply(q, kv, latent[..., -ROPE:], rope, 1.0)
        turned = torch.cat((q[..., :NOPE], rotate(q[..., NOPE:], rope)), dim=-1)
        unturned = causal.CausalAttention.apply(turned, kv, latent[..., -ROPE:], torch.ones_like(rope), 1.0)
    torch.testing.assert_close(out, unturned, rtol=1e-5, atol=1e-6)
