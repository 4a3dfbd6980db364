"""Experts over ranks compute what all of them on one rank do, wherever the tokens go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked import on_ranks
from torch import Tensor

from LMConfig import LMConfig
from model.experts import Experts
from training.parallel.ranks import Ranks

RANKS, TOKENS, TOP_K = 2, 12, 3
CASES = ("spread", "all to rank 1", "one token on rank 0")


def routed(config: LMConfig, case: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a rank, their weights and their experts."""
    generator = torch.Generator().manual_seed(rank)
    tokens = 1 if case == "one token on rank 0" and rank == 0 else TOKENS
    scores = torch.rand(tokens, config.n_routed_experts, generator=generator)
    if case == "all to rank 1":
        scores[:, : config.n_routed_experts // RANKS] -= 1
    weights, indices = scores.topk(TOP_K)
    return torch.randn(tokens, config.hidden_size, generator=generator), weights, indices


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_one_rank(case, tiny_config, tmp_path):
    config: LMConfig = tiny_config()
    experts = Experts(config)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)

    def forward(module: Experts, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        x, weights, indices = routed(config, case, rank)
        x.requires_grad_(), weights.requires_grad_()
        out = module(x, weights, indices)
        (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
        return out.detach(), x.grad, weights.grad

    def of_rank(rank: int) -> None:
        from model.expert_parallel import ExpertsOverRanks

        Ranks.start("cpu", timeout=30)
        spread = ExpertsOverRanks(experts, torch.distributed.group.WORLD)
        made = forward(spread, rank)
        grads = {name: p.grad for name, p in spread.named_parameters()}
        torch.save((made, grads, spread.rows_sent), tmp_path / f"{rank}.pt")

    done = on_ranks(RANKS, of_rank, tmp_path)
    assert [rank.code for rank in done] == [0] * RANKS, "".join(rank.output() for rank in done)
    found = [torch.load(Path(tmp_path) / f"{rank}.pt") for rank in range(RANKS)]
    for rank, (made, _, rows_sent) in enumerate(found):
        for ours, theirs in zip(made, forward(experts, rank), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        homes = routed(config, case, rank)[2] // (config.n_routed_experts // RANKS)
        assert rows_sent == (homes != rank).any(1).sum()  # each token once, however many of its experts are there
    for name, weight in experts.named_parameters():  # of both ranks' tokens
        joined = torch.cat([grads[name] for _, grads, _ in found])
        torch.testing.assert_close(joined, weight.grad, rtol=1e-5, atol=1e-5)
