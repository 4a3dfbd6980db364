"""The routed experts (DeepSeek-V3 section 2.1.2): plan, dispatch, products, combine. No token is dropped.

The N * K choices are sorted by expert, so that each expert's tokens are neighbouring rows, and its products are large;
what it made of them is summed again for each token. On CUDA no step waits for the host.

Shapes: N tokens, K experts a token, E experts, D hidden, I intermediate, R rows sorted by expert, padding included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from LMConfig import LMConfig
from model.ops import (
    autocast,
    expert_rows,
    gather_sum,
    grad_buffer,
    grouped_linear,
    padded_rows,
    row_block,
    row_tile,
    run_experts,
    sort_by_expert,
    weighted_swiglu,
)

if TYPE_CHECKING:
    from model.pipeline import WeightGradients

NO_CORRECTIONS: Mapping[str, LowRank] = {}


class LowRank(NamedTuple):
    """A correction of each expert's matrix, W_e + scale * B_e A_e (LoRA, Hu et al. 2021), applied without forming it.

    Attributes: a: (E, r, in features); b: (E, out features, r).
    """

    a: Tensor
    b: Tensor
    scale: float


class Experts(nn.Module):
    """SwiGLU experts, stored stacked: gate_up_proj (E, 2 * I, D) and down_proj (E, D, I)."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        count, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))
        self.grad_buffers = {name: grad_buffer() for name, _ in self.named_parameters()}
        self.later: WeightGradients | None = None  # where the gradients of the weights wait, if they do

    def forward(
        self,
        x_ND: Tensor,
        weights_NK: Tensor,
        indices_NK: Tensor,
        corrections: Mapping[str, LowRank] = NO_CORRECTIONS,
    ) -> Tensor:
        """sum_k weight_k * expert_k(x) for each token (Eq. 12, the routed part). Returns (N, D).

        corrections: of the matrices, by the name of the parameter.
        """
        return run_experts(self, autocast(x_ND), weights_NK, indices_NK, corrections)

    def dispatched(self, x_ND: Tensor, weights_NK: Tensor, indices_NK: Tensor, corrections: Mapping) -> Tensor:
        """Plan, products, combine."""
        plan = Plan.of(indices_NK, self.gate_up_proj.shape[0], row_tile(self, x_ND, corrections))
        weights_R = Permute.apply(weights_NK.flatten(), plan.choice_of_row, plan.row_of_choice.flatten())
        out_RD = expert_rows(self, x_ND, weights_R.to(x_ND.dtype), plan, corrections)
        return Combine.apply(out_RD, plan.token_of_row, plan.row_of_choice)

    def rows(self, x_ND: Tensor, weights_R: Tensor, plan: Plan, corrections: Mapping[str, LowRank]) -> Tensor:
        """weight * W_down (silu(W_gate x) * (W_up x)) of each row by its own expert, (R, D)."""
        x_RD = Dispatch.apply(x_ND, plan.token_of_row, plan.row_of_choice)
        gate_up_R2I = self._product("gate_up_proj", x_RD, plan, corrections)
        # Scaling the inner activation equals scaling the output, since down_proj is linear, and is narrower.
        inner_RI = weighted_swiglu(gate_up_R2I, weights_R)
        return self._product("down_proj", inner_RI, plan, corrections)

    def _product(self, name: str, x_RF: Tensor, plan: Plan, corrections: Mapping[str, LowRank]) -> Tensor:
        weight, buffer = getattr(self, name), self.grad_buffers[name]
        product = grouped_linear if self.later is None else self.later.grouped_linear
        out = product(x_RF, weight, plan.ends, buffer)
        if name not in corrections:
            return out
        a, b, scale = corrections[name]
        return out + scale * grouped_linear(grouped_linear(x_RF, a, plan.ends), b, plan.ends)


@dataclass(frozen=True)
class Plan:
    """Where each (token, choice) goes among the rows sorted by expert. Padding rows hold token 0 and are never read.

    Attributes:
        counts: (E,) tokens of each expert; ends: (E,) int32, one past the last row of each expert, padding included.
        token_of_row, choice_of_row: (R,) the token, and the flat (token, choice), that a row holds.
        row_of_choice: (N, K) the row that holds it.
    """

    counts: Tensor
    ends: Tensor
    token_of_row: Tensor
    choice_of_row: Tensor
    row_of_choice: Tensor

    @staticmethod
    def of(indices_NK: Tensor, experts: int, block: int | None = None) -> Plan:
        """Sort the choices by expert and pad each expert's rows to a whole number of blocks, or of those that suit."""
        tokens, top_k = indices_NK.shape
        expert_of_choice = indices_NK.flatten()
        sorted_experts, order = sort_by_expert(expert_of_choice, experts)
        counts = torch.zeros(experts, dtype=torch.int64, device=order.device)
        counts.scatter_add_(0, expert_of_choice, torch.ones_like(order))  # bincount would wait for the device
        padded, rows = padded_rows(counts, tokens * top_k, block or row_block(indices_NK, experts))
        ends = padded.cumsum(0)
        first_row, first_sorted = ends - padded, counts.cumsum(0) - counts
        row_of_sorted = torch.arange(tokens * top_k, device=order.device) + (first_row - first_sorted)[sorted_experts]
        row_of_choice = torch.empty_like(expert_of_choice).scatter_(0, order, row_of_sorted)
        choice_of_row = torch.zeros(rows, dtype=order.dtype, device=order.device).scatter_(0, row_of_sorted, order)
        return Plan(counts, ends.int(), choice_of_row // top_k, choice_of_row, row_of_choice.view(tokens, top_k))


class Dispatch(torch.autograd.Function):
    """Copy each token to its rows. Its gradient is a gather and a sum over k, where autograd's own would scatter."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, token_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_choice)
        return x_ND.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (row_of_choice,) = ctx.saved_tensors
        return gather_sum(grad_RD, row_of_choice), None, None


class Combine(torch.autograd.Function):
    """Sum each token's rows: the transpose of `Dispatch`."""

    @staticmethod
    def forward(ctx, y_RD: Tensor, token_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row)
        return gather_sum(y_RD, row_of_choice)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (token_of_row,) = ctx.saved_tensors
        # Padding rows get token 0's gradient here; it ends where their weight, which is 0, multiplies it.
        return grad_ND.index_select(0, token_of_row), None, None


class Permute(torch.autograd.Function):
    """Put the weight of each choice into its row, 0 into padding rows; the gradient goes the way back."""

    @staticmethod
    def forward(ctx, weights: Tensor, choice_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_choice)
        return weights.new_zeros(choice_of_row.shape[0]).scatter_(0, row_of_choice, weights)

    @staticmethod
    def backward(ctx, grad_R: Tensor) -> tuple[Tensor, None, None]:
        (row_of_choice,) = ctx.saved_tensors
        return grad_R.index_select(0, row_of_choice), None, None
