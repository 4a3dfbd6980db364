"""Routing replay: what the sampler's routers chose is recorded, and taken in training, with weights of training."""

from __future__ import annotations

import pytest
import torch

import grpo_train
from dataset import PromptDataset
from model import MiniDeepSeek
from model.decoding.recording import RecordingEngine
from model.decoding.sampling import Sampling
from model.decoding.scheduler import Request
from text.tokenizer import Tokenizer
from training.alignment.batches import Experience
from training.alignment.policy_loss import GRPOLoss
from training.alignment.rewards import Rewards
from training.alignment.rollouts import Rollouts, RolloutSettings
from training.alignment.sampler import Sampler
from training.losses import PLACES, Batch, located
from training.parallel.ranks import Ranks

SEEN = list[torch.Tensor]  # of each call of a layer's experts: the (N, K) experts


@pytest.fixture
def watch(monkeypatch):
    """`watch(model)`: for each MoE layer of the main model the experts that it runs from here on, call by call."""

    def start(model: MiniDeepSeek) -> list[SEEN]:
        found = []
        for layer in model.model.layers:
            if layer.is_moe:
                calls: SEEN = []
                layer.mlp.experts.register_forward_pre_hook(lambda _, given, calls=calls: calls.append(given[2]))
                found.append(calls)
        return found

    return start


@pytest.mark.parametrize("slots", [2, 8])
@torch.no_grad()
def test_the_experts_of_every_token_are_recorded(slots, tiny_model, watch):
    """Those that one pass over the whole text chooses; sequences change their slots, and prompts are padded."""
    model = tiny_model()
    prompts = [[5, 9, 17, 30, 4, 50, 3, 8, 22], [8], [40, 40, 7], [8]]
    engine = RecordingEngine(model, slots, 20)
    warm = Sampling(temperature=1.0)
    made = [*engine.run([Request(ids, new, warm) for ids, new in zip(prompts, (9, 4, 7, 2), strict=True)])]
    assert not any(router._forward_hooks for router in model.routers())
    layers = watch(model)
    for completion, prompt in zip(made, prompts, strict=True):
        model(torch.tensor([[*prompt, *completion.tokens[:-1]]]))
        expected = torch.stack([calls.pop() for calls in layers], dim=1)
        found = engine.experts(completion)
        assert found.shape == expected.shape and found.dtype == torch.int16
        unread, found[: len(prompt) - 1, -1] = found[: len(prompt) - 1, -1].clone(), 0
        assert (unread == -1).all()
        expected[: len(prompt) - 1, -1] = 0
        assert torch.equal(found.sort(-1).values, expected.short().sort(-1).values)


def other_experts(model: MiniDeepSeek, ids: torch.Tensor, layers: list[SEEN]) -> torch.Tensor:
    """For each token of ids as many experts as it has now, none of which it would choose. (batch, time, layers, K)"""
    with torch.no_grad():
        model(ids)
    chosen = torch.stack([calls.pop() for calls in layers], dim=1)
    free = torch.ones(*chosen.shape[:2], 8).scatter_(2, chosen, 0.0)
    return free.topk(3, dim=-1).indices.view(*ids.shape, len(layers), 3)


def test_given_experts_run_with_the_weights_of_the_scores_of_now(tiny_model, watch):
    model, ids = tiny_model(num_nextn_predict_layers=0), torch.randint(61, (2, 5))
    layers = watch(model)
    experts = other_experts(model, ids, layers)
    experts[1, 3:] = -1
    given = []
    model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, inputs: given.append(inputs[:2]))
    model(ids, experts=experts.short()).hidden.square().sum().backward()
    (x, weights), router = given[0], model.model.layers[1].mlp.gate
    ran, asked = layers[0].pop(), experts[:, :, 0].flatten(0, 1)
    assert torch.equal(ran[:8], asked[:8]) and (ran[8:] >= 0).all()  # the last two tokens choose for themselves
    assert torch.equal(ran[8:], router(x)[1][8:])
    scores = (x @ router.weight.t()).sigmoid().gather(1, ran)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))
    # Each token's gradient goes to the rows of the experts that it was given.
    assert router.weight.grad.abs().sum(1)[asked[:8].unique()].min() > 0
    one = model.zero_grad() or model(ids[:1, :1], experts=experts[:1, :1])
    one.hidden.square().sum().backward()
    moved = model.model.layers[1].mlp.gate.weight.grad.abs().sum(1) > 0
    assert sorted(moved.nonzero().flatten().tolist()) == sorted(experts[0, 0, 0].tolist())


def test_no_experts_and_unknown_ones_change_no_bit_and_computing_again_no_gradient(tiny_model, watch):
    model, ids = tiny_model(), torch.randint(61, (2, 5))
    unknown = torch.full((2, 5, 2, 3), -1, dtype=torch.int16)
    assert torch.equal(model(ids).logits, model(ids, experts=unknown).logits)
    experts, gradients = other_experts(model, ids, watch(model)), []
    for again in (False, True):
        model.zero_grad()
        model.gradient_checkpointing = again
        model(ids, experts=experts).hidden.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.fixture
def experience(tiny_model, tokenizer: Tokenizer):
    """`experience(model, **settings)`: the completions of a step of reinforcement learning."""

    def make(model: MiniDeepSeek, **changes: object) -> Experience:
        settings = RolloutSettings(**{**dict(prompts=4, group=4, max_new_tokens=8), **changes})
        prompts = PromptDataset([("arithmetic:1-2", 1.0)], tokenizer, 40)
        ranks, sampler = Ranks(0, 1, torch.device("cpu")), Sampler(model, torch.float32)
        rollouts = Rollouts(prompts, Rewards.of({"training.alignment.rewards:language": 1.0}), sampler, settings, ranks)
        made = Experience(rollouts, 48, 8, torch.float32)
        made.prepare(0, model)
        made.rows.left_out_R.zero_()  # every row is trained on, whatever it was worth
        return made

    return make


def batch_of(experience: Experience) -> Batch:
    return located(experience.batch(range(16)))


def test_training_runs_what_the_sampler_ran_though_the_routers_have_moved(tiny_model, experience, watch):
    model = tiny_model(vocab_size=600, initializer_range=0.05, num_nextn_predict_layers=0)
    replayed = batch_of(experience(model, replay_routing=True))
    assert "experts" not in batch_of(experience(model))
    loss = GRPOLoss("grpo", 8)
    with torch.no_grad():
        assert loss(model, replayed)[2]["mismatch"][0] / len(replayed[PLACES]) < 1e-5
        for router in model.routers():  # as rounding would, but much more: other experts with the same scores
            router.e_score_correction_bias.uniform_(-1, 1)
        layers = watch(model)
        with_replay = loss(model, replayed)[2]["mismatch"][0]
        for layer, (prompts, completions) in enumerate(layers):
            labels = (replayed["labels"][:, 1:] >= 0).flatten()  # the tokens that are read
            wanted = replayed["experts"][:, :, layer].flatten(0, 1)[labels]
            assert (wanted >= 0).all() and torch.equal(completions[labels], wanted.long())
            asked = replayed["prompt_experts"][:, :, layer].flatten(0, 1).long()
            known = (asked >= 0).all(-1)
            assert torch.equal(prompts[known], asked[known]) and known.any()
        without = {name: value for name, value in replayed.items() if not name.endswith("experts")}
        assert with_replay / len(replayed[PLACES]) < 1e-5 < 1e-2 < loss(model, without)[2]["mismatch"][0]


def test_what_is_replayed_is_kept_for_a_resumed_run(tiny_model, experience):
    model = tiny_model(vocab_size=600, initializer_range=0.05)
    made, again = experience(model, replay_routing=True, mu=2), experience(model, mu=2)
    again.load_state(made.state())
    assert torch.equal(batch_of(again)["experts"], batch_of(made)["experts"])


def test_a_model_without_experts_has_nothing_to_replay(tiny_model, tokenizer, tmp_path, run):
    """Those of its MTP layer take no part."""
    tiny_model(vocab_size=600, first_k_dense_replace=3).save_pretrained(tmp_path / "dense")
    tokenizer.save(tmp_path / "dense")
    given = ["--ckpt", tmp_path / "dense", "--data", "arithmetic:1", "--sequence_length", 48, "--max_new_tokens", 8]
    done = run(grpo_train.main, *given, "--out", tmp_path / "run", "--device", "cpu", "--replay_routing", "true")
    assert done.code == 2 and done.err.endswith(f"{tmp_path / 'dense'} has no experts; leave it out\n")
