"""A model's likelihoods by hand, and scores by name, for the tests of suites."""

from __future__ import annotations

import torch

from eval.opened_model import OpenedModel
from eval.own_model import OwnModel
from eval.suites.suite import Score


def logits(model: OpenedModel, ids: list[int]) -> torch.Tensor:
    """(time, vocab) of one row, in one pass and without any cache."""
    network = model.answerer.model if isinstance(model, OwnModel) else model.network
    with torch.no_grad():
        return network(torch.tensor([ids])).logits[0].float()


def nats_by_hand(model: OpenedModel, ids: list[int], scored: int) -> float:
    log_probs = logits(model, ids[:-1]).log_softmax(-1)[scored - 1 :]
    return log_probs.gather(1, torch.tensor(ids[scored:])[:, None]).sum().item()


def values(scores: list[Score], group: str = "all") -> dict[str, float]:
    return {score.metric: score.value for score in scores if score.group == group}
