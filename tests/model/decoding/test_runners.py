"""Runners in C and in PyTorch give the same numbers, and PyTorch runs wherever another does not apply."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from decoding_steps import NARROW, SHAPES, distance, in_pytorch, same_bits_however_many, shaken, steps
from torch import Tensor, nn

from model import MiniDeepSeek, ops
from model.cache import LatentCache
from model.decoding import eager, native, runner
from model.decoding.eager import Step
from model.decoding.native import NativeRunner, Program
from model.decoding.runner import fits_graph, runner_for
from model.decoding.slot_cache import SlotCache
from model.kernels import decode
from model.kernels.compiled import compiled
from model.moe import Router
from model.norm import RMSNorm
from model.quantized import Int8Weight, quantize_weights
from training.losses import NextTokenLoss

PADDINGS = [None, torch.tensor([0, 6, 3])]
ATTENTION = ["plain", "sizes that fill no vector", "sizes of several vectors", "heads in fours", "six heads", "yarn"]
BF16, FP32 = torch.bfloat16, torch.float32
IDS = torch.arange(12)[None] * 37 % 61

in_c = pytest.mark.skipif(decode.library(FP32) is None, reason="no C compiler here: decoding runs in PyTorch")


def cache_of(model: MiniDeepSeek, batch: int, room: int, padding: Tensor | None = None) -> LatentCache:
    mtp = padding is None and len(model.mtp) > 0
    return LatentCache(model.config, batch, room, FP32, "cpu", padding, mtp)


@in_c
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_step_in_c_equals_pytorch(shape, padding, tiny_model, monkeypatch):
    model = shaken(tiny_model(**SHAPES[shape]))
    pieces = torch.randint(0, 61, (3, 16), generator=torch.Generator().manual_seed(1)).split([7, 1, 2, 1, 5], dim=1)

    def run() -> tuple[Tensor, ...]:
        runner = runner_for(model, cache_of(model, 3, 16, padding))
        parts = [runner.step(piece, 1 if i == 2 else piece.shape[1]) for i, piece in enumerate(pieces)]
        if padding is None:  # drafts are made for single prompts
            parts += [runner.draft(parts[i].states, piece, 1) for i, piece in enumerate(pieces)]
        return tuple(torch.cat([getattr(part, name) for part in parts], dim=1) for name in Step._fields)

    used, of = [], Program.run
    monkeypatch.setattr(Program, "run", lambda self, *given: used.append(self.places.start) or of(self, *given))
    ours = run()
    assert used == [0] * 5 + ([3] * 5 if padding is None else [])
    for mine, expected in zip(ours, in_pytorch(monkeypatch, run), strict=True):
        torch.testing.assert_close(mine, expected, atol=5e-5, rtol=1e-4)


@in_c
@pytest.mark.parametrize("fine", [BF16, FP32], ids=["bf16 norms", "fp32 norms"])
def test_bfloat16_weights_are_read_as_they_are_and_computed_in_float32(fine, tiny_model, monkeypatch):
    model = shaken(tiny_model()).bfloat16()
    for module in model.modules():
        if isinstance(module, (RMSNorm, Router)):
            module.to(fine)
            nn.init.normal_(module.weight)
    exact = in_pytorch(monkeypatch, steps, copy.deepcopy(model).float())
    ours, theirs = steps(model), in_pytorch(monkeypatch, steps, model)
    assert distance(ours, exact) < 0.01 < distance(theirs, exact) * 10


@in_c
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shape", ATTENTION)
def test_a_cache_in_bfloat16_is_read_as_it_is(shape, padding, tiny_model, monkeypatch):
    """Queries and weights meet it in bfloat16 too. Without experts: one chosen otherwise would hide what is wrong."""
    model = tiny_model(**{**SHAPES[shape], "first_k_dense_replace": 3})
    for parameter in model.model.parameters():  # attention of some tokens more than of others
        parameter.data.mul_(2 if parameter.dim() > 1 else 1)
    ours = steps(model, padding, held=BF16)
    theirs = in_pytorch(monkeypatch, steps, model, padding, 3, BF16)
    exact = steps(model, padding)
    assert 0 < distance(ours, exact) < 0.02 and distance(ours, theirs) < 0.02


@in_c
def test_it_is_without_the_processors_own_instructions(portable, tiny_model, monkeypatch):
    model = tiny_model(**SHAPES["six heads"], first_k_dense_replace=3)
    ours = steps(model, held=BF16)
    assert distance(ours, in_pytorch(monkeypatch, steps, model, None, 3, BF16)) < 0.005


@in_c
@pytest.mark.parametrize(("batch", "heads"), [(1, 2), (1, 4), (3, 8), (4, 4)])
@pytest.mark.parametrize("held", [FP32, BF16])
def test_two_threads_give_what_one_gives(held, batch, heads, tiny_model):
    """Four heads of one token go together, and all where there are tokens enough for both threads."""
    model = shaken(tiny_model(num_attention_heads=heads))
    alone = steps(model, None, batch, held)
    torch.set_num_threads(2)
    try:
        assert torch.equal(steps(model, None, batch, held), alone)
    finally:
        torch.set_num_threads(1)


@in_c
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_token_gives_the_same_bits_whatever_stands_beside_it(dtype, tiny_model):
    """Or speculative decoding would not be exact."""
    assert same_bits_however_many(shaken(tiny_model(**NARROW)).to(dtype), dtype)


@in_c
@torch.no_grad()
def test_changed_weights_and_lost_rows_are_noticed(tiny_model, monkeypatch):
    def run(model: MiniDeepSeek) -> Tensor:
        ids, cache = torch.arange(24).view(4, 6), cache_of(model, 4, 8)
        runner = runner_for(model, cache)
        first = runner.step(ids[:, :4]).logits
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1.5)
        second = runner.step(ids[:, 4:5]).logits
        cache.keep_rows(torch.tensor([3, 1]))
        return torch.cat((first, second, runner.step(ids[[3, 1], 5:]).logits))

    model = tiny_model()
    torch.testing.assert_close(run(copy.deepcopy(model)), in_pytorch(monkeypatch, run, model), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("most", [0, native.MOST_TOKENS], ids=["PyTorch", "C"])
@pytest.mark.parametrize("padding", [None, torch.tensor([0, 6, 3, 9, 1])])
@torch.no_grad()
def test_a_prefill_in_parts_leaves_what_one_pass_leaves(padding, most, tiny_model, monkeypatch):
    """Of the asked positions; the last layer computes no others, but all latents."""
    model, ids = tiny_model(), torch.randint(61, (5, 12))
    monkeypatch.setattr(eager, "PREFILL_TOKENS", 24)
    monkeypatch.setattr(native, "MOST_TOKENS", most)
    last = torch.tensor([11, 11, 11, 11, 11] if padding is not None else [3, 11, 0, 7, 8])
    whole, parts = (LatentCache(model.config, 5, 14, FP32, "cpu", padding) for _ in range(2))
    expected = model(ids, cache=whole).logits[torch.arange(5), last]
    runner = runner_for(model, parts)
    torch.testing.assert_close(runner.prefill(ids, last), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(parts.latents, whole.latents, atol=2e-5, rtol=1e-4)
    assert parts.lengths == whole.lengths == [12] * 3
    ids = torch.randint(61, (5, 1))
    torch.testing.assert_close(runner.step(ids).logits, model(ids, cache=whole).logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_rows_of_different_lengths_decode_in_c_as_in_pytorch(tiny_model, monkeypatch):
    model = tiny_model()

    def run() -> Tensor:
        cache = SlotCache(model.config, 3, 20, FP32, "cpu")
        for length in (4, 11, 7):
            cache.occupy(torch.randn(3, length, 24, generator=torch.Generator().manual_seed(length)))
        runner = runner_for(model, cache)
        first = runner.step(torch.tensor([[5], [6], [7]])).logits
        cache.release(0)
        assert cache.held.tolist() == [8, 12, 0]
        return torch.cat((first[[2, 1]], runner.step(torch.tensor([[8, 9], [10, 11]])).logits))

    torch.testing.assert_close(run(), in_pytorch(monkeypatch, run), atol=2e-5, rtol=1e-4)


def test_a_sequence_that_outgrows_its_slot_is_an_error(tiny_model):
    cache = SlotCache(tiny_model().config, 1, 4, FP32, "cpu")
    cache.occupy(torch.zeros(3, 4, 24))
    with pytest.raises(ValueError, match="5 positions, but only 4 were allocated"):
        cache.begin(1, 1)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


CHANGES = {
    "wrapped": lambda model, layer: setattr(layer.self_attn, "o_proj", nn.Sequential(layer.self_attn.o_proj)),
    "of another class": lambda model, layer: setattr(layer.self_attn, "o_proj", Doubled(40, 32, bias=False)),
    "hooked": lambda model, layer: layer.register_forward_hook(lambda *_: None),
    "mixed": lambda model, layer: layer.mlp.shared_experts.bfloat16(),
    "another head": lambda model, layer: model.lm_head.bfloat16(),
    "another bias": lambda model, layer: layer.mlp.gate.register_buffer(
        "e_score_correction_bias", torch.ones(8).half()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_layers_that_are_not_plain_run_in_pytorch(change, tiny_model):
    model = tiny_model()
    layer = model.model.layers[2]
    CHANGES[change](model, layer)
    assert NativeRunner(model, cache_of(model, 1, 8)).program(0, torch.zeros(1, 1)) is None
    if change == "another bias":
        x = torch.randn(3, 32)
        assert torch.equal(ops.route(layer.mlp.gate, x)[1], layer.mlp.gate(x)[1])


@in_c
def test_gradients_autocast_and_many_tokens_run_in_pytorch(tiny_model):
    model = tiny_model()

    def chosen(batch: int) -> bool:
        return NativeRunner(model, cache_of(model, batch, 8)).program(0, torch.zeros(batch, 1)) is not None

    assert not chosen(1)
    with torch.no_grad():
        assert chosen(1) and chosen(native.MOST_TOKENS) and not chosen(native.MOST_TOKENS + 1)
        with torch.autocast("cpu", dtype=BF16):
            assert not chosen(1)


@pytest.mark.parametrize("compiler", ["", "/no/such/cc", "false"])
def test_without_a_working_compiler_pytorch_decodes(compiler, tiny_model, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("PATH", "/bin" if compiler == "false" else "")
    decode.library.cache_clear()
    try:
        assert decode.library(FP32) is None
        expected = in_pytorch(monkeypatch, steps, tiny_model())
        assert torch.equal(steps(tiny_model()), expected)
        native.main()
    finally:
        decode.library.cache_clear()
    assert "PyTorch decodes" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.so"))


@in_c
def test_it_is_compiled_once_for_each_type(monkeypatch, tmp_path):
    monkeypatch.setattr("model.kernels.compiled.FLAGS", ("-O0", "-march=native", "-fopenmp", "-shared", "-fPIC"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = compiled("products.c", FP32)
    made = file.stat().st_mtime_ns
    assert compiled("products.c", FP32) == file and file.stat().st_mtime_ns == made
    others = {compiled("products.c", BF16, *flags) for flags in ([], ["-DHALF_CACHE"])}
    assert len(others - {file}) == 2 and len(list(tmp_path.rglob("*"))) == 4
    monkeypatch.setenv("CC", "cc -DUNUSED")  # a compiler may come with words
    assert compiled("products.c", FP32).is_file()
    monkeypatch.setenv("CC", "false -DUNUSED")
    with pytest.raises(subprocess.CalledProcessError):
        compiled("products.c", FP32)


@in_c
def test_the_module_says_where_the_library_is(capsys):
    native.main()
    assert capsys.readouterr().out.count("decode-") == 2


def test_a_user_without_a_home_gets_pytorch(monkeypatch):
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(FileNotFoundError, match="set XDG_CACHE_HOME"):
        compiled("decode.c", FP32)


@pytest.fixture
def model(tiny_model) -> MiniDeepSeek:
    return shaken(tiny_model(hidden_size=64, num_nextn_predict_layers=1, initializer_range=0.3))


@pytest.fixture(params=[BF16, torch.float64], ids=["bf16", "fp64"])
def other_default(request) -> Iterator[None]:
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(FP32)


def test_torchs_default_type_changes_nothing(model, other_default):
    def results() -> list[Tensor]:
        """Of decoding with and without drafts, and of a step of training."""
        plain, drafted = (model.generate(IDS, max_new_tokens=9, speculative=drafts) for drafts in (False, True))
        model.zero_grad()
        total, _, _ = NextTokenLoss(mtp=True)(model, {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:]})
        total.backward()
        return [plain, drafted, total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = results()
    other_default()
    torch.testing.assert_close(results(), expected, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("speculative", [False, True])
def test_ids_of_any_width_are_read_as_numbers_and_those_outside_the_vocabulary_refused(speculative, model):
    options = dict(max_new_tokens=9, speculative=speculative)
    assert torch.equal(model.generate(IDS.int(), **options), model.generate(IDS, **options))
    for wrong in (-1, 61, 2**40):
        with pytest.raises(IndexError):
            model.generate(torch.tensor([[1, wrong]]), **options)


def test_more_rows_than_the_cache_has_are_an_error(model):
    with torch.inference_mode(), pytest.raises((RuntimeError, IndexError)):
        runner_for(model, cache_of(model, 1, 8)).step(IDS.view(6, 2))


def test_a_mask_of_any_type_pads(model):
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    ids = IDS.view(2, 6)
    expected = model.generate(ids, max_new_tokens=5, attention_mask=mask)
    for dtype in (FP32, torch.float64, torch.uint8):
        assert torch.equal(model.generate(ids, max_new_tokens=5, attention_mask=mask.to(dtype)), expected)


@pytest.mark.parametrize(
    ("dtype", "capability", "fits"),
    [(BF16, (9, 0), True), (BF16, (10, 3), True), (BF16, (8, 0), False), (BF16, (12, 0), False), (FP32, (9, 0), False)],
)
def test_a_graph_holds_only_steps_that_never_wait_for_the_device(
    dtype, capability, fits, tiny_model, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model, device = tiny_model(), torch.device("cuda", 0)
    runner._report.cache_clear()
    assert fits_graph(model, dtype, device, 513) == fits_graph(model, dtype, device, 513) == fits
    assert fits_graph(model, dtype, device, 512)
    said = capsys.readouterr().err
    assert said.count("notice: decoding without a CUDA graph") == (not fits) == said.count("\n")
    assert (
        fits
        or f"of more than 512 rows in {str(dtype)[6:]} on compute capability {capability[0]}.{capability[1]} " in said
    )
    assert fits_graph(tiny_model(first_k_dense_replace=3, num_nextn_predict_layers=0), FP32, device, 513)
    quantize_weights(model, "model.layers.2.mlp.experts", Int8Weight.rounded)
    assert fits_graph(model, dtype, device, 1) == fits
