"""Matrices that DeepSeek publishes in FP8: e4m3 numbers, and a float32 scale for each block of 128 x 128 (section 3.3).

A matrix `NAME` stands beside its scales `NAME_scale_inv`; a number's value is the e4m3 number times its block's scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import DamagedCheckpoint, UserError

FP8 = torch.float8_e4m3fn
SCALE = "_scale_inv"  # what a matrix's name is followed by in the name of its scales


def block_size(path: Path, quantization: Any) -> tuple[int, int]:
    """Rows and columns that share a scale, by the quantization_config of the config.json at `path`.

    Raises:
        UserError: quantised by another method than DeepSeek's.
    """
    given = quantization if isinstance(quantization, dict) else {}
    method, number, block = (given.get(key) for key in ("quant_method", "fmt", "weight_block_size"))
    whole = isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)
    if method != "fp8" or number not in (None, "e4m3") or not whole:
        raise UserError(
            f"{path}: quantization_config has quant_method {method!r}, fmt {number!r}, weight_block_size {block!r}; "
            "only 'fp8', 'e4m3' and two sides such as [128, 128] are read: use the released folder, or a bf16 copy"
        )
    return block[0], block[1]


def dequantised(
    tensors: Iterable[tuple[str, Tensor]], block: tuple[int, int] | None, path: Path
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors, FP8 matrices in float32 and without their scales.

    In memory are the tensor at hand, the one before it, and FP8 halves that wait for a later one. path: of config.json.
    """
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        scales_of = name.removesuffix(SCALE)
        if scales_of == name and tensor.dtype != FP8:
            yield name, tensor
            continue
        other = scales_of if scales_of != name else name + SCALE
        if other not in waiting:
            waiting[name] = tensor
            continue
        if block is None:
            raise DamagedCheckpoint(f"{path}: no quantization_config, though {scales_of} is FP8; restore the file")
        pair = {name: tensor, other: waiting.pop(other)}
        tensor = dequantise(scales_of, pair[scales_of], pair[scales_of + SCALE], block)
        yield scales_of, tensor
    for name in sorted(waiting):
        if name.endswith(SCALE):
            raise DamagedCheckpoint(f"scales {name} are there without their FP8 matrix; fetch the files again")
        raise DamagedCheckpoint(f"weight {name} is FP8 without its scales {name}{SCALE}; fetch the files again")


def scale_(x: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply each number of a float32 matrix, in place, by its block's scale: see `dequantise`."""
    rows, columns = block
    scales = scales.repeat_interleave(columns, -1)[..., : x.shape[-1]]
    if rows == 1:
        return x.mul_(scales)
    for row in range(scales.shape[-2]):  # a row of blocks at a time: no second matrix of all scales is made
        x[..., row * rows : (row + 1) * rows, :] *= scales[..., row : row + 1, :]
    return x


def dequantise(name: str, weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The matrix in float32: w_ij = q_ij * s_(i // rows)(j // columns), where `block` is (rows, columns).

    Args:
        weight: (..., M, N) e4m3; the last blocks of a side that is no multiple of the block are cut short.
        scales: (..., ceil(M / rows), ceil(N / columns)).
    Raises:
        DamagedCheckpoint: scales of another shape, or that are no numbers of 0 or more, or a weight that is no number.
    """
    blocks = [-(-side // size) for side, size in zip(weight.shape[-2:], block, strict=True)]
    expected = (*weight.shape[:-2], *blocks)
    if scales.shape != expected:
        raise DamagedCheckpoint(
            f"scales {name}{SCALE} have shape {tuple(scales.shape)}, but {tuple(weight.shape)} in blocks of {block} "
            f"needs {expected}; fetch the file again, or correct weight_block_size in config.json"
        )
    scales = scales.float()
    if not (scales.isfinite() & (scales >= 0)).all():
        raise DamagedCheckpoint(f"scales {name}{SCALE} hold NaN, infinity or numbers below 0; fetch the file again")
    out = scale_(weight.float(), scales, block)
    if not out.isfinite().all():
        raise DamagedCheckpoint(f"weight {name} holds NaN or infinity; fetch the file again")
    return out
