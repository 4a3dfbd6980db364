"""Products by oneDNN equal torch's own, and are asked for only where they pay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import far, numbers

from model.kernels import products
from model.ops import Linear


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    """`on(True)`: as on a processor that is not Intel's and has AVX-512; `on(False)`: as on one of Intel's."""

    def change(here: bool) -> None:
        monkeypatch.setattr(products, "not_intel", lambda: here)
        monkeypatch.setattr(products, "multiplies", lambda dtype: here)

    return change


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_its_gradients_are_those_of_float64(bias: bool, on) -> None:
    on(True)
    layer = Linear(48, 80, bias=bias)
    x, grad = numbers(3, 50, 48).requires_grad_(), numbers(3, 50, 80, seed=1)
    assert products.faster(x)
    out = layer(x)
    out.backward(grad)
    exact = x.detach().double().requires_grad_()
    weight = layer.weight.detach().double().requires_grad_()
    want = F.linear(exact, weight, layer.bias.detach().double() if bias else None)
    want.backward(grad.double())
    for got, true in ((out, want), (x.grad, exact.grad), (layer.weight.grad, weight.grad)):
        assert far(got, true) < 1e-6
    if bias:
        torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))


def test_products_of_parts_and_transposes_are_right(on) -> None:
    on(True)
    a, b = numbers(300, 96), numbers(70, 200, seed=1)
    for left, right in ((a[100:228, :64], b[:, :64]), (a.t()[:, :200], b[:, :200]), (a[:, ::2], b[:, :48])):
        want = left.double() @ right.double().t()
        assert far(products.product(left, right), want) < 1e-6


def test_they_are_asked_for_where_they_pay(on) -> None:
    on(True)
    x = numbers(64, 32)
    assert products.faster(x)
    assert not products.faster(x[:63])
    assert not products.faster(x.bfloat16()) and not products.faster(x.double()) and not products.faster(x.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not products.faster(x)
    on(False)
    assert not products.faster(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "out", "features"), [(64, 16, 16), (65, 48, 112), (300, 160, 64), (515, 32, 96)])
def test_gradients_of_weights_are_those_of_float64(
    dtype: torch.dtype, tokens: int, out: int, features: int, on
) -> None:
    on(True)
    grad = numbers(tokens, out + 16).to(dtype)[:, :out]  # rows further apart than they are long
    x = numbers(tokens, features + 8, seed=1).to(dtype)[:, 8:]
    want = grad.double().t() @ x.double()
    assert products.gradient_fits(torch.empty(out, features), grad, x)
    got = products.gradient_into(torch.full((out, features), torch.nan), grad, x)
    assert far(got, want) < 1e-6
    products.add_gradient(got, grad, x)
    assert far(got, 2 * want) < 1e-6


@pytest.mark.parametrize(("rows", "features", "out"), [(64, 16, 16), (72, 48, 80), (200, 112, 96)])
def test_products_into_place_are_those_of_float64(rows: int, features: int, out: int, on, monkeypatch) -> None:
    on(True)
    monkeypatch.setattr(products, "product", None)  # nothing else is asked
    whole, a, weight = torch.full((rows + 8, out), torch.nan), numbers(rows, features), numbers(out, features, seed=1)
    want = a.double() @ weight.double().t()
    for b in (weight, weight.t().contiguous().t()):
        got = products.product_into(whole[:rows], a, b)
        assert got.data_ptr() == whole.data_ptr() and far(got, want) < 1e-6
        assert whole[rows:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_into_place_that_are_no_whole_tiles_are_right_too(dtype: torch.dtype, on) -> None:
    on(True)
    a, b = numbers(101, 40).to(dtype), numbers(24, 40, seed=1).to(dtype)
    torch.testing.assert_close(products.product_into(torch.empty(101, 24, dtype=dtype), a, b), a @ b.t())


def test_gradients_of_weights_where_they_are_no_whole_lanes_are_right_too(on) -> None:
    on(True)
    grad, x = numbers(100, 20), numbers(100, 48, seed=1)
    to = torch.zeros(20, 48)
    assert not products.gradient_fits(to, grad, x)
    torch.testing.assert_close(products.add_gradient(products.gradient_into(to, grad, x), grad, x), 2 * grad.t() @ x)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_under_autocast_is_torchs_own(bias: bool, on, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = Linear(48, 80, bias=bias), []
    real = products.gradient_in_c
    monkeypatch.setattr(products, "gradient_in_c", lambda *given, **how: calls.append(1) or real(*given, **how))
    x, grad = numbers(3, 50, 48).bfloat16().requires_grad_(), numbers(3, 50, 80, seed=1).bfloat16()
    results = []
    for each in (layer, lambda x: F.linear(x, layer.weight, layer.bias)):
        x.grad = layer.weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = each(x)
        out.backward(grad)
        assert out.dtype == torch.bfloat16
        results.append((out.detach(), x.grad, layer.weight.grad))
    assert calls == ([] if bias else [1])  # torch adds a bias before it rounds
    (out, to_x, to_weight), want = results
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(to_x, want[1])
    if bias:
        return
    assert to_weight.dtype == torch.float32
    exact = grad.flatten(0, 1).double().t() @ x.detach().flatten(0, 1).double()
    assert (to_weight - exact).norm() < 1e-6 * exact.norm() < (want[2] - exact).norm()  # nothing is rounded to bfloat16


def test_a_part_of_something_wider_is_no_slow_case(on) -> None:
    """oneDNN would compute it by a reference loop; what it is given must be dense."""
    on(True)
    given = []
    real = torch.ops.mkldnn._linear_pointwise

    class Watched:
        def _linear_pointwise(self, a: torch.Tensor, b: torch.Tensor, *rest: object) -> torch.Tensor:
            given.append(b)
            return real(a, b, *rest)

    wide = numbers(64, 160)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops, "mkldnn", Watched())
        out = products.product(numbers(70, 64), wide[:, :128].t())
    assert len(given) == 1 and (given[0].is_contiguous() or given[0].t().is_contiguous())
    torch.testing.assert_close(out, numbers(70, 64) @ wide[:, :128])
