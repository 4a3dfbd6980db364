"""FP8 training: numbers, scales and the three products of a scalar loop, partial tiles among them; whole models."""

from __future__ import annotations

import copy
from bisect import bisect_left

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import MiniDeepSeek
from model.experts import Experts
from model.fp8 import BLOCK, TILE, FP8Experts, FP8Linear, Product, Quantised, hopper_product, product, to_fp8
from model.ops import Linear
from training.losses import NextTokenLoss

CPU = torch.device("cpu")
# Every value of E4M3 from 0 up: below 2^-6 in steps of 2^-9, then 8 to each power of 2, up to 448.
VALUES = [n / 512 for n in range(8)] + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)][:-1]


def rounded(x: float) -> float:
    """The nearest value; of two the one whose last bit is 0."""
    above = min(bisect_left(VALUES, abs(x)), len(VALUES) - 1)
    near = min((above - 1, above), key=lambda i: (abs(abs(x) - VALUES[max(i, 0)]), i % 2))
    return float(np.copysign(VALUES[max(near, 0)], x))


def in_loops(x: Tensor, block: tuple[int, int], powers: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Number by number: what each becomes, with its scale in float32, and the scales."""
    x, (rows, columns), (height, width) = x.detach().numpy(), block, x.shape
    out, scales = np.zeros_like(x), np.zeros((-(-height // rows), -(-width // columns)), np.float32)
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            below, right = min(top + rows, height), min(left + columns, width)
            inside = [(i, j) for i in range(top, below) for j in range(left, right)]
            scale = np.float32(max(abs(x[place]) for place in inside)) / np.float32(448)
            if powers:
                scale = np.float32(next(2.0**e for e in range(-40, 40) if 2.0**e >= scale))
            scales[top // rows, left // columns] = scale
            for place in inside:
                out[place] = np.float32(rounded(x[place] / scale)) * scale
    return out, scales


@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("block", [TILE, BLOCK, (128, 1)])
def test_numbers_and_scales_are_those_of_a_loop_also_in_partial_tiles(block, powers):
    x = torch.randn(131, 133) * torch.logspace(-3, 2, 133)
    x[5, 7] = 448 * 16  # whose scale is a power of 2 as it is
    given = x.t() if block == (128, 1) else x  # along tokens: as dW reads its inputs
    found = Quantised.of(given, TILE if block == (128, 1) else block, powers)
    found = found.t() if block == (128, 1) else found
    numbers, scales = in_loops(x, block, powers)
    assert found.dense().numpy().tobytes() == numbers.tobytes() and np.array_equal(found.scales.numpy(), scales)
    if powers:
        assert (torch.frexp(found.scales).mantissa == 0.5).all()


def test_zeros_stay_and_what_is_no_number_is_not_hidden():
    zeros = torch.zeros(3, 200)
    assert torch.equal(Quantised.of(zeros, TILE, False).dense(), zeros)
    for bad in (torch.inf, torch.nan):
        x = zeros.clone()
        x[1, 130] = bad
        assert Quantised.of(x, TILE, True).dense()[1, 128:].isnan().all()


TOKENS, IN, OUT = 131, 133, 132


def varied(height: int, width: int) -> Tensor:
    """Of sizes that differ along both sides, so that it matters which numbers share a scale."""
    return torch.randn(height, width) * torch.rand(height, 1).add(0.1) * torch.logspace(-2, 1, width)


def same_in_loops(found: Tensor, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether it is a b^T: to the bit by torch's sums in float32, and at its edges by those of a loop."""
    for row in (0, 127, 128, len(a) - 1):
        for column in (0, 127, 128, len(b) - 1):
            parts = [x * y for x, y in zip(a[row].tolist(), b[column].tolist(), strict=True)]
            assert found[row, column] == pytest.approx(sum(parts), abs=1e-6 * sum(map(abs, parts)))
    return torch.equal(found, torch.from_numpy(a) @ torch.from_numpy(b).t())


@pytest.mark.parametrize("powers", [False, True])
def test_the_three_products_are_those_of_a_loop_to_the_bit(powers):
    x, w, grad = varied(TOKENS, IN).requires_grad_(), varied(OUT, IN), varied(TOKENS, OUT)
    layer = Linear(IN, OUT, bias=False)
    layer.weight.data = w
    layer.__class__, layer.powers = FP8Linear, powers
    out = layer(x)
    out.backward(grad)
    along_features, along_tokens = TILE, TILE[::-1]
    x_q, w_q = in_loops(x, along_features, powers)[0], in_loops(w, BLOCK, powers)[0]
    assert same_in_loops(out.detach(), x_q, w_q)  # Y = X W^T
    assert same_in_loops(x.grad, in_loops(grad, along_features, powers)[0], w_q.T)  # dX = dY W
    again = in_loops(torch.from_numpy(x_q), along_tokens, powers)[0]  # of what is kept in FP8
    grad_q = in_loops(grad, along_tokens, powers)[0]
    assert same_in_loops(layer.weight.grad, np.ascontiguousarray(grad_q.T), np.ascontiguousarray(again.T))  # dY^T X


@pytest.mark.parametrize("powers", [False, True])
def test_experts_are_linear_layers_each_over_its_own_rows(powers, tiny_config):
    """Padding has no part in a scale; gate and up are two matrices, each with blocks of its own."""
    experts = Experts(tiny_config(hidden_size=136, moe_intermediate_size=72))
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    experts.__class__, experts.powers = FP8Experts, powers
    x, weights = torch.randn(50, 136, requires_grad=True), torch.rand(50, 2)
    indices = torch.tensor([(0, 3)] * 7 + [(3, 5)] * 43)
    out = experts(x, weights, indices)
    grad = torch.randn(out.shape)
    out.backward(grad)
    ours = [x.grad, experts.gate_up_proj.grad, experts.down_proj.grad]

    def linear(inputs: Tensor, weight: Tensor) -> Tensor:
        return Product.apply(inputs, weight[None], [(0, slice(None))], 1, powers)

    theirs = [each.detach().clone().requires_grad_() for each in (x, experts.gate_up_proj, experts.down_proj)]
    total = torch.zeros_like(x)
    for expert in (0, 3, 5):
        tokens, choice = (indices == expert).nonzero().T
        rows, gate_up = theirs[0][tokens], theirs[1][expert]
        gate, up = (linear(rows, half) for half in gate_up.chunk(2))
        inner = F.silu(gate) * up * weights[tokens, choice][:, None]
        total = total.index_add(0, tokens, linear(inner, theirs[2][expert]))
    total.backward(grad)
    torch.testing.assert_close(out, total)
    for mine, other in zip(ours, [each.grad for each in theirs], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert not experts.down_proj.grad[1].any()


def losses(model: MiniDeepSeek, steps: int, dtype: torch.dtype) -> list[float]:
    """Of a few steps on the same rows."""
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=3e-3), NextTokenLoss(mtp=True)
    ids = torch.randint(61, (4, 33), generator=torch.Generator().manual_seed(1))
    segments = (torch.arange(32) > 20).long().expand(4, -1)
    seen = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            total, count, _ = loss(model, {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "segment_ids": segments})
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((total / count).item())
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_learns_nearly_as_without_and_what_needs_no_gradient_is_untouched(dtype, tiny_model):
    plain = tiny_model(num_nextn_predict_layers=1).train()
    ours = copy.deepcopy(plain)
    named = dict(ours.named_parameters())
    said = to_fp8(ours, CPU)
    matrices = sum(isinstance(module, FP8Linear) for module in ours.modules())
    matrices += sum(3 * len(module.down_proj) for module in ours.modules() if isinstance(module, FP8Experts))
    assert said.startswith(f"fp8        {matrices} matrices in E4M3, emulated") and isinstance(
        ours.mtp[0].eh_proj, FP8Linear
    )
    assert type(ours.lm_head) is torch.nn.Linear and dict(ours.named_parameters()) == named
    ids = torch.randint(61, (2, 9))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, plain(ids).logits)
    assert not torch.equal(ours(ids).logits, plain(ids).logits)
    recomputed = copy.deepcopy(ours)
    recomputed.gradient_checkpointing = True
    without, with_fp8 = losses(plain, 6, dtype), losses(ours, 6, dtype)
    assert with_fp8 == pytest.approx(without, rel=0.01) and with_fp8 != without
    assert with_fp8[-1] < 0.9 * with_fp8[0]
    assert losses(recomputed, 6, dtype) == with_fp8


def scaled_mm(a: Tensor, b: Tensor, scale_a, recipe_a, scale_b, recipe_b, output_dtype, use_fast_accum) -> Tensor:
    """What cuBLAS is said to compute from such numbers and scales, laid out as torch demands of a GPU."""
    recipes = F.ScalingType
    assert recipe_a == recipes.BlockWise1x128 and not use_fast_accum and output_dtype == torch.float32
    assert scale_a.stride()[0] == scale_b.stride()[0] == 1
    whole_a = a.float() * scale_a.repeat_interleave(128, 1)
    if recipe_b == recipes.BlockWise1x128:
        return whole_a @ (b.t().float() * scale_b.repeat_interleave(128, 1)).t()
    scales = scale_b[: len(b) // 128]  # the rest fills up
    return whole_a @ (b.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1))


@pytest.mark.parametrize("block", [TILE, BLOCK])
@pytest.mark.parametrize("sizes", [(5, 7, 3), (130, 700, 129), (128, 256, 128)])
def test_the_product_on_hopper_reads_the_same_numbers(block, sizes, monkeypatch):
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    height, inner, width = sizes
    a, b = Quantised.of(torch.randn(height, inner), TILE, False), Quantised.of(torch.randn(width, inner), block, False)
    torch.testing.assert_close(hopper_product(a, b), product(a, b), rtol=1e-5, atol=1e-4)
