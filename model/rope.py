"""Rotary position embedding on interleaved pairs, with YaRN for extended contexts (DeepSeek-V3 section 4.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from LMConfig import LMConfig
from model.float32 import Float32Buffers


class RotaryEmbedding(Float32Buffers):
    """Turns positions into the angles of RoPE (Su et al. 2021): theta_i = base^(-2i/d), i = 0 .. d/2 - 1."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)
        self.scale = attention_factor(config)

    def forward(self, position_ids: Tensor) -> Tensor:
        """position_ids: (batch, time) integers -> scale * [cos, sin], float32, (batch, time, 1, rope/2, 2)."""
        angles = (position_ids[..., None].float() * self.inv_freq).unsqueeze(2)
        return torch.view_as_real(torch.polar(torch.full_like(angles, self.scale), angles))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn each pair (x_2i, x_2i+1), read as a complex number, by its angle, as the released weights are laid out.

    Args:
        x: (batch, time, heads, rope), any type; computed in float32 and returned in the type of x.
        rope: from `RotaryEmbedding`.
    """
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(rope)).flatten(-2).to(x.dtype)


def inverse_frequencies(config: LMConfig) -> Tensor:
    """The angle a position adds to each pair, in radians, (rope/2,); under YaRN as in Peng et al. 2023, section 3.2."""
    size, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    inv_freq = base ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    if yarn is None:
        return inv_freq

    original = yarn["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        """Index of the pair that makes so many turns over the original context."""
        return size * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_that_turns(yarn.get("beta_slow") or 1)), size - 1)
    # Fast pairs keep their angle, slow ones are slowed by `factor`, with a linear ramp between.
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return inv_freq / yarn["factor"] * ramp + inv_freq * (1 - ramp)


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature for a context extended by `factor` (Peng et al. 2023, Eq. 15 with a weight)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def attention_factor(config: LMConfig) -> float:
    """Compute the factor of cos and sin under YaRN; 1 for DeepSeek's settings, where it is in the softmax scale."""
    yarn = config.rope_scaling
    if yarn is None:
        return 1.0
    if yarn.get("attention_factor") is not None:
        return float(yarn["attention_factor"])
    if yarn.get("mscale") and yarn.get("mscale_all_dim"):
        return mscale(yarn["factor"], yarn["mscale"]) / mscale(yarn["factor"], yarn["mscale_all_dim"])
    return mscale(yarn["factor"])


def softmax_scale(config: LMConfig) -> float:
    """1 / sqrt(nope + rope), times mscale^2 under YaRN with `mscale_all_dim`."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn is not None and yarn.get("mscale_all_dim"):
        scale *= mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2
    return scale
