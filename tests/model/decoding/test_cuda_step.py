"""A step of one shape gives what plain decoding gives; the graph itself needs a GPU."""

from __future__ import annotations

import pytest
import torch

from model.cache import LatentCache
from model.decoding import cuda_step
from model.decoding.cuda_step import StaticStep, fits_graph
from model.transformer import logits


def prefilled(model, ids: torch.Tensor, room: int, padding: torch.Tensor | None = None) -> LatentCache:
    cache = LatentCache(model.config, len(ids), room, torch.float32, "cpu", padding)
    with torch.no_grad():
        model(ids, cache=cache)
    return cache


@pytest.mark.parametrize("padding", [None, torch.tensor([0, 3, 1])])
def test_logits_of_every_step_equal_plain_decoding(padding, tiny_model):
    model = tiny_model()
    prompt, tokens = torch.randint(0, 61, (3, 6)), torch.randint(0, 61, (5, 3, 1))
    plain, step = (prefilled(model, prompt, 11, padding) for _ in range(2))
    step = StaticStep(model, step)
    with torch.no_grad():
        for ids in tokens:
            out = model(ids, cache=plain)
            torch.testing.assert_close(step(ids), logits(out.hidden[:, -1], out.head), atol=1e-4, rtol=1e-4)


def test_generation_by_steps_of_one_shape_gives_the_same_tokens(tiny_model):
    model, prompt = tiny_model(), torch.randint(0, 61, (3, 6))
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    for given in (None, mask):
        plain = model.generate(prompt, max_new_tokens=12, attention_mask=given)
        assert torch.equal(model.generate(prompt, max_new_tokens=12, attention_mask=given, static=True), plain)


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "capability", "fits"),
    [(BF16, (9, 0), True), (BF16, (10, 3), True), (BF16, (8, 0), False), (BF16, (12, 0), False), (FP32, (9, 0), False)],
)
def test_a_graph_holds_only_steps_that_never_wait_for_the_device(
    dtype, capability, fits, tiny_model, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model, device = tiny_model(), torch.device("cuda", 0)
    cuda_step._report.cache_clear()
    assert fits_graph(model, dtype, device) == fits_graph(model, dtype, device) == fits
    said = capsys.readouterr().err
    assert said.count("notice: decoding without a CUDA graph") == (not fits) == said.count("\n")
    assert fits or f"{str(dtype)[6:]} on compute capability {capability[0]}.{capability[1]} " in said


def test_a_model_without_experts_fits_a_graph_in_any_type(tiny_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    dense = tiny_model(first_k_dense_replace=tiny_model().config.num_hidden_layers, num_nextn_predict_layers=0)
    assert fits_graph(dense, FP32, torch.device("cuda", 0))


def test_generation_takes_plain_steps_where_a_graph_does_not_fit(tiny_model, monkeypatch):
    model, prompt = tiny_model(), torch.randint(0, 61, (3, 6))
    plain = model.generate(prompt, max_new_tokens=12)
    monkeypatch.setattr("model.decoding.generate.fits_graph", lambda *_: False)
    monkeypatch.setattr("model.decoding.generate.StaticStep", lambda *_: pytest.fail("a graph was recorded"))
    assert torch.equal(model.generate(prompt, max_new_tokens=12, static=True), plain)


def test_places_and_shapes_stay_from_step_to_step(tiny_model):
    model = tiny_model()
    cache = prefilled(model, torch.randint(0, 61, (2, 4)), 9)
    step, place = StaticStep(model, cache), cache.latents.data_ptr()
    read = []
    cache_append = step.cache.append

    def append(layer: int, latents: torch.Tensor) -> torch.Tensor:
        out = cache_append(layer, latents)
        read.append((out.shape, out.data_ptr()))
        return out

    step.cache.append = append
    with torch.no_grad():
        for _ in range(3):
            step(torch.ones(2, 1, dtype=torch.long))
    layers = len(read) // 3
    assert read[:layers] == read[layers : 2 * layers] == read[2 * layers :]
    assert step.cache.latents.data_ptr() == place and step.cache.position.item() == 7


def test_a_full_cache_is_said(tiny_model):
    step = StaticStep(tiny_model(), prefilled(tiny_model(), torch.randint(0, 61, (1, 4)), 5))
    with torch.no_grad():
        step(torch.ones(1, 1, dtype=torch.long))
        with pytest.raises(ValueError, match="all of the 5 positions"):
            step(torch.ones(1, 1, dtype=torch.long))
