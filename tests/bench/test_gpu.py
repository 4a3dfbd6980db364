"""The doctor without a GPU: its list passes on the branches for CUDA; each check fails where its thing is broken."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path

import gpu
import gpu_shape
import pytest
import torch
from gpu_decoding import waits
from gpu_place import Finding, Place, branches_for_cuda
from torch._subclasses.fake_tensor import FakeTensorMode

from model import MiniDeepSeek, kernels, ops
from model.decoding import runner
from model.decoding.eager import EagerRunner, Step
from model.decoding.graph import StaticCache
from model.decoding.sampling import Sampling
from training.optim.adamw import AdamWBF16
from training.optim.build import step_scaled

SHAPES, TIMED = (Place(torch.device("cpu"), timed=timed) for timed in (False, True))
ROOT = Path(__file__).parents[2]
MISSING = ("jsonargparse", "math_verify", "wandb", "torchao", "datasets")  # on a machine with little beyond PyTorch
BARE = f"""
import sys
sys.modules.update(dict.fromkeys({MISSING}))
import gpu
sys.exit(gpu.main())
"""


@pytest.fixture(scope="module")
def whole(once) -> tuple[int, dict[str, dict], str]:
    """Exit code, rows by name, and the page of all of it by shape, in a process of its own without some packages."""

    def make(folder: Path) -> None:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bench")])}
        command = [sys.executable, "-c", BARE, "--by-shape", "--out", str(folder)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert (folder / "gpu.json").exists(), done.stderr[-2000:]
        (folder / "code").write_text(str(done.returncode))

    folder = once("gpu", make)
    rows = json.loads((folder / "gpu.json").read_text())["rows"]
    return int((folder / "code").read_text()), {row["name"]: row for row in rows}, (folder / "gpu.md").read_text()


def test_every_check_passes_by_shape_and_is_a_row_of_the_page(whole):
    code, rows, page = whole
    assert code == 0, [f"{row['name']}: {row['text']}" for row in rows.values() if row["verdict"] == "FAILED"]
    assert set(rows) == set(gpu.CHECKS)
    assert {name: row["why"] for name, row in rows.items() if row["verdict"] == "not run"} == {"card": "there is none"}
    assert all(row["findings"] or row["why"] for row in rows.values())
    assert all(re.search(rf"^\| `{name}` \| .+ \| {row['verdict']} \|", page, re.M) for name, row in rows.items())


def broken(name: str, target: str, value: object, monkeypatch: pytest.MonkeyPatch) -> gpu.Row:
    monkeypatch.setattr(target, value)
    return gpu.judge(name, SHAPES)


def scaled(target: str, by: float) -> Callable[..., object]:
    """The function of that name, whose result is a little too large."""
    module, _, name = target.rpartition(".")
    of = getattr(__import__(module, fromlist=[name]), name)
    return lambda *given, **named: of(*given, **named) * by


BROKEN = {
    "norms": ("model.norm.rms_norm", 1.05),
    "rope": ("model.ops.rotate", 1.05),
    "experts": ("model.experts.gather_sum", 1.05),
    "loss": ("gpu_checks.cross_entropy_sum", 1.05),
    "head_sizes": ("model.ops.attend", 1.05),
    "network": ("model.mla.causal_attention", 1.3),
    "quantized": ("model.quantized.autocast", 1.05),
    "fp8": ("gpu_checks.fp8_product", 1.05),
    "absorbed": ("model.mla.small_products", 1.05),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_check_fails_where_the_result_is_a_little_wrong(name, monkeypatch):
    target, by = BROKEN[name]
    row = broken(name, target, scaled(target, by), monkeypatch)
    assert row.verdict == gpu.FAILED and "at most" in row.text, row


def test_what_failed_is_said_and_is_exit_code_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("model.norm.rms_norm", scaled("model.norm.rms_norm", 1.05))
    monkeypatch.setattr("sys.argv", ["gpu.py", "--by-shape", "--out", str(tmp_path), "--only", "norms,rope"])
    assert gpu.main() == 1
    assert capsys.readouterr().out.endswith(f"{tmp_path}/gpu.md: 1 of 2 failed: norms\n")
    assert "| `norms` | RMSNorm | FAILED | " in (tmp_path / "gpu.md").read_text()


def test_isolated_segments_that_see_each_other_fail():
    together = lambda q, k, v, *_, scale, window_size: v  # noqa: E731
    with branches_for_cuda(SHAPES), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.varlen.varlen_attn", together)
        findings = list(gpu.CHECKS["network"](SHAPES))
    failed = [finding.what for finding in findings if not finding.passed]
    assert failed and all(what.startswith("packed, bf16") for what in failed)


def test_a_router_in_bfloat16_fails(monkeypatch):
    row = broken("router", "model.moe.float32_only", lambda device: nullcontext(), monkeypatch)
    assert row.verdict == gpu.FAILED


def test_a_step_that_goes_astray_in_bfloat16_or_when_computed_again_fails(monkeypatch):
    calls = []
    of = MiniDeepSeek.embed

    def drifting(self, ids):
        calls.append(0)
        return of(self, ids) + 0.3 * len(calls)

    monkeypatch.setattr(MiniDeepSeek, "embed", drifting)
    assert [gpu.judge(name, SHAPES).verdict for name in ("bf16", "checkpointing")] == [gpu.FAILED] * 2


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamWBF16])
def test_an_optimiser_with_another_formula_fails(kind, monkeypatch):
    of = kind.step
    monkeypatch.setattr(kind, "step", lambda self: (of(self), self.param_groups[0]["params"][0].data.mul_(1.01)))
    assert gpu.judge("optimizer", SHAPES).verdict == gpu.FAILED


def test_gradients_scaled_otherwise_than_by_the_cpu_fail(monkeypatch):
    """As if AdamW's kernel multiplied by what it is to divide by."""

    def wrong(made: torch.optim.Optimizer, gradients: list[torch.Tensor], factor: float) -> None:
        step_scaled(made, gradients, 1 / factor if kernels.on_cuda(gradients[0]) else factor)

    monkeypatch.setattr("gpu_checks.step_scaled", wrong)
    monkeypatch.setattr("gpu_training.step_scaled", wrong)
    assert [gpu.judge(name, SHAPES).verdict for name in ("optimizer", "steps")] == [gpu.FAILED] * 2


@pytest.mark.parametrize("name", ["graphs", "engine"])
def test_a_graph_that_keeps_the_first_position_fails(name, monkeypatch):
    monkeypatch.setattr(StaticCache, "begin", lambda self, batch, time: torch.tensor(self.starts.tolist())[:, None])
    row = gpu.judge(name, SHAPES)
    assert row.verdict == gpu.FAILED and "cannot wait for the device" in row.why


def test_plain_steps_where_graphs_could_be_fail(monkeypatch):
    monkeypatch.setattr(runner, "without_host", lambda *_: False)
    monkeypatch.setattr(runner, "FEW_TOKENS", 0)
    assert gpu.judge("chosen_by_itself", SHAPES).verdict == gpu.FAILED


def test_a_step_of_the_engine_that_waits_once_more_fails(monkeypatch):
    of = EagerRunner.step
    monkeypatch.setattr(
        "model.decoding.graph.GraphRunner.step", lambda self, ids, last=1: (ids.max().item(), of(self, ids, last))[1]
    )
    row = gpu.judge("engine", SHAPES)
    assert row.verdict == gpu.FAILED and "waits of a step: 3" in row.text


def test_a_wait_in_a_micro_batch_fails(monkeypatch):
    of = MiniDeepSeek.embed
    monkeypatch.setattr(MiniDeepSeek, "embed", lambda self, ids: of(self, ids) * (ids.max() >= 0).item())
    found = [gpu.judge(name, SHAPES) for name in ("micro_batch", "trainer")]
    assert [row.verdict for row in found] == [gpu.FAILED] * 2
    assert "of a micro-batch: 1" in found[0].text and "of a step: 2" in found[0].text
    assert "of a micro-batch more: 3" in found[1].text


def test_a_layer_that_breaks_its_graph_or_is_wrong_where_compiled_fails(monkeypatch):
    compiling, rotate, swiglu = torch.compiler.is_compiling, ops.rotate, ops.swiglu
    monkeypatch.setattr("model.ops.rotate", lambda x, rope: (torch._dynamo.graph_break(), rotate(x, rope))[1])
    monkeypatch.setattr("model.moe.swiglu", lambda gate, up: swiglu(gate, up) * (2.0 if compiling() else 1.0))
    row = gpu.judge("compiled", SHAPES)
    assert row.verdict == gpu.FAILED
    for kind in ("causal", "packed"):
        assert all(f"{kind}: {what}: " in row.text for what in ("gradients", "graph breaks")), row.text


def test_ranks_that_exchange_no_gradients_fail(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import training.parallel.replication as replication\nreplication.replicate = lambda model, ranks: model\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    row = gpu.judge("ranks", SHAPES)
    assert row.verdict == gpu.FAILED and row.text.startswith("gradients: "), row


@pytest.mark.parametrize("name", ["train_64m", "train_1b_moe"])
def test_more_calls_and_flops_than_today_fail(name, monkeypatch):
    monkeypatch.setattr(gpu_shape, "training_work", lambda config: gpu_shape.Work(10**6, 1e15, 1e9))
    row = gpu.judge(name, SHAPES)
    assert row.verdict == gpu.FAILED and "calls of a step" in row.text and "FLOPs beside the formula" in row.text


def test_more_calls_of_a_decoding_step_than_today_fail(monkeypatch):
    monkeypatch.setattr(gpu_shape, "decoding_work", lambda config, rows: gpu_shape.Work(666, 0, 1e9))
    row = gpu.judge("decode", SHAPES)
    assert row.verdict == gpu.FAILED and "calls in a graph, batch 128: 666 calls (at most 665)" in row.text


def test_what_is_sampled_with_other_probabilities_than_it_is_trained_with_fails(monkeypatch):
    of = Sampling.choose_by_uniform

    def other(self: Sampling, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, log_probs = of(self, *given)
        return chosen, log_probs * 1.2

    monkeypatch.setattr(Sampling, "choose_by_uniform", other)
    assert gpu.judge("grpo", SHAPES).verdict == gpu.FAILED


class Waiting(EagerRunner):
    """Reads a number twice a step."""

    def step(self, ids: torch.Tensor, last: int = 1) -> Step:
        return (ids.max().item(), ids.min().item(), super().step(ids, last))[2]


@pytest.mark.parametrize(
    ("name", "target", "value", "said"),
    [
        ("card", "gpu_speed.published_peak", lambda place: 1.0, "bf16 products over the published peak: "),
        ("decode", "gpu_speed.runner_for", Waiting, "waits of a step: "),
    ],
)
def test_on_a_card_a_peak_beyond_the_published_and_a_step_that_waits_twice_fail(name, target, value, said, monkeypatch):
    row = gpu.judge(name, TIMED)
    assert row.verdict != gpu.FAILED, row
    monkeypatch.setattr(target, value)
    row = gpu.judge(name, TIMED)
    assert row.verdict == gpu.FAILED and said in row.text, row


def test_work_is_flops_and_the_bytes_that_are_read_and_written():
    with FakeTensorMode(), gpu_shape.Counter() as counter:
        a, b = torch.zeros(30, 20), torch.zeros(20, 10)
        (a @ b).view(3, 100).t()
    assert counter.names == {"zeros": 2, "mm": 1}
    assert counter.work.flops == 2 * 30 * 20 * 10
    assert counter.work.moved == 4 * (600 + 200 + 600 + 200 + 300)
    with FakeTensorMode(), gpu_shape.Counter() as counter:
        x, experts, ends = (torch.empty(*size, dtype=torch.bfloat16) for size in ((16, 32), (64, 8, 32), (64,)))
        torch.nn.functional.grouped_mm(x, experts.transpose(1, 2), offs=ends.int())
    # Two experts at most have rows among 16, of which each has eight.
    assert counter.work.flops == 2 * 16 * 32 * 8
    assert counter.work.moved == 2 * (16 * 32 + 2 * 8 * 32 + 16 * 8) + 4 * 64 + 6 * 64
    assert counter.work.seconds[0] == pytest.approx(counter.work.moved / 936e9)


def test_on_a_card_waits_are_the_warnings_of_torch_but_for_the_one_about_the_mode(monkeypatch):
    modes = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    def work() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    assert waits(Place(torch.device("cuda", 0), timed=True), work) == 2 and modes == ["warn", "default"]


def test_without_cuda_there_is_one_line_and_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(tmp_path / "none")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2 and not (tmp_path / "none").exists()
    said = capsys.readouterr().err
    assert said.startswith("no CUDA here (") and said.count("\n") == 1
    monkeypatch.setattr("sys.argv", ["gpu.py", "--only", "norms,none"])
    assert gpu.main() == 2 and "--only none: no such check; one of norms, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "verdict", "why"),
    [
        (ImportError("no", name="xyz"), gpu.NOT_RUN, "xyz is not installed"),
        (torch.OutOfMemoryError("CUDA out of memory"), gpu.NOT_RUN, "not enough memory"),
        (RuntimeError("no kernel image\nfor this"), gpu.FAILED, "RuntimeError: no kernel image"),
        (NotImplementedError("not for CPUs\nbut"), gpu.NOT_RUN, "NotImplementedError: not for CPUs"),
    ],
)
def test_what_stops_one_check_stops_no_other(error, verdict, why, monkeypatch):
    def stopped(place):
        raise error
        yield

    monkeypatch.setitem(gpu.CHECKS, "norms", stopped)
    if isinstance(error, NotImplementedError):  # a card that lacks an operation has failed
        with monkeypatch.context() as on_card:
            on_card.setattr(Place, "small", False)
            assert gpu.judge("norms", SHAPES).verdict == gpu.FAILED
    first, second = gpu.run(SHAPES, ["norms", "router"])
    assert (first.verdict, first.why, second.verdict) == (verdict, why, gpu.PASSED)
    monkeypatch.setattr(gpu, "MINUTES", -1)
    assert gpu.run(SHAPES, ["router"])[0].verdict == gpu.NOT_RUN


def test_no_number_passes_no_bound():
    assert not Finding("x", float("nan"), 1.0).passed and not Finding("x", float("inf"), 1.0).passed
    assert Finding("x", 1.0, 1.0).passed and Finding("x", float("nan")).passed


@pytest.mark.parametrize("file", ["performance.md", "performance_zh.md"])
def test_the_page_of_docs_has_what_the_program_counts(file, whole):
    text = (ROOT / "docs" / file).read_text("utf8").replace("，", ", ")
    _, rows, _ = whole
    for name, preset in (("train_64m", "64m"), ("train_1b_moe", "1b-moe")):
        _, *found = (finding["value"] for finding in rows[name]["findings"])
        numbers = ", ".join(f"{value:,.0f}" for value in found)
        assert re.search(rf"^\| `{preset}`[^|]*\| {numbers} \|", text, re.M), numbers
    found = [finding["value"] for finding in rows["decode"]["findings"]]
    for batch, (calls, flops, moved) in ((1, found[:3]), (128, found[3:])):
        row = rf"^\| `64m`[^|]* {batch}\b[^|]*\| {calls:,.0f}, {flops:.1f}, {moved / 1e3:.2f} \|"
        assert re.search(row, text, re.M), (batch, calls, flops, moved)


def test_the_page_of_docs_names_each_check():
    for file in ("performance.md", "performance_zh.md"):
        text = (ROOT / "docs" / file).read_text(encoding="utf8")
        rows = re.findall(r"^\| (`[^|]+) \|", text[text.index("make gpu") :], re.M)
        listed = re.findall(r"`(\w+)`", " ".join(rows))
        assert list(takewhile(lambda name: name in gpu.CHECKS, listed)) == list(gpu.CHECKS), file
