"""The experts of an MoE layer as few large products: dropless, and without a host round trip on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from LMConfig import LMConfig
from model import fused, grouped, products
from model.packed import Packed, dense

# CPU kernels are generated for each new row count (7 to 10 ms in bfloat16 against under 1 ms of work): each expert's
# rows are padded to a multiple of the largest of these blocks of which its share fills four.
ROW_BLOCKS = (128, 64, 32, 16)
SMALL_ROW_BLOCK = 8  # under that, and on CUDA, whose grouped products want groups aligned to 16 bytes
KEPT_BYTES = 2**25  # glibc gives a larger block back to the system as soon as it is freed
FEW_CHOICES = 16  # up to so many (token, expert) pairs are computed one by one
NO_CORRECTIONS: Mapping[str, LowRank] = {}


class LowRank(NamedTuple):
    """A correction of each expert's matrix, W_e + scale * B_e A_e (LoRA, Hu et al. 2021), applied without forming it.

    Attributes: a: (E, r, in features); b: (E, out features, r).
    """

    a: Tensor
    b: Tensor
    scale: float


class Experts(nn.Module):
    """SwiGLU experts, stored stacked: gate_up_proj (E, 2 * I, D) and down_proj (E, D, I).

    Shapes: N tokens, K experts a token, E experts, D hidden, I intermediate, R padded rows.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        count, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))
        self.kept = {name: KeptMemory() for name, _ in self.named_parameters()}

    def forward(
        self,
        x_ND: Tensor,
        weights_NK: Tensor,
        indices_NK: Tensor,
        corrections: Mapping[str, LowRank] = NO_CORRECTIONS,
    ) -> Tensor:
        """sum_k weight_k * expert_k(x) for each token (Eq. 12, the routed part). Returns (N, D).

        corrections: of the matrices, by the name of the parameter.
        """
        if torch.is_autocast_enabled(x_ND.device.type):
            x_ND = x_ND.to(torch.get_autocast_dtype(x_ND.device.type))
        plain = not corrections and not isinstance(self.gate_up_proj, Packed)
        if plain and x_ND.device.type == "cpu" and not torch.is_grad_enabled():
            few = indices_NK.numel() <= FEW_CHOICES
            return (self._few if few else self._in_turn)(x_ND, weights_NK.to(x_ND.dtype), indices_NK)
        return (self._grouped if x_ND.is_cuda else self._looped)(x_ND, weights_NK, indices_NK, corrections)

    @torch.compiler.disable
    def _looped(self, *inputs: Tensor | Mapping[str, LowRank]) -> Tensor:
        """On CPU the number of rows is read from the data: a compiled graph would hold for one step."""
        return self._grouped(*inputs)

    def _grouped(
        self, x_ND: Tensor, weights_NK: Tensor, indices_NK: Tensor, corrections: Mapping[str, LowRank]
    ) -> Tensor:
        own = grouped.suits(x_ND, self.gate_up_proj, self.down_proj)
        plan = Plan.of(indices_NK, self.gate_up_proj.shape[0], grouped.TILE if own else None)
        x_RD = _Dispatch.apply(x_ND, plan.token_of_row, plan.row_of_choice)
        weights_R = _Permute.apply(weights_NK.flatten(), plan.choice_of_row, plan.row_of_choice.flatten())
        # Scaling the inner activation equals scaling the output, since down_proj is linear, and is narrower.
        gate_up_R2I = self._product("gate_up_proj", x_RD, plan, corrections)
        inner_RI = _weighted_swiglu(gate_up_R2I, weights_R.to(x_RD.dtype))
        out_RD = self._product("down_proj", inner_RI, plan, corrections)
        return _Combine.apply(out_RD, plan.token_of_row, plan.row_of_choice)

    def _product(self, name: str, x_RF: Tensor, plan: Plan, corrections: Mapping[str, LowRank]) -> Tensor:
        out = grouped_linear(x_RF, getattr(self, name), plan, self.kept[name])
        if name not in corrections:
            return out
        a, b, scale = corrections[name]
        return out + scale * grouped_linear(grouped_linear(x_RF, a, plan), b, plan)

    @torch.compiler.disable
    def _in_turn(self, x_ND: Tensor, weights_NK: Tensor, indices_NK: Tensor) -> Tensor:
        """The same bits as `_grouped` without a gradient: the rows of one expert stay in the processor's cache from the
        first product to the last, in the place of those of the expert before.
        """
        plan = Plan.of(indices_NK, self.gate_up_proj.shape[0])
        weights_R = _Permute.apply(weights_NK.flatten(), plan.choice_of_row, plan.row_of_choice.flatten())
        spans = _spans(plan.ends.tolist())
        most = max(rows.stop - rows.start for _, rows in spans)
        rows_of = x_ND.new_empty(most, x_ND.shape[1])
        gate_up_of = x_ND.new_empty(most, self.gate_up_proj.shape[1])
        out_RD = x_ND.new_empty(len(weights_R), x_ND.shape[1])
        gate_up_weight, down_weight = _Cast(self.gate_up_proj, x_ND.dtype), _Cast(self.down_proj, x_ND.dtype)
        for expert, rows in spans:
            x, gate_up = rows_of[: rows.stop - rows.start], gate_up_of[: rows.stop - rows.start]
            torch.index_select(x_ND, 0, plan.token_of_row[rows], out=x)
            products.product_into(gate_up, x, gate_up_weight(expert))
            products.product_into(out_RD[rows], _weighted_swiglu(gate_up, weights_R[rows]), down_weight(expert))
        return _gather_sum(out_RD, plan.row_of_choice)

    def _few(self, x_ND: Tensor, weights_NK: Tensor, indices_NK: Tensor) -> Tensor:
        """The same for a token or two while decoding: no sorting, and only the chosen experts' weights are read."""
        out = []
        for x_1D, weights, experts in zip(x_ND.split(1), weights_NK, indices_NK.tolist(), strict=True):
            hidden = []
            for expert in experts:
                gate, up = F.linear(x_1D, self.gate_up_proj[expert].to(x_1D.dtype)).chunk(2, dim=-1)
                hidden.append(F.linear(F.silu(gate).mul_(up), self.down_proj[expert].to(x_1D.dtype)))
            out.append(weights.unsqueeze(0) @ torch.cat(hidden))
        return torch.cat(out)


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
        choices = tokens * top_k
        if block is None:
            block = SMALL_ROW_BLOCK if indices_NK.is_cuda else row_block(tokens, choices / experts)
        expert_of_choice = indices_NK.flatten()
        sorted_experts, order = expert_of_choice.sort(stable=True)
        counts = count_choices(expert_of_choice, experts)
        padded = (counts + block - 1) // block * block
        ends = padded.cumsum(0)
        first_row, first_sorted = ends - padded, counts.cumsum(0) - counts
        row_of_sorted = torch.arange(choices, device=order.device) + (first_row - first_sorted)[sorted_experts]
        # On CUDA the number of rows is not known to the host: take the most there can be.
        most = choices + min(experts, choices) * (block - 1)
        rows = (most + block - 1) // block * block if indices_NK.is_cuda else int(ends[-1])
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


class KeptMemory:
    """The memory of a gradient, taken again in the next step once nobody else holds it.

    The system finds and clears the pages of a new block one by one, which for the gradients of a hundred small experts
    takes as long as their products.
    """

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> KeptMemory:
        return KeptMemory()

    def __reduce__(self) -> tuple:
        return KeptMemory, ()

    def like(self, x: Tensor) -> Tensor:
        """A tensor like x of any content; x is of one shape all along."""
        if x.device.type != "cpu" or x.nbytes < KEPT_BYTES:
            return torch.empty_like(x)
        if self.tensor is None or self._holders() > 2:  # this one, and the storage's face to Python
            self.tensor = torch.empty_like(x)
        return self.tensor.detach()

    def _holders(self) -> int:
        return torch._C._storage_Use_Count(self.tensor.untyped_storage()._cdata)


def grouped_linear(x_RD: Tensor, weight_EOD: Tensor | Packed, plan: Plan, kept: KeptMemory | None = None) -> Tensor:
    """Each expert's rows times its own matrix: (R, D) x (E, O, D) -> (R, O). kept: for the gradient of the weight."""
    if x_RD.is_cuda and x_RD.dtype == torch.bfloat16:
        weight = dense(weight_EOD, x_RD.dtype)
        out, inner = (-size % SMALL_ROW_BLOCK for size in weight.shape[1:])
        if out or inner:  # rows of both must be aligned to 16 bytes, which adapters of a low rank are not
            x_RD, weight = F.pad(x_RD, (0, inner)), F.pad(weight, (0, inner, 0, out))
        product = F.grouped_mm(x_RD, weight.transpose(-2, -1), offs=plan.ends)
        return product[:, : weight_EOD.shape[1]] if out else product
    return _GroupedLinear.apply(x_RD, weight_EOD, plan.ends.tolist(), kept or KeptMemory())


class _GroupedLinear(torch.autograd.Function):
    """A loop over the experts that writes into one buffer, forward and backward.

    A weight of another type is cast expert by expert, in the cache, in both passes: a copy of all would be written to
    memory, read again twice, and kept. A frozen weight costs no product, nor are rows kept for its gradient.
    """

    @staticmethod
    def forward(ctx, x_RD: Tensor, weight_EOD: Tensor | Packed, ends: list[int], kept: KeptMemory) -> Tensor:
        packed = isinstance(weight_EOD, Packed)
        ctx.save_for_backward(x_RD if ctx.needs_input_grad[1] else None, None if packed else weight_EOD)
        ctx.packed, ctx.dtype, ctx.ends, ctx.kept = weight_EOD if packed else None, x_RD.dtype, ends, kept
        if not packed and grouped.fits(x_RD, weight_EOD, ends):
            return grouped.product(x_RD, weight_EOD, ends)
        weight_EOD = dense(weight_EOD, x_RD.dtype) if packed else weight_EOD
        # Where the number of rows is only bounded (CUDA in float32), those past the last expert must still be numbers.
        make = x_RD.new_empty if ends[-1] == x_RD.shape[0] else x_RD.new_zeros
        out, weight_of = make(x_RD.shape[0], weight_EOD.shape[1]), _Cast(weight_EOD, x_RD.dtype)
        for expert, rows in _spans(ends):
            products.product_into(out[rows], x_RD[rows], weight_of(expert))
        return out

    @staticmethod
    def backward(ctx, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_RD, weight_EOD = ctx.saved_tensors
        weight_EOD = dense(ctx.packed, ctx.dtype) if weight_EOD is None else weight_EOD
        ends, spans, grad_RO, grad_x, grad_weight = ctx.ends, _spans(ctx.ends), grad_RO.contiguous(), None, None
        if ctx.packed is None and grouped.fits(grad_RO, weight_EOD, ends):
            if ctx.needs_input_grad[0]:
                grad_x = grouped.product_back(grad_RO, weight_EOD, ends)
            if ctx.needs_input_grad[1]:
                grad_weight = grouped.gradient_into(ctx.kept.like(weight_EOD), grad_RO, x_RD, ends)
            return grad_x, grad_weight, None, None
        weight_of = _Cast(weight_EOD, ctx.dtype)
        if ctx.needs_input_grad[0]:
            make = grad_RO.new_empty if ends[-1] == grad_RO.shape[0] else grad_RO.new_zeros
            grad_x = make(grad_RO.shape[0], weight_EOD.shape[2])
        if ctx.needs_input_grad[1]:
            grad_weight = ctx.kept.like(weight_EOD)
            for expert in set(range(len(ends))).difference(expert for expert, _ in spans):
                grad_weight[expert].zero_()
        for expert, rows in spans:
            if grad_x is not None:
                products.product_into(grad_x[rows], grad_RO[rows], weight_of(expert).t())
            if grad_weight is not None:
                products.gradient_into(grad_weight[expert], grad_RO[rows], x_RD[rows])
        return grad_x, grad_weight, None, None


class _Cast:
    """One expert's matrix after the other in another type, all in the same place."""

    def __init__(self, weight_EOD: Tensor, dtype: torch.dtype) -> None:
        self.weight_EOD = weight_EOD
        self.place = None if weight_EOD.dtype == dtype else weight_EOD.new_empty(weight_EOD.shape[1:], dtype=dtype)

    def __call__(self, expert: int) -> Tensor:
        weight = self.weight_EOD[expert]
        return weight if self.place is None else self.place.copy_(weight)


def _spans(ends: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, each with its rows."""
    return [
        (e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if end > start
    ]


def _weighted_swiglu(gate_up_R2I: Tensor, weights_R: Tensor) -> Tensor:
    """silu(gate) * up * weight for gate_up = [gate | up]; weights are of its type."""
    gate, up = gate_up_R2I.chunk(2, dim=-1)
    if fused.fits(gate, up):
        return fused.FusedSwiGLU.apply(weights_R, gate_up_R2I)
    return _WeightedSwiGLU.apply(gate_up_R2I, weights_R)


class _WeightedSwiGLU(torch.autograd.Function):
    """silu(gate) * up * weight for gate_up (R, 2 * I) = [gate | up] and weight (R,), keeping only its inputs."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(weight.unsqueeze(1))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weight = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        scaled = grad * weight.unsqueeze(1)
        torch.mul(scaled, activated, out=grad_up)
        grad_weight = activated.mul_(up).mul_(grad).sum(-1)
        grad_gate.copy_(torch.ops.aten.silu_backward(scaled.mul_(up), gate))
        return grad_gate_up, grad_weight


class _Dispatch(torch.autograd.Function):
    """Copy each token to its rows. Its gradient is a gather and a sum over k, where autograd's own would scatter."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, token_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_choice)
        return x_ND.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (row_of_choice,) = ctx.saved_tensors
        return _gather_sum(grad_RD, row_of_choice), None, None


class _Combine(torch.autograd.Function):
    """Sum each token's rows: the transpose of `_Dispatch`."""

    @staticmethod
    def forward(ctx, y_RD: Tensor, token_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row)
        return _gather_sum(y_RD, row_of_choice)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (token_of_row,) = ctx.saved_tensors
        # Padding rows get token 0's gradient here; it ends where their weight, which is 0, multiplies it.
        return grad_ND.index_select(0, token_of_row), None, None


class _Permute(torch.autograd.Function):
    """Put the weight of each choice into its row, 0 into padding rows; the gradient goes the way back."""

    @staticmethod
    def forward(ctx, weights: Tensor, choice_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_choice)
        return weights.new_zeros(choice_of_row.shape[0]).scatter_(0, row_of_choice, weights)

    @staticmethod
    def backward(ctx, grad_R: Tensor) -> tuple[Tensor, None, None]:
        (row_of_choice,) = ctx.saved_tensors
        return grad_R.index_select(0, row_of_choice), None, None


def _gather_sum(rows_RD: Tensor, row_of_choice: Tensor) -> Tensor:
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
