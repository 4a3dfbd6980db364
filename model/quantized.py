"""Frozen weights that are stored quantized, such as in 8 bits, and made dense for the moment of use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.float32 import Float32Buffers
from model.ops import autocast


class QuantizedWeight(nn.Module, ABC):
    """A matrix, or a stack of them, that can be read but not trained. `shape` is that of the weight it stands for."""

    def __init__(self, shape: torch.Size, **buffers: Tensor) -> None:
        super().__init__()
        self.shape = shape
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """Compute the weight in a type of products."""


class Int8Weight(QuantizedWeight, Float32Buffers):
    """codes: (..., out, in) int8; scales: (..., out, 1), one an output feature. decode.c reads them as they are."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes.shape, codes=codes, scales=scales)

    @classmethod
    def rounded(cls, weight: Tensor) -> Int8Weight:
        """Round a weight without torchao, whose import takes a second: for a copy that serves while decoding."""
        weight = weight.detach().float()
        scales = (weight.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return cls((weight / scales).round().to(torch.int8), scales)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.codes.to(dtype).mul_(self.scales.to(dtype))


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is quantized. It keeps the weight quantized for the backward pass too."""

    def __init__(self, linear: nn.Linear, quantized: QuantizedWeight) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.quantized = quantized

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        out = _QuantizedProduct.apply(autocast(x), self.quantized)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, quantized: QuantizedWeight) -> Tensor:
        ctx.quantized = quantized
        return F.linear(x, quantized.dense(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.quantized.dense(grad.dtype), None


def quantize_weights(root: nn.Module, name: str, quantize: Callable[[nn.Parameter], QuantizedWeight]) -> None:
    """Put quantized weights in the place of those of root's module of that name: a linear layer, or stacked experts."""
    module = root.get_submodule(name)
    if isinstance(module, nn.Linear):
        parent, _, own = name.rpartition(".")
        setattr(root.get_submodule(parent), own, QuantizedLinear(module, quantize(module.weight)))
        return
    for matrix, weight in list(module.named_parameters(recurse=False)):
        quantized = quantize(weight)
        delattr(module, matrix)
        setattr(module, matrix, quantized)
