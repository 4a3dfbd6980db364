"""Models of many shapes, and the steps of decoding that C and PyTorch are compared on."""

from __future__ import annotations

import torch

from model import MiniDeepSeek
from model.cache import LatentCache
from model.decoding import native
from model.decoding.runner import runner_for

SHAPES = {
    "plain": {},
    "sizes that fill no vector": dict(
        hidden_size=42, intermediate_size=37, moe_intermediate_size=19, kv_lora_rank=21, q_lora_rank=23,
        qk_nope_head_dim=7, qk_rope_head_dim=6, v_head_dim=11,
    ),
    "sizes of several vectors": dict(hidden_size=64, kv_lora_rank=48, moe_intermediate_size=40, v_head_dim=32),
    "heads in fours": dict(num_attention_heads=8, kv_lora_rank=80),
    "six heads": dict(num_attention_heads=6, kv_lora_rank=70),
    "without q_lora": dict(q_lora_rank=None),
    "attention bias": dict(attention_bias=True),
    "yarn": dict(
        rope_scaling=dict(type="yarn", factor=8.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
    ),
    "one group": dict(n_group=1, topk_group=1),
    "all groups": dict(n_group=4, topk_group=4),
    "weights not normalised": dict(norm_topk_prob=False, routed_scaling_factor=1.7),
    "no shared expert": dict(n_shared_experts=0),
    "two shared experts": dict(n_shared_experts=2),
    "dense only": dict(first_k_dense_replace=3),
    "wide eps": dict(rms_norm_eps=0.5),
}  # fmt: skip


@torch.no_grad()
def steps(
    model: MiniDeepSeek,
    padding: torch.Tensor | None = None,
    batch: int = 3,
    held: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Logits of 1, 2, 1 and 5 new tokens after a prompt of 7, for a batch, with a cache of type `held`."""
    ids = torch.randint(0, 61, (batch, 16), generator=torch.Generator().manual_seed(1))
    cache = LatentCache(model.config, batch, 16, held, "cpu", padding)
    runner = runner_for(model, cache)
    parts = ids.split([7, 1, 2, 1, 5], dim=1)
    return torch.cat([runner.step(part, part.shape[1]).logits for part in parts], dim=1)


def in_pytorch(monkeypatch, compute, *arguments):
    """The result of `compute` with decoding in PyTorch."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "MOST_TOKENS", 0)
        return compute(*arguments)


def shaken(model: MiniDeepSeek) -> MiniDeepSeek:
    """With router biases that change choices, negative ones too."""
    for router in model.routers():
        router.e_score_correction_bias.normal_(std=0.5)
    return model


NARROW = {"hidden_size": 80, "kv_lora_rank": 48, "moe_intermediate_size": 72}  # rows that end within a block


@torch.no_grad()
def same_bits_however_many(model: MiniDeepSeek, held: torch.dtype = torch.float32) -> bool:
    """Whether the logits of 13 tokens are the same to the bit, read one by one or up to seven at once."""
    ids, found = torch.randint(0, 61, (1, 13)), []
    for sizes in ([6] + [1] * 7, [6, 2, 2, 3], [6, 3, 4], [6, 7]):
        cache = LatentCache(model.config, 1, 16, held, "cpu")
        runner = runner_for(model, cache)
        found.append(torch.cat([runner.step(part, part.shape[1]).logits for part in ids.split(sizes, dim=1)], 1))
    return all(torch.equal(logits, found[0]) for logits in found[1:])


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, by the norm."""
    return ((found - exact).norm() / exact.norm()).item()
