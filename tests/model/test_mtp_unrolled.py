"""The unrolled MTP layer learns from its own state exactly what decoding will ask of it."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy_stage import files

from errors import UserError
from model import MiniDeepSeek
from model.attention import AttentionMask
from model.cache import LatentCache
from model.decoding.eager import EagerRunner
from training.losses import IGNORE, NextTokenLoss, labels_of_unrolled_step

STEPS, TIME = 4, 11


class Seen:
    """Latents that one position attends to; its own come last."""

    decoding, counts_loads = False, True

    def __init__(self, before: list[Tensor]) -> None:
        self.before = before

    def append(self, layer: int, latent: Tensor) -> Tensor:
        self.own = latent
        return torch.cat([*self.before, latent], dim=1)


def written_out(model: MiniDeepSeek, ids: Tensor, steps: int) -> list[dict[int, Tensor]]:
    """Of each step of the last depth the states by position, one position after the other, as they are drafted."""
    state, embedding = model(ids).state, model.model.embed_tokens(ids)
    depth, layer, time = len(model.mtp), model.mtp[-1], ids.shape[1]
    for before in range(1, depth):
        rope = model.rotary(torch.arange(time - before)[None])
        state, _ = model.mtp[before - 1](state[:, : time - before], embedding[:, before:], rope, AttentionMask())
    latents, states = [{} for _ in range(steps)], [{} for _ in range(steps)]
    for step in range(steps):
        for u in range(step, time - depth):
            begun = u - step
            before = [latents[0][v] for v in range(begun + (step > 0))]
            before += [latents[i][begun + i] for i in range(1, step)]
            given = states[step - 1][u - 1] if step else state[:, u : u + 1]
            seen, rope = Seen(before), model.rotary(torch.tensor([[u]]))
            states[step][u], _ = layer(given, embedding[:, u + depth : u + depth + 1], rope, AttentionMask(), seen)
            latents[step][u] = seen.own
    return states


@pytest.mark.parametrize("depth", [1, 2])
def test_the_loss_and_its_gradient_are_those_of_chains_written_out(depth, tiny_model):
    model, ids = tiny_model(num_nextn_predict_layers=depth), torch.randint(61, (2, TIME + 1))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    total, _, metrics = NextTokenLoss(mtp_weight=0.3, balance_weight=0, mtp_steps=STEPS)(model, batch)
    got = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)

    def nll(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ model.lm_head.weight.t()).flatten(0, -2), labels.flatten(), reduction="sum")

    out = model(batch["input_ids"], mtp=1)
    parts = [nll(out.mtp_hidden[k - 1][:, :-k], batch["labels"][:, k:]) for k in range(1, depth + 1)]
    for states in written_out(model, batch["input_ids"], STEPS)[1:]:
        norm = model.mtp[-1].shared_head.norm
        parts.append(sum(nll(norm(state), batch["labels"][:, u + depth, None]) for u, state in states.items()))
    mtp = sum(parts) / (depth + STEPS - 1)
    plain = nll(out.hidden, batch["labels"]) + 0.3 * mtp
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(metrics["mtp"], mtp.detach())
    want = torch.autograd.grad(plain, list(model.parameters()), allow_unused=True)
    for (name, _), one, other in zip(model.named_parameters(), got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_a_step_in_training_is_what_decoding_drafts(depth, tiny_model):
    model, ids = tiny_model(num_nextn_predict_layers=depth), torch.randint(61, (1, TIME))
    out = model(ids, mtp=STEPS)
    last = model.config.num_hidden_layers + depth - 1
    for begun in range(TIME - depth - STEPS + 1):
        cache = LatentCache(model.config, 1, TIME, torch.float32, "cpu", mtp=True)
        runner, state = EagerRunner(model, cache), out.state[:, : begun + 1]
        for k in range(1, depth + 1):
            state = runner.draft(state, ids[:, k : begun + 1 + k], k).states
        for step in range(2, STEPS + 1):
            u = cache.lengths[last]
            drafted = runner.draft(state[:, -1:], ids[:, u + depth : u + depth + 1], depth)
            expected, state = out.mtp_unrolled[step - 2][:, u] @ model.lm_head.weight.t(), drafted.states
            torch.testing.assert_close(drafted.logits[:, 0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_all_but_the_unrolled_steps_is_as_without_them(tiny_model):
    model, ids = tiny_model(num_nextn_predict_layers=2), torch.randint(61, (2, TIME))
    plain, more = model(ids, mtp=1), model(ids, mtp=3)
    assert plain.mtp_unrolled == () and len(more.mtp_unrolled) == 2
    for name in ("hidden", "state", "counts", "balance_loss"):
        assert torch.equal(getattr(plain, name), getattr(more, name)), name
    assert all(map(torch.equal, plain.mtp_hidden, more.mtp_hidden))
    assert model(ids).mtp_unrolled == model(ids).mtp_hidden == ()


def test_a_chain_begins_and_ends_within_a_segment():
    labels = torch.arange(1, 10)[None]
    batch = {"labels": labels, "segment_ids": torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1]])}
    assert labels_of_unrolled_step(batch, 1, 2).tolist() == [[IGNORE, 3, 4, 5, IGNORE, IGNORE, 8, 9, IGNORE]]
    assert labels_of_unrolled_step(batch, 1, 3).tolist() == [[IGNORE, IGNORE, 4, 5, IGNORE, IGNORE, IGNORE, 9, IGNORE]]
    assert labels_of_unrolled_step(batch, 2, 2).tolist() == [[IGNORE, 4, 5, IGNORE, IGNORE, IGNORE, 9, IGNORE, IGNORE]]


def test_packed_samples_lose_what_they_lose_alone(tiny_model):
    model, lengths = tiny_model(), [6, 2, 8]
    ids, labels = torch.randint(61, (2, 16)), torch.randint(61, (2, 16))
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    loss = NextTokenLoss(balance_weight=0, mtp_weight=1.0, mtp_steps=STEPS)
    packed = {"input_ids": ids, "labels": labels, "segment_ids": segments, "position_ids": positions}
    together, count, _ = loss(model, packed)
    parts = zip(ids.split(lengths, 1), labels.split(lengths, 1), strict=True)
    alone = [loss(model, {"input_ids": some, "labels": wanted})[0] for some, wanted in parts]
    torch.testing.assert_close(together, sum(alone))
    got, want = (torch.autograd.grad(total, model.mtp[0].eh_proj.weight)[0] for total in (together, sum(alone)))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert count == 32


def test_recomputed_activations_give_the_same_gradient(tiny_model):
    model, ids = tiny_model(), torch.randint(61, (2, TIME + 1))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        total, _, _ = NextTokenLoss(mtp_steps=3)(model, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
        gradients.append(torch.autograd.grad(total, list(model.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_a_resumed_run_is_the_same_to_the_bit_and_another_one_than_without_unrolling(make):
    options = dict(max_steps=4, save_every=2, mtp_steps=3)
    whole = make(**options)
    want = files(whole.run())
    shutil.rmtree(whole.out / "final")
    assert files(make(**options, resume=True).run()) == want
    other = files(make("other", **{**options, "mtp_steps": 1}).run())
    assert other["model.safetensors"] != want["model.safetensors"]


def test_no_steps_at_all_are_refused(make):
    with pytest.raises(UserError, match="--mtp_steps 0: must be at least 1"):
        make(mtp_steps=0)
