"""The weights that a step of decoding reads, of which the bench reports the share of the bandwidth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode import weights_read

from LMConfig import LMConfig
from model.costs import count


@pytest.fixture(scope="module")
def config() -> LMConfig:
    return LMConfig.preset("demo", tie_word_embeddings=False, vocab_size=500)


def test_one_token_reads_what_it_activates_and_many_read_all(config):
    costs, lookup = count(config), config.vocab_size * config.hidden_size
    assert weights_read(config, 1) == pytest.approx(costs.activated - lookup)
    assert weights_read(config, 10_000) == pytest.approx(costs.total - lookup)


@pytest.mark.parametrize("batch", [3, 40])
def test_distinct_experts_are_those_of_random_choices(batch, config):
    config = replace(config, n_routed_experts=16, num_experts_per_tok=3, n_group=1, topk_group=1)
    chosen = torch.rand(4000, batch, 16).topk(3).indices.flatten(1)
    found = torch.zeros(4000, 16).scatter_(1, chosen, 1.0).sum(1).mean().item()
    layers, expert = config.num_hidden_layers - 1, 3 * config.hidden_size * config.moe_intermediate_size
    more = (weights_read(config, batch) - weights_read(config, 1)) / layers / expert
    assert more + 3 == pytest.approx(found, rel=0.02)
