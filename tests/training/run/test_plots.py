"""A run's curves show what its metrics say."""

from __future__ import annotations

import json
import signal
import warnings
from pathlib import Path

import pytest
from toy_stage import ROWS, TIME, interrupt_at

import training.run.plots
from training.run.log import read_metrics
from training.run.plots import draw_run, load_pyplot, plain
from training.trainer import Trainer

DRAW = Trainer._draw


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that were drawn, kept from being closed until the test is over."""
    pyplot = load_pyplot()
    figures, close = [], pyplot.close
    monkeypatch.setattr(pyplot, "close", figures.append)
    yield figures
    for figure in figures:
        close(figure)


def run_folder(folder: Path, *entries: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf8")
    return folder


def test_a_real_run_is_drawn_from_its_metrics(pretrained, tmp_path, drawn):
    entries = read_metrics(pretrained / "metrics.jsonl")
    picture = draw_run(run_folder(tmp_path / "run", *entries))
    assert picture == tmp_path / "run" / "curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    (figure,) = drawn
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    losses = panels["training loss"].lines
    assert losses[0].get_ydata().tolist() == [entry["loss"] for entry in entries[1:]]
    assert losses[1].get_ydata().tolist() == [entry["mtp_loss"] for entry in entries[1:]]
    held_out = panels["held-out text"].lines[0]
    assert held_out.get_xdata().tolist() == [0, entries[-1]["tokens"]]
    assert held_out.get_ydata().tolist() == [entries[0]["val_bits_per_byte"], entries[-1]["val_bits_per_byte"]]
    assert panels["learning rate"].lines[0].get_ydata().tolist() == [entry["lr"] for entry in entries[1:]]
    assert panels["speed"].lines[0].get_ydata().tolist() == [entry["tokens_per_second"] for entry in entries[1:]]
    assert panels["expert balance"].lines[0].get_ydata().tolist() == [max(entry["max_vio"]) for entry in entries[1:]]
    load = panels["expert load on held-out text"].images[0].get_array()
    assert load.tolist() == [[share * 8 for share in layer] for layer in entries[-1]["expert_load"]]


def test_a_finished_run_has_its_curves(make, monkeypatch):
    monkeypatch.setattr(Trainer, "_draw", DRAW)
    trainer = make(max_steps=2)
    trainer.run()
    assert (trainer.out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_experts_or_validation_is_drawn_too(tmp_path, drawn):
    entry = {"step": 1, "tokens": 10, "loss": 3.0, "lr": 0.1, "tokens_per_second": 5.0}
    assert draw_run(run_folder(tmp_path / "run", entry)).is_file()
    titles = {axis.get_title() for axis in drawn[0].axes if axis.axison}
    assert titles == {"training loss", "learning rate", "speed"}  # no empty panels


def test_a_loss_that_is_rounding_alone_is_not_drawn(tmp_path, drawn):
    entries = [{"step": step, "tokens": step, "loss": 1e-9 * step, "reward": 0.1 * step, "lr": 1e-6} for step in (1, 2)]
    draw_run(run_folder(tmp_path / "run", *entries))
    assert [axis.get_title() for axis in drawn[0].axes if axis.get_title()] == ["rewards", "learning rate"]


@pytest.mark.parametrize("name", ["小镇", "小镇 run 🙂", "$a$ \U000e0100"])
def test_a_folder_of_any_name_draws_no_warning(name, tmp_path, drawn, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_run(run_folder(tmp_path / name, {"step": 1, "tokens": 10, "loss": 3.0}))
    assert not caplog.records
    (figure,) = drawn
    assert figure.get_suptitle().endswith(": 1 step, 10 tokens") and str(tmp_path) in figure.get_suptitle()


def test_a_character_is_drawn_where_a_font_of_the_system_has_it(monkeypatch):
    letter = "\u02ef"  # in matplotlib's own serif font, and not in the one that it draws with
    monkeypatch.setattr(training.run.plots, "CHINESE", ())
    load_pyplot()
    assert plain(f"a{letter}{letter}b") == "a…b"
    monkeypatch.setattr(training.run.plots, "CHINESE", ("of no system", "DejaVu Serif"))
    load_pyplot()
    assert plain(f"a{letter}b$") == f"a{letter}b\\$"
    monkeypatch.undo()
    load_pyplot()


@pytest.mark.parametrize("tokens", [0, 2048])
def test_a_single_point_stands_on_an_axis_from_zero(tokens, tmp_path, drawn):
    entry = {"step": 1, "tokens": tokens, "loss": 3.0, "val_bits_per_byte": 4.0}
    draw_run(run_folder(tmp_path / "run", entry))
    for axis in drawn[0].axes[:2]:
        left, right = axis.get_xlim()
        assert -0.03 * right < left <= 0 and right >= max(tokens, 1)
        drawn[0].canvas.draw()
        labels = [label.get_text() for label in axis.get_xticklabels()]
        shown = [label for label, place in zip(labels, axis.get_xticks(), strict=True) if left <= place <= right]
        assert len(shown) > 1 and not [label for label in shown if "\N{MINUS SIGN}" in label or "m" in label]
        assert axis.lines[0].get_markersize() > 4  # of a line of one point nothing else is seen


def test_the_title_tells_where_the_run_is_between_two_entries(make, monkeypatch, drawn):
    """Interrupted, resumed and interrupted again at steps that are not logged."""
    monkeypatch.setattr(Trainer, "_draw", DRAW)
    given = dict(max_steps=9, log_every=100)
    trainer = make(dataset=interrupt_at(3, signal.SIGTERM), **given)
    trainer.run()
    make(dataset=interrupt_at(5, signal.SIGTERM), resume=True, **given).run()
    titles = [figure.get_suptitle().removeprefix(f"{trainer.out}: ") for figure in drawn]
    assert titles == [f"{step} steps, {step * ROWS * TIME} tokens" for step in (3, 5)]


def test_a_run_without_metrics_has_no_curves(tmp_path):
    assert draw_run(tmp_path) is None
    assert draw_run(run_folder(tmp_path / "run")) is None


def test_preferences_have_panels_of_their_own(tmp_path, drawn):
    """`val_accuracy` is the share of pairs preferred here, and of problems solved in reinforcement learning."""
    start = {"step": 0, "tokens": 0, "loss": 0.7, "val_accuracy": 0.5, "val_margin": 0.0}
    end = {"step": 2, "tokens": 20, "loss": 0.4, "accuracy": 0.9, "margin": 1.5, "val_accuracy": 0.8, "val_margin": 1.2}
    draw_run(run_folder(tmp_path / "run", start, end))
    panels = {
        axis.get_title(): {line.get_label(): list(line.get_ydata()) for line in axis.lines} for axis in drawn[0].axes
    }
    assert panels["pairs preferred"] == {"train": [0.9], "held out": [0.5, 0.8]}
    assert panels["reward margin"] == {"train": [1.5], "held out": [0.0, 1.2]}
    assert "rewards" not in panels and "problems solved" not in panels


def test_problems_solved_are_no_rewards(tmp_path, drawn):
    end = {"step": 1, "tokens": 20, "loss": 0.4, "reward": 0.6, "val_accuracy": 0.8, "val_pass_1": 0.7}
    draw_run(run_folder(tmp_path / "run", end))
    panels = {axis.get_title(): [line.get_label() for line in axis.lines] for axis in drawn[0].axes}
    assert panels["rewards"] == ["train"] and panels["problems solved"] == ["held out, greedy", "held out, sampled"]
