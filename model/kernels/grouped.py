"""The products of all experts in one call, for training in bfloat16 on CPU: `grouped.c`, where that is the quick way.

A library is called for each expert by itself and arranges each matrix anew; with hundreds of experts and some dozens of
rows for each, that takes as long as the products do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from model.kernels.compiled import floats, multiplies, opened

SOURCE = Path(__file__).with_name("grouped.c")
TILE, PANEL = 8, 32  # as in grouped.c: rows, and features, come in multiples of these


def suits(x_RF: Tensor, *weights_EOI: Tensor) -> bool:
    """Whether rows like these, in bfloat16, meet weights, in float32, as it wants them, in multiples of TILE."""
    if x_RF.device.type != "cpu" or x_RF.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False
    for weight in weights_EOI:
        if not isinstance(weight, Tensor) or weight.dtype != torch.float32 or not weight.is_contiguous():
            return False
        if any(size % PANEL for size in weight.shape[1:]):
            return False
    return type(x_RF) is Tensor and library() is not None


def fits(x_RF: Tensor, weight_EOI: Tensor, ends: Sequence[int]) -> bool:
    """Whether it computes with just these; ends as in `product`."""
    whole = x_RF.is_contiguous() and ends[-1] == len(x_RF) and not any(end % TILE for end in ends)
    return whole and suits(x_RF, weight_EOI)


def product(x_RI: Tensor, weight_EOI: Tensor, ends: Sequence[int]) -> Tensor:
    """Each expert's rows times its matrix transposed, (R, O). ends: one past the last row of each."""
    return _product(x_RI, weight_EOI, ends, back=False)


def product_back(grad_RO: Tensor, weight_EOI: Tensor, ends: Sequence[int]) -> Tensor:
    """Each expert's rows times its matrix, (R, I): the gradient of `product` for its rows."""
    return _product(grad_RO, weight_EOI, ends, back=True)


def gradient_into(to_EOI: Tensor, grad_RO: Tensor, x_RI: Tensor, ends: Sequence[int]) -> Tensor:
    """to = grad^T x over each expert's rows, zeros where it has none, summed in float32; returns `to`."""
    threads, count, out, inner = torch.get_num_threads(), *to_EOI.shape
    places = (to_EOI.data_ptr(), grad_RO.data_ptr(), x_RI.data_ptr(), _numbers(ends))
    memory = _memory(threads, out, inner)
    library().grouped_gradient(*places, count, out, inner, _aligned(memory), threads)
    return to_EOI


def _product(x_RF: Tensor, weight_EOI: Tensor, ends: Sequence[int], back: bool) -> Tensor:
    threads, count, out, inner = torch.get_num_threads(), *weight_EOI.shape
    result = x_RF.new_empty(len(x_RF), inner if back else out)
    places = (result.data_ptr(), x_RF.data_ptr(), weight_EOI.data_ptr(), _numbers(ends))
    memory = _memory(threads, out, inner)
    library().grouped_product(*places, count, out, inner, back, _aligned(memory), threads)
    return result


def _numbers(ends: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(ends))(*ends)


def _memory(threads: int, out: int, inner: int) -> Tensor:
    return floats(threads * library().scratch(out, inner) + PANEL)


def _aligned(memory: Tensor) -> int:
    """Rows begin with a line of the cache."""
    return memory.data_ptr() + -memory.data_ptr() % 64


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """grouped.c compiled; None where that cannot be, or other products are faster."""
    built = opened(SOURCE, torch.bfloat16) if multiplies(torch.bfloat16) else None
    if built is None or not hasattr(built, "grouped_product"):
        return None
    place, whole, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    built.grouped_product.argtypes = [place] * 4 + [whole] * 3 + [flag, place, flag]
    built.grouped_gradient.argtypes = [place] * 4 + [whole] * 3 + [place, flag]
    built.grouped_product.restype = built.grouped_gradient.restype = None
    built.scratch.argtypes, built.scratch.restype = [whole, whole], whole
    return built
