"""Attention with heads of two sizes: padded, as it runs, against torch's kernels that take v as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from gpu_checks import compared
from gpu_place import Finding, Place
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import ops
from model.attention import AttentionMask

BACKENDS = {"cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION), "cpu": (SDPBackend.MATH,)}


def head_sizes(place: Place) -> Iterator[Finding]:
    """Attention whose v is padded to the size of q and k, as it runs, beside kernels that take v as it is."""
    heads, time = (2, 40) if place.small else (8, 1024)
    for name, size, value in (("64m", 96, 64), ("V3", 192, 128)):
        q, k, v = (
            torch.randn(4, time, heads, each, device=place.device, dtype=torch.bfloat16).requires_grad_()
            for each in (size, size, value)
        )
        padded = lambda q, k, v: ops.attend(q, k, v, q.shape[-1] ** -0.5, AttentionMask())  # noqa: E731
        yield from compared("bf16", padded, unequal_heads, [q, k, v], prefix=name)
        if place.timed:
            yield Finding(f"{name}, padded", forward_and_back(place, padded, q, k, v), unit="ms")
        for backend in BACKENDS[place.device.type]:

            def unpadded(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return unequal_heads(q, k, v)

            kind = f"{name}, {backend.name.partition('_')[0].lower()}"
            try:
                yield from compared("bf16", unpadded, unequal_heads, [q, k, v], prefix=kind)
            except RuntimeError:  # there is none for these sizes on this card
                continue
            if place.timed:
                yield Finding(kind, forward_and_back(place, unpadded, q, k, v), unit="ms")


def unequal_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, time, heads, value) of causal attention by torch; heads of v may be smaller than those of q and k."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def forward_and_back(place: Place, attention: Callable[..., Tensor], *given: Tensor) -> float:
    """Return ms of a forward and a backward pass."""
    return 1e3 * place.seconds(lambda: attention(*given).sum().backward(), 20)


CHECKS = {head_sizes.__name__: head_sizes}
