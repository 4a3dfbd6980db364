"""The experts of an MoE layer as few large products: dropless, and without a host round trip on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from LMConfig import LMConfig
from model.dispatch import Combine, Dispatch, Permute, Plan, gather_sum
from model.grouped_linear import Cast, GradBuffer, grouped_linear, spans_of
from model.kernels import fused, grouped, products
from model.quantized import QuantizedWeight

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
        self.grad_buffers = {name: GradBuffer() for name, _ in self.named_parameters()}

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
        plain = not corrections and not isinstance(self.gate_up_proj, QuantizedWeight)
        if plain and x_ND.device.type == "cpu" and not torch.is_grad_enabled():
            few = indices_NK.numel() <= FEW_CHOICES
            return (self._few if few else self._in_turn)(x_ND, weights_NK.to(x_ND.dtype), indices_NK)
        return (self._grouped if x_ND.is_cuda else self._looped)(x_ND, weights_NK, indices_NK, corrections)

    @torch._disable_dynamo  # torch.compiler.disable, but torch._dynamo is imported at the first call
    def _looped(self, *inputs: Tensor | Mapping[str, LowRank]) -> Tensor:
        """On CPU the number of rows is read from the data: a compiled graph would hold for one step."""
        return self._grouped(*inputs)

    def _grouped(
        self, x_ND: Tensor, weights_NK: Tensor, indices_NK: Tensor, corrections: Mapping[str, LowRank]
    ) -> Tensor:
        own = grouped.suits(x_ND, self.gate_up_proj, self.down_proj)
        plan = Plan.of(indices_NK, self.gate_up_proj.shape[0], grouped.TILE if own else None)
        x_RD = Dispatch.apply(x_ND, plan.token_of_row, plan.row_of_choice)
        weights_R = Permute.apply(weights_NK.flatten(), plan.choice_of_row, plan.row_of_choice.flatten())
        # Scaling the inner activation equals scaling the output, since down_proj is linear, and is narrower.
        gate_up_R2I = self._product("gate_up_proj", x_RD, plan, corrections)
        inner_RI = _weighted_swiglu(gate_up_R2I, weights_R.to(x_RD.dtype))
        out_RD = self._product("down_proj", inner_RI, plan, corrections)
        return Combine.apply(out_RD, plan.token_of_row, plan.row_of_choice)

    def _product(self, name: str, x_RF: Tensor, plan: Plan, corrections: Mapping[str, LowRank]) -> Tensor:
        out = grouped_linear(x_RF, getattr(self, name), plan, self.grad_buffers[name])
        if name not in corrections:
            return out
        a, b, scale = corrections[name]
        return out + scale * grouped_linear(grouped_linear(x_RF, a, plan), b, plan)

    @torch._disable_dynamo
    def _in_turn(self, x_ND: Tensor, weights_NK: Tensor, indices_NK: Tensor) -> Tensor:
        """The same bits as `_grouped` without a gradient: the rows of one expert stay in the processor's cache from the
        first product to the last, in the place of those of the expert before.
        """
        plan = Plan.of(indices_NK, self.gate_up_proj.shape[0])
        weights_R = Permute.apply(weights_NK.flatten(), plan.choice_of_row, plan.row_of_choice.flatten())
        spans = spans_of(plan.ends.tolist())
        most = max(rows.stop - rows.start for _, rows in spans)
        rows_of = x_ND.new_empty(most, x_ND.shape[1])
        gate_up_of = x_ND.new_empty(most, self.gate_up_proj.shape[1])
        out_RD = x_ND.new_empty(len(weights_R), x_ND.shape[1])
        gate_up_weight, down_weight = Cast(self.gate_up_proj, x_ND.dtype), Cast(self.down_proj, x_ND.dtype)
        for expert, rows in spans:
            x, gate_up = rows_of[: rows.stop - rows.start], gate_up_of[: rows.stop - rows.start]
            torch.index_select(x_ND, 0, plan.token_of_row[rows], out=x)
            products.product_into(gate_up, x, gate_up_weight(expert))
            products.product_into(out_RD[rows], _weighted_swiglu(gate_up, weights_R[rows]), down_weight(expert))
        return gather_sum(out_RD, plan.row_of_choice)

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
