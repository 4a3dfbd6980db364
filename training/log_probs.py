"""Log-probabilities of chosen tokens, in chunks of positions: the logits of a batch never exist together."""

from __future__ import annotations

import torch
from torch import Tensor

from training.losses import CHUNK_ELEMENTS, IGNORE


class _ChosenLogProbs(torch.autograd.Function):
    """log softmax(h W^T / temperature)[target] at some positions. The backward pass makes each chunk's logits anew."""

    @staticmethod
    def forward(
        ctx, hidden_ND: Tensor, head_VD: Tensor, target_M: Tensor, place_M: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        weight, chosen_MD = head_VD.to(hidden_ND.dtype), hidden_ND.index_select(0, place_M)
        log_probs, normaliser, entropy = (chosen_MD.new_empty(len(target_M), dtype=torch.float32) for _ in range(3))
        for part in _parts(len(target_M), weight.shape[0]):
            logits = (chosen_MD[part] @ weight.t()).float() / temperature
            normaliser[part] = logits.logsumexp(-1)
            log_probs[part] = logits.gather(1, target_M[part].unsqueeze(1)).squeeze(1) - normaliser[part]
            # H = -sum p log p = log Z - sum p z
            p = (logits - normaliser[part].unsqueeze(1)).exp_()
            entropy[part] = normaliser[part] - (p.mul_(logits)).sum(-1)
        ctx.save_for_backward(chosen_MD, weight, target_M, place_M, normaliser)
        ctx.temperature, ctx.positions, ctx.head_dtype = temperature, hidden_ND.shape[0], head_VD.dtype
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx, grad_M: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        chosen_MD, weight, target_M, place_M, normaliser = ctx.saved_tensors
        grad_hidden = chosen_MD.new_zeros(ctx.positions, chosen_MD.shape[1])
        grad_head = torch.zeros_like(weight, dtype=torch.float32)
        for part in _parts(len(target_M), weight.shape[0]):
            # d log p_y / dz = (onehot(y) - p) / temperature
            grad = (chosen_MD[part] @ weight.t()).float() / ctx.temperature
            grad = (grad - normaliser[part].unsqueeze(1)).exp_().neg_()
            grad[torch.arange(len(grad), device=grad.device), target_M[part]] += 1
            grad = grad.mul_((grad_M[part] / ctx.temperature).unsqueeze(1)).to(weight.dtype)
            grad_hidden[place_M[part]] = grad @ weight
            grad_head += grad.t() @ chosen_MD[part]
        return grad_hidden, grad_head.to(ctx.head_dtype), None, None, None


def token_log_probs(hidden: Tensor, head: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p of each label at `temperature`, in nats, and the entropy of each distribution; 0 where nothing counts.

    Args:
        hidden: (batch, time, hidden); head: (vocab, hidden); labels: (batch, time) token ids, -100 where none counts.
    Returns:
        Two (batch, time) float32; only the first has a gradient.
    """
    flat = labels.flatten()
    places = (flat != IGNORE).nonzero().squeeze(1)
    with torch.autocast(hidden.device.type, enabled=False):
        chosen, entropy = _ChosenLogProbs.apply(hidden.flatten(0, -2), head, flat[places], places, temperature)
    return tuple(
        values.new_zeros(flat.shape).index_put((places,), values).view_as(labels) for values in (chosen, entropy)
    )


def _parts(positions: int, vocabulary: int) -> list[slice]:
    rows = max(64, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + rows) for start in range(0, positions, rows)]
