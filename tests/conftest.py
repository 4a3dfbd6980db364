"""Small models that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from LMConfig import LMConfig
from model import MiniDeepSeek
from model.norm import RMSNorm

TINY = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
    num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, q_lora_rank=24,
    kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, max_position_embeddings=64,
    initializer_range=0.15,
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small only wait for each other's threads, ten times as long as they compute on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers each time, whichever tests run."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_config() -> Callable[..., LMConfig]:
    """`tiny_config(**changes)`: one dense and two MoE layers; no two sizes that could be confused are equal."""
    return lambda **changes: LMConfig(**{**TINY, **changes})


@pytest.fixture
def tiny_model(tiny_config) -> Callable[..., MiniDeepSeek]:
    """`tiny_model(seed=0, **changes)`: its norms, biases and router biases are random too, so none can be swapped."""

    def make(seed: int = 0, **changes: Any) -> MiniDeepSeek:
        torch.manual_seed(seed)
        model = MiniDeepSeek(tiny_config(**changes)).eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, RMSNorm):
                    module.weight.uniform_(0.5, 1.5)
                elif isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.uniform_(-0.3, 0.3)
            for router in model.routers():
                router.e_score_correction_bias.uniform_(-0.3, 0.3)
        return model

    return make
