"""Decoding in C: the same numbers as the layers in PyTorch, and PyTorch wherever it does not apply."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from decoding_steps import NARROW, SHAPES, in_pytorch, same_bits_however_many, shaken, steps
from torch import nn

from model import MiniDeepSeek
from model.cache import LatentCache
from model.decoding import native
from model.decoding.stepper import Step, Stepper, draft, read
from model.moe import Router
from model.norm import RMSNorm


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """These tests are about the compiled library: without a compiler there is nothing to compare."""
    if native.library(torch.float32) is None:
        pytest.skip("no C compiler here: decoding runs in PyTorch")


@pytest.mark.parametrize("padding", [None, torch.tensor([0, 6, 3])])
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_in_c_equals_pytorch(shape, padding, tiny_model, monkeypatch):
    model = shaken(tiny_model(**SHAPES[shape]))
    expected = in_pytorch(monkeypatch, steps, model, padding)
    torch.testing.assert_close(steps(model, padding), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fine", [torch.bfloat16, torch.float32], ids=["bf16 norms", "fp32 norms"])
def test_bfloat16_weights_are_read_as_they_are_and_computed_in_float32(fine, tiny_model, monkeypatch):
    model = shaken(tiny_model()).bfloat16()
    for module in model.modules():
        if isinstance(module, (RMSNorm, Router)):
            module.to(fine)
            nn.init.normal_(module.weight)
    exact = in_pytorch(monkeypatch, steps, copy.deepcopy(model).float())
    ours, theirs = steps(model), in_pytorch(monkeypatch, steps, model)
    assert (ours - exact).norm() / exact.norm() < 0.01 < (theirs - exact).norm() / exact.norm() * 10


ATTENTION = ["plain", "sizes that fill no vector", "sizes of several vectors", "heads in fours", "six heads", "yarn"]


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("padding", [None, torch.tensor([0, 6, 3])])
@pytest.mark.parametrize("shape", ATTENTION)
def test_a_cache_in_bfloat16_is_read_as_it_is(shape, padding, tiny_model, monkeypatch):
    """Queries and weights meet it in bfloat16 too. Without experts: one chosen otherwise would hide what is wrong."""
    model = tiny_model(**{**SHAPES[shape], "first_k_dense_replace": 3})
    for parameter in model.model.parameters():  # attention of some tokens more than of others
        parameter.data.mul_(2 if parameter.dim() > 1 else 1)
    ours = steps(model, padding, held=torch.bfloat16)
    theirs = in_pytorch(monkeypatch, steps, model, padding, 3, torch.bfloat16)
    exact = steps(model, padding)
    assert 0 < relative(ours, exact) < 0.02 and relative(ours, theirs) < 0.02


def test_it_is_without_the_processors_own_instructions(portable, tiny_model, monkeypatch):
    model = tiny_model(**SHAPES["six heads"], first_k_dense_replace=3)
    ours = steps(model, held=torch.bfloat16)
    assert relative(ours, in_pytorch(monkeypatch, steps, model, None, 3, torch.bfloat16)) < 0.005


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_two_threads_give_what_one_gives(held, heads, batch, tiny_model):
    """Four heads of one token go together, and all where there are tokens enough for both threads."""
    model = shaken(tiny_model(num_attention_heads=heads))
    alone = steps(model, None, batch, held)
    torch.set_num_threads(2)
    try:
        assert torch.equal(steps(model, None, batch, held), alone)
    finally:
        torch.set_num_threads(1)


def test_the_mtp_chain_drafts_in_c_too(tiny_model, monkeypatch):
    model, prompt = tiny_model(num_nextn_predict_layers=2), torch.randint(0, 61, (1, 9))
    used = []
    run = Stepper.run_step
    monkeypatch.setattr(Stepper, "run_step", lambda self, *a: used.append(self.places.start) or run(self, *a))
    drafted = model.generate(prompt, max_new_tokens=20, speculative=True)
    assert {0, 3, 4} <= set(used)
    assert torch.equal(drafted, in_pytorch(monkeypatch, lambda: model.generate(prompt, max_new_tokens=20)))


@pytest.mark.parametrize("padding", [None, torch.tensor([0, 6, 3])])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_whole_step_in_c_equals_the_model(shape, padding, tiny_model, monkeypatch):
    model = shaken(tiny_model(**SHAPES[shape]))
    ids = torch.randint(0, 61, (3, 16), generator=torch.Generator().manual_seed(1))

    def run() -> tuple[torch.Tensor, ...]:
        cache = LatentCache(model.config, 3, 16, torch.float32, "cpu", padding, mtp=True)
        pieces = ids.split(4, dim=1)
        parts = [read(model, piece, cache, 1 if i == 2 else 4) for i, piece in enumerate(pieces)]
        if padding is None:  # drafts are made for single prompts
            parts += [draft(model, parts[i].states, piece, 1, cache) for i, piece in enumerate(pieces)]
        return tuple(torch.cat([getattr(p, name) for p in parts], dim=1) for name in Step._fields)

    used, step = [], Stepper.run_step
    monkeypatch.setattr(Stepper, "run_step", lambda self, *a: used.append(self.places.start) or step(self, *a))
    ours = run()
    assert used == [0] * 4 + ([3] * 4 if padding is None else [])
    for mine, expected in zip(ours, in_pytorch(monkeypatch, run), strict=True):
        torch.testing.assert_close(mine, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_gives_the_same_bits_whatever_stands_beside_it(dtype, tiny_model):
    """Or speculative decoding would not be exact."""
    assert same_bits_however_many(shaken(tiny_model(**NARROW)).to(dtype), dtype)


@torch.no_grad()
def test_changed_weights_and_lost_rows_are_noticed(tiny_model, monkeypatch):
    def run(model: MiniDeepSeek) -> torch.Tensor:
        ids = torch.arange(24).view(4, 6)
        cache = LatentCache(model.config, 4, 8, torch.float32, "cpu")
        first = model(ids[:, :4], cache=cache).logits
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1.5)
        second = model(ids[:, 4:5], cache=cache).logits
        cache.keep_rows(torch.tensor([3, 1]))
        return torch.cat((first[:, -1], second[:, 0], model(ids[[3, 1], 5:], cache=cache).logits[:, 0]))

    model = tiny_model()
    torch.testing.assert_close(run(copy.deepcopy(model)), in_pytorch(monkeypatch, run, model), atol=2e-5, rtol=1e-4)


def wrapped(model: MiniDeepSeek) -> None:
    model.model.layers[1].self_attn.o_proj = nn.Sequential(model.model.layers[1].self_attn.o_proj, nn.Linear(32, 32))


def hooked(model: MiniDeepSeek) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def mixed(model: MiniDeepSeek) -> None:
    model.model.layers[2].mlp.shared_experts.bfloat16()


def scaled(model: MiniDeepSeek) -> None:
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model.model.layers[2].self_attn.o_proj = Doubled(40, 32, bias=False)


@pytest.mark.parametrize("change", [wrapped, hooked, scaled, mixed])
def test_layers_that_are_not_plain_run_in_pytorch(change, tiny_model):
    model = tiny_model()
    change(model)
    cache = LatentCache(model.config, 1, 8, torch.float32, "cpu")
    with torch.no_grad():
        assert native.decoder(model.model.layers, model.config, torch.zeros(1, 1, 32), cache) is None


def test_gradients_and_many_tokens_run_in_pytorch(tiny_model):
    model = tiny_model()

    def chosen(batch: int) -> bool:
        cache = LatentCache(model.config, batch, 8, torch.float32, "cpu")
        return native.decoder(model.model.layers, model.config, torch.zeros(batch, 1, 32), cache) is not None

    assert not chosen(1)
    with torch.no_grad():
        assert chosen(1) and chosen(native.MOST_TOKENS) and not chosen(native.MOST_TOKENS + 1)


@pytest.mark.parametrize("compiler", ["", "/no/such/cc", "false"])
def test_without_a_working_compiler_pytorch_decodes(compiler, tiny_model, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("PATH", "/bin" if compiler == "false" else "")
    expected = in_pytorch(monkeypatch, steps, tiny_model())
    native.library.cache_clear()
    try:
        assert native.library(torch.float32) is None
        torch.manual_seed(0)
        assert torch.equal(steps(tiny_model()), expected)
        native.main()
    finally:
        native.library.cache_clear()
    assert "PyTorch decodes" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.so"))


def test_it_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setattr("model.kernels.compiled.FLAGS", ("-O0", "-march=native", "-fopenmp", "-shared", "-fPIC"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    single = (torch.float32,) * 3
    file = native.build(*single)
    made = file.stat().st_mtime_ns
    assert native.build(*single) == file and file.stat().st_mtime_ns == made
    others = {native.build(torch.bfloat16, torch.bfloat16, held) for held in (torch.float32, torch.bfloat16)}
    assert len(others - {file}) == 2 and len(list(tmp_path.rglob("*"))) == 4


def test_the_module_says_where_the_library_is():
    done = subprocess.run([sys.executable, "-m", "model.decoding.native"], capture_output=True, text=True, check=True)
    assert done.stdout.count("decode-") == 2
