"""The products of grouped.py on CUDA: torch's grouped_mm where that is one launch, else a loop over the experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import model.kernels as kernels
from model.kernels.grouped import spans

ALIGNED = 8  # numbers of 16 bytes, which grouped_mm wants rows to be aligned to


def without_rows(x_ND: Tensor, weights_NK: Tensor, indices_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """sum_k weight_k * expert_k(x) for few tokens on CUDA, (N, D), without a gradient: no sorting, no number is read.

    Many tokens choose nearly all experts: each computes every token, with weight 0 where it was not chosen. For a token
    or two the chosen matrices are copied, which moves them three times.
    """
    (tokens, top_k), count, dtype = indices_NK.shape, len(down), x_ND.dtype
    if few := 3 * tokens * top_k <= count:
        chosen, x = indices_NK.flatten(), x_ND.repeat_interleave(top_k, 0).unsqueeze(1)
        gate_up, down = gate_up.index_select(0, chosen), down.index_select(0, chosen)
        share = weights_NK.reshape(-1, 1, 1)
    else:
        x = x_ND.expand(count, -1, -1)
        share = weights_NK.new_zeros(tokens, count).scatter_(1, indices_NK, weights_NK).t().unsqueeze(-1)
    gate, up = torch.bmm(x, gate_up.to(dtype).transpose(1, 2)).chunk(2, dim=-1)
    out = torch.bmm(F.silu(gate) * up * share.to(dtype), down.to(dtype).transpose(1, 2))
    return out.view(tokens, top_k, -1).sum(1, dtype=dtype) if few else out.sum(0, dtype=dtype)


def grouped_mm(x_RD: Tensor, weight_EOD, ends_E: Tensor) -> Tensor:
    """The product of `GroupedLinear` on CUDA in one launch, `without_host`."""
    out, inner = (-size % ALIGNED for size in weight_EOD.shape[1:])
    if inner:  # adapters of a low rank
        x_RD = F.pad(x_RD, (0, inner))
    if isinstance(weight_EOD, Tensor):
        result = F.grouped_mm(x_RD, aligned(weight_EOD.to(x_RD.dtype)).transpose(-2, -1), offs=ends_E)
    else:
        result = QuantizedGroupedMM.apply(x_RD, weight_EOD, ends_E)
    return result[:, : weight_EOD.shape[1]] if out else result


class QuantizedGroupedMM(torch.autograd.Function):
    """grouped_mm with a `QuantizedWeight`, dense for the moment of each product and never kept dense."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, quantized, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        ctx.quantized = quantized
        return F.grouped_mm(x_RD, aligned(quantized.dense(x_RD.dtype)).transpose(-2, -1), offs=ends_E)

    @staticmethod
    def backward(ctx, grad_RO: Tensor) -> tuple[Tensor, None, None]:
        (ends_E,) = ctx.saved_tensors
        return F.grouped_mm(grad_RO, aligned(ctx.quantized.dense(grad_RO.dtype)), offs=ends_E), None, None


def aligned(weight_EOD: Tensor) -> Tensor:
    """Pad both sizes with zeros to a multiple of `ALIGNED`."""
    out, inner = (-size % ALIGNED for size in weight_EOD.shape[1:])
    return F.pad(weight_EOD, (0, inner, 0, out)) if out or inner else weight_EOD


def without_host(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether torch's grouped_mm is one launch; elsewhere it waits for the groups' ends in each product."""
    return dtype == torch.bfloat16 and kernels.capability(device) in (9, 10)


@torch.library.custom_op("mini_deepseek::read_ends", mutates_args=())
def read_ends(ends_E: Tensor) -> Tensor:
    """Copy the groups' ends to the host, which waits for the device: once for all products of a layer."""
    return torch.empty_like(ends_E, device="cpu").copy_(ends_E)


@torch.library.custom_op("mini_deepseek::each_expert", mutates_args=())
def each_expert(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix, (R, O), of any content past the last; ends: on the host."""
    out = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
    for expert, rows in spans(ends_E.tolist()):
        torch.mm(x_RI[rows], weight_EOI[expert].t(), out=out[rows])
    return out


@torch.library.custom_op("mini_deepseek::each_gradient", mutates_args=())
def each_gradient(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    """Return grad^T x over each expert's rows, (E, O, I), zeros where it has none; ends: on the host."""
    out = grad_RO.new_zeros(len(ends_E), grad_RO.shape[1], x_RI.shape[1])
    for expert, rows in spans(ends_E.tolist()):
        torch.mm(grad_RO[rows].t(), x_RI[rows], out=out[expert])
    return out


# What compiled graphs know of them: shapes.
read_ends.register_fake(lambda ends_E: torch.empty_like(ends_E, device="cpu"))
each_expert.register_fake(lambda x_RI, weight_EOI, ends_E: x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1]))
each_gradient.register_fake(
    lambda grad_RO, x_RI, ends_E: grad_RO.new_empty(len(ends_E), grad_RO.shape[1], x_RI.shape[1])
)


class LoopedLinear(torch.autograd.Function):
    """The product of `GroupedLinear` on CUDA, one expert after the other, without a wait; ends: on the host.

    The stack is cast in one launch, again in the backward pass. A `QuantizedWeight` is dense for each pass only.
    """

    @staticmethod
    def forward(ctx, x_RI: Tensor, weight_EOI, ends_E: Tensor) -> Tensor:
        is_dense = isinstance(weight_EOI, Tensor)
        ctx.save_for_backward(x_RI if ctx.needs_input_grad[1] else None, weight_EOI if is_dense else None, ends_E)
        ctx.quantized = None if is_dense else weight_EOI
        return each_expert(x_RI, dense(weight_EOI, x_RI.dtype), ends_E)

    @staticmethod
    def backward(ctx, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RI, weight_EOI, ends_E = ctx.saved_tensors
        grad_RO, to_x, to_weight = grad_RO.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            weight = dense(ctx.quantized if weight_EOI is None else weight_EOI, grad_RO.dtype)
            to_x = each_expert(grad_RO, weight.transpose(1, 2), ends_E)
        if ctx.needs_input_grad[1]:
            to_weight = each_gradient(grad_RO, x_RI, ends_E).to(weight_EOI.dtype)
        return to_x, to_weight, None


def weight_gradient(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor, weight_EOI: Tensor) -> Tensor:
    """The gradient of the weight in `model.ops.grouped_linear`, computed apart, (E, O, I)."""
    if not without_host(grad_RO.dtype, grad_RO.device):
        return each_gradient(grad_RO, x_RI, ends_E)
    out, inner = (-size % ALIGNED for size in weight_EOI.shape[1:])
    to_EOI = F.grouped_mm(F.pad(grad_RO, (0, out)).t(), F.pad(x_RI, (0, inner)), offs=ends_E)
    return to_EOI[:, : weight_EOI.shape[1], : weight_EOI.shape[2]]


def dense(weight, dtype: torch.dtype) -> Tensor:
    """Return a tensor's or a `QuantizedWeight`'s matrices in a type."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dense(dtype)
