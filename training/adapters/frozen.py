"""Store the frozen weights of a model in training in the type of the products, or quantized in 8 or 4 bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from errors import quiet_imports, require
from model import MiniDeepSeek
from model.experts import Experts
from model.ops import Linear
from model.quantized import Int8Weight, QuantizedWeight, quantize_weights

BLOCK = 64  # elements that share a scale in 4 bits
SCALES = 256  # such scales that share a second one: double quantisation
BASES = ("auto", "int8", "nf4")


def check_base(base: str) -> None:
    """Raise `UserError` for an unknown way."""
    require(base in BASES, f"--base {base}: one of {', '.join(BASES)}")


def shrink_frozen(model: MiniDeepSeek, base: str, dtype: torch.dtype) -> None:
    """Store the matrices that are not trained in `dtype`, or those of the layers quantized: `int8` or `nf4`.

    Norms and routers keep float32, and what is trained stays as it is. Embedding and head are never quantized.
    Of a model whose weights are yet to come, each that is quantized is read for that.
    """
    quantize, read = nf4_or_int8 if base == "nf4" else int8, getattr(model, "whole", None)
    names = {p: name.replace(".base_layer", "") for name, p in model.named_parameters()} if read else {}
    for name, module in list(model.named_modules()):
        is_matrix = isinstance(module, (nn.Embedding, Experts)) or type(module) in (nn.Linear, Linear)
        if not is_matrix or any(parameter.requires_grad for parameter in module.parameters()):
            continue
        if base == "auto" or not name.startswith("model.layers."):
            module.to(dtype)
        else:
            quantize_weights(model, name, (lambda p: quantize(read(names[p], p))) if read else quantize)


def int8(weight: Tensor) -> Int8Weight:
    """Quantize (..., out, in) to 8 bits with torchao, a scale for each output feature."""
    with quiet_imports():
        from torchao.quantization import Int8Tensor, PerRow
    made = Int8Tensor.from_hp(weight.detach().float(), granularity=PerRow())
    return Int8Weight(made.qdata, made.scale)


class NF4Weight(QuantizedWeight):
    """NormalFloat: 16 levels at the quantiles of a normal distribution, a scale for 64 elements, itself in 8 bits.

    Buffers: codes, two a byte; scales (groups, blocks of a group) int8, factors (groups,) and mean, so that the scale
    of a block is scale / factor + mean; levels (16,).
    """

    def dense(self, dtype: torch.dtype) -> Tensor:
        # A byte holds two levels, the first in its high half: a table of all 256 pairs is read once a byte, as one
        # number twice as wide. torchao's own way takes several times as long.
        wide = {2: torch.int32, 4: torch.int64}[dtype.itemsize]
        levels = self.levels.to(dtype)
        pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1).view(wide).flatten()
        values = pairs.index_select(0, self.codes.int()).view(dtype).view(-1, BLOCK)
        scales = (self.scales / self.factors.unsqueeze(1)).flatten() + self.mean
        return values.mul_(scales.to(dtype).unsqueeze(1)).view(self.shape)


def nf4(weight: Tensor) -> NF4Weight:
    """Quantize to 4 bits with torchao; any shape of whole blocks, taken as one row, since torchao takes no stacks."""
    with quiet_imports():
        from torchao.quantization import to_nf4
    made = to_nf4(weight.detach().float().reshape(1, -1), BLOCK, math.gcd(weight.numel() // BLOCK, SCALES))
    return NF4Weight(
        weight.shape,
        codes=made.quantized_data,
        scales=made.quantized_scalers.view(len(made.quantization_factor), -1),
        factors=made.quantization_factor,
        mean=made.scaler_mean,
        levels=made.nf4,
    )


def nf4_or_int8(weight: Tensor) -> QuantizedWeight:
    """Quantize to 4 bits where the size allows it, else to 8."""
    return int8(weight) if weight.numel() % BLOCK else nf4(weight)
