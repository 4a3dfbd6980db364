"""Before its first step a run says what it will take, and what to do where that is too long."""

from __future__ import annotations

import re

import pytest
import torch

import training.run.estimate
from errors import INDENT, WIDTH
from grpo_train import GRPOSettings
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.costs import count
from pretrain import PretrainSettings
from training.machine import machine_peak
from training.parallel.ranks import Ranks
from training.run.estimate import Pace, batch_line, length, memory, step_seconds
from training.run.progress import Progress
from training.schedule import Budget

CPU, MB = torch.device("cpu"), 1e6


def settings(**changes: object) -> PretrainSettings:
    """Those of configs/64m.yaml."""
    given = dict(data="x", out="x", batch_tokens=262144, micro_tokens=32768)
    return PretrainSettings(**{**given, **changes})


@pytest.fixture(scope="module")
def model() -> MiniDeepSeek:
    with torch.device("meta"):
        return MiniDeepSeek(LMConfig.preset("64m"))


def test_a_step_takes_its_flops_at_the_usual_share_of_the_peak(model):
    flops = count(model.config).flops
    found = step_seconds(settings(), flops, 400e9)
    assert found == pytest.approx(262144 * flops / 120e9) and 400 < found < 600


@pytest.mark.parametrize(
    ("budget", "steps", "left"),
    [
        (Budget(7, None), 7, 5),
        (Budget(None, 2.0), 24, 20),
        (Budget(None, None, 9001), 10, 8),
        (Budget(100, 1.0), 12, 8),
        (Budget(2, None), 2, 1),
    ],
    ids=["steps", "minutes", "tokens", "whichever is first", "one more at least"],
)
def test_a_run_lasts_as_long_as_its_budget_and_a_resumed_one_as_what_is_left(budget, steps, left):
    assert length(budget, 5.0, 1000, Progress()) == (steps, steps * 5.0)
    assert length(budget, 5.0, 1000, Progress(step=2, tokens=2000, seconds=20.0)) == (left, left * 5.0)


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ((5, 1024, 1, 1, 4), "5 rows of 1024 tokens: 1 rank, 2 micro-batches of at most 4 rows"),
        ((8, 64, 4, 2, 2), "8 rows of 64 tokens: 2 pipelines of 2 ranks, 2 micro-batches of 2 rows"),
        ((8, 64, 2, 1, 2), "8 rows of 64 tokens: 2 ranks, 2 micro-batches of 2 rows"),
        ((1, 64, 1, 1, 16), "1 row of 64 tokens: 1 rank, 1 micro-batch of 1 row"),
    ],
)
def test_the_shares_of_a_step_are_told_as_they_are(shape, line):
    rows, row_tokens, world, pp, micro = shape
    assert batch_line(rows, row_tokens, Ranks(0, world, torch.device("cpu"), pp=pp), micro) == line


def test_the_memory_is_near_what_was_measured(model):
    """2,016 MB beyond the imports: 8 x 512 tokens in bfloat16, without MTP and without a save (docs/performance.md)."""
    with torch.device("meta"):
        plain = MiniDeepSeek(LMConfig.preset("64m", num_nextn_predict_layers=0))
    found = memory(settings(micro_tokens=4096, background_save=False), plain, CPU, torch.bfloat16) - 400 * MB
    assert found == pytest.approx(2016 * MB, rel=0.2)


def test_less_memory_with_smaller_micro_batches_and_recomputed_layers(model):
    most = memory(settings(), model, CPU, torch.float32)
    assert memory(settings(micro_tokens=8192), model, CPU, torch.float32) < 0.5 * most
    assert memory(settings(gradient_checkpointing=True), model, CPU, torch.float32) < 0.5 * most
    few = settings(batch_tokens=8192)  # a micro-batch is never larger than its step
    assert memory(few, model, CPU, torch.float32) == memory(settings(micro_tokens=8192), model, CPU, torch.float32)


@pytest.mark.parametrize(
    ("changes", "device", "remedy"),
    [
        ({}, "cpu", "the recipe for CPUs is --config configs/minutes.yaml"),
        ({}, "cuda", "lower --batch_tokens, now 262,144, or take a smaller model"),
        ({"model": {"preset": "demo"}}, "cpu", "lower --batch_tokens, now 262,144, or take a smaller model"),
        ({"ckpt": "x"}, "cpu", "lower --batch_tokens, now 262,144, or take a smaller model"),
    ],
)
def test_the_remedy_fits_the_machine(changes, device, remedy):
    assert settings(**changes).lighten(device) == remedy


def test_the_remedy_of_grpo_names_what_makes_its_steps():
    asked = GRPOSettings(ckpt="x", data="x", out="x", prompts=64, group=4, max_new_tokens=40)
    remedy = "lower --prompts, now 64, --group, now 4, or --max_new_tokens, now 40, or take a smaller model"
    assert asked.lighten("cpu") == remedy


def before_the_steps(shown: str, start: str) -> str:
    """The one line that begins so, with what goes on below it, which must come before those of steps."""
    lines = shown.replace(f"\n{INDENT}", " ").splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith(start)]
    assert place < min(number for number, line in enumerate(lines) if line.startswith("step "))
    return lines[place]


@pytest.mark.parametrize(
    ("val_every", "left"), [(0, 150.0 + 40.0), (1, 150.0 + 3 * 40.0), (2, 150.0 + 2 * 40.0), (3, 150.0 + 2 * 40.0)]
)
def test_what_is_left_follows_from_the_pace_of_this_sitting_and_counts_validations(val_every, left, model, capsys):
    """The third step, in 50 s, was a fifth of the budget; what was done before the run was resumed does not count.

    Three steps more: the last is validated, and those among them that --val_every says.
    """
    asked = settings(val_every=val_every)
    pace = Pace(asked, Ranks(0, 1, CPU), Budget(5, None))
    progress = Progress(step=1, seconds=1000.0)
    pace.announce(model, range(100), 1, 1.0, torch.float32, progress)
    assert pace.left(0.2) is None
    progress.step, progress.seconds, pace.pause = 2, 1050.0, 40.0
    assert pace.left(0.4) == pytest.approx(left)


def test_every_stage_says_before_its_first_step_that_it_has_too_few(make, capsys):
    make(max_steps=2).run()  # the loop of all stages
    assert before_the_steps(capsys.readouterr().out, "notice: this run ends after 2 steps (--max_steps 2)")


@pytest.fixture
def slow_machine(monkeypatch):
    monkeypatch.setattr("training.machine.measured_peak", lambda *_, **__: 1e6)
    machine_peak.cache_clear()
    yield
    machine_peak.cache_clear()


def test_a_slow_step_is_warned_of_once_and_before_it_begins(slow_machine, make, capsys):
    make(max_steps=1, micro_tokens=4 * 16).run()
    shown = capsys.readouterr().out
    takes = before_the_steps(shown, "takes      about ")
    assert re.fullmatch(r"takes      about (\S+) a step, 1 step in \1, 4\d\d\.\d MB of memory a rank", takes)
    assert before_the_steps(shown, "warning    a step takes about ").endswith("or take a smaller model")


def test_the_first_micro_batch_of_a_long_step_tells_its_pace(make, capsys, monkeypatch):
    monkeypatch.setattr(training.run.estimate, "SLOW_STEP", 1e-6)
    make(max_steps=2, micro_tokens=2 * 16).run()
    shown = capsys.readouterr().out.replace("step      0", "")
    assert "whole run" in before_the_steps(shown, "measured   micro-batch 1 of 4 took ")
    make(max_steps=3, micro_tokens=2 * 16, resume=True).run()
    shown = capsys.readouterr().out
    assert " a step, 1 more step in " in before_the_steps(shown, "takes      about ")
    assert "rest of the run" in before_the_steps(shown, "measured   micro-batch 1 of 4 took ")


def test_a_small_last_micro_batch_takes_less(capsys):
    """5 rows are one micro-batch of 4 and one of 1: 40 s and 10 s."""
    asked = settings(sequence_length=64, batch_tokens=5 * 64, micro_tokens=4 * 64)
    Pace(asked, Ranks(0, 1, CPU), Budget(10, None)).report(40.0, 4)
    assert (
        "measured   micro-batch 1 of 2 took 40s: about 50s a step, 8m20s for the whole run" in capsys.readouterr().out
    )
    asked = settings(sequence_length=64, batch_tokens=5 * 64, micro_tokens=4 * 64, val_every=5)
    pace = Pace(asked, Ranks(0, 1, CPU), Budget(10, None))
    pace.pause = 60.0  # after steps 5 and 10
    pace.report(40.0, 4)
    assert "about 50s a step, 10m20s for the whole run" in capsys.readouterr().out


def test_a_run_that_does_not_fit_into_memory_is_warned_of_before_its_first_step(make, capsys, monkeypatch):
    monkeypatch.setattr(training.run.estimate, "memory_of", lambda device: 100 * MB)
    make("large", max_steps=1).run()
    warned = before_the_steps(capsys.readouterr().out, "warning    the run needs about ")
    assert "this machine has 100 MB a rank: lower --micro_tokens, now " in warned


def test_what_is_said_before_the_steps_fits_a_terminal_whatever_the_machine_is(model, capsys, monkeypatch):
    why = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)"
    asked = settings(max_steps=3, max_minutes=60.0)
    pace = Pace(asked, Ranks(0, 64, CPU, why), Budget(16_000, 600.0, None, "--epochs 2"))
    pace.announce(model, range(100), 10**9, 400e9, torch.float32, Progress())
    shown = capsys.readouterr().out
    assert why in before_the_steps(f"{shown}step ", "machine ") and "too few to learn" in shown
    assert "whichever is first" in shown and all(len(line) <= WIDTH for line in shown.splitlines())


class Sampled:
    """A data set whose rows the model writes, so that nobody knows how long they become."""

    def prepare(self, step: int, model: MiniDeepSeek) -> dict: ...
    def state(self) -> dict: ...
    def load_state(self, state: dict) -> None: ...
    def __len__(self) -> int:
        return 100


@pytest.mark.parametrize(
    ("budget", "run"),
    [(Budget(7, None), "7 steps in at most 35s"), (Budget(None, 1.0), "at least 12 steps"),
     (Budget(7, 1.0), "7 steps in at most 35s")],
)  # fmt: skip
def test_what_is_sampled_takes_at_most_so_long_and_a_clock_leaves_at_least_so_many_steps(
    budget, run, model, capsys, monkeypatch
):
    """A clock ends a run whose steps are shorter after more of them; a number of steps ends it sooner."""
    monkeypatch.setattr(training.run.estimate, "step_seconds", lambda *_: 5.0)
    minutes = {"max_minutes": budget.max_minutes} if budget.max_minutes else {}
    Pace(settings(**minutes), Ranks(0, 1, CPU), budget).announce(model, Sampled(), 1, 1.0, torch.float32, Progress())
    (line,) = [line for line in capsys.readouterr().out.replace(f"\n{INDENT}", " ").splitlines() if line[:5] == "takes"]
    assert f"at most 5s a step where replies are as long as they may be, {run}, sampling apart, " in line


def test_ranks_of_one_machine_share_its_memory(monkeypatch):
    whole = training.run.estimate.memory_of(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 1e9 < whole == 4 * training.run.estimate.memory_of(CPU)
