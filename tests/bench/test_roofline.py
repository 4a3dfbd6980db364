"""The counts that the roofline stands on, against counts made in other ways."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.roofline import Machine, Network, main
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.cache import LatentCache
from model.kernels import causal, products


@pytest.fixture(scope="module")
def config() -> LMConfig:
    return LMConfig.preset("demo", tie_word_embeddings=False, vocab_size=500)


def counted(model: MiniDeepSeek, ids: torch.Tensor, cache: LatentCache | None = None) -> int:
    """FLOPs of the products that a forward pass calls, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model(ids, cache=cache)
        torch.nn.functional.linear(out.hidden, out.head)
    return counter.get_total_flops()


def test_flops_of_a_decoded_token_are_those_of_the_products_called(config):
    model = MiniDeepSeek(config).eval()
    cache = LatentCache(config, 1, 40, torch.float32, "cpu")
    with torch.no_grad():
        model(torch.zeros(1, 30, dtype=torch.long), cache=cache)
    found = counted(model, torch.zeros(1, 1, dtype=torch.long), cache)
    assert Network.of(config, 512).decoding_flops(past=31) == pytest.approx(found, rel=0.01)


def test_flops_of_prefill_are_those_of_the_products_called(config, monkeypatch):
    # Every expert gets every token, so that no row is padding; at this length causality skips nothing. What oneDNN is
    # asked for by its own name is not counted by torch, nor what is computed in C.
    monkeypatch.setattr(products, "not_intel", lambda: False)
    monkeypatch.setattr(causal, "fits", lambda *_: False)
    config = replace(config, n_routed_experts=8, num_experts_per_tok=8, n_group=1, topk_group=1)
    tokens = 128
    found = counted(MiniDeepSeek(config).eval(), torch.zeros(1, tokens, dtype=torch.long)) / tokens
    network = Network.of(config, tokens)
    skipped = config.num_hidden_layers * config.num_attention_heads * tokens * (config.qk_head_dim + config.v_head_dim)
    assert network.prefill_flops() + skipped == pytest.approx(found, rel=0.01)


def test_training_is_three_forward_passes_and_mtp_is_one_layer_and_head_more(config):
    network = Network.of(config, 256)
    assert network.costs.flops > 3 * network.prefill_flops()
    plain = Network.of(replace(config, num_nextn_predict_layers=0), 256)
    assert plain.costs.flops == pytest.approx(3 * plain.prefill_flops())


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_distinct_experts_are_those_of_random_choices(batch, config):
    config = replace(config, n_routed_experts=16, num_experts_per_tok=3)
    chosen = torch.rand(4000, batch, 16).topk(3).indices.flatten(1)
    found = torch.zeros(4000, 16).scatter_(1, chosen, 1.0).sum(1).mean().item()
    assert Network.of(config, 512).distinct_experts(batch) == pytest.approx(found, rel=0.02)


def test_weights_read_at_batch_one_are_the_activated_ones_and_at_a_large_batch_all(config):
    network = Network.of(config, 512)
    lookup = config.vocab_size * config.hidden_size
    assert network.read_weights(1) == pytest.approx(network.costs.activated - lookup)
    assert network.read_weights(10_000) == pytest.approx(network.costs.total - lookup)


def test_bytes_of_a_decoded_token_are_those_of_weights_and_cache(config):
    network = Network.of(config, 512)
    cache = LatentCache(config, 5, 7, torch.bfloat16, "cpu")
    held = cache.latents.nbytes
    weights = 2 * network.read_weights(5)
    assert network.decoding_bytes(batch=5, past=7) == pytest.approx(weights + held)


def test_a_time_is_the_larger_of_two_and_a_ring_moves_all_but_a_share_twice():
    machine = Machine(count=4, flops=100.0, bandwidth=10.0, link=8.0, compute_share=0.5, memory_share=0.5)
    assert machine.seconds(flops=400.0, moved=10.0) == pytest.approx(2.0)
    assert machine.seconds(flops=100.0, moved=40.0) == pytest.approx(2.0)
    assert machine.all_reduce(16.0) == pytest.approx(2 * 0.75 * 16 / 4)


def test_what_does_not_fit_is_said_in_the_tables(run):
    lines = run(main, "--presets", "demo", "deepseek-v3").out.splitlines()
    assert any(line.startswith("| deepseek-v3 | 8 |") and "too much" in line for line in lines)
    assert not any(line.startswith("| demo |") and "too much" in line for line in lines)
