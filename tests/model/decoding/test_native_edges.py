"""What C is given at the edges: other defaults of torch, ids and rows that are not there, weights that go away."""

from __future__ import annotations

import gc
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from decoding_steps import shaken
from torch import Tensor

from model import MiniDeepSeek, ops
from model.cache import LatentCache
from model.decoding import native
from model.decoding.greedy_pass import greedy_pass
from model.decoding.stepper import read
from model.kernels.compiled import compiled
from training.losses import NextTokenLoss

IDS = torch.arange(12)[None] * 37 % 61


@pytest.fixture(scope="module", autouse=True)
def a_compiler_is_there() -> None:
    if native.library(torch.float32) is None:
        pytest.skip("no C compiler here: decoding runs in PyTorch")


@pytest.fixture
def model(tiny_model) -> MiniDeepSeek:
    return shaken(tiny_model(hidden_size=64, num_nextn_predict_layers=1, initializer_range=0.3))


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def other_default(request) -> Iterator[None]:
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(torch.float32)


def results(model: MiniDeepSeek) -> list[Tensor]:
    """Of decoding with and without drafts, and of a step of training."""
    plain, drafted = (model.generate(IDS, max_new_tokens=9, speculative=drafts) for drafts in (False, True))
    model.zero_grad()
    total, _, _ = NextTokenLoss(mtp=True)(model, {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:]})
    total.backward()
    return [plain, drafted, total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_torchs_default_type_changes_nothing(model, other_default):
    expected = results(model)
    other_default()
    torch.testing.assert_close(results(model), expected, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("speculative", [False, True])
def test_ids_of_32_bits_are_read_as_numbers(speculative, model):
    short = model.generate(IDS.int(), max_new_tokens=9, speculative=speculative)
    assert torch.equal(short, model.generate(IDS, max_new_tokens=9, speculative=speculative))


@pytest.mark.parametrize("wrong", [-1, 61, 2**40])
@pytest.mark.parametrize("speculative", [False, True])
def test_a_token_outside_the_vocabulary_is_an_error(speculative, wrong, model):
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[1, wrong]]), max_new_tokens=2, speculative=speculative)


def test_more_rows_than_the_cache_has_are_an_error(model):
    cache = LatentCache(model.config, 1, 8, torch.float32, "cpu")
    with torch.inference_mode(), pytest.raises((RuntimeError, IndexError)):
        read(model, IDS.view(6, 2), cache)


def test_a_mask_of_any_type_pads(model):
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    ids = IDS.view(2, 6)
    expected = model.generate(ids, max_new_tokens=5, attention_mask=mask)
    for dtype in (torch.float32, torch.float64, torch.uint8):
        assert torch.equal(model.generate(ids, max_new_tokens=5, attention_mask=mask.to(dtype)), expected)


def test_a_pass_keeps_the_weights_that_it_reads(model):
    cache = LatentCache(model.config, 1, 64, torch.float32, "cpu", mtp=True)
    with torch.inference_mode():
        step = read(model, IDS, cache)
        fast = greedy_pass(model, cache, [*IDS[0].tolist(), int(step.choice)], step.states, 2, 0.0)
        head = weakref.ref(model.drafter.head)
        model.drafter = None
        gc.collect()
        assert fast is not None and head() is not None
        fast.run()


def test_a_router_bias_of_another_type_goes_to_pytorch(model):
    for layer in model.model.layers[1:]:
        gate = layer.mlp.gate
        gate.e_score_correction_bias = gate.e_score_correction_bias.bfloat16()
    cache = LatentCache(model.config, 1, 8, torch.float32, "cpu")
    with torch.inference_mode():
        assert native.decoder(model.model.layers, model.config, torch.zeros(1, 1, 64), cache) is None
        gate = model.model.layers[1].mlp.gate
        x = torch.randn(3, 64)
        assert torch.equal(ops.route(gate, x)[1], gate(x)[1])


def test_a_user_without_a_home_gets_pytorch(monkeypatch):
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(FileNotFoundError, match="set XDG_CACHE_HOME"):
        compiled(native.SOURCE)


def test_a_compiler_may_come_with_words(monkeypatch, tmp_path):
    monkeypatch.setattr("model.kernels.compiled.FLAGS", ("-O0", "-march=native", "-fopenmp", "-shared", "-fPIC"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "cc -DUNUSED")
    assert compiled(native.SOURCE).is_file()
    monkeypatch.setenv("CC", "false -DUNUSED")
    with pytest.raises(subprocess.CalledProcessError):
        compiled(native.SOURCE)
