"""The passes in C equal PyTorch's own operations, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import TYPES, far, numbers

from model.kernels import fused


@pytest.fixture(autouse=True)
def a_compiler_is_there() -> None:
    assert all(fused.library(dtype) is not None for dtype in TYPES)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_swiglu_and_its_gradients_are_those_of_float64(dtype: torch.dtype, weighted: bool, whole: bool) -> None:
    both = numbers(37, 96, dtype=dtype, scale=4.0).requires_grad_()
    weight = numbers(37, dtype=dtype, seed=1).requires_grad_() if weighted else None
    grad = numbers(37, 48, dtype=dtype, seed=2)
    gate, up = both.chunk(2, dim=-1)  # rows that do not follow each other at once
    assert fused.fits(gate, up)
    out = fused.SwiGLU.apply(weight, *((both,) if whole else (gate, up)))
    out.backward(grad)

    exact = both.detach().double().requires_grad_()
    by = weight.detach().double().requires_grad_() if weighted else torch.ones(37, dtype=torch.float64)
    want = F.silu(exact[:, :48]) * exact[:, 48:] * by[:, None]
    want.backward(grad.double())
    limit = 1e-6 if dtype == torch.float32 else 3e-3
    assert far(out, want) < limit
    assert far(both.grad, exact.grad) < limit
    if weighted:
        assert far(weight.grad, by.grad) < limit


def test_the_exponential_is_right_at_the_ends_of_its_range() -> None:
    gate = torch.tensor([-200.0, -90.0, -87.5, -50.0, -1e-4, 0.0, 1e-4, 20.0, 87.0, 100.0, 3e38, -3e38] + [0.5] * 4)[
        None
    ]
    out = fused.SwiGLU.apply(None, gate, torch.ones_like(gate))
    torch.testing.assert_close(out, F.silu(gate), rtol=1e-6, atol=1e-36)
    assert fused.SwiGLU.apply(None, gate * torch.nan, gate).isnan().all()


@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm_and_its_gradients_are_those_of_float64(dtype: torch.dtype) -> None:
    wide = numbers(3, 11, 80, dtype=dtype).requires_grad_()
    x, weight = wide[..., :64], numbers(64, seed=1).requires_grad_()
    grad = numbers(3, 11, 64, dtype=dtype, seed=2)
    assert fused.fits(x)
    out = fused.RMSNorm.apply(x, weight, 1e-3)
    out.backward(grad)

    exact, by = wide.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = F.rms_norm(exact[..., :64], (64,), by, 1e-3)
    want.backward(grad.double())
    limit = 1e-6 if dtype == torch.float32 else 3e-3
    assert far(out, want) < limit and far(wide.grad, exact.grad) < limit and far(weight.grad, by.grad) < limit


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("many", [1, 2, 5])
def test_sums_of_rows_are_those_of_float64(dtype: torch.dtype, many: int) -> None:
    rows = numbers(50, 48, dtype=dtype)
    places = torch.randint(0, 50, (many, 33), generator=torch.Generator().manual_seed(1)).t()
    want = rows.double()[places].sum(1)
    assert far(fused.gather_sum(rows, places), want) < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("vocabulary", [64, 61, 5])
def test_cross_entropy_and_its_gradient_are_those_of_float64(dtype: torch.dtype, vocabulary: int) -> None:
    logits, labels = numbers(37, vocabulary, dtype=dtype, scale=5.0), torch.arange(37) % vocabulary
    labels[::4] = -100
    exact = logits.double().requires_grad_()
    want = F.cross_entropy(exact, labels, reduction="none")
    want.sum().backward()
    nll = fused.cross_entropy_(logits, labels)
    assert far(nll, want) < 1e-6 and not nll[::4].any() and not logits[::4].any()
    assert far(logits, exact.grad) < (1e-6 if dtype == torch.float32 else 3e-3)


def test_cross_entropy_of_what_is_not_finite_is_not_hidden() -> None:
    logits = numbers(3, 32)
    logits[0, 5], logits[1, 7] = torch.nan, torch.inf
    assert fused.cross_entropy_(logits, torch.tensor([0, 1, 2])).isfinite().tolist() == [False, False, True]
    with pytest.raises(IndexError, match="label 32 of 32"):
        fused.cross_entropy_(numbers(1, 32), torch.tensor([32]))


def test_what_it_cannot_compute_goes_to_pytorch() -> None:
    x = numbers(4, 32)
    assert fused.fits(x) and not fused.fits(x, x.bfloat16())
    for other in (numbers(4, 40), x.double(), x.t(), numbers(4, 3, 32).transpose(0, 1), x.to("meta"), x[:0]):
        assert not fused.fits(other)


@pytest.mark.parametrize(
    ("shape", "cut", "stride"),
    [
        ((3, 5, 32), lambda x: x, 32),
        ((3, 5, 32), lambda x: x[:, :4], None),
        ((3, 5, 32), lambda x: x[:, :1], 160),
        ((3, 5, 64), lambda x: x[..., :32], 64),
        ((3, 1, 6, 32), lambda x: x[:, :, :4], None),  # the axis of size 1 does not join those beside it
        ((3, 1, 6, 32), lambda x: x, 32),
        ((1, 1, 6, 32), lambda x: x[:, :, :4], 32),
        ((1, 1, 32), lambda x: x, 32),
        ((6, 32), lambda x: x[::2], 64),
        ((3, 5, 32), lambda x: x.transpose(0, 1), None),
    ],
)
def test_rows_are_as_far_apart_as_they_are_said_to_be(shape, cut, stride) -> None:
    x = cut(numbers(*shape))
    assert fused.stride_of(x) == stride
    if stride is not None:
        rows = x.flatten(0, -2)
        said = x.as_strided((len(rows), x.shape[-1]), (stride, 1))
        assert torch.equal(said, rows)
