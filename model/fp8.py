"""Training with products in FP8 (DeepSeek-V3 section 3.3): all three of every linear layer and expert, in E4M3.

Y = X W^T, dX = dY W and dW = dY^T X read numbers of 8 bits. Those of a tile share a scale, which maps the largest of
them to 448: 128 features of a token, for dW 128 tokens of a feature, and 128 x 128 of a weight. Sums, outputs of dW and
master weights are float32. Embedding, head, router, norms and attention's own products stay as they are, and so does
what needs no gradient: a validation measures what a checkpoint holds.

On Hopper cuBLAS multiplies the numbers; elsewhere they are multiplied by their scales first, then in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import model.kernels as kernels
from model.checkpoint.fp8 import FP8, scale_
from model.experts import Experts, LowRank, Plan
from model.float32 import float32_only
from model.ops import Linear, autocast

if TYPE_CHECKING:
    from model import MiniDeepSeek

SIZE, LARGEST = 128, torch.finfo(FP8).max  # 448
TILE, BLOCK = (1, SIZE), (SIZE, SIZE)
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of zeros
HOPPER, CUBLAS = 9, (12, 9)  # compute capability, and the CUDA from which on cuBLAS takes such scales
SCALES_ALIGNED = 4  # cuBLAS wants so many scales of a block's column, or a multiple
Span = tuple[int, slice]  # an expert, and its rows


@dataclass(frozen=True)
class Quantised:
    """A matrix of numbers, and a scale for each block of (rows, columns), of which the last may be partial.

    Attributes: numbers: (M, K) E4M3; scales: (ceil(M / rows), ceil(K / columns)) float32.
    """

    numbers: Tensor
    scales: Tensor
    block: tuple[int, int]

    @classmethod
    def of(cls, x_MK: Tensor, block: tuple[int, int], powers: bool) -> Quantised:
        """Quantise by the numbers at hand (online quantisation, section 3.3.2).

        powers: scales are powers of 2 (UE8M0), the next above: to multiply by one rounds nothing.
        """
        (rows, columns), (height, width) = block, x_MK.shape
        x_MK = x_MK.float()
        whole = F.pad(x_MK, (0, -width % columns, 0, -height % rows)).view(
            -(-height // rows), rows, -(-width // columns), columns
        )
        scales = (whole.abs().amax((1, 3)) / LARGEST).clamp(min=SMALLEST_SCALE)
        if powers:
            mantissa, exponent = torch.frexp(scales)  # 0.5 <= mantissa < 1
            above = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
            scales = torch.where(scales.isfinite(), above, scales)  # infinity must not be hidden
        numbers = (whole / scales[:, None, :, None]).to(FP8).view(whole.shape[0] * rows, -1)
        return cls(numbers[:height, :width], scales, block)

    def dense(self) -> Tensor:
        """Return the matrix in float32."""
        # By a table of all 256, which is five times as fast as torch's conversion on a CPU.
        places = torch.arange(256, dtype=torch.uint8, device=self.numbers.device)
        values = places.view(FP8).float().index_select(0, self.numbers.view(torch.uint8).flatten().int())
        return scale_(values.view(self.numbers.shape), self.scales, self.block)

    def rows(self, rows: slice) -> Quantised:
        """Return some rows of one that has tiles of single rows."""
        return Quantised(self.numbers[rows], self.scales[rows], self.block)

    def t(self) -> Quantised:
        """Return the transposed matrix."""
        return Quantised(self.numbers.t(), self.scales.t(), self.block[::-1])


def product(a_MK: Quantised, b_NK: Quantised) -> Tensor:
    """a b^T, (M, N) float32. a: of tiles; b: of tiles or blocks."""
    if on_hopper(a_MK.numbers.device):
        return hopper_product(a_MK, b_NK)
    with float32_only(a_MK.numbers.device):
        return a_MK.dense() @ b_NK.dense().t()


def on_hopper(device: torch.device) -> bool:
    """Return whether cuBLAS multiplies numbers with such scales here."""
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return kernels.capability(device) == HOPPER and version >= CUBLAS


def hopper_product(a_MK: Quantised, b_NK: Quantised) -> Tensor:
    """`product` by cuBLAS: sides are padded to whole blocks, scales laid out as it wants them, columns first."""
    (height, width), scales, recipes = (len(a_MK.numbers), len(b_NK.numbers)), [], []
    for each in (a_MK, b_NK):
        whole = F.pad(each.scales, (0, 0, 0, -len(each.numbers) % SIZE if each.block == TILE else 0))
        if each.block == TILE:  # (M, K / 128), a column after the other
            scales.append(whole.t().contiguous().t())
            recipes.append(F.ScalingType.BlockWise1x128)
        else:  # (K / 128 padded, N / 128), likewise
            scales.append(F.pad(whole, (0, -whole.shape[1] % SCALES_ALIGNED)).contiguous().t())
            recipes.append(F.ScalingType.BlockWise128x128)
    a, b = (_whole(each.numbers) for each in (a_MK, b_NK))
    given = scales[0], recipes[0], scales[1], recipes[1]
    # Without fast accumulation: partial sums are added in float32 (section 3.3.2, Figure 7 b).
    return F.scaled_mm(a, b.t(), *given, output_dtype=torch.float32, use_fast_accum=False)[:height, :width]


def _whole(numbers: Tensor) -> Tensor:
    """Pad both sides with zeros to whole blocks, row after row in memory."""
    height, width = numbers.shape
    return F.pad(numbers.view(torch.uint8), (0, -width % SIZE, 0, -height % SIZE)).contiguous().view(FP8)


class Product(torch.autograd.Function):
    """(R, I) x (E, P * O, I) -> (R, P * O): the rows of each span times the P matrices of its expert.

    Rows in no span give zeros. Inputs are kept in FP8 and quantised again, along tokens, for dW (section 3.3.3).
    """

    @staticmethod
    def forward(ctx, x_RI: Tensor, weight_EOI: Tensor, spans: Sequence[Span], parts: int, powers: bool) -> Tensor:
        x, out_RO = Quantised.of(x_RI, TILE, powers), x_RI.new_zeros(len(x_RI), weight_EOI.shape[1])
        ctx.save_for_backward(x.numbers, x.scales, weight_EOI)
        ctx.spans, ctx.parts, ctx.powers, ctx.dtype = spans, parts, powers, x_RI.dtype
        for expert, rows in spans:
            for columns in _columns(weight_EOI, parts):
                w = Quantised.of(weight_EOI[expert, columns], BLOCK, powers)
                out_RO[rows, columns] = product(x.rows(rows), w).to(out_RO.dtype)
        return out_RO

    @staticmethod
    def backward(ctx, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        numbers, scales, weight_EOI = ctx.saved_tensors
        x, powers, to_x, to_weight = Quantised(numbers, scales, TILE), ctx.powers, None, None
        if ctx.needs_input_grad[0]:
            to_x = grad_RO.new_zeros(x.numbers.shape, dtype=torch.float32)
        if ctx.needs_input_grad[1]:
            to_weight = torch.zeros_like(weight_EOI)
        for expert, rows in ctx.spans:
            if to_weight is not None:
                x_IR = Quantised.of(x.rows(rows).dense().t(), TILE, powers)
            for columns in _columns(weight_EOI, ctx.parts):
                grad = grad_RO[rows, columns]
                if to_x is not None:
                    w = Quantised.of(weight_EOI[expert, columns], BLOCK, powers)
                    to_x[rows] += product(Quantised.of(grad, TILE, powers), w.t())
                if to_weight is not None:
                    to_weight[expert, columns] = product(Quantised.of(grad.t(), TILE, powers), x_IR)
        return None if to_x is None else to_x.to(ctx.dtype), to_weight, None, None, None


def _columns(weight_EOI: Tensor, parts: int) -> Iterator[slice]:
    """Yield the rows of a weight, which are columns of its output, that each of so many matrices has."""
    size = weight_EOI.shape[1] // parts
    yield from (slice(part * size, (part + 1) * size) for part in range(parts))


class FP8Linear(Linear):
    """A linear layer that is trained in FP8. Attributes: powers: see `Quantised.of`."""

    powers: bool

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        x = autocast(x)
        out = Product.apply(x.flatten(0, -2), self.weight.unsqueeze(0), [(0, slice(None))], 1, self.powers)
        out = out.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias.to(out.dtype)


class FP8Experts(Experts):
    """Experts that are trained in FP8. Attributes: powers: see `Quantised.of`."""

    powers: bool

    def _product(self, name: str, x_RF: Tensor, plan: Plan, corrections: Mapping[str, LowRank]) -> Tensor:
        if corrections or not torch.is_grad_enabled():
            return super()._product(name, x_RF, plan, corrections)
        numbers = torch.cat((plan.ends, plan.counts)).tolist()  # on CUDA the host waits here
        ends, counts = numbers[: len(plan.ends)], numbers[len(plan.ends) :]
        begins = zip([0, *ends[:-1]], counts, strict=True)
        # Without padding, which would have a part in scales along tokens.
        spans = [(expert, slice(begin, begin + count)) for expert, (begin, count) in enumerate(begins) if count]
        parts = 2 if name == "gate_up_proj" else 1
        return Product.apply(x_RF, getattr(self, name), spans, parts, self.powers)


def to_fp8(model: MiniDeepSeek, device: torch.device, powers: bool = False) -> str:
    """Have all linear layers and experts of a model trained in FP8, and say so in a line; their weights stay."""
    matrices = 0
    for layer in [*model.model.layers, *model.mtp]:
        for module in layer.modules():
            kind = {Linear: FP8Linear, Experts: FP8Experts}.get(type(module))
            if kind is not None:
                module.__class__, module.powers = kind, powers
                matrices += 1 if kind is FP8Linear else 3 * len(module.down_proj)
    how = "by cuBLAS" if on_hopper(device) else "emulated here, which is slower than products without it"
    return f"fp8        {matrices:,} matrices in E4M3{', scales UE8M0' if powers else ''}, {how}"
