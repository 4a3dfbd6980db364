"""AdamW with moments in bfloat16: torch's AdamW but for the rounding of what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.kernels import fused
from training.optim.adamw import AdamWBF16, plain_adamw_
from training.optim.build import state_tensors
from training.run.state import load_state_tensors

SIZES = [(3,), (16,), (5, 7), (64, 33), (3, 40, 50)]  # whole lanes or not


def trained(optimizer_of, steps: int) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Parameters after so many steps on gradients that are the same for every optimiser."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size)) for size in SIZES]
    optimizer = optimizer_of(parameters)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn_like(p) * 0.1 + p.detach() * 0.05
        optimizer.step()
    return parameters, optimizer


def theirs(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def ours(parameters):
    return AdamWBF16(parameters, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def in_pytorch(monkeypatch, work):
    with monkeypatch.context() as patch:
        patch.setattr(fused, "available", lambda x: False)
        return work()


@pytest.mark.parametrize("plain", [False, True])
def test_the_first_step_is_that_of_torch(plain, monkeypatch):
    """Nothing that is used was rounded yet."""
    wanted, _ = trained(theirs, 1)
    got, _ = in_pytorch(monkeypatch, lambda: trained(ours, 1)) if plain else trained(ours, 1)
    for p, q in zip(got, wanted, strict=True):
        torch.testing.assert_close(p, q, atol=2e-6, rtol=0)


def test_many_steps_stay_near_torch(monkeypatch):
    begin, _ = trained(ours, 0)
    wanted, exact = trained(theirs, 60)
    got, rough = trained(ours, 60)
    for p, q, start in zip(got, wanted, begin, strict=True):
        assert (p - q).norm() < 0.01 * (q - start).norm()
        for key in ("exp_avg", "exp_avg_sq"):
            kept = rough.state[p][key]
            assert kept.dtype == torch.bfloat16
            assert (kept.float() - exact.state[q][key]).norm() < 0.02 * exact.state[q][key].norm()


@pytest.mark.skipif(not fused.available(torch.zeros(1, dtype=torch.bfloat16)), reason="no C compiler")
def test_one_pass_in_c_equals_pytorch(monkeypatch):
    torch.manual_seed(0)
    numbers = (0.9, 0.95, 1e-8, 0.999, 0.03, 1.7)
    for size in SIZES:
        p, grad = torch.randn(size), torch.randn(size)
        first, second = torch.randn(size).bfloat16(), torch.rand(size).bfloat16()
        mine = [x.clone() for x in (p, grad, first, second)]
        fused.adamw_(*mine, *numbers)
        plain_adamw_(p, grad, first, second, *numbers)
        torch.testing.assert_close(mine[0], p, atol=1e-6, rtol=1e-6)
        for got, wanted in zip(mine[1:], (grad, first, second), strict=True):  # one unit in the last place at most
            torch.testing.assert_close(got, wanted, atol=0, rtol=2**-7)


def test_on_cuda_few_launches_give_the_bits_of_one_parameter_after_the_other(on_cuda, monkeypatch):
    """Some of them at a time, and those that were updated less often apart."""

    def late(parameters):
        optimizer = ours(parameters)
        optimizer.state[parameters[1]].update(
            step=torch.tensor(5.0), exp_avg=torch.ones(16).bfloat16(), exp_avg_sq=torch.ones(16).bfloat16()
        )
        return optimizer

    monkeypatch.setattr("training.optim.adamw.TOGETHER", 2200)
    calls, update = [], AdamWBF16._update_together
    monkeypatch.setattr(AdamWBF16, "_update_together", lambda *given: calls.append(len(given[1])) or update(*given))
    got, state = trained(late, 2)
    assert calls == 2 * [3, 1, 1] and {type(x["step"]) for x in state.state.values()} == {torch.Tensor}
    monkeypatch.setattr("model.kernels.on_cuda", lambda x: False)
    wanted, _ = in_pytorch(monkeypatch, lambda: trained(late, 2))
    assert all(torch.equal(p, q) for p, q in zip(got, wanted, strict=True))


def test_counts_of_a_loaded_state_stay_on_the_host():
    parameters, optimizer = trained(ours, 1)
    model = nn.ParameterDict({str(i): p for i, p in enumerate(parameters)})
    saved = state_tensors(optimizer, model)
    places = []
    move = torch.Tensor.to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda x, *given: places.append(x.dim()) or move(x, *given))
        load_state_tensors(ours(parameters), model, saved)
    assert len(places) == 2 * len(SIZES) and 0 not in places


def test_two_threads_give_the_bits_of_one():
    alone, _ = trained(ours, 3)
    torch.set_num_threads(2)
    try:
        together, _ = trained(ours, 3)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(p, q) for p, q in zip(alone, together, strict=True))
