"""Steps recorded as graphs give what plain steps give, however rows and lengths change; tapes stand for the graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from decoding_steps import shaken
from gpu_tape import Tape, taped_graphs
from torch import Tensor

from model import MiniDeepSeek
from model.cache import LatentCache
from model.decoding import graph
from model.decoding.eager import EagerRunner
from model.decoding.engine import Engine
from model.decoding.graph import GraphRunner, positions_seen
from model.decoding.runner import fits_graph
from model.decoding.sampling import Sampling
from model.decoding.scheduler import Request
from model.decoding.slot_cache import SlotCache

BF16, HERE = torch.bfloat16, torch.device("cpu")
CLOSE = dict(atol=0.02, rtol=0.02)


@pytest.fixture
def tapes(on_cuda, monkeypatch) -> Iterator[list[Tape]]:
    """The tapes recorded, of small shapes."""
    monkeypatch.setattr(graph, "SHORTEST", 8)
    with taped_graphs() as tapes:
        yield tapes


@pytest.fixture(params=["grouped", "without rows"])
def model(request, tiny_model, monkeypatch) -> MiniDeepSeek:
    """With experts as on an H100, and as on a card whose grouped products wait for the device."""
    if request.param == "without rows":
        monkeypatch.setattr("model.kernels.grouped_cuda.without_host", lambda *_: False)
    return shaken(tiny_model(num_nextn_predict_layers=0)).to(BF16)


def graphs(monkeypatch) -> None:
    monkeypatch.setattr("model.decoding.generate.runner_for", GraphRunner)
    monkeypatch.setattr("model.decoding.engine.runner_for", GraphRunner)


@pytest.mark.parametrize("padding", [None, torch.tensor([0, 3, 1])])
@torch.inference_mode()
def test_replayed_steps_equal_plain_ones_whatever_the_length(padding, model, tapes):
    prompt, tokens = torch.randint(0, 61, (3, 5)), torch.randint(0, 61, (15, 3, 1))
    plain, recorded = (
        kind(model, LatentCache(model.config, 3, 20, BF16, HERE, padding)) for kind in (EagerRunner, GraphRunner)
    )
    torch.testing.assert_close(recorded.prefill(prompt), plain.prefill(prompt))
    for ids in tokens:
        for mine, expected in zip(recorded.step(ids), plain.step(ids), strict=True):
            torch.testing.assert_close(mine, expected, **CLOSE)
    torch.testing.assert_close(recorded.cache.latents, plain.cache.latents, **CLOSE)
    # The first step of each length comes as it is; of 8 positions there are two more, of 16 seven, of 20 three.
    assert [tape.replays for tape in tapes] == [2, 7, 3] and recorded.cache.lengths == [20] * 3
    with pytest.raises(ValueError, match="21 positions, but only 20 were allocated"):
        recorded.step(tokens[0])


@torch.inference_mode()
def test_slots_of_different_lengths_are_steps_of_a_few_shapes(model, tapes):
    def run(kind: type[EagerRunner]) -> Tensor:
        cache = SlotCache(model.config, 4, 16, BF16, HERE)
        for length in (3, 5, 2):
            cache.occupy(torch.randn(3, length, 24, generator=torch.Generator().manual_seed(length)))
        runner, found = kind(model, cache), []
        for number in range(9):
            if number == 3:
                cache.release(0)
            rows = 4 if number < 3 else 2  # as many rows as a power of two
            ids = torch.arange(rows)[:, None] * 7 + number
            found.append(runner.step(ids).logits[: cache.used].clone())
        return torch.cat(found)

    torch.testing.assert_close(run(GraphRunner), run(EagerRunner), **CLOSE)
    assert [tape.replays for tape in tapes] == [2, 5]  # of 4 rows and 8 positions, of 2 and 16


@torch.inference_mode()
def test_rows_that_are_left_are_recorded_again(model, tapes):
    def run(kind: type[EagerRunner]) -> Tensor:
        cache = LatentCache(model.config, 3, 16, BF16, HERE)
        runner, ids = kind(model, cache), torch.tensor([[5], [6], [7]])
        runner.prefill(torch.arange(12).view(3, 4))
        found = [runner.step(ids).logits.clone() for _ in range(3)]
        cache.keep_rows(torch.tensor([2, 0]))
        return torch.cat(found + [runner.step(ids[[2, 0]]).logits.clone() for _ in range(3)])

    torch.testing.assert_close(run(GraphRunner), run(EagerRunner), **CLOSE)


def test_generation_and_the_engine_replay_and_give_the_same_tokens(model, tapes, monkeypatch):
    prompt, mask = torch.randint(0, 61, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[1, :4] = 0
    sampled, cold = Sampling(temperature=0.8, top_k=20), Sampling(temperature=0.0)

    def run() -> list[object]:
        plain, padded = (
            model.generate(prompt, max_new_tokens=12, attention_mask=given).tolist() for given in (None, mask)
        )
        drawn = torch.rand(7, 12, generator=torch.Generator().manual_seed(0)).tolist()
        requests = [
            Request([1, 2, 3 + place], 5 + place, sampled if place % 2 else cold, (), row)
            for place, row in enumerate(drawn)
        ]
        made = list(Engine(model, 4, 20).run(requests))
        return [plain, padded, [each.tokens for each in made]]

    monkeypatch.setattr("model.decoding.generate.runner_for", EagerRunner)
    monkeypatch.setattr("model.decoding.engine.runner_for", EagerRunner)
    expected = run()
    graphs(monkeypatch)
    assert run() == expected
    assert sum(tape.replays for tape in tapes) > 20


def test_a_step_is_one_replay_and_one_read_by_the_host(model, tapes, monkeypatch):
    reads = []
    for name in ("tolist", "item", "cpu", "__bool__"):
        of = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, name=name, of=of: reads.append(name) or of(self))
    graphs(monkeypatch)
    engine = Engine(model, 2, 16)
    for place in range(2):
        engine.submit(Request([1, 2 + place], 12))
    for _ in range(3):
        engine.step()
    before = tapes[0].replays
    del reads[:]
    engine.step()
    assert tapes[0].replays == before + 1 and reads == ["tolist"] and len(tapes) == 1


def test_hooks_gradients_and_longer_steps_run_as_they_come(model, tapes):
    runner = GraphRunner(model, LatentCache(model.config, 1, 9, BF16, HERE))
    with torch.no_grad():
        for ids in (torch.tensor([[1, 2]]), torch.tensor([[3, 4]])):
            runner.step(ids, 2)
    for _ in range(3):
        assert runner.step(torch.tensor([[5]])).logits.requires_grad
    assert not tapes and runner.cache.length == 7
    device = torch.device("cuda", 0)
    dense = MiniDeepSeek(model.config.preset("demo", first_k_dense_replace=4, num_nextn_predict_layers=0))
    assert fits_graph(dense, torch.float32, device)
    dense.model.norm.register_forward_hook(lambda *_: None)
    assert not fits_graph(dense, torch.float32, device)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_experts_without_rows_are_those_in_rows(tokens, tiny_model, on_cuda):
    experts = tiny_model(n_routed_experts=16).model.layers[1].mlp.experts
    x, weights = torch.randn(tokens, 32), torch.rand(tokens, 3)
    indices = torch.rand(tokens, 16).topk(3).indices
    expected = experts(x, weights, indices)
    with torch.no_grad():
        torch.testing.assert_close(experts(x, weights, indices), expected, atol=1e-5, rtol=1e-4)
    assert expected.requires_grad


def test_positions_are_rounded_up_to_few_numbers():
    found = {positions_seen(needed, 1000) for needed in range(1, 1001)}
    assert found == {256, 512, 1000} and positions_seen(3, 20) == 20
