"""What a run reports: lines that fit a terminal, with units and a legend, and metrics.jsonl."""

from __future__ import annotations

import ast
import io
import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import errors
import full_sft
import grpo_train
import training.run.log
from errors import tracked, waiting
from text.files import json_text
from training.parallel.ranks import Ranks
from training.run.lines import COLUMNS, HELD_OUT, duration, held_out_line, legend, step_line
from training.run.log import WIDTH, RunLog, read_metrics

ROOT = Path(__file__).resolve().parents[3]


def console_line(out: Path, capsys: pytest.CaptureFixture, **metrics: object) -> str:
    out.mkdir(exist_ok=True)
    with RunLog(out, 0, True) as log:
        log.write({"step": 1, "tokens": 10, **metrics})
    return capsys.readouterr().out


def test_no_two_measures_of_a_line_have_one_name(tmp_path, capsys):
    both = dict(accuracy=0.9, margin=1.5, val_accuracy=0.8, val_margin=1.25)
    line = console_line(tmp_path / "run", capsys, loss=0.4, **both)
    assert "preferred 90.0%  reward margin 1.500" in line
    assert "val  preferred 80.0%  reward margin 1.250" in line
    for shown in line.splitlines():
        names = re.findall(r"  ([a-zA-Z][-a-zA-Z ]*) [\d.]+", shown)
        assert len(names) == len(set(names))


def test_chinese_stays_chinese_in_the_log(tmp_path, capsys):
    """Through a resume too, which writes the lines again."""
    sample = {"question": "三加四等于几？", "completion": "七", "answer": "7", "rewards": {"correct": 1.0}}
    for step in (0, 1):
        with RunLog(tmp_path, step, True) as log:
            log.write({"step": step + 1, "tokens": 10, "val_accuracy": 1.0, "sample": sample})
        assert "三加四等于几？" in (tmp_path / "metrics.jsonl").read_text(encoding="utf8").splitlines()[0]
    assert [entry["sample"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [sample, sample]


@pytest.mark.parametrize("text", ["小镇", "half \ud83d of 🙂", "\u2028 and \x00"])
def test_what_utf8_cannot_hold_is_an_escape(text):
    assert json.loads(json_text({"text": text}).encode("utf8")) == {"text": text}
    assert "小镇" not in text or "小镇" in json_text(text)


# Digests, keys, headers and pipes, which only programs read.
FOR_PROGRAMS = {
    "comparison.py", "harness.py", "measured_rows.py", "tokenizer.py", "verifier.py", "dpo_train.py"
}  # fmt: skip


def test_no_json_is_written_with_escapes_for_chinese():
    folders = (ROOT / name for name in ("model", "text", "training", "eval"))
    for path in sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("json.dump", "json.dumps"):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                is_plain = options.get("ensure_ascii") == "False"
                assert is_plain or path.name in FOR_PROGRAMS, f"{path}:{call.lineno}"


PRETRAINING = {
    "step": 120000, "loss": 2.5, "lr": 1e-3, "grad_norm": 12.34, "tokens_per_second": 1234567.0, "mfu": 0.351,
    "max_vio": [0.25, 1.5], "memory": 71.2e9, "mtp_loss": 3.21, "val_bits_per_byte": 1.2345, "val_loss": 3.4,
}  # fmt: skip
REWARDED = {
    **PRETRAINING, "reward": 0.125, "reward_correct": 0.1234,
    "completion_length": 812.3, "zero_variance": 0.25, "clip_share": 0.123, "kl": 0.01,
    "entropy": 1.234, "val_accuracy": 0.625, "val_pass_1": 0.4,
}  # fmt: skip


@pytest.mark.parametrize("metrics", [PRETRAINING, REWARDED], ids=["pretraining", "rewards"])
def test_no_line_is_longer_than_a_hundred_characters(metrics):
    lines = [step_line(metrics, {"loss": 2.5}, 0.123, 360_000.0), held_out_line(metrics)]
    assert all(50 < len(line) <= WIDTH == 100 for line in lines), lines


def test_a_line_shows_how_far_the_run_is_and_how_long_it_still_takes():
    assert step_line(PRETRAINING, {}, 0.0412, 11_530.0).startswith("step 120000    4%  3h12m left  loss 2.5000  norm")
    assert " left" not in step_line(PRETRAINING, {}, 1.0, 0.0)
    assert "nan" not in step_line({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 1e-3}, {}, 0.5, None)


def test_a_log_file_hears_of_what_takes_long(tmp_path, capsys, monkeypatch):
    """Lines at most every `QUIET` seconds; a terminal has a bar with a percentage."""
    clock = [100.0]
    monkeypatch.setattr(training.run.log.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(training.run.log, "QUIET", 30.0)
    with RunLog(tmp_path, 0, True) as log:
        for done in range(100):
            log.doing("validating" if done > 20 else "sampling", done, 100)
            clock[0] += 1.0
        log.doing("", 0, 0)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"validating: {done} of 100, {done}%" for done in (31, 62, 93)]


def test_a_step_of_less_is_told_of_at_its_end(tmp_path, capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(training.run.log.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(training.run.log, "QUIET", 30.0)
    with RunLog(tmp_path, 0, True) as log:
        for step in (1, 2, 3):
            for done in range(4):
                log.doing(f"step {step}, micro-batches", done, 4)
                clock[0] += 6.0
            log.stepped(step / 10, None, {"loss": float(step)})
            log.pulse(step)
    assert capsys.readouterr().out == "step      2   20%  loss 1.5000\n"


def test_a_terminal_shows_two_bars_and_their_percentages(tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(training.run.log, "Console", lambda: console)
    monkeypatch.setattr(training.run.log, "QUIET", -1.0)
    with RunLog(tmp_path, 0, True) as log:
        log.stepped(0.25, 90.0, {})
        log.doing("sampling completions", 41.6, 64)
        log.bar.refresh()
        shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", console.file.getvalue())
        log.doing("", 0, 0)
        tasks = [task.visible for task in log.bar.tasks]
    assert re.search(r"25% \S+ 1m30s left", shown) and re.search(r"sampling completions +\S+ +65%", shown)
    assert tasks == [True, False] and "64, 65%" not in shown


class Slow:
    """A validation during which a minute passes, in three parts."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def __call__(self, model: object, dtype: object, ranks: Ranks) -> dict[str, float]:
        for _ in ranks.watch.track(range(3), "validating", 3):
            self.clock[0] += 20.0
        return {"val_loss": 1.0}


def test_no_validation_is_silent_for_long_in_a_log_file(make, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training.run.log.time, "monotonic", lambda: clock[0])
    trainer = make(max_steps=1)
    trainer.validation = Slow(clock)
    trainer.run()
    assert capsys.readouterr().out.count("validating: 2 of 3, 67%\n") == 2  # before the first step and after the last


def test_the_line_of_a_step_does_not_wait_for_its_validation(make, capsys):
    trainer, seen = make(max_steps=2, val_every=1), []
    measure = trainer.validation
    trainer.validation = lambda *given: (seen.append(capsys.readouterr().out), measure(*given))[1]
    trainer.run()
    assert [re.findall(r"step +(\d) .* loss", text)[-1:] for text in seen] == [[], ["1"], ["2"]]
    assert re.findall(r"step +(\d)", capsys.readouterr().out) == ["2"]  # that of the validation


def test_a_validation_has_its_units():
    assert held_out_line(PRETRAINING) == "step 120000   val  1.2345 bits/byte  loss 3.4000 nats"
    assert held_out_line({"step": 3, "loss": 1.0}) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "0.012s"), (5.23, "5.2s"), (59.4, "59s"), (59.6, "1m00s"), (725, "12m05s"), (11_530, "3h12m"),
     (356_400, "4d03h")],
)  # fmt: skip
def test_durations_have_two_units_at_most(seconds, text):
    assert duration(seconds) == text


def test_the_loss_of_a_line_is_the_mean_since_the_line_before(make, capsys):
    """While metrics.jsonl keeps the loss of each logged step."""
    every, some = make("every", max_steps=7), make("some", max_steps=7, log_every=3)
    every.run()
    losses = [entry["loss"] for entry in read_metrics(every.out / "metrics.jsonl")[1:]]
    capsys.readouterr()
    some.run()
    shown = dict(re.findall(r"^step +(\d+) .*? loss ([\d.]+)  norm", capsys.readouterr().out, flags=re.MULTILINE))
    means = {"1": losses[:1], "3": losses[1:3], "6": losses[3:6], "7": losses[6:]}
    assert shown == {step: f"{sum(values) / len(values):.4f}" for step, values in means.items()}
    assert [entry["loss"] for entry in read_metrics(some.out / "metrics.jsonl")[1:]] == [
        losses[i] for i in (0, 2, 5, 6)
    ]


def test_what_is_measured_on_pairs_is_the_mean_since_the_line_before_too(tmp_path, capsys):
    """The learning rate and the norm are the step's own."""
    with RunLog(tmp_path, 0, True) as log:
        for accuracy, margin in ((0.5, 1.0), (1.0, 2.0), (0.9, math.nan)):
            log.stepped(0.5, None, {"loss": 0.25, "accuracy": accuracy, "margin": margin})
        log.write({"step": 3, "tokens": 10, "loss": 9.0, "accuracy": 0.9, "margin": 7.0, "grad_norm": 3.0, "lr": 1e-3})
        log.stepped(1.0, None, {"accuracy": 0.25})
        log.pulse(3)
        log.write({"step": 4, "tokens": 10, "accuracy": 0.0})
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("preferred 80.0%  reward margin 1.500  loss 0.2500  norm 3.00  lr 1.0e-03")
    assert second.endswith("preferred 25.0%")
    assert [entry["accuracy"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [0.9, 0.0]


def test_before_training_only_what_was_measured_is_shown(make, capsys):
    make(max_steps=1).run()
    (untrained,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step      0")]
    assert re.fullmatch(r"step      0   val  [\d.]+ bits/byte  loss [\d.]+ nats", untrained)


def test_what_lasts_long_is_said_and_what_does_not_is_not(capsys, monkeypatch):
    with waiting("reading much"):
        pass
    monkeypatch.setattr(errors, "PATIENCE", 0.0)
    with waiting("reading much", speaks=False):
        time.sleep(0.05)
    assert not capsys.readouterr().err
    with waiting("reading much"):
        time.sleep(0.2)
    assert capsys.readouterr().err == "reading much ...\n"
    monkeypatch.setenv("RANK", "1")
    with waiting("reading much"):
        time.sleep(0.05)
    assert not capsys.readouterr().err


def test_what_is_tracked_is_told_now_and_then_in_a_log_file_and_in_a_bar_elsewhere(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(errors.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(errors, "QUIET", 30.0)

    def items():
        for item in range(100):
            clock[0] += 1.0
            yield item

    assert list(tracked(items(), "asking", 100, speaks=False)) == list(range(100)) and not capsys.readouterr().err
    assert list(tracked(items(), "asking", 100)) == list(range(100))
    assert capsys.readouterr().err.splitlines() == [f"asking: {done} of 100, {done}%" for done in (30, 61, 92)]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(tracked(items(), "asking", 100)) == list(range(100))
    assert "asking:   0%" in capsys.readouterr().err


def test_lines_reach_a_file_as_they_are_printed(monkeypatch, tmp_path):
    with open(tmp_path / "out.txt", "w", encoding="utf8") as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "argv", ["script"])
        errors.command_line(lambda: print("first"))
        assert (tmp_path / "out.txt").read_text() == "first\n"


def test_a_run_that_logs_seldom_is_not_silent(make, capsys, monkeypatch):
    """A line for a step that comes long after the last one, but no entry of metrics.jsonl."""
    monkeypatch.setattr(training.run.log, "QUIET", -1.0)
    trainer = make(max_steps=5, log_every=100)
    trainer.run()
    shown = re.findall(r"^step +(\d+) +\d+%", capsys.readouterr().out, flags=re.MULTILINE)
    assert shown == ["1", "2", "3", "4", "5"] and len(read_metrics(trainer.out / "metrics.jsonl")) == 3


def test_a_long_step_says_how_far_it_is(make, capsys, monkeypatch):
    monkeypatch.setattr(training.run.log, "QUIET", -1.0)
    make(max_steps=2, micro_tokens=2 * 16).run()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("step 2, ")] == [
        f"step 2, micro-batches: {done} of 4, {share}%" for done, share in ((0, 0), (1, 25), (2, 50), (3, 75))
    ]


@pytest.mark.parametrize("script", [full_sft, grpo_train], ids=["full_sft", "grpo_train"])
def test_help_explains_each_word_of_a_line(script, run):
    shown = run(script.main, "--help").out
    assert legend() in shown
    for column in (*COLUMNS, *HELD_OUT):
        assert column.meaning in shown and column.form.partition("{")[0] in shown
