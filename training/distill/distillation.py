"""Distillation loss: a divergence from the teacher's distribution at every label, mixed with cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from errors import require
from model.transformer import Output
from training.distill.divergences import (
    Divergence,
    forward_kl,
    generalised_jsd,
    logit_gradient,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
)
from training.losses import PLACES, ROWS, Batch, NextTokenLoss, chunks, label_places, located, padded, padded_rows

SAMPLED = "sampled"  # in a batch where the student answered itself, and in no other


@dataclass(kw_only=True)
class DistillationSettings:
    """How the student is compared with its teacher.

    Args:
        loss: forward_kl, reverse_kl, skewed_forward_kl, skewed_reverse_kl or jsd.
        temperature: both distributions are softened by it; the loss is multiplied by its square.
        skew: lambda of the skewed losses, at least 0 and below 1.
        beta: of jsd, between 0 and 1.
        ce_weight: share of the cross entropy with the data's answers; the divergence has the rest.
    """

    loss: str = "skewed_forward_kl"
    temperature: float = 1.0
    skew: float = 0.1
    beta: float = 0.5
    ce_weight: float = 0.5

    def check(self) -> None:
        """Raises `UserError` for a value that makes no sense."""
        require(self.loss in LOSSES, f"--loss {self.loss}: one of {', '.join(LOSSES)}")
        require(0 < self.temperature < float("inf"), f"--temperature {self.temperature:g}: must be above 0")
        nothing = "where the loss is 0 for every student"
        require(0 <= self.skew < 1, f"--skew {self.skew:g}: must be at least 0 and below 1, {nothing}")
        require(0 < self.beta < 1, f"--beta {self.beta:g}: must be between 0 and 1, {nothing}")
        require(0 <= self.ce_weight <= 1, f"--ce_weight {self.ce_weight:g}: a share, from 0 to 1")

    @property
    def divergence(self) -> Divergence:
        return LOSSES[self.loss](self)


LOSSES: dict[str, Callable[[DistillationSettings], Divergence]] = {
    "forward_kl": lambda _: forward_kl,
    "reverse_kl": lambda _: reverse_kl,
    "skewed_forward_kl": lambda settings: partial(skewed_forward_kl, skew=settings.skew),
    "skewed_reverse_kl": lambda settings: partial(skewed_reverse_kl, skew=settings.skew),
    "jsd": lambda settings: partial(generalised_jsd, beta=settings.beta),
}


class TeacherOutput(Protocol):
    """A teacher's distributions at N labelled positions."""

    def compare(self, part: slice, log_q_RV: Tensor, divergence: Divergence, temperature: float) -> tuple[Tensor, ...]:
        """Return value (rows,) and flow (rows, vocab) of the divergence at some positions, where the student has q."""
        ...


# Gives its distributions, in the student's vocabulary, at the labels that count, in their order. It may have `prepare`,
# as a loss may.
Teacher = Callable[[Batch], TeacherOutput]


@dataclass(frozen=True)
class Logits:
    """A teacher's last states, and its head, cut to the student's vocabulary; or its logits, where `head` is None.

    Cutting leaves tokens out that the student does not have, and the softmax gives their probability to the others.

    Attributes: hidden: (N, hidden) or (N, vocab); head: (vocab, hidden); bias: (vocab,) or None.
    """

    hidden: Tensor
    head: Tensor | None
    bias: Tensor | None = None

    def log_probs(self, part: slice, temperature: float) -> Tensor:
        """Return (rows, vocab) float32."""
        z = self.hidden[part]
        if self.head is not None:
            rows = len(z)
            z = (padded_rows(z, rows + -rows % ROWS) @ self.head.to(z.dtype).t())[:rows]
        z = z.float() if self.bias is None else z.float() + self.bias.float()
        # A token that the teacher forbids (-inf) is only very improbable: infinity times 0 is no number.
        return (z / temperature).log_softmax(-1).clamp_(min=-1e4)

    def compare(self, part: slice, log_q_RV: Tensor, divergence: Divergence, temperature: float) -> tuple[Tensor, ...]:
        return divergence(self.log_probs(part, temperature), log_q_RV)


class _Distilled(torch.autograd.Function):
    """(1 - c) T^2 D(p_T, q_T) + c (-log q[label]), summed over positions, in chunks: no logits of a batch exist whole.

    The loss is a sum, so the gradient of a chunk is formed at once and only scaled in `backward`, as in
    `training.losses`. Returns also the plain sums of both parts, without gradient.
    """

    @staticmethod
    def forward(
        ctx, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, teacher: TeacherOutput, divergence: Divergence,
        temperature: float, ce_weight: float, with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        weight = head_VD.to(hidden_ND.dtype)
        distance, cross_entropy = torch.zeros(2, device=hidden_ND.device).unbind()
        grad_hidden = torch.empty_like(hidden_ND) if with_grad else None
        grad_head = torch.zeros_like(weight, dtype=torch.float32) if with_grad else None
        for part in chunks(hidden_ND, len(weight), copies=8):
            tokens = slice(part.start, min(part.stop, len(labels_N)))  # the states behind the labels are padding
            z = (hidden_ND[part] @ weight.t())[: tokens.stop - tokens.start].float()
            log_q = (z / temperature).log_softmax(-1)
            value, flow = teacher.compare(tokens, log_q, divergence, temperature)
            distance += value.sum()
            hard = log_q if temperature == 1 else z.log_softmax(-1)
            target = labels_N[tokens].unsqueeze(1)
            cross_entropy -= hard.gather(1, target).sum()
            if with_grad:
                # d/dz of T^2 D is T dD/d(z/T): gradients of D shrink as 1/T^2, and the mixture should not.
                grad = logit_gradient(log_q, flow).mul_((1 - ce_weight) * temperature)
                if ce_weight:
                    grad.add_(hard.exp(), alpha=ce_weight)
                    grad[torch.arange(len(grad), device=grad.device), target.squeeze(1)] -= ce_weight
                grad = padded_rows(grad, part.stop - part.start).to(weight.dtype)
                torch.mm(grad, weight, out=grad_hidden[part])
                grad_head += grad.t() @ hidden_ND[part]
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head_VD.dtype
        ctx.mark_non_differentiable(distance, cross_entropy)
        return (1 - ce_weight) * temperature**2 * distance + ce_weight * cross_entropy, distance, cross_entropy

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_head * grad).to(ctx.head_dtype), *[None] * 6


def distillation_sum(
    hidden: Tensor, head: Tensor, labels: Tensor, teacher: TeacherOutput, divergence: Divergence,
    temperature: float = 1.0, ce_weight: float = 0.0, places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(1 - ce_weight) T^2 D + ce_weight cross entropy, D alone and cross entropy alone: sums in nats, float32.

    Only positions with a label go through the heads. The first of the sums has a gradient.

    Args:
        hidden: (..., hidden) of the student; head: (vocab, hidden); labels: (...) token ids, -100 where nothing counts.
        teacher: its output at the labels that count; places: of these, if the batch has them (`losses.located`).
    """
    targets, places = labels.flatten(), label_places(labels) if places is None else places
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    # The types are chosen here, as in `training.losses`.
    with torch.autocast(hidden.device.type, enabled=False):
        chosen = hidden.flatten(0, -2).index_select(0, padded(places))
        return _Distilled.apply(chosen, head, targets[places], teacher, divergence, temperature, ce_weight, with_grad)


@dataclass(kw_only=True)
class DistillationLoss(NextTokenLoss):
    """A `NextTokenLoss` whose main part is the mixture of divergence and cross entropy.

    The MTP chain is still trained on the labels: its depths have no counterpart in most teachers. Where the student
    answered itself the divergence stands alone, without cross entropy with its own words.
    """

    settings: DistillationSettings
    teacher: Teacher

    def main(self, out: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            teacher = self.teacher(batch)
        settings = self.settings
        ce_weight = 0.0 if is_sampled(batch) else settings.ce_weight
        total, distance, cross_entropy = distillation_sum(
            out.hidden, out.head, batch["labels"], teacher, settings.divergence, settings.temperature, ce_weight,
            batch.get(PLACES),
        )  # fmt: skip
        return total, {"divergence": distance, "cross_entropy": cross_entropy}

    def prepare(self, batch: Batch) -> Batch:
        """Add where the labels are, and what the teacher asks of the host."""
        prepare = getattr(self.teacher, "prepare", None)
        return prepare(located(batch)) if prepare else located(batch)

    def weight_of_mtp(self, batch: Batch) -> float:
        # Times 0, not left out: a parameter without gradient would keep DDP waiting.
        return 0.0 if is_sampled(batch) else self.mtp_weight


def is_sampled(batch: Batch) -> bool:
    """Return whether the answers of a batch are the student's own."""
    return SAMPLED in batch
