"""The products of all experts in one call are those of float64, each by itself, and are asked for where they fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_cases import far, numbers
from torch import Tensor

from LMConfig import LMConfig
from model import experts as experts_module
from model.experts import Experts
from model.kernels import grouped
from model.ops import grouped_linear

DOTS = torch.cpu._is_avx512_bf16_supported()
needs_dots = pytest.mark.skipif(not DOTS, reason="no dot products of bfloat16 here")
ROWS = {
    "few": [8, 16, 8, 24],
    "some have none": [0, 16, 0, 40, 0],
    "all to one": [0, 0, 320],
    "sums in several parts": [264, 8, 600],
}
SIZES = [(32, 32), (64, 96), (160, 64), (288, 352)]


@pytest.fixture(autouse=True)
def on_beside_faster_products(request, monkeypatch) -> Iterator[None]:
    """Also where AMX does the same faster."""
    if request.node.get_closest_marker("skipif"):
        monkeypatch.setattr(grouped, "multiplies", lambda dtype: DOTS)
        grouped.library.cache_clear()
    yield
    grouped.library.cache_clear()


def given(rows: list[int], out: int, inner: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """x (R, I) and grad (R, O) in bfloat16, weights (E, O, I) in float32, ends."""
    ends, total = torch.tensor(rows).cumsum(0).tolist(), sum(rows)
    x, grad = numbers(total, inner, seed=1).bfloat16(), numbers(total, out, seed=2).bfloat16()
    return x, grad, numbers(len(rows), out, inner, seed=3), ends


def computed(x: Tensor, grad: Tensor, weight: Tensor, ends: list[int]) -> list[Tensor]:
    to = torch.full_like(weight, torch.nan)
    products = grouped.product(x, weight, ends), grouped.product(grad, weight, ends, back=True)
    return [*products, grouped.all_gradients_into(to, grad, x, ends)]


@needs_dots
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_products_are_those_of_float64_with_weights_in_bfloat16(rows, sizes):
    x, grad, weight, ends = given(ROWS[rows], *sizes)
    spans = [slice(end - count, end) for count, end in zip(ROWS[rows], ends, strict=True)]
    rounded = weight.bfloat16().double()
    out = torch.cat([x[span].double() @ w.T for span, w in zip(spans, rounded, strict=True)])
    back = torch.cat([grad[span].double() @ w for span, w in zip(spans, rounded, strict=True)])
    gradient = torch.stack([grad[span].double().T @ x[span].double() for span in spans])
    ours = computed(x, grad, weight, ends)
    assert far(ours[0], out) < 3e-3 and far(ours[1], back) < 3e-3  # the result's own rounding
    assert far(ours[2], gradient) < 1e-6
    assert all(not ours[2][e].any() for e, count in enumerate(ROWS[rows]) if not count)


@needs_dots
def test_two_threads_give_what_one_gives():
    inputs = given([264, 0, 8, 600, *[64] * 40], 160, 288)
    alone = computed(*inputs)
    torch.set_num_threads(2)
    try:
        often = [computed(*inputs) for _ in range(20)]  # threads that meet do so by chance
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(ours, theirs) for some in often for ours, theirs in zip(some, alone, strict=True))


def module(inner: int = 32) -> Experts:
    """Of sizes that the one call computes with, unless `inner` is none of its multiples."""
    config = LMConfig(hidden_size=64, moe_intermediate_size=inner, n_routed_experts=8, n_group=1, topk_group=1)
    made = Experts(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def trained(made: Experts, tokens: int) -> list[Tensor]:
    """Output, and the gradients of x, of the routing weights and of both matrices."""
    made.zero_grad()
    x, weights = numbers(tokens, 64, seed=4).requires_grad_(), numbers(tokens, 3, seed=5).sigmoid().requires_grad_()
    indices = numbers(tokens, 8, seed=6).topk(3, dim=-1).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(x, weights, indices)
    out.float().pow(2).sum().backward()
    return [out.detach(), x.grad, weights.grad, *(parameter.grad for parameter in made.parameters())]


@needs_dots
@pytest.mark.parametrize("tokens", [1, 30, 700])
def test_training_through_it_is_training_expert_by_expert(tokens, monkeypatch):
    used, made = [], module()
    for name in ("product", "all_gradients_into"):
        original = getattr(grouped, name)
        monkeypatch.setattr(grouped, name, lambda *a, n=name, f=original, **how: used.append((n, *how)) or f(*a, **how))
    ours = trained(made, tokens)
    assert sorted(used) == sorted([("product",), ("product", "back"), ("all_gradients_into",)] * 2)
    monkeypatch.setattr(grouped, "suits", lambda *a: False)
    used.clear()
    for mine, theirs in zip(ours, trained(made, tokens), strict=True):
        assert far(mine, theirs.double()) < 0.01
    assert not used


@needs_dots
def test_rows_are_padded_to_few_where_one_call_takes_any_number(monkeypatch):
    blocks = []
    original = experts_module.Plan.of
    monkeypatch.setattr(experts_module.Plan, "of", lambda *a: blocks.append(a[2]) or original(*a))
    trained(module(), 2048)
    trained(module(inner=24), 2048)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # one expert after the other
        module()(numbers(100, 64), numbers(100, 3), numbers(100, 8).topk(3).indices)
    assert blocks == [grouped.TILE, None, None]


def test_it_is_asked_only_for_what_it_computes_with():
    here = grouped.library() is not None
    x, _, weight, ends = given([8, 16], 64, 32)
    assert grouped.fits(x, weight, ends) == here
    for other in (
        (x.float(), weight, ends), (x, weight.bfloat16(), ends), (x, weight[..., :16].contiguous(), ends),
        (x, weight.mT, ends), (x, weight, [4, 24]), (x, weight, [8, 16]), (x[:, ::2], weight[..., :16], ends),
    ):  # fmt: skip
        assert not grouped.fits(*other)


def test_it_is_compiled_where_the_processor_multiplies_bfloat16_and_no_more():
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert (grouped.library() is not None) == ("avx512_bf16" in facts and "amx_tile" not in facts)


@needs_dots
def test_rows_that_lie_apart_have_the_same_gradients():
    x, grad, weight, ends = given([64, 8, 0, 32], 64, 96)
    wide, found = torch.cat((x, x), dim=1), []
    for rows in (x, wide[:, : x.shape[1]]):
        made = torch.nn.Parameter(weight.clone())
        grouped_linear(rows, made, torch.tensor(ends)).backward(grad)
        found.append(made.grad)
    assert far(found[1], found[0].double()) < 0.01
