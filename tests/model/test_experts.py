"""The fast expert path against a plain loop, and its CUDA branch without CUDA."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from model.experts import Experts, Plan
from model.moe import DeepseekMoE
from model.ops import FEW_CHOICES, ROW_BLOCKS, SMALL_ROW_BLOCK, grouped_linear, sort_by_expert

EXPERTS, CHOSEN, HIDDEN = 8, 3, 32


@pytest.fixture
def experts(tiny_config) -> Experts:
    module = Experts(tiny_config())
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def plain_loop(experts: Experts, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Eq. 12, the routed part: one expert after the other, its own tokens only."""
    out = torch.zeros_like(x)
    for expert in range(experts.gate_up_proj.shape[0]):
        token, k = torch.where(indices == expert)
        gate, up = (x[token] @ experts.gate_up_proj[expert].to(x.dtype).T).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ experts.down_proj[expert].to(x.dtype).T
        out = out.index_add(0, token, y * weights[token, k, None].to(x.dtype))
    return out


def balanced(tokens: int) -> torch.Tensor:
    return torch.rand(tokens, EXPERTS).topk(CHOSEN, dim=-1).indices


CHOICES = {
    "small blocks": lambda: balanced(30),
    "whole blocks": lambda: balanced(300),
    "one token": lambda: balanced(1),
    "all tokens to one expert": lambda: torch.full((40, 1), 5),
    "the last experts get nothing": lambda: balanced(40) % 4,
    "the first experts get nothing": lambda: balanced(300) % 3 + 5,
    "a block filled to its last row": lambda: torch.arange(EXPERTS).repeat(ROW_BLOCKS[-1], 1)[:, :CHOSEN],
}


def values_and_gradients(forward, experts: Experts, x, weights, indices, direction) -> list[torch.Tensor]:
    """Output and the gradients of x, of the routing weights and of both matrices."""
    inputs = [x.detach().requires_grad_(), weights.detach().requires_grad_(), *experts.parameters()]
    out = forward(*inputs[:2], indices)
    return [out.detach(), *torch.autograd.grad(out, inputs, direction.to(out.dtype))]


def assert_equals_loop(experts: Experts, indices: torch.Tensor, dtype: torch.dtype = torch.float32) -> list:
    """Values and gradients equal those of the plain loop in float32: to rounding, or, in bfloat16, to 2 %."""
    x, weights = torch.randn(len(indices), HIDDEN).to(dtype), torch.rand(indices.shape)
    direction = torch.randn(x.shape)
    fast = values_and_gradients(experts, experts, x, weights, indices, direction)
    loop = values_and_gradients(lambda *a: plain_loop(experts, *a), experts, x.float(), weights, indices, direction)
    for ours, expected in zip(fast, loop, strict=True):
        if fast[0].dtype == torch.float32:
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
        else:
            assert (ours.float() - expected).norm() <= 2e-2 * expected.norm()
    return fast


@pytest.mark.parametrize("case", CHOICES)
def test_gradients_of_the_fast_path_equal_a_plain_loops(case, experts):
    assert_equals_loop(experts, CHOICES[case]())


def test_autocast_computes_in_bfloat16_with_float32_gradients(experts):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, *gradients = assert_equals_loop(experts, balanced(60))
    assert out.dtype == torch.bfloat16 and all(grad.dtype == torch.float32 for grad in gradients)


@pytest.mark.parametrize("case", CHOICES)
def test_every_choice_has_a_row_of_its_own_among_its_experts(case):
    indices = CHOICES[case]()
    plan = Plan.of(indices, EXPERTS)
    assert_planned(plan, indices)
    assert torch.equal(plan.counts, indices.flatten().bincount(minlength=EXPERTS))
    assert int(plan.ends[-1]) == len(plan.token_of_row)


def assert_planned(plan: Plan, indices: torch.Tensor) -> None:
    """Each choice has a row, the row knows its choice and token, and lies among the rows of its expert."""
    rows = plan.row_of_choice.flatten()
    assert len(rows.unique()) == indices.numel()
    assert torch.equal(plan.choice_of_row[rows], torch.arange(indices.numel()))
    assert torch.equal(plan.token_of_row[rows], torch.arange(indices.numel()) // indices.shape[1])
    assert torch.equal(torch.searchsorted(plan.ends, rows.int(), right=True), indices.flatten())


def sizes_of(plan: Plan) -> torch.Tensor:
    """(E,) rows of each expert, padding included."""
    return plan.ends.diff(prepend=torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("tokens", "block"), [(1400, ROW_BLOCKS[0]), (300, ROW_BLOCKS[-1]), (30, SMALL_ROW_BLOCK), (1, 1)]
)
def test_rows_come_in_blocks_so_that_few_shapes_occur(tokens, block):
    sizes = sizes_of(Plan.of(balanced(tokens), EXPERTS))
    assert (sizes % block == 0).all()


@pytest.mark.parametrize("count", [16, 64, 256])
def test_few_rows_are_padding_however_many_experts_share_them(count):
    plan = Plan.of(torch.rand(4096, count).topk(4, dim=-1).indices, count)
    assert len(plan.token_of_row) < 1.2 * 4096 * 4
    assert len(plan.ends.diff().unique()) < 24  # row counts that kernels are generated for


def test_no_other_copy_of_all_weights_is_made_or_kept_for_the_backward_pass(experts):
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        out = experts(torch.randn(60, HIDDEN, requires_grad=True), torch.rand(60, CHOSEN), balanced(60))
    out.float().sum().backward()
    stacks = [saved for saved in kept if saved.dim() == 3]
    assert {saved.data_ptr() for saved in stacks} == {weight.data_ptr() for weight in experts.parameters()}


@pytest.fixture
def large_experts(experts, monkeypatch) -> Experts:
    """Large enough for the memory of their gradients to be kept."""
    monkeypatch.setattr("model.kernels.grouped.MIN_BUFFER_BYTES", 0)
    return experts


def backward(experts: Experts, seed: int) -> None:
    x = torch.randn(60, HIDDEN, generator=torch.Generator().manual_seed(seed))
    experts(x, torch.ones(60, 1), torch.full((60, 1), seed)).sum().backward()


def test_memory_of_a_gradient_is_taken_again_and_holds_nothing_of_the_step_before(large_experts):
    backward(large_experts, 1)
    place = large_experts.down_proj.grad.data_ptr()
    large_experts.zero_grad()
    backward(large_experts, 2)
    gradient = large_experts.down_proj.grad
    assert gradient.data_ptr() == place
    assert gradient[2].abs().sum() > 0 and gradient[:2].abs().sum() == 0


def test_memory_of_a_gradient_that_is_still_held_is_not_written(large_experts):
    backward(large_experts, 1)
    held = large_experts.down_proj.grad
    before = held.clone()
    backward(large_experts, 1)  # accumulates
    torch.testing.assert_close(large_experts.down_proj.grad, 2 * before)
    alone = torch.autograd.grad(large_experts(torch.ones(9, HIDDEN), torch.ones(9, 1), torch.ones(9, 1).long()).sum(),
                                [large_experts.down_proj])[0][1]  # fmt: skip
    value = alone.clone()
    large_experts.zero_grad()
    backward(large_experts, 1)
    assert torch.equal(alone, value)


def test_a_copy_of_the_experts_has_memory_of_its_own(large_experts):
    backward(large_experts, 1)
    copy = deepcopy(large_experts)
    assert copy.grad_buffers["down_proj"].tensor is None and len(pickle.dumps(large_experts.grad_buffers)) < 1000


class PoisonedGroups(torch.autograd.Function):
    """Grouped products that are NaN wherever a GPU may leave arbitrary numbers: in rows past the last group, values and
    gradients, and on sm100 in the weight gradient of a group without rows.
    """

    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(x, weight)
        ctx.spans = [slice(a, b) for a, b in zip([0, *ends.tolist()], ends.tolist(), strict=False)]
        out = x.new_full((x.shape[0], weight.shape[-1]), float("nan"))
        for rows, matrix in zip(ctx.spans, weight, strict=True):
            out[rows] = x[rows] @ matrix
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.full_like(x, float("nan")), torch.empty_like(weight)
        for expert, rows in enumerate(ctx.spans):
            grad_x[rows] = grad[rows] @ weight[expert].T
            grad_weight[expert] = x[rows].T @ grad[rows] if rows.stop > rows.start else float("nan")
        return grad_x, grad_weight, None


@pytest.mark.parametrize("product", [F.grouped_mm, lambda x, weight, offs: PoisonedGroups.apply(x, weight, offs)])
@pytest.mark.parametrize("case", CHOICES)
def test_cuda_branch_equals_a_plain_loop(case, product, experts, on_cuda, monkeypatch):
    used = []
    monkeypatch.setattr(F, "grouped_mm", lambda x, weight, offs: used.append(1) or product(x, weight, offs=offs))
    assert_equals_loop(experts, CHOICES[case](), torch.bfloat16)
    assert len(used) == 2


@pytest.mark.parametrize("case", CHOICES)
def test_on_cuda_every_expert_has_a_block_where_gradients_are_recorded(case, on_cuda):
    indices = CHOICES[case]()
    plan = Plan.of(indices, EXPERTS)
    sizes = sizes_of(plan)
    assert (sizes >= SMALL_ROW_BLOCK).all() and (sizes % SMALL_ROW_BLOCK == 0).all()
    assert int(plan.ends[-1]) <= len(plan.token_of_row)
    assert_planned(plan, indices)


class SortedSizes(TorchDispatchMode):
    """Bytes of the numbers of each sort."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if str(function).startswith("aten.sort"):
            self.sizes.append(arguments[0].itemsize)
        return function(*arguments, **named or {})


@pytest.mark.parametrize("count", [200, 256, 300])
def test_on_cuda_choices_are_sorted_as_on_a_cpu(count, request):
    choices = torch.randint(count, (3000,))
    plain = sort_by_expert(choices, count)
    request.getfixturevalue("on_cuda")
    with SortedSizes() as seen:
        found = sort_by_expert(choices, count)
    assert all(torch.equal(short, long) for short, long in zip(found, plain, strict=True))
    assert seen.sizes == [1 if count <= 256 else 2]  # a radix sort passes over its keys once for each byte


@pytest.mark.parametrize("loads", [[8, 16, 24], [9, 0, 0], [1, 1, 1], [7, 8, 0], [15, 15, 15], [16, 0, 1]])
@pytest.mark.parametrize("gradients", [True, False])
def test_on_cuda_the_rows_allocated_are_enough_for_any_load(loads, gradients, on_cuda):
    indices = torch.arange(3).repeat_interleave(torch.tensor(loads)).unsqueeze(1)
    with torch.set_grad_enabled(gradients):
        plan = Plan.of(indices, 3)
    assert sizes_of(plan).tolist() == [max(-(-load // 8), int(gradients)) * 8 for load in loads]
    assert int(plan.ends[-1]) <= len(plan.token_of_row) <= int(plan.ends[-1]) + 3 * 8


def test_decoding_on_cuda_reads_the_chosen_experts_only(on_cuda):
    with torch.no_grad():
        plan = Plan.of(torch.tensor([[3, 200]]), 256)
    assert sizes_of(plan).nonzero().flatten().tolist() == [3, 200] and len(plan.token_of_row) <= 3 * SMALL_ROW_BLOCK


def test_on_cuda_an_expert_without_tokens_has_a_gradient_of_zeros(experts, on_cuda, monkeypatch):
    monkeypatch.setattr(F, "grouped_mm", lambda x, weight, offs: PoisonedGroups.apply(x, weight, offs))
    indices = torch.full((40, 1), 5)
    x, weights = torch.randn(40, HIDDEN).bfloat16(), torch.rand(40, 1)
    *_, gate_up, down = values_and_gradients(experts, experts, x, weights, indices, torch.randn(40, HIDDEN))
    for grad in (gate_up, down):
        assert [expert for expert in range(EXPERTS) if grad[expert].any()] == [5]


def test_low_ranks_are_padded_for_cudas_alignment_with_the_same_numbers(on_cuda, monkeypatch):
    shapes = []
    product = F.grouped_mm

    def checked(x, weight, offs):
        shapes.append((x.shape, weight.shape))
        assert all(size % 8 == 0 for size in (x.shape[-1], *weight.shape[1:]))  # rows of 16 bytes
        assert offs.dtype == torch.int32 and (offs % 8 == 0).all()
        return product(x, weight, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", checked)
    indices = balanced(30)
    plan = Plan.of(indices, EXPERTS)
    x = torch.randn(len(plan.token_of_row), 32).bfloat16()
    a, b = torch.randn(EXPERTS, 4, 32, requires_grad=True), torch.randn(EXPERTS, 20, 4, requires_grad=True)
    used = int(plan.ends[-1])  # what is in the rows after that is never read
    out = grouped_linear(grouped_linear(x, a, plan.ends), b, plan.ends)[:used]
    expert = torch.searchsorted(plan.ends, torch.arange(used), right=True)
    inner = torch.einsum("rd,rkd->rk", x[:used].float(), a[expert])
    expected = torch.einsum("rk,rok->ro", inner, b[expert])
    assert len(shapes) == 2 and out.shape == expected.shape
    assert (out.float() - expected).norm() <= 2e-2 * expected.norm()
    gradients = torch.autograd.grad(out.float().square().sum(), [a, b])
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.square().sum(), [a, b]), strict=True):
        assert (ours - theirs).norm() <= 3e-2 * theirs.norm()


def test_float32_on_cuda_equals_a_plain_loop(experts, on_cuda):
    assert_equals_loop(experts, balanced(30))


@pytest.mark.parametrize("tokens", [1, 30, 300])
def test_cuda_branch_never_asks_the_host(tokens, tiny_config, on_cuda):
    # A tensor without data raises when .item(), .tolist() or a size that depends on data asks for a number of it.
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer = DeepseekMoE(tiny_config())
        x = torch.empty(1, tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        out, report = layer(x)
        (out.float().sum() + report.balance_loss.sum()).backward()
    assert out.shape == x.shape == x.grad.shape and out.dtype == torch.bfloat16
    assert all(parameter.grad.shape == parameter.shape for parameter in layer.parameters())


def test_cpu_branch_asks_for_the_row_count(tiny_config):
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):  # so the test above can fail
        DeepseekMoE(tiny_config())(torch.empty(1, 30, HIDDEN))


def test_few_tokens_without_gradient_give_what_rows_give(experts):
    x, weights, indices = torch.randn(4, HIDDEN), torch.rand(4, CHOSEN), balanced(4)
    assert indices.numel() <= FEW_CHOICES
    with torch.no_grad():
        one_by_one = experts(x, weights, indices)
    torch.testing.assert_close(one_by_one, experts(x, weights, indices).detach(), rtol=1e-5, atol=1e-5)
