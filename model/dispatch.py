"""Dispatch and combine: each token goes to the experts that it chose, and what they made of it is summed again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels import fused

# CPU kernels are generated for each new row count (7 to 10 ms in bfloat16 against under 1 ms of work): each expert's
# rows are padded to a multiple of the largest of these blocks of which its share fills four.
ROW_BLOCKS = (128, 64, 32, 16)
SMALL_ROW_BLOCK = 8  # under that, and on CUDA, whose grouped products want groups aligned to 16 bytes


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
        choices, on_cuda = tokens * top_k, indices_NK.is_cuda
        if block is None:
            block = SMALL_ROW_BLOCK if on_cuda else row_block(tokens, choices / experts)
        expert_of_choice = indices_NK.flatten()
        sorted_experts, order = expert_of_choice.sort(stable=True)
        counts = count_choices(expert_of_choice, experts)
        blocks = (counts + block - 1) // block
        # On sm100 the weight gradient of a group without rows is garbage (pytorch/pytorch#172439): where gradients are
        # recorded each expert has a block, of padding whose weight is 0. Decoding reads the chosen experts only.
        fill = on_cuda and torch.is_grad_enabled()
        padded = (blocks.clamp(min=1) if fill else blocks) * block
        ends = padded.cumsum(0)
        first_row, first_sorted = ends - padded, counts.cumsum(0) - counts
        row_of_sorted = torch.arange(choices, device=order.device) + (first_row - first_sorted)[sorted_experts]
        # On CUDA the number of rows is not known to the host: take the most there can be, one block an expert begun.
        begun = experts if fill else min(experts, choices)
        rows = (choices // block + begun) * block if on_cuda else int(ends[-1])
        row_of_choice = torch.empty_like(expert_of_choice).scatter_(0, order, row_of_sorted)
        choice_of_row = torch.zeros(rows, dtype=order.dtype, device=order.device).scatter_(0, row_of_sorted, order)
        return Plan(counts, ends.int(), choice_of_row // top_k, choice_of_row, row_of_choice.view(tokens, top_k))


def row_block(tokens: int, mean_rows: float) -> int:
    """What each expert's rows are padded to a multiple of, on CPU: little of its share is wasted, few shapes occur."""
    return next((block for block in ROW_BLOCKS if mean_rows >= 4 * block), SMALL_ROW_BLOCK if tokens > 1 else 1)


def count_choices(indices: Tensor, experts: int) -> Tensor:
    """How often each expert was chosen, (E,) int64; unlike bincount, without a host round trip."""
    flat = indices.flatten()
    return torch.zeros(experts, dtype=flat.dtype, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


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


def gather_sum(rows_RD: Tensor, row_of_choice: Tensor) -> Tensor:
    """(R, D), (N, K) -> (N, D): the sum of each token's K rows."""
    if rows_RD.is_cuda:
        rows_NKD = rows_RD.index_select(0, row_of_choice.flatten()).unflatten(0, row_of_choice.shape)
        return rows_NKD.sum(1, dtype=rows_RD.dtype)  # autocast would make it float32, and the residual stream with it
    if fused.fits(rows_RD) and rows_RD.is_contiguous():
        return fused.gather_sum(rows_RD, row_of_choice)
    # K additions of contiguous rows are several times faster than a sum over a middle axis.
    first, *others = row_of_choice.unbind(1)
    total = rows_RD.index_select(0, first)
    for rows in others:
        total += rows_RD.index_select(0, rows)
    return total
