"""Products of stacked experts' matrices with the rows of each, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.dispatch import SMALL_ROW_BLOCK, Plan
from model.kernels import grouped, products
from model.quantized import QuantizedWeight, dense

MIN_BUFFER_BYTES = 2**25  # glibc gives a larger block back to the system as soon as it is freed


class GradBuffer:
    """The memory of a gradient, taken again in the next step once nobody else holds it.

    The system finds and clears the pages of a new block one by one, which for the gradients of a hundred small experts
    takes as long as their products.
    """

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> GradBuffer:
        return GradBuffer()

    def __reduce__(self) -> tuple:
        return GradBuffer, ()

    def like(self, x: Tensor) -> Tensor:
        """A tensor like x of any content; x is of one shape all along."""
        if x.device.type != "cpu" or x.nbytes < MIN_BUFFER_BYTES:
            return torch.empty_like(x)
        if self.tensor is None or self._holders() > 2:  # this one, and the storage's face to Python
            self.tensor = torch.empty_like(x)
        return self.tensor.detach()

    def _holders(self) -> int:
        return torch._C._storage_Use_Count(self.tensor.untyped_storage()._cdata)


def grouped_linear(
    x_RD: Tensor, weight_EOD: Tensor | QuantizedWeight, plan: Plan, buffer: GradBuffer | None = None
) -> Tensor:
    """Each expert's rows times its own matrix: (R, D) x (E, O, D) -> (R, O). buffer: for the gradient of the weight."""
    if not (x_RD.is_cuda and x_RD.dtype == torch.bfloat16):
        return _GroupedLinear.apply(x_RD, weight_EOD, plan.ends.tolist(), buffer or GradBuffer())
    # torch computes this in one launch on sm90 and sm100 (`without_host`); on other GPUs, such as sm80, 86, 89 and 120,
    # by a loop over the groups on the host, which waits for the device to read their ends.
    out, inner = (-size % SMALL_ROW_BLOCK for size in weight_EOD.shape[1:])
    if inner:  # rows of both must be aligned to 16 bytes, which adapters of a low rank are not
        x_RD = F.pad(x_RD, (0, inner))
    if isinstance(weight_EOD, QuantizedWeight):
        product = _QuantizedGroupedLinear.apply(x_RD, weight_EOD, plan.ends)
    else:
        weight = aligned(weight_EOD.to(x_RD.dtype))
        product = F.grouped_mm(x_RD, weight.transpose(-2, -1), offs=plan.ends)
    return product[:, : weight_EOD.shape[1]] if out else product


def without_host(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `grouped_linear` in this type never waits for the device there: see the kernels of torch's grouped_mm."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)


def aligned(weight_EOD: Tensor) -> Tensor:
    """With zeros behind both sizes up to a multiple of `SMALL_ROW_BLOCK`."""
    out, inner = (-size % SMALL_ROW_BLOCK for size in weight_EOD.shape[1:])
    return F.pad(weight_EOD, (0, inner, 0, out)) if out or inner else weight_EOD


class _QuantizedGroupedLinear(torch.autograd.Function):
    """grouped_mm with a quantized weight, which is dense for the moment of each product and never kept dense."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, quantized: QuantizedWeight, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        ctx.quantized = quantized
        return F.grouped_mm(x_RD, aligned(quantized.dense(x_RD.dtype)).transpose(-2, -1), offs=ends_E)

    @staticmethod
    def backward(ctx, grad_RO: Tensor) -> tuple[Tensor, None, None]:
        (ends_E,) = ctx.saved_tensors
        return F.grouped_mm(grad_RO, aligned(ctx.quantized.dense(grad_RO.dtype)), offs=ends_E), None, None


class _GroupedLinear(torch.autograd.Function):
    """A loop over the experts that writes into one buffer, forward and backward.

    A weight of another type is cast expert by expert, in the cache, in both passes: a copy of all would be written to
    memory, read again twice, and kept. A frozen weight costs no product, nor are rows kept for its gradient.
    """

    @staticmethod
    def forward(ctx, x_RD: Tensor, weight_EOD: Tensor | QuantizedWeight, ends: list[int], buffer: GradBuffer) -> Tensor:
        quantized = isinstance(weight_EOD, QuantizedWeight)
        ctx.save_for_backward(x_RD if ctx.needs_input_grad[1] else None, None if quantized else weight_EOD)
        ctx.quantized, ctx.dtype, ctx.ends, ctx.buffer = weight_EOD if quantized else None, x_RD.dtype, ends, buffer
        if not quantized and grouped.fits(x_RD, weight_EOD, ends):
            return grouped.product(x_RD, weight_EOD, ends)
        weight_EOD = dense(weight_EOD, x_RD.dtype) if quantized else weight_EOD
        # Where the number of rows is only bounded (CUDA in float32), those past the last expert must still be numbers.
        make = x_RD.new_empty if ends[-1] == x_RD.shape[0] else x_RD.new_zeros
        out, weight_of = make(x_RD.shape[0], weight_EOD.shape[1]), Cast(weight_EOD, x_RD.dtype)
        for expert, rows in spans_of(ends):
            products.product_into(out[rows], x_RD[rows], weight_of(expert))
        return out

    @staticmethod
    def backward(ctx, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_RD, weight_EOD = ctx.saved_tensors
        weight_EOD = dense(ctx.quantized, ctx.dtype) if weight_EOD is None else weight_EOD
        ends, spans, grad_RO, grad_x, grad_weight = ctx.ends, spans_of(ctx.ends), grad_RO.contiguous(), None, None
        if ctx.quantized is None and grouped.fits(grad_RO, weight_EOD, ends):
            if ctx.needs_input_grad[0]:
                grad_x = grouped.product_back(grad_RO, weight_EOD, ends)
            if ctx.needs_input_grad[1]:
                grad_weight = grouped.gradient_into(ctx.buffer.like(weight_EOD), grad_RO, x_RD.contiguous(), ends)
            return grad_x, grad_weight, None, None
        weight_of = Cast(weight_EOD, ctx.dtype)
        if ctx.needs_input_grad[0]:
            make = grad_RO.new_empty if ends[-1] == grad_RO.shape[0] else grad_RO.new_zeros
            grad_x = make(grad_RO.shape[0], weight_EOD.shape[2])
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.buffer.like(weight_EOD)
            for expert in set(range(len(ends))).difference(expert for expert, _ in spans):
                grad_weight[expert].zero_()
        for expert, rows in spans:
            if grad_x is not None:
                products.product_into(grad_x[rows], grad_RO[rows], weight_of(expert).t())
            if grad_weight is not None:
                products.gradient_into(grad_weight[expert], grad_RO[rows], x_RD[rows])
        return grad_x, grad_weight, None, None


class Cast:
    """One expert's matrix after the other in another type, all in the same place."""

    def __init__(self, weight_EOD: Tensor, dtype: torch.dtype) -> None:
        self.weight_EOD = weight_EOD
        self.place = None if weight_EOD.dtype == dtype else weight_EOD.new_empty(weight_EOD.shape[1:], dtype=dtype)

    def __call__(self, expert: int) -> Tensor:
        weight = self.weight_EOD[expert]
        return weight if self.place is None else self.place.copy_(weight)


def spans_of(ends: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, each with its rows."""
    return [
        (e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if end > start
    ]
