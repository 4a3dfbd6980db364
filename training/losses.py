"""The losses: `loss(model, batch) -> (sum, count, metrics)`, normalised later by the counted tokens of a whole step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model.kernels as kernels
from model.ops import cross_entropy_
from model.transformer import Output

IGNORE = -100  # a label that does not count
PLACES = "places"  # in a batch: see `located`
INPUTS = ("input_ids", "position_ids", "segment_ids", "segment_ends")  # in a batch: what a model is given
CHUNK_ELEMENTS = 2**22  # logits held at a time, in a CPU's cache: those of a batch never exist together
CUDA_CHUNK_ELEMENTS = 2**28  # on CUDA, where launches cost more than memory: 0.5 GB in bfloat16, twice that in float32
# A CPU generates kernels for each row count that it has not seen, up to 10 ms and 10 MB: chunks are multiples.
ROWS = 64

Batch = dict[str, Tensor]
Metric = Tensor | tuple[Tensor, Tensor]


class Loss(Protocol):
    """What a stage minimises, over one micro-batch.

    Returns (sum, count, metrics). The trainer adds sums and counts over micro-batches and ranks and divides once, so
    how a batch is cut changes nothing. A metric is a sum to be logged over the same count, or a pair (sum, count) with
    a count of its own; each call brings the same names. Two names are special: `main` is logged as the loss, where a
    loss has parts, and `counts` are the experts' loads, (MoE layers, experts), that move the routers' biases.

    A loss may name, in `schedules`, attributes of its own that change along the run; the trainer sets them before each
    step and refuses a schedule of any other name. `bias_speed` among them is the routers' gamma.

    A loss may have `prepare(batch) -> batch`, which adds what depends on the data's numbers, such as how many labels
    count: it is called while the batch is still in the host's memory. Of a GPU the host would have to wait for them.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Metric]]: ...


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(h W^T)[label] over chunks of positions: the logits of a batch never exist together.

    The gradient of a chunk is ready when its softmax is, so it is formed at once and only scaled in `backward`.
    """

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, with_grad: bool) -> Tensor:
        weight = head_VD.to(hidden_ND.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if with_grad else None
        trains_head = with_grad and head_VD.requires_grad
        grad_head = torch.zeros_like(weight, dtype=torch.float32) if trains_head else None
        for part in chunks(hidden_ND, len(weight)):
            logits_NV = kernels.products.product(hidden_ND[part], weight)
            nll_N, error_NV = cross_entropy_(logits_NV, labels_N[part])
            total += nll_N.sum()
            if with_grad:
                grad_hidden[part] = kernels.products.product(error_NV, weight.t())
                if trains_head:
                    kernels.products.add_gradient(grad_head, error_NV, hidden_ND[part])
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head_VD.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_head is not None:
            grad_head = (grad_head * grad).to(ctx.head_dtype)
        return grad_hidden * grad.to(grad_hidden.dtype), grad_head, None, None


def chunks(hidden_ND: Tensor, vocab: int, copies: int = 1) -> list[slice]:
    """Return slices of rows whose products with the vocabulary are few enough to be held at a time.

    copies: how much more memory a logit takes than in a cross entropy.
    """
    elements, rows = CUDA_CHUNK_ELEMENTS // copies if kernels.on_cuda(hidden_ND) else CHUNK_ELEMENTS, len(hidden_ND)
    size = max(ROWS, elements // vocab // ROWS * ROWS)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def located(batch: Batch) -> Batch:
    """Return the batch with `places`, (N,): where in the flattened labels those stand that count."""
    return batch if PLACES in batch else {**batch, PLACES: label_places(batch["labels"])}


def label_places(labels: Tensor) -> Tensor:
    """Return (N,) int64, where in the flattened labels those stand that count; of a GPU the host waits for N."""
    return (labels != IGNORE).flatten().nonzero().squeeze(1)


def padded(places: Tensor) -> Tensor:
    """Return (N,) indices, followed by zeros up to a multiple of `ROWS`."""
    return F.pad(places, (0, -len(places) % ROWS))


def padded_rows(x: Tensor, rows: int) -> Tensor:
    """Return (N, ...) with rows of zeros behind, up to (rows, ...)."""
    return F.pad(x, (0, 0, 0, rows - len(x)))


def cross_entropy_sum(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy in nats, float32, over the labels that count.

    Args:
        hidden: (..., hidden); head: (vocab, hidden); labels: (...) token ids, -100 where nothing counts.
    """
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    # The types are chosen here; autocast would carry every softmax through memory in float32.
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden.flatten(0, -2), head, labels.flatten(), with_grad)


def token_losses(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each label in nats, float32, 0 where nothing counts; without gradient. Shape of `labels`."""
    weight, flat, targets = head.to(hidden.dtype), hidden.flatten(0, -2), labels.flatten()
    with torch.no_grad():
        parts = [
            F.cross_entropy((flat[part] @ weight.t()).float(), targets[part], reduction="none")
            for part in chunks(flat, len(weight))
        ]
    return torch.cat(parts).view_as(labels)


def labels_ahead(batch: Batch, depth: int) -> Tensor:
    """What MTP depth k predicts at position t: the label of position t+k, if it lies in the same segment (Eq. 24)."""
    labels = batch["labels"]
    ahead = torch.full_like(labels, IGNORE)
    ahead[:, :-depth] = labels[:, depth:]
    if "segment_ids" in batch:
        segments = batch["segment_ids"]
        ahead[:, :-depth].masked_fill_(segments[:, depth:] != segments[:, :-depth], IGNORE)
    return ahead


def labels_of_unrolled_step(batch: Batch, depth: int, step: int) -> Tensor:
    """What step j of MTP depth D on its own state predicts at position t: the same as the depth itself, but only where
    the chain began, j-1 positions before, in the same segment."""
    labels, begun = labels_ahead(batch, depth), step - 1
    labels[:, :begun] = IGNORE
    if "segment_ids" in batch:
        segments = batch["segment_ids"]
        labels[:, begun:].masked_fill_(segments[:, begun:] != segments[:, :-begun], IGNORE)
    return labels


@dataclass
class NextTokenLoss:
    """Cross entropy, plus lambda / D * the MTP losses (Eq. 25), plus alpha * the sequence-wise balance loss (Eq. 17).

    All three are sums over tokens and divided by the same count, the labels of the main model, so that micro-batches
    and ranks add up to the loss of the whole batch. The balance loss weighs a sequence by its labels. An MTP depth
    has a few labels fewer than it is divided by.

    With K > 1 the MTP losses are those of the D depths and of steps 2 .. K of the last depth on its own state, which
    the paper does not have; lambda weighs the mean of all D + K - 1.

    Attributes:
        mtp: whether the MTP chain runs at all; mtp_steps: K.
        mtp_weight: lambda; balance_weight: alpha; bias_speed: gamma of the routers' biases. All three follow their
            schedules. While lambda is 0 the chain is left out: its layers cost nothing and stay as they are.
    """

    schedules: ClassVar[tuple[str, ...]] = ("mtp_weight", "balance_weight", "bias_speed")

    mtp: bool = True
    mtp_weight: float = 0.3
    balance_weight: float = 1e-4
    mtp_steps: int = 1
    bias_speed: float = 0.0

    @property
    def runs_mtp(self) -> bool:
        """Return whether the MTP layers take part now."""
        return self.mtp and self.mtp_weight > 0

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss sum (to be divided), the count of labels, sums for the log (main, mtp, balance, counts)."""
        labels = batch["labels"]
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        out = model(**inputs, mtp=self.mtp_steps if self.runs_mtp else 0)
        count = (labels != IGNORE).sum()
        main, parts = self.main(out, batch)
        total, metrics = main, {"main": main.detach(), **parts}
        if out.mtp_hidden:
            depths = [
                cross_entropy_sum(hidden, out.head, labels_ahead(batch, depth))
                for depth, hidden in enumerate(out.mtp_hidden, start=1)
            ]
            depths += [
                cross_entropy_sum(hidden, out.head, labels_of_unrolled_step(batch, len(out.mtp_hidden), step))
                for step, hidden in enumerate(out.mtp_unrolled, start=2)
            ]
            mtp = torch.stack(depths).mean()
            total = total + self.weight_of_mtp(batch) * mtp
            metrics["mtp"] = mtp.detach()
        if out.counts is not None:
            token_mask_BT = (
                batch["segment_ids"] >= 0 if "segment_ids" in batch else torch.ones_like(labels, dtype=torch.bool)
            )
            # Per token of the sequence; brought to the scale of its labels that count, which may be fewer.
            share_B = (labels != IGNORE).sum(1) / token_mask_BT.sum(1).clamp(min=1)
            balance = (out.balance_loss * share_B).sum()
            if self.balance_weight:
                total = total + self.balance_weight * balance
            metrics["balance"] = balance.detach() / out.counts.shape[0]
            metrics["counts"] = out.counts.detach()
        return total, count, metrics

    def main(self, out: Output, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the main model's labels, and sums of its parts for the log, if it has any."""
        return cross_entropy_sum(out.hidden, out.head, batch["labels"]), {}

    def weight_of_mtp(self, batch: Batch) -> float:
        """What the MTP losses of this batch weigh."""
        return self.mtp_weight
