"""What tests of kernels share: random tensors, a distance, and a training step."""

from __future__ import annotations

import torch
from torch import Tensor

from LMConfig import LMConfig
from model import MiniDeepSeek
from training.losses import NextTokenLoss

TYPES = (torch.float32, torch.bfloat16)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def far(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor) -> Tensor:
    """softmax(q k^T * scale) v in plain operations; allowed: bool, broadcastable to (batch, heads, queries, keys)."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)


def training_step(config: LMConfig, dtype: torch.dtype, time: int = 65) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a new model."""
    tokens = torch.randint(0, config.vocab_size, (2, time), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = MiniDeepSeek(config)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        total, count, _ = NextTokenLoss()(model, {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]})
    (total / count).backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters()}


def varlen_on_cpu() -> None:
    """Give `varlen_attn`'s operations, which have kernels for CUDA only, plain ones on a CPU."""
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
