"""Decoding with weights in 8 bits: C reads the codes, and computes what the dense weights give."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from decoding_steps import NARROW, SHAPES, distance, in_pytorch, same_bits_however_many, shaken, steps
from torch import nn

from model import MiniDeepSeek
from model.cache import LatentCache
from model.decoding.engine import Engine
from model.decoding.native import NativeRunner, Program
from model.decoding.scheduler import Request
from model.experts import Experts
from model.kernels import compiled, decode
from model.ops import Linear
from model.quantized import Int8Weight, QuantizedLinear
from training.adapters.frozen import shrink_frozen

TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """These tests are about the compiled library: without a compiler there is nothing to compare."""
    if decode.library(torch.float32) is None:
        pytest.skip("no C compiler here: decoding runs in PyTorch")


def quantized(model: MiniDeepSeek, dtype: torch.dtype = torch.float32, base: str = "int8") -> MiniDeepSeek:
    """The layers' matrices in 8 bits, all other weights in a type of products."""
    shrink_frozen(model.requires_grad_(False), base, dtype)
    return model.to(dtype)


def dense(model: MiniDeepSeek) -> MiniDeepSeek:
    """A float32 model of the same numbers, whose layers are plain again."""
    model = copy.deepcopy(model).float()
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight, plain.bias = nn.Parameter(module.quantized.dense(torch.float32)), module.bias
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, plain)
        elif isinstance(module, Experts):
            for matrix in ("gate_up_proj", "down_proj"):
                weight = getattr(module, matrix)
                if isinstance(weight, Int8Weight):
                    delattr(module, matrix)
                    setattr(module, matrix, nn.Parameter(weight.dense(torch.float32)))
    return model.requires_grad_(False)


WIDTHS = [1, 15, 16, 17, 31, 32, 33, 48, 100, 8192 + 40]


def products(dtype: torch.dtype, allowed: float) -> None:
    draw = torch.Generator().manual_seed(3)
    for width in WIDTHS:
        for rows in 1, 7, 8, 61:
            weight = Int8Weight.rounded(torch.randn(rows, width, generator=draw))
            for count in 1, 2, 3, 4, 6:
                x = torch.randn(count, width, generator=draw) * torch.logspace(-3, 3, count)[:, None]
                found = decode.project(x, weight.codes, dtype, weight.scales)
                exact = (x.double() @ weight.dense(torch.float64).T).float()
                size = x.norm(dim=1, keepdim=True) * weight.dense(torch.float32).norm(dim=1)
                assert ((found - exact).abs() <= allowed * size).all(), (width, rows, count)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 3e-7), (torch.bfloat16, 1e-4)])
def test_codes_times_vectors_are_near_the_exact_products_for_any_size(dtype, allowed):
    products(dtype, allowed)


def test_they_are_without_the_processors_own_instructions(portable):
    products(torch.float32, 3e-7)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_largest_sums_do_not_overflow_and_zeros_nan_and_infinity_stay(dtype):
    def product(x: torch.Tensor) -> torch.Tensor:
        ones = Int8Weight.rounded(torch.ones(8, x.shape[1]))
        return decode.project(x, ones.codes, dtype, ones.scales)

    width = 3 * 8192 + 5
    torch.testing.assert_close(product(torch.full((1, width), 2.5)), torch.full((1, 8), 2.5 * width))
    assert torch.equal(product(torch.zeros(1, 40)), torch.zeros(1, 8))
    for value in (math.nan, math.inf):
        x = torch.ones(2, 40)
        x[0, 37] = value
        found = product(x)
        assert not found[0].isfinite().any() and found[1].isfinite().all()


@pytest.mark.parametrize("padding", [None, torch.tensor([0, 6, 3])])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_in_c_equal_pytorch_with_dense_weights(shape, padding, tiny_model, monkeypatch):
    model = quantized(shaken(tiny_model(**SHAPES[shape])))
    expected = in_pytorch(monkeypatch, steps, model, padding)
    torch.testing.assert_close(steps(model, padding), expected, atol=2e-5, rtol=1e-4)


def test_beside_bfloat16_the_codes_meet_vectors_finer_than_bfloat16(tiny_model, monkeypatch):
    model = quantized(shaken(tiny_model()), torch.bfloat16)
    exact = in_pytorch(monkeypatch, steps, dense(model))
    ours, theirs = steps(model), in_pytorch(monkeypatch, steps, model)
    assert distance(ours, exact) < 0.01 < distance(theirs, exact) * 10


@pytest.mark.parametrize("dtype", TYPES)
def test_a_token_gives_the_same_bits_whatever_stands_beside_it(dtype, tiny_model):
    assert same_bits_however_many(quantized(shaken(tiny_model(**NARROW)), dtype), dtype)


def test_two_threads_give_what_one_gives(tiny_model):
    model = quantized(shaken(tiny_model()))
    alone = steps(model)
    torch.set_num_threads(2)
    try:
        assert torch.equal(steps(model), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", TYPES)
def test_generation_speculation_and_batches_decode_the_codes_in_c(dtype, tiny_model, monkeypatch):
    model = quantized(shaken(tiny_model(initializer_range=0.3)), dtype)
    prompts = [torch.randint(0, 61, (1, length)) for length in (9, 4, 7)]
    expected = [in_pytorch(monkeypatch, lambda p=p: dense(model).generate(p, max_new_tokens=20)) for p in prompts]
    used, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda self, *given: used.append(self.places.start) or run(self, *given))
    for prompt, wanted in zip(prompts, expected, strict=True):
        assert torch.equal(model.generate(prompt, max_new_tokens=20), wanted)
        assert torch.equal(model.generate(prompt, max_new_tokens=20, speculative=True, draft_tokens=2), wanted)
    asked = [Request(prompt[0].tolist(), 20) for prompt in prompts]
    made = Engine(model, 3, 32).run(asked)
    assert [request.prompt + each.tokens for request, each in zip(asked, made, strict=True)] == [
        wanted[0].tolist() for wanted in expected
    ]
    assert used.count(0) > 40 and 3 in used


def chosen(model: MiniDeepSeek) -> bool:
    """Whether C decodes it."""
    cache = LatentCache(model.config, 1, 8, torch.float32, "cpu")
    with torch.no_grad():
        return NativeRunner(model, cache).program(0, torch.zeros(1, 1)) is not None


def test_four_bits_and_layers_quantized_by_halves_run_in_pytorch(tiny_model):
    assert chosen(quantized(tiny_model()))
    fours = dict(hidden_size=64, moe_intermediate_size=64)
    model = tiny_model(**fours)
    assert not chosen(quantized(model, base="nf4"))
    halves = quantized(tiny_model())
    attention = halves.model.layers[1].self_attn
    attention.o_proj = Linear(attention.o_proj.in_features, attention.o_proj.out_features, bias=False)
    assert not chosen(halves)


def test_scales_keep_float32_beside_bfloat16(tiny_model):
    model = quantized(tiny_model(), torch.bfloat16)
    kinds = {module.scales.dtype for module in model.modules() if isinstance(module, Int8Weight)}
    assert kinds == {torch.float32} and model.lm_head.weight.dtype == torch.bfloat16


def test_a_changed_header_is_compiled_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, header = tmp_path / "one.c", tmp_path / "one.h"
    source.write_text('#include "one.h"\nint answer(void) { return ANSWER; }\n')
    header.write_text("#define ANSWER 1\n")
    first = compiled.compiled(source, torch.float32)
    header.write_text("#define ANSWER 2\n")
    assert compiled.compiled(source, torch.float32) != first
