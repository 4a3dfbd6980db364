"""`varlen_attn` without CUDA: its operations, which have kernels for CUDA only, in plain float64 on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def varlen_on_cpu() -> None:
    """Register them, for the rest of the process."""
    from torch.nn.attention import varlen

    def forward(q, k, v, ends, ends_k, longest, longest_k, is_causal=False, scale=None, window_size=None, *_):
        assert window_size == [-1, 0] and torch.equal(ends, ends_k)  # each sees what came before it
        assert q.shape == k.shape == v.shape and q.dtype == torch.bfloat16 and ends.dtype == torch.int32
        assert not len(ends) - 1 & len(ends) - 2  # a power of two segments, some of them empty
        assert ends[0] == 0 and ends[-1] == len(q) and 0 <= ends.diff().min() <= ends.diff().max() <= longest
        out = _weights(q, k, ends, scale) @ v.double().transpose(0, 1)
        return out.transpose(0, 1).bfloat16(), torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    def backward(grad, q, k, v, out, lse, ends, ends_k, longest, longest_k, is_causal, rng, scale, window_size):
        p = _weights(q, k, ends, scale)
        q, k, v, grad = (x.double().transpose(0, 1) for x in (q, k, v, grad))
        to_p = grad @ v.transpose(1, 2)
        to_scores = p * (to_p - (to_p * p).sum(-1, keepdim=True)) * scale
        gradients = (to_scores @ k, to_scores.transpose(1, 2) @ q, p.transpose(1, 2) @ grad)
        return tuple(x.transpose(0, 1).bfloat16() for x in gradients)

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)


def _weights(q: Tensor, k: Tensor, ends: Tensor, scale: float) -> Tensor:
    """(heads, time, time) of flat q and k (time, heads, size)."""
    place = torch.arange(len(q))
    segment = torch.searchsorted(ends, place.int(), right=True)
    allowed = (segment[:, None] == segment) & (place[:, None] >= place)
    scores = torch.stack([a @ b.t() for a, b in zip(q.double().unbind(1), k.double().unbind(1), strict=True)]) * scale
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1)
