"""How the frozen weights of a model in training are kept: in the type of the products, or quantized in 8 or 4 bits."""

from __future__ import annotations

import torch
from torch import nn

from errors import UserError
from model import MiniDeepSeek
from model.experts import Experts
from model.ops import Linear
from model.quantized import Int8Weight, NF4Weight, QuantizedWeight, quantize_weights

BASES = ("auto", "int8", "nf4")


def check_base(base: str) -> None:
    """Raises `UserError` for a way that is none."""
    if base not in BASES:
        raise UserError(f"--base {base}: one of {', '.join(BASES)}")


def shrink_frozen(model: MiniDeepSeek, base: str, dtype: torch.dtype) -> None:
    """Keep the matrices that are not trained in `dtype`, or those of the layers quantized: `int8` or `nf4`.

    Norms and routers keep float32, and what is trained stays as it is. Embedding and head are never quantized.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Embedding, Experts)) or type(module) in (nn.Linear, Linear):
            trained = any(parameter.requires_grad for parameter in module.parameters())
            if trained:
                continue
            if base == "auto" or not name.startswith("model.layers."):
                module.to(dtype)
            else:
                quantize_weights(model, name, nf4_or_int8 if base == "nf4" else Int8Weight)


def nf4_or_int8(weight: nn.Parameter) -> QuantizedWeight:
    """In 4 bits where the size allows it, else in 8."""
    return NF4Weight(weight) if NF4Weight.fits(weight) else Int8Weight(weight)
