"""A stage of a pipeline: the model with some of its layers; weight gradients that wait (DeepSeek-V3 section 3.2.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model import kernels
from model.experts import Experts
from model.kernels.grouped import GradBuffer, each_gradient_into
from model.kernels.products import product
from model.mtp import MTPChain
from model.ops import Linear, grouped_linear, linear
from model.transformer import MiniDeepSeek, Output


class Elsewhere(nn.Module):
    """Stands for a part that is on another stage: the state passes it by."""

    is_moe, weight = False, None

    def forward(self, x: Tensor, *_: Any) -> tuple[Tensor, None]:
        """Return x as it is."""
        return x, None


class Stage(MiniDeepSeek):
    """The modules of a whole model that are one stage's, under their names there.

    The first stage has the embedding, the last one norm, head and MTP chain, and the embedding too where these take it.
    """

    def __init__(self, whole: MiniDeepSeek, layers: range, first: bool, last: bool) -> None:
        """layers: those of the main model that are here."""
        nn.Module.__init__(self)
        embeds = first or (last and (len(whole.mtp) > 0 or whole.config.tie_word_embeddings))
        self.config, self.rotary = whole.config, whole.rotary
        self.gradient_checkpointing, self.has_dropout = whole.gradient_checkpointing, whole.has_dropout
        self.model = nn.Module()
        self.model.embed_tokens = whole.model.embed_tokens if embeds else None
        self.model.layers = nn.ModuleList(
            layer if index in layers else Elsewhere() for index, layer in enumerate(whole.model.layers)
        )
        self.model.norm = whole.model.norm if last else nn.Identity()
        self.mtp = whole.mtp if last else MTPChain()
        self.lm_head = whole.lm_head if last else Elsewhere()
        routed = [index for index, layer in enumerate(whole.model.layers) if layer.is_moe]
        self.moe_layers, self._places = len(routed), [place for place, index in enumerate(routed) if index in layers]

    def embed(self, input_ids: Tensor) -> Tensor | None:
        """Return the start of the residual stream, where the embedding is here."""
        return None if self.model.embed_tokens is None else super().embed(input_ids)

    def forward(self, input_ids: Tensor, *, balance: Tensor | None = None, **inputs: Any) -> Output:
        """Run this stage; `state` and the sums `balance` come from the one before it.

        The output's balance loss goes on with them; its counts have a row for each MoE layer of the model, of those
        elsewhere zeros, and the head is None before the last stage.
        """
        out = super().forward(input_ids, **inputs)
        balance_loss = [sums for sums in (balance, out.balance_loss) if sums is not None]
        counts = out.counts
        if self.moe_layers:
            ahead = 0 if counts is None else len(counts) - len(self._places)  # of the MTP chain
            shape = (self.moe_layers + ahead, self.config.n_routed_experts)
            counts = torch.zeros(shape, device=input_ids.device)
            if out.counts is not None:
                places = [*self._places, *range(self.moe_layers, self.moe_layers + ahead)]
                counts[torch.tensor(places, device=counts.device)] = out.counts
        return out._replace(counts=counts, balance_loss=sum(balance_loss) if balance_loss else None)


class WeightGradients:
    """Weight gradients that wait until there is time: a schedule fills bubbles with them (Qi et al. 2023, ZB-H1).

    The backward pass gives only the gradients of activations at once. A product with a weight leaves both of its
    factors here, for the third of the products that nobody else waits for.
    """

    def __init__(self, stage: nn.Module) -> None:
        """Take those of the linear layers and experts of a stage that are trained."""
        self._waiting: list[Callable[[], None]] = []
        for module in stage.modules():
            if isinstance(module, (Linear, Experts)) and any(p.requires_grad for p in module.parameters()):
                module.later = self

    def linear(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None = None) -> Tensor:
        """`model.ops.linear`."""
        out = linear(x, weight.detach(), bias)

        def gradient(grad: Tensor, x: Tensor) -> Tensor:
            grad_NO, x_NI = grad.flatten(0, -2), x.flatten(0, -2)
            return product(grad_NO.t(), x_NI.to(grad.dtype).t())

        return _Wait.apply(out, x.detach(), weight, gradient, self)

    def grouped_linear(self, x_RD: Tensor, weight_EOD: nn.Parameter, ends_E: Tensor, buffer: GradBuffer) -> Tensor:
        """`model.ops.grouped_linear`."""
        out = grouped_linear(x_RD, weight_EOD.detach(), ends_E, buffer)

        def gradient(grad: Tensor, x: Tensor) -> Tensor:
            return weight_gradient(grad.contiguous(), x, ends_E, weight_EOD)

        return _Wait.apply(out, x_RD.detach(), weight_EOD, gradient, self)

    def add(self, work: Callable[[], None]) -> None:
        """Have `work` done later."""
        self._waiting.append(work)

    def take(self) -> Callable[[], None]:
        """Return what does all that waits now."""
        waiting, self._waiting = self._waiting, []

        def run() -> None:
            while waiting:
                waiting.pop(0)()

        return run


def weight_gradient(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor, weight_EOI: Tensor) -> Tensor:
    """The gradient of the weight in `model.ops.grouped_linear`, computed apart."""
    if kernels.on_cuda(grad_RO):
        return kernels.grouped_cuda.weight_gradient(grad_RO, x_RI, ends_E, weight_EOI)
    return each_gradient_into(torch.empty_like(weight_EOI, dtype=torch.float32), grad_RO, x_RI, ends_E.tolist())


class _Wait(torch.autograd.Function):
    """Passes the result of a product on, and leaves its gradient and the other factor in a store.

    The weight is kept as it is, not saved: of a layer that is computed again, autograd would give a copy.
    """

    @staticmethod
    def forward(
        ctx, out: Tensor, x: Tensor, weight: nn.Parameter, gradient: Callable[[Tensor, Tensor], Tensor], store
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.later = weight, gradient, store
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,), (weight, gradient, store) = ctx.saved_tensors, ctx.later

        @torch.no_grad()
        def work() -> None:
            found = gradient(grad, x).to(torch.float32)
            if weight.grad is None:
                weight.grad_dtype = torch.float32  # of weights in bfloat16 too: sums of micro-batches
                weight.grad = found
            else:
                weight.grad += found

        store.add(work)
        return grad, None, None, None, None
