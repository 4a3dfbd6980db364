"""The router, its bias, what it reports, and the balance loss."""

from __future__ import annotations

import pytest
import torch

from model.moe import DeepseekMoE, Router, routing
from training.router_bias import update_bias

EXPERTS, CHOSEN = 8, 3  # of the tiny configuration, in 4 groups of which 2 are kept


@pytest.fixture
def router(tiny_config):
    """`router(**changes)`: one with random weights and a random bias."""

    def make(**changes) -> Router:
        gate = Router(tiny_config(**changes))
        torch.nn.init.normal_(gate.weight, std=0.3)
        gate.e_score_correction_bias.uniform_(-0.3, 0.3)
        return gate

    return make


def by_hand(scores: list[float], bias: list[float], groups: int, kept: int, top_k: int) -> set[int]:
    """The chosen experts of one token, by sorting lists (Eq. 16 and section 2.1.2, node-limited routing)."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(biased) // groups

    def group_score(group: int) -> float:
        return sum(sorted(biased[group * size : (group + 1) * size])[-2:])

    best = sorted(range(groups), key=group_score)[-kept:]
    candidates = [expert for group in best for expert in range(group * size, (group + 1) * size)]
    return set(sorted(candidates, key=lambda expert: biased[expert])[-top_k:])


@pytest.mark.parametrize(
    "changes", [{}, {"n_group": 1, "topk_group": 1}, {"n_routed_experts": 16, "n_group": 4, "topk_group": 1}]
)
def test_choice_is_group_limited_top_k_of_biased_scores(changes, router):
    gate = router(**changes)
    _, indices, scores = gate(torch.randn(50, 32))
    config, bias = gate.config, gate.e_score_correction_bias.tolist()
    for row, chosen in zip(scores.tolist(), indices.tolist(), strict=True):
        expected = by_hand(row, bias, config.n_group, config.topk_group, config.num_experts_per_tok)
        assert len(chosen) == len(expected) and set(chosen) == expected


def test_group_score_is_the_sum_of_its_two_best_biased_scores(tiny_config):
    gate = Router(tiny_config(n_group=2, topk_group=1, num_experts_per_tok=2))
    one_star = torch.tensor([[0.9, 0.1, 0.1, 0.1, 0.6, 0.6, 0.0, 0.0]])
    assert set(gate.choose(one_star)[0].tolist()) == {4, 5}  # neither the best expert's group
    many_middling = torch.tensor([[0.4, 0.4, 0.4, 0.4, 0.6, 0.6, 0.0, 0.0]])
    assert set(gate.choose(many_middling)[0].tolist()) == {4, 5}  # nor the largest sum of all
    gate.e_score_correction_bias[:2] = 0.3
    assert set(gate.choose(many_middling)[0].tolist()) == {0, 1}  # and the bias counts


def test_negative_biased_scores_of_a_kept_group_beat_a_lost_group(router):
    gate = router()
    gate.e_score_correction_bias.fill_(-2.0)
    _, indices, scores = gate(torch.randn(50, 32))
    for row, chosen in zip(scores.tolist(), indices.tolist(), strict=True):
        assert set(chosen) == by_hand(row, [-2.0] * EXPERTS, 4, 2, CHOSEN)


def test_bias_never_enters_the_weights(router):
    gate = router()
    x = torch.randn(50, 32)
    gate.e_score_correction_bias += 1000.0  # (s + b) - b would now lose four digits of s
    weights, indices, scores = gate(x)
    torch.testing.assert_close(scores, (x @ gate.weight.T).sigmoid())
    chosen = scores.gather(1, indices)
    torch.testing.assert_close(weights, chosen / chosen.sum(1, keepdim=True), atol=1e-7, rtol=1e-6)


def test_weights_are_normalised_before_they_are_scaled(router):
    gate = router(routed_scaling_factor=2.5)
    weights, indices, scores = gate(torch.randn(50, 32))
    torch.testing.assert_close(weights.sum(1), torch.full((50,), 2.5))
    raw, indices, scores = router(routed_scaling_factor=2.5, norm_topk_prob=False)(torch.randn(50, 32))
    torch.testing.assert_close(raw, 2.5 * scores.gather(1, indices))


def test_scores_of_nothing_give_weights_of_nothing(router):
    gate = router()
    gate.weight.data.fill_(-100.0)
    weights, _, scores = gate(torch.ones(3, 32))
    assert (scores == 0).all() and (weights == 0).all()  # not 0 / 0


def test_shared_experts_are_added_unscaled(tiny_config):
    layer = DeepseekMoE(tiny_config(routed_scaling_factor=2.5))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 7, 32)
    shared = layer.shared_experts(x)
    scaled = layer(x)[0] - shared
    layer.gate.config.routed_scaling_factor = 1.0
    torch.testing.assert_close(scaled, 2.5 * (layer(x)[0] - shared), atol=1e-5, rtol=1e-4)
    layer.shared_experts.down_proj.weight.data.zero_()
    torch.testing.assert_close(2.5 * layer(x)[0], scaled, atol=1e-5, rtol=1e-4)


def test_gate_computes_in_float32_under_autocast(router):
    gate = router()
    x = torch.randn(50, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, indices, scores = gate(x)
    assert scores.dtype == weights.dtype == torch.float32
    for inside, outside in zip((weights, indices, scores), gate(x), strict=True):
        assert torch.equal(inside, outside)
    half = gate.bfloat16()
    _, _, scores = half(x.bfloat16())
    torch.testing.assert_close(scores, (x.bfloat16().float() @ half.weight.float().T).sigmoid())


def test_bias_is_a_float32_buffer_and_no_parameter(tiny_model):
    model = tiny_model()
    biases = [router.e_score_correction_bias.clone() for router in model.routers()]
    assert not [name for name, _ in model.named_parameters() if "e_score" in name]
    assert sum(name.endswith("gate.e_score_correction_bias") for name in model.state_dict()) == 3
    model.bfloat16().to(torch.float16)
    for router, bias in zip(model.routers(), biases, strict=True):
        assert router.weight.dtype == torch.float16
        assert router.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(router.e_score_correction_bias, bias)


def test_buffers_hold_nothing_that_differs_between_ranks(tiny_model):
    # DistributedDataParallel overwrites every rank's buffers with the first one's: loads must not be among them.
    names = {name.rsplit(".", 1)[-1] for name, _ in tiny_model().named_buffers()}
    assert names == {"e_score_correction_bias", "inv_freq"}


def test_loads_count_every_choice_of_every_layer(tiny_model):
    model = tiny_model(num_nextn_predict_layers=0)
    chosen = []
    for router in model.routers():
        router.register_forward_hook(lambda module, args, out: chosen.append(out[1]))
    counts = model(torch.randint(0, 61, (2, 20))).counts
    assert counts.shape == (2, EXPERTS) and counts.sum(1).tolist() == [2 * 20 * CHOSEN] * 2
    expected = torch.stack([indices.flatten().bincount(minlength=EXPERTS) for indices in chosen])
    assert torch.equal(counts.long(), expected)


def test_padding_is_not_counted(tiny_model):
    model = tiny_model()
    ids = torch.randint(0, 61, (2, 20))
    segments = torch.zeros(2, 20, dtype=torch.int64)
    segments[0, 14:] = -1
    padded = model(ids, segment_ids=segments)
    alone = [model(ids[:1, :14]), model(ids[1:])]
    assert torch.equal(padded.counts, alone[0].counts + alone[1].counts)
    torch.testing.assert_close(padded.balance_loss, torch.cat([alone[0].balance_loss, alone[1].balance_loss]))


def test_a_model_without_experts_reports_no_loads(tiny_model):
    out = tiny_model(first_k_dense_replace=3, num_nextn_predict_layers=0)(torch.randint(0, 61, (1, 5)))
    assert out.counts is None and out.balance_loss is None


def balance_by_hand(scores: torch.Tensor, indices: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Eq. 17 to 20 as they are printed, one sum after the other, each sequence times its length."""
    total = torch.zeros(())
    for b, length in enumerate(lengths):
        for i in range(EXPERTS):
            chosen = sum(i in indices[b, t].tolist() for t in range(length))
            f = EXPERTS / (CHOSEN * length) * chosen
            p = sum(scores[b, t, i] / scores[b, t].sum() for t in range(length)) / length
            total = total + f * p * length
    return total


def random_routing(batch: int, time: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and K different experts for each token, chosen by other scores, so that f and P are independent."""
    scores = torch.rand(batch, time, EXPERTS, requires_grad=True)
    return scores, torch.rand(batch, time, EXPERTS).topk(CHOSEN, dim=-1).indices


@pytest.mark.parametrize("lengths", [[9, 9], [9, 4]])
def test_balance_loss_is_eq_17_to_20_for_each_sequence(lengths):
    scores, indices = random_routing(2, 9)
    token_mask = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    loss = routing(scores, indices, None if lengths == [9, 9] else token_mask).balance_loss.sum()
    expected = balance_by_hand(scores, indices, lengths)
    torch.testing.assert_close(loss, expected)
    for grad, wanted in zip(*(torch.autograd.grad(x, [scores]) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("lengths", [[9, 9], [9, 4]])
def test_balance_loss_over_the_batch_is_that_of_one_sequence_of_all_tokens(lengths):
    scores, indices = random_routing(2, 9)
    token_mask = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    masked = None if lengths == [9, 9] else token_mask
    loss = routing(scores, indices, masked, over_batch=True).balance_loss.sum()
    expected = balance_by_hand(scores[token_mask][None], indices[token_mask][None], [sum(lengths)])
    torch.testing.assert_close(loss, expected)
    for grad, wanted in zip(*(torch.autograd.grad(x, [scores]) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(grad, wanted)
    assert not torch.isclose(loss, routing(scores, indices, masked).balance_loss.sum())


def test_balance_loss_teaches_the_router_through_the_scores_only(tiny_model):
    model = tiny_model()
    ids = torch.randint(0, 61, (2, 20))
    out = model(ids)
    out.balance_loss.sum().backward()
    gate = model.model.layers[-1].mlp.gate
    assert gate.weight.grad.abs().max() > 0
    assert not gate.e_score_correction_bias.requires_grad and not out.counts.requires_grad
    with torch.no_grad():
        for router in model.routers()[:2]:
            router.weight -= 0.01 * router.weight.grad / router.weight.grad.norm()
        assert model(ids).balance_loss.sum() < out.balance_loss.sum()


def test_bias_rises_below_the_mean_load_and_falls_above_it():
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    update_bias(bias, torch.tensor([10.0, 0.0, 5.0, 5.0]), speed=0.001)
    torch.testing.assert_close(bias, torch.tensor([0.499, 0.501, 0.5, 0.5]))


def test_a_skewed_router_becomes_balanced(router):
    gate = router()
    gate.e_score_correction_bias.zero_()
    direction = torch.randn(32)

    def violation() -> float:
        """MaxVio: how far the most loaded expert is above the mean."""
        counts = gate(torch.randn(400, 32) + direction)[1].flatten().bincount(minlength=EXPERTS).float()
        update_bias(gate.e_score_correction_bias, counts, speed=0.01)
        return float(counts.max() / counts.mean() - 1)

    with torch.no_grad():
        history = [violation() for _ in range(300)]
    assert history[0] > 0.8 and sum(history[-20:]) / 20 < 0.2


def test_checkpointing_gives_the_same_gradients_and_counts_once(tiny_model):
    ids = torch.randint(0, 61, (2, 20))
    results = []
    for checkpointing in (False, True):
        model = tiny_model(num_nextn_predict_layers=2).train()
        model.gradient_checkpointing = checkpointing
        calls = []
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        out = model(ids, mtp=True)
        logits = (out.logits, out.mtp_logits(1), out.mtp_logits(2))
        (sum(part.square().mean() for part in logits) + out.balance_loss.sum()).backward()
        assert len(calls) == 1 + checkpointing  # the layer did run again
        results.append((out.counts, [parameter.grad for parameter in model.parameters()]))
    (counts, grads), (counts_again, grads_again) = results
    assert torch.equal(counts, counts_again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
