"""Log-probabilities of given tokens, with gradient, without the logits of a batch ever existing together."""

from __future__ import annotations

import torch
from torch import Tensor

import model.kernels as kernels
from training.losses import chunks, label_places, padded

TOGETHER = 256  # rows whose softmax is made at a time on a CPU: fastest for 2,000 tokens and for 6,400


def cached(chunk: slice, x: Tensor) -> list[slice]:
    """Return the rows of a chunk in parts, whose probabilities pass through a CPU's cache; on CUDA in one."""
    size = chunk.stop - chunk.start if kernels.on_cuda(x) else TOGETHER
    return [slice(start, min(start + size, chunk.stop)) for start in range(chunk.start, chunk.stop, size)]


class _LabelLogProbs(torch.autograd.Function):
    """log softmax(h W^T / T)[label] of each position, over chunks of positions; `backward` makes each softmax again.

    Unlike a sum's gradient (`training.losses`), each position's is known only when the loss over all of them is.
    """

    @staticmethod
    def forward(
        ctx, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        weight = head_VD.to(hidden_ND.dtype)
        log_probs = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
        normaliser, entropy = torch.empty_like(log_probs), torch.zeros_like(log_probs)
        for part in (part for chunk in chunks(hidden_ND, len(weight), copies=2) for part in cached(chunk, hidden_ND)):
            logits = (hidden_ND[part] @ weight.t()).float().div_(temperature)
            most = logits.amax(-1, keepdim=True)
            p = (logits - most).exp_()  # times Z / exp(most)
            total = p.sum(-1)
            normaliser[part] = total.log() + most.squeeze(1)
            log_probs[part] = logits.gather(1, labels_N[part].unsqueeze(1)).squeeze(1) - normaliser[part]
            if with_entropy:
                # H = -sum p log p = log Z - sum p z
                entropy[part] = normaliser[part] - p.mul_(logits).sum(-1).div_(total)
        ctx.save_for_backward(hidden_ND, weight, labels_N, normaliser)
        ctx.temperature, ctx.head_dtype = temperature, head_VD.dtype
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx, grad_N: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, labels, normaliser = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(weight, dtype=torch.float32)
        for chunk in chunks(hidden, len(weight), copies=2):
            grad_logits = hidden.new_empty(chunk.stop - chunk.start, len(weight))
            for part in cached(chunk, hidden):
                p = (hidden[part] @ weight.t()).float().div_(ctx.temperature).sub_(normaliser[part].unsqueeze(1)).exp_()
                # d(log p_y)/dz = (onehot(y) - p) / T
                p[torch.arange(p.shape[0], device=p.device), labels[part]] -= 1
                p.mul_((-grad_N[part] / ctx.temperature).unsqueeze(1))
                grad_logits[part.start - chunk.start : part.stop - chunk.start] = p
            torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            grad_head += grad_logits.t() @ hidden[chunk]
        return grad_hidden, grad_head.to(ctx.head_dtype), None, None, None


def label_log_probs(
    hidden: Tensor, head: Tensor, labels: Tensor, temperature: float = 1.0, places: Tensor | None = None
) -> Tensor:
    """log p of each label, float32, 0 where nothing counts; the shape of `labels`.

    Only positions that count go through the head, so that prompts and padding cost nothing there.

    Args:
        hidden: (..., hidden); head: (vocab, hidden); labels: (...) token ids, -100 where nothing counts.
        places: of the labels that count, if the batch has them (`losses.located`).
    """
    return _label_log_probs(hidden, head, labels, temperature, places, with_entropy=False)[0]


def log_probs_and_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, temperature: float = 1.0, places: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`label_log_probs`, and the entropy of each of these positions in nats, which has no gradient."""
    return _label_log_probs(hidden, head, labels, temperature, places, with_entropy=True)


def _label_log_probs(
    hidden: Tensor, head: Tensor, labels: Tensor, temperature: float, places: Tensor | None, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    flat, targets = hidden.flatten(0, -2), labels.flatten()
    places = label_places(labels) if places is None else places
    with torch.autocast(hidden.device.type, enabled=False):
        rows = padded(places)
        chosen, labels_R = flat.index_select(0, rows), targets[rows].clamp(min=0)
        log_probs, entropy = _LabelLogProbs.apply(chosen, head, labels_R, temperature, with_entropy)
        log_probs, entropy = log_probs[: len(places)], entropy[: len(places)]
    empty = torch.zeros(targets.shape, device=targets.device)
    return empty.index_copy(0, places, log_probs).view_as(labels), empty.index_copy(0, places, entropy).view_as(labels)
