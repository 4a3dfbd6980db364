"""The policy losses: gradients worked out by hand, trl's numbers, ratios, clipping, groups without variance."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from training.alignment.advantages import advantages
from training.alignment.policy_loss import GRPOLoss, completion_hidden
from training.alignment.prompt_latents import PromptLatents
from training.log_probs import label_log_probs
from training.losses import IGNORE


class TwoTokens(nn.Module):
    """A policy over two tokens whose logits are its only parameters: p(0) = p(1) = 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2, 1))

    def forward(self, ids: torch.Tensor, cache: PromptLatents) -> SimpleNamespace:
        cache.append(0, torch.zeros(*ids.shape, 1))
        return SimpleNamespace(hidden=torch.ones(*ids.shape, 1), head=self.logits)


def toy(advantage: tuple[float, float] = (1.0, -0.5), **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two completions: token 0 alone, and token 1 twice."""
    zero = torch.zeros(1, 1, dtype=torch.long)
    return {
        "prompt_ids": zero, "prompt_padding": zero[0], "prompt_of": torch.tensor([0, 0]),
        "input_ids": zero.expand(2, 1), "labels": torch.tensor([[0, IGNORE], [1, 1]]),
        "sampled_log_probs": torch.zeros(2, 2), "advantages": torch.tensor(advantage), "absent": torch.tensor([0, 0]),
        **more,
    }  # fmt: skip


def gradient(loss: GRPOLoss, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Of the first logit, and the loss itself. d log p(0) / dz0 = 1 - p(0) = 1/2, d log p(1) / dz0 = -p(0) = -1/2."""
    policy = TwoTokens()
    total, count, _ = loss(policy, batch)
    (total / count).backward()
    assert policy.logits.grad.sum().abs() < 1e-6  # both logits up together change nothing
    return policy.logits.grad[0].item(), (total / count).item()


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        # completions the same: -1/2 [1 * 1/2 + (-1/2) * (1/2 + 1/2) / 2 * -1]
        ("grpo", -(0.5 + 0.25) / 2),
        # tokens the same: -1/3 [1/2 + (-1/2) * 2 * -1/2]
        ("dapo", -(0.5 + 0.5) / 3),
        # over the longest allowed, 4: -1/(2 * 4) [1/2 + 1/2]
        ("dr_grpo", -(0.5 + 0.5) / 8),
    ],
)
def test_the_gradient_is_the_one_worked_out_by_hand(kind, want):
    found, loss = gradient(GRPOLoss(kind, longest=4), toy())
    assert found == pytest.approx(want)
    by_hand = {"grpo": -(1 - 0.5) / 2, "dapo": -(1 - 1) / 3, "dr_grpo": 0.0}[kind]
    assert loss == pytest.approx(by_hand)  # the ratio is 1, so the surrogate is the advantage


def test_clipping_stops_what_has_moved_far_enough_and_nothing_else():
    """Ratio 1.5 in all places. A > 0: clipped at 1.2, no gradient. A < 0: min takes 1.5 A, and its gradient."""
    old = torch.full((2, 2), torch.tensor(0.5 / 1.5).log().item())
    loss = GRPOLoss("dapo", 4)
    found, value = gradient(loss, toy(old_log_probs=old))
    assert found == pytest.approx(-(2 * -0.5 * 1.5 * -0.5) / 3)
    assert value == pytest.approx(-(1.2 - 2 * 0.5 * 1.5) / 3)
    higher, _ = gradient(GRPOLoss("dapo", 4, clip_high=0.6), toy(old_log_probs=old))
    assert higher == pytest.approx(-(1.5 * 0.5 + 1.5 * 0.5) / 3)
    low = torch.full((2, 2), torch.tensor(0.5 / 0.5).log().item())  # ratio 0.5: A < 0 is clipped at 0.8
    found, _ = gradient(loss, toy(old_log_probs=low))
    assert found == pytest.approx(-(0.5 * 0.5) / 3)
    _, _, metrics = loss(TwoTokens(), toy(old_log_probs=old))
    assert (metrics["clip_share"][0] / metrics["clip_share"][1]).item() == pytest.approx(1 / 3)


def test_advantages_are_normalised_in_their_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [3.0, 1.0, 1.0, 1.0]])
    found, zero_variance = advantages(rewards, "grpo")
    assert zero_variance.tolist() == [False, True, False] and not found[1].any()
    assert found[0].tolist() == pytest.approx([0.5 / 0.57745, -0.5 / 0.57745, -0.5 / 0.57745, 0.5 / 0.57745], rel=1e-3)
    assert found.sum(1).abs().max() < 1e-5 and found[0].std() == pytest.approx(1, rel=1e-3)
    rounded = torch.tensor([[0.1 + 0.2, 0.3, 0.3]]) + torch.tensor([[0.0, 1e-7, 0.0]])  # of a weighted sum: no variance
    assert advantages(rounded, "grpo")[1].all()
    plain, _ = advantages(rewards, "dr_grpo")
    assert plain.tolist() == [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]]


def test_a_group_that_was_left_out_stays_in_the_count():
    """As in the formulas, where its advantage is 0: the same gradient with its rows as without them."""
    for kind in ("grpo", "dapo", "dr_grpo"):
        loss = GRPOLoss(kind, 4)
        there = toy((1.0, 0.0))
        without = {name: value[:1] for name, value in there.items() if name != "absent"}
        assert gradient(loss, {**without, "absent": torch.tensor([1, 2])}) == pytest.approx(gradient(loss, there))


def test_a_batch_with_nothing_to_learn_has_no_gradient(tiny_model):
    model, batch = tiny_model(), random_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    total, count, _ = GRPOLoss("grpo", 8)(model, batch)
    total.backward()
    assert total == 0 and count == 4
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def random_batch(temperature: float = 1.0) -> dict[str, torch.Tensor]:
    """Four prompts of 5 tokens with completions of 6, 3, 1 and 5, and what trl was given with them."""
    generator = torch.Generator().manual_seed(7)
    prompt, completion = (torch.randint(4, 61, (4, size), generator=generator) for size in (5, 6))
    shown = torch.arange(6) < torch.tensor([6, 3, 1, 5]).unsqueeze(1)
    old = -3.5 + torch.rand(4, 6, generator=generator)
    reference = -4.0 + torch.rand(4, 6, generator=generator)
    return {
        "prompt_ids": prompt,
        "prompt_padding": torch.zeros(4, dtype=torch.long),
        "prompt_of": torch.arange(4),
        "input_ids": completion[:, :-1],
        "labels": completion.masked_fill(~shown, IGNORE),
        "advantages": torch.tensor([1.2, -0.7, 0.3, -0.8]),
        "sampled_log_probs": old,
        "absent": torch.tensor([0, 0]),
    } | {"old": old, "reference": reference}


# GRPOTrainer._compute_loss of trl 1.16.0 with transformers 5.23.0, on the folder that this model saves, with beta 0.04,
# epsilon 0.2 and 0.3, max_completion_length 8 and use_bias_correction_kl off: the loss, and the norms of the gradients
# of all parameters, lm_head, embed_tokens and the first layer's kv_b_proj.
TRL = {
    ("grpo", 1.0): (0.2654151, 2.1752517, 0.4357358, 0.8860617, 0.7809337),
    ("grpo", 0.8): (0.3216276, 3.3093359, 0.6845192, 1.3750266, 1.1520468),
    ("dapo", 1.0): (0.2379464, 1.4673045, 0.3931796, 0.5337712, 0.4942051),
    ("dapo", 0.8): (0.2891673, 2.2266256, 0.5797237, 0.8430380, 0.7403567),
    ("dr_grpo", 1.0): (0.1115374, 0.6877989, 0.1843030, 0.2502052, 0.2316587),
    ("dr_grpo", 0.8): (0.1355472, 1.0437307, 0.2717454, 0.3951740, 0.3470422),
}


@pytest.mark.parametrize(("kind", "temperature"), TRL)
def test_loss_and_gradient_are_trls(kind, temperature, tiny_model):
    model, batch = tiny_model(num_nextn_predict_layers=0), random_batch()
    batch |= {"old_log_probs": batch.pop("old"), "reference_log_probs": batch.pop("reference")}
    total, count, _ = GRPOLoss(kind, 8, clip_low=0.2, clip_high=0.3, beta=0.04, temperature=temperature)(model, batch)
    loss = total / count
    loss.backward()
    everything = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    named = [model.lm_head, model.model.embed_tokens, model.model.layers[0].self_attn.kv_b_proj]
    found = [loss.item(), everything.item(), *(module.weight.grad.norm().item() for module in named)]
    assert found == pytest.approx(list(TRL[kind, temperature]), abs=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prompts_read_once_give_what_whole_rows_give(checkpointing, tiny_model):
    """Log-probabilities and gradients, for prompts of several lengths whose completions stand in any order."""
    model = tiny_model()
    model.gradient_checkpointing = checkpointing
    prompts, of = [[5, 9, 17, 30, 4], [8], [40, 40, 7]], [2, 0, 0, 1, 2]
    completions = torch.randint(4, 61, (5, 9), generator=torch.Generator().manual_seed(3))
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(4))

    def shared() -> torch.Tensor:
        batch = {
            "prompt_ids": torch.tensor([[0] * (5 - len(prompt)) + prompt for prompt in prompts]),
            "prompt_padding": torch.tensor([5 - len(prompt) for prompt in prompts]),
            "prompt_of": torch.tensor(of),
            "input_ids": completions[:, :-1],
        }
        return label_log_probs(*completion_hidden(model, batch), completions)

    def whole() -> torch.Tensor:
        rows = []
        for row, prompt in enumerate(of):
            ids = torch.tensor([prompts[prompt] + completions[row].tolist()])
            out = model(ids[:, :-1])
            rows.append(label_log_probs(out.hidden[:, -9:], out.head, completions[row : row + 1]))
        return torch.cat(rows)

    found = []
    for compute in (shared, whole):
        log_probs = compute()
        model.zero_grad()
        (log_probs * weight).sum().backward()
        found.append((log_probs.detach(), [p.grad.clone() for p in model.model.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_what_is_logged_is_of_tokens_and_not_of_what_fills_their_rows():
    """Sampler and reference say of each token what the policy says; what stands behind the first's end is no token."""
    said = torch.full((2, 2), 0.5).log()
    said[0, 1] = -3.0
    batch = toy(reference_log_probs=said, sampled_log_probs=said)
    _, _, metrics = GRPOLoss("dapo", 4, beta=0.1)(TwoTokens(), batch)
    for name in ("kl", "mismatch"):
        total, count = metrics[name]
        assert total.item() == pytest.approx(0, abs=1e-6) and count == 3
