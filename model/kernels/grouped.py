"""Products of stacked experts' matrices with the rows of each on a CPU, forward and backward. On CUDA: grouped_cuda.py.

A loop over the experts or, in bfloat16 without AMX, one call of `grouped.c`: a library called for each expert arranges
each matrix again, which can take as long as the products do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import compiled
from model.kernels.compiled import multiplies, readable, scratch
from model.kernels.fused import weighted_swiglu
from model.kernels.products import gradient_into, product_into

TILE, PANEL = 8, 32  # as in grouped.c: rows, and features, come in multiples of these
MIN_BUFFER_BYTES = 2**25  # glibc gives a larger block back to the system as soon as it is freed


class GradBuffer:
    """The memory of a gradient, used again in the next step once nobody else holds it.

    The system clears a new block page by page: for a hundred small experts as long as their products take.
    """

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> GradBuffer:
        return GradBuffer()

    def __reduce__(self) -> tuple:
        return GradBuffer, ()

    def like(self, x: Tensor) -> Tensor:
        """Return a tensor like x of any content; x is of one shape all along."""
        if x.device.type != "cpu" or x.nbytes < MIN_BUFFER_BYTES:
            return torch.empty_like(x)
        if self.tensor is None or self._holders() > 2:  # this one, and the storage's face to Python
            self.tensor = torch.empty_like(x)
        return self.tensor.detach()

    def _holders(self) -> int:
        return torch._C._storage_Use_Count(self.tensor.untyped_storage()._cdata)


class GroupedLinear(torch.autograd.Function):
    """(R, D) x (E, O, D) -> (R, O): a loop over the experts that writes into one buffer, forward and backward.

    A weight of another type is cast expert by expert, in the cache, in both passes. For a frozen weight no rows are
    kept; a `QuantizedWeight` is made dense for each pass and never kept.
    """

    @staticmethod
    def forward(ctx, x_RD: Tensor, weight_EOD, ends: list[int], buffer: GradBuffer) -> Tensor:
        is_dense = isinstance(weight_EOD, Tensor)
        ctx.save_for_backward(x_RD if ctx.needs_input_grad[1] else None, weight_EOD if is_dense else None)
        ctx.quantized, ctx.dtype, ctx.ends, ctx.buffer = None if is_dense else weight_EOD, x_RD.dtype, ends, buffer
        if fits(x_RD, weight_EOD, ends):
            return product(x_RD, weight_EOD, ends)
        weight_EOD = weight_EOD if is_dense else weight_EOD.dense(x_RD.dtype)
        out, weight_of = x_RD.new_empty(x_RD.shape[0], weight_EOD.shape[1]), Cast(weight_EOD, x_RD.dtype)
        for expert, rows in spans(ends):
            product_into(out[rows], x_RD[rows], weight_of(expert))
        return out

    @staticmethod
    def backward(ctx, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_RD, weight_EOD = ctx.saved_tensors
        weight_EOD = ctx.quantized.dense(ctx.dtype) if weight_EOD is None else weight_EOD
        ends, grad_RO, grad_x, grad_weight = ctx.ends, grad_RO.contiguous(), None, None
        if ctx.needs_input_grad[1]:
            grad_weight = each_gradient_into(ctx.buffer.like(weight_EOD), grad_RO, x_RD, ends)
        if ctx.needs_input_grad[0] and ctx.quantized is None and fits(grad_RO, weight_EOD, ends):
            grad_x = product(grad_RO, weight_EOD, ends, back=True)
        elif ctx.needs_input_grad[0]:
            weight_of = Cast(weight_EOD, ctx.dtype)
            grad_x = grad_RO.new_empty(grad_RO.shape[0], weight_EOD.shape[2])
            for expert, rows in spans(ends):
                product_into(grad_x[rows], grad_RO[rows], weight_of(expert).t())
        return grad_x, grad_weight, None, None


def each_gradient_into(to_EOI: Tensor, grad_RO: Tensor, x_RI: Tensor, ends: list[int]) -> Tensor:
    """to = grad^T x over each expert's rows, zeros where it has none; returns `to`."""
    if fits(grad_RO, to_EOI, ends):
        return all_gradients_into(to_EOI, grad_RO, x_RI.contiguous(), ends)
    for expert in set(range(len(ends))).difference(expert for expert, _ in spans(ends)):
        to_EOI[expert].zero_()
    for expert, rows in spans(ends):
        gradient_into(to_EOI[expert], grad_RO[rows], x_RI[rows])
    return to_EOI


class Cast:
    """One expert's matrix after the other in another type, all in the same place."""

    def __init__(self, weight_EOD: Tensor, dtype: torch.dtype) -> None:
        self.weight_EOD = weight_EOD
        self.place = None if weight_EOD.dtype == dtype else weight_EOD.new_empty(weight_EOD.shape[1:], dtype=dtype)

    def __call__(self, expert: int) -> Tensor:
        weight = self.weight_EOD[expert]
        return weight if self.place is None else self.place.copy_(weight)


def spans(ends: Sequence[int]) -> list[tuple[int, slice]]:
    """List the experts that have rows, each with its rows."""
    starts = [0, *ends[:-1]]
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip(starts, ends, strict=True)) if end > start]


def experts_in_turn(
    x_ND: Tensor, weights_R: Tensor, token_of_row: Tensor, ends: list[int], gate_up: Tensor, down: Tensor
) -> Tensor:
    """weight * down(silu(gate) * up) of every row, (R, D), without a gradient, with the bits of the three steps apart.

    The rows of one expert stay in the processor's cache, in the place of those of the expert before.
    """
    most = max(rows.stop - rows.start for _, rows in spans(ends))
    x_of, gate_up_of = x_ND.new_empty(most, x_ND.shape[1]), x_ND.new_empty(most, gate_up.shape[1])
    out_RD = x_ND.new_empty(len(weights_R), x_ND.shape[1])
    gate_up_weight, down_weight = Cast(gate_up, x_ND.dtype), Cast(down, x_ND.dtype)
    for expert, rows in spans(ends):
        x, inner = x_of[: rows.stop - rows.start], gate_up_of[: rows.stop - rows.start]
        torch.index_select(x_ND, 0, token_of_row[rows], out=x)
        product_into(inner, x, gate_up_weight(expert))
        product_into(out_RD[rows], weighted_swiglu(inner, weights_R[rows]), down_weight(expert))
    return out_RD


def few_experts(x_ND: Tensor, weights_NK: Tensor, indices_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """sum_k weight_k * expert_k(x) for a token or two, (N, D): no sorting, and only the chosen experts are read."""
    out = []
    for x_1D, weights, experts in zip(x_ND.split(1), weights_NK, indices_NK.tolist(), strict=True):
        hidden = []
        for expert in experts:
            gate, up = F.linear(x_1D, gate_up[expert].to(x_1D.dtype)).chunk(2, dim=-1)
            hidden.append(F.linear(F.silu(gate).mul_(up), down[expert].to(x_1D.dtype)))
        out.append(weights.unsqueeze(0) @ torch.cat(hidden))
    return torch.cat(out)


def suits(x_RF: Tensor, *weights_EOI) -> bool:
    """Return whether grouped.c takes rows like these, in bfloat16 and multiples of TILE, with weights in float32."""
    for w in weights_EOI:
        if not isinstance(w, Tensor) or not readable(w) or w.dtype != torch.float32 or not w.is_contiguous():
            return False
        if w.shape[1] % PANEL or w.shape[2] % PANEL:
            return False
    return x_RF.dtype == torch.bfloat16 and readable(x_RF) and library() is not None


def fits(x_RF: Tensor, weight_EOI, ends: Sequence[int]) -> bool:
    """Return whether grouped.c computes with just these; ends as in `product`."""
    whole = x_RF.is_contiguous() and ends[-1] == len(x_RF) and not any(end % TILE for end in ends)
    return whole and suits(x_RF, weight_EOI)


def product(x_RF: Tensor, weight_EOI: Tensor, ends: Sequence[int], back: bool = False) -> Tensor:
    """Each expert's rows (R, I) times its matrix transposed, (R, O), or `back` again; ends: one past its last row."""
    threads, (count, out, inner) = torch.get_num_threads(), weight_EOI.shape
    result, memory = x_RF.new_empty(len(x_RF), inner if back else out), scratch(threads * library().scratch(out, inner))
    library().grouped_product(result, x_RF, weight_EOI, _array(ends), count, out, inner, back, memory, threads)
    return result


def all_gradients_into(to_EOI: Tensor, grad_RO: Tensor, x_RI: Tensor, ends: Sequence[int]) -> Tensor:
    """to = grad^T x over each expert's rows, zeros where it has none, summed in float32; returns `to`."""
    threads, (count, out, inner) = torch.get_num_threads(), to_EOI.shape
    memory = scratch(threads * library().scratch(out, inner))
    library().grouped_gradient(to_EOI, grad_RO, x_RI, _array(ends), count, out, inner, memory, threads)
    return to_EOI


def _array(ends: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(ends))(*ends)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Open grouped.c; None where that cannot be, or other products are faster."""
    signatures = {"grouped_product": "tttpllliti", "grouped_gradient": "tttplllti", "scratch": "ll>"}
    return compiled.library("grouped.c", torch.bfloat16, **signatures) if multiplies(torch.bfloat16) else None
