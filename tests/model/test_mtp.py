"""Multi-token prediction: what a depth joins, what it may see, what it shares."""

from __future__ import annotations

import pytest
import torch

from model.attention import AttentionMask
from model.cache import LatentCache
from model.decoding.eager import EagerRunner

DEPTHS = 2


@pytest.fixture
def model(tiny_model):
    return tiny_model(num_nextn_predict_layers=DEPTHS)


def test_the_input_is_embedding_then_hidden(model):
    layer = model.mtp[0]
    hidden, embedding = torch.randn(2, 5, 32), torch.randn(2, 5, 32)

    def norm(module, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight

    left, right = layer.eh_proj.weight.chunk(2, dim=1)
    expected = norm(layer.enorm, embedding) @ left.T + norm(layer.hnorm, hidden) @ right.T
    torch.testing.assert_close(layer.join(hidden, embedding), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_depth_k_joins_the_state_with_the_token_k_places_on(model):
    ids = torch.randint(0, 61, (2, 16))
    out = model(ids, mtp=1)
    # The state comes before the final norm of the main model, and each depth hands on its own before its norm.
    torch.testing.assert_close(model.model.norm(out.state), out.hidden)
    assert not torch.allclose(out.state, out.hidden, atol=1e-2)
    state, embedding = out.state, model.model.embed_tokens(ids)
    for depth, layer in enumerate(model.mtp, start=1):
        length = 16 - depth
        rope = model.rotary(torch.arange(length)[None])
        state, _ = layer(state[:, :length], embedding[:, depth:], rope, AttentionMask())
        logits = layer.shared_head.norm(state) @ model.lm_head.weight.T
        torch.testing.assert_close(out.mtp_logits(depth)[:, :length], logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", range(1, DEPTHS + 1))
def test_depth_k_sees_the_token_k_places_on_and_none_after_it(depth, model):
    ids = torch.randint(0, 61, (1, 16))
    embedded = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: embedded.append(out))
    logits = model(ids, mtp=1).mtp_logits(depth)
    for t in range(16 - depth - 1):
        (grad,) = torch.autograd.grad(logits[0, t].square().sum(), embedded, retain_graph=True)
        seen = grad[0].abs().amax(-1) > 0
        assert seen[: t + depth + 1].all()  # up to token t+k
        assert not seen[t + depth + 1 :].any()  # token t+k+1, which it predicts, is not among them


def test_embedding_and_head_are_the_main_models(model, tiny_model):
    names = [name for name, _ in model.mtp.named_parameters()]
    assert not [name for name in names if "embed" in name or "lm_head" in name or "head.head" in name]
    model(torch.randint(0, 61, (1, 12)), mtp=1).mtp_logits(1).square().sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0 and model.lm_head.weight.grad.abs().max() > 0


@torch.no_grad()
def test_each_depth_has_a_norm_of_its_own_before_the_head(model):
    ids = torch.randint(0, 61, (1, 12))
    before = model(ids, mtp=1)
    model.mtp[0].shared_head.norm.weight.mul_(2)
    after = model(ids, mtp=1)
    torch.testing.assert_close(after.mtp_logits(1), 2 * before.mtp_logits(1))
    assert torch.equal(after.mtp_logits(2), before.mtp_logits(2)) and torch.equal(after.logits, before.logits)
    model.model.norm.weight.mul_(3)
    assert torch.equal(model(ids, mtp=1).mtp_logits(1), after.mtp_logits(1))


@torch.no_grad()
def test_the_main_model_does_not_notice_the_chain(model):
    ids = torch.randint(0, 61, (2, 12))
    plain, with_chain = model(ids), model(ids, mtp=1)
    assert torch.equal(plain.logits, with_chain.logits) and plain.mtp_hidden == ()
    assert len(plain.counts) == 2 and torch.equal(with_chain.counts[:2], plain.counts)


@torch.no_grad()
def test_loads_of_the_chain_are_counted_last_and_without_wrapped_positions(model):
    chosen = {}
    for index, router in enumerate(model.routers()):
        router.register_forward_hook(lambda module, args, out, index=index: chosen.update({index: out[1]}))
    counts = model(torch.randint(0, 61, (2, 16)), mtp=1).counts
    assert len(counts) == len(model.routers()) == 4
    assert counts.sum(1).tolist() == [2 * 16 * 3, 2 * 16 * 3, 2 * 15 * 3, 2 * 14 * 3]
    for row, length in zip(range(4), [16, 16, 15, 14], strict=True):
        indices = chosen[row].view(2, 16, 3)[:, :length]
        assert torch.equal(counts[row].long(), indices.flatten().bincount(minlength=8))


@torch.no_grad()
def test_packed_samples_equal_separate_ones_where_the_answer_lies_within(model):
    lengths = [6, 3, 7]
    ids = torch.randint(0, 61, (1, 16))
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, position_ids=positions, segment_ids=segments, mtp=1)
    for depth in range(1, DEPTHS + 1):
        parts = zip(packed.mtp_logits(depth)[0].split(lengths), ids[0].split(lengths), strict=True)
        for logits, sample in parts:
            alone = model(sample[None], mtp=1).mtp_logits(depth)[0]
            torch.testing.assert_close(logits[:-depth], alone[:-depth], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunks", [[15], [9, 1, 5], [1] * 15])
@torch.no_grad()
def test_drafting_step_by_step_equals_one_pass(chunks, model):
    ids = torch.randint(0, 61, (1, 17))
    out = model(ids, mtp=1)
    runner = EagerRunner(model, LatentCache(model.config, 1, 20, torch.float32, "cpu", mtp=True))
    start = 0
    for size in chunks:
        state = out.state[:, start : start + size]
        for depth in range(1, DEPTHS + 1):
            step = runner.draft(state, ids[:, start + depth : start + depth + size], depth)
            expected, state = out.mtp_logits(depth)[:, start + size - 1], step.states
            torch.testing.assert_close(step.logits[:, 0], expected, atol=1e-4, rtol=1e-4)
        start += size
