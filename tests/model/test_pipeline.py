"""A stage is the whole model where its layers are; weight gradients that wait are those that do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.experts import Experts
from model.ops import Linear
from model.pipeline import Elsewhere, Stage, WeightGradients
from training.losses import NextTokenLoss


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(600, (2, 17), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(16) // 6).expand(2, -1)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "segment_ids": segments, "position_ids": segments * 0 + 3}


@pytest.mark.parametrize("tied", [False, True])
def test_the_stages_one_after_the_other_are_the_whole(tied, tiny_model, batch):
    whole = tiny_model(vocab_size=600, num_hidden_layers=4, tie_word_embeddings=tied)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    state = balance = None
    counts = 0
    for place, layers in enumerate((range(1), range(1, 3), range(3, 4))):
        out = Stage(whole, layers, place == 0, place == 2)(**inputs, state=state, balance=balance, mtp=place == 2)
        state, balance = out.state, out.balance_loss
        counts = counts + nn.functional.pad(out.counts, (0, 0, 0, 4 - len(out.counts)))
    expected = whole(**inputs, mtp=1)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.mtp_logits(1), expected.mtp_logits(1))
    assert torch.equal(counts, expected.counts)
    torch.testing.assert_close(out.balance_loss, expected.balance_loss)


def test_a_stage_has_its_own_weights_alone_under_the_names_of_the_whole(tiny_model):
    whole = tiny_model(num_hidden_layers=4)
    parts = [Stage(whole, layers, not layers.start, layers.stop == 4) for layers in (range(2), range(2, 4))]
    names = [dict(part.named_parameters()) for part in parts]
    assert names[0].keys() & names[1].keys() == {"model.embed_tokens.weight"}  # which MTP takes too
    assert {**names[0], **names[1]}.keys() == dict(whole.named_parameters()).keys()
    assert isinstance(parts[0].model.layers[2], Elsewhere) and parts[0].model.layers[1] is whole.model.layers[1]


@pytest.mark.parametrize("recomputed", [False, True])
def test_weight_gradients_that_wait_are_the_same_and_each_computed_once(recomputed, tiny_model, batch, monkeypatch):
    plain, waiting = (tiny_model(vocab_size=600) for _ in range(2))
    loss = NextTokenLoss()
    loss(plain, batch)[0].backward()

    later, done = WeightGradients(waiting), []
    waiting.gradient_checkpointing = recomputed
    add = later.add
    monkeypatch.setattr(later, "add", lambda work: add(lambda: done.append(work())))
    products = [module for module in waiting.modules() if isinstance(module, (Linear, Experts))]
    of_products = [p for module in products for p in module.parameters(recurse=False)]
    for micro_batch in range(2):
        loss(waiting, batch)[0].backward()
        run = later.take()
        assert not done and all(p.grad is None for p in of_products) == (micro_batch == 0)
        run()
        assert len(done) == len(of_products)
        done.clear()
    for (name, one), (_, other) in zip(plain.named_parameters(), waiting.named_parameters(), strict=True):
        torch.testing.assert_close(2 * one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_frozen_weights_have_no_gradients_that_wait(tiny_model, batch, monkeypatch):
    frozen = tiny_model(vocab_size=600).requires_grad_(False)
    frozen.model.embed_tokens.requires_grad_()
    monkeypatch.setattr(WeightGradients(frozen), "add", lambda _: pytest.fail("a gradient that nobody wants"))
    NextTokenLoss()(frozen, batch)[0].backward()
    assert frozen.model.embed_tokens.weight.grad.abs().sum() > 0


def test_weights_in_bfloat16_collect_their_gradients_in_float32():
    layer = Linear(32, 32, bias=False, dtype=torch.bfloat16)
    later, x = WeightGradients(layer), torch.ones(4, 32, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(300):  # in bfloat16 a sum of ones would stay at 256
        layer(x)[:1].sum().backward()
        later.take()()
    assert layer.weight.grad.dtype == torch.float32 and torch.equal(layer.weight.grad, torch.full((32, 32), 300.0))
