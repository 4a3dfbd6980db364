"""Reference curves: a further seed is within the band, a run that strays is told where, and usually why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from data_files import entry, write_run

from errors import UserError
from eval.compare import main
from eval.compared_run import ComparedRun
from eval.curves import Curve, measure_band, read_curve, write_curve
from eval.verdict import compare_with, report
from training.run.progress import Progress

SETTINGS = {"model": {"preset": "demo"}, "optim": {"lr": 3e-3, "betas": [0.9, 0.99]}, "bias_speed": {"0": 0.01},
            "sequence_length": 256, "out": "x", "data": "a.csv", "log_every": 1}  # fmt: skip
STEPS = 120


@pytest.fixture
def make(tmp_path) -> Callable[..., ComparedRun]:
    """Makes finished runs whose loss falls with noise; `off(step)` is added to it, `changes` go into its settings."""

    def make(
        seed: int, off: Callable[[int], float] = lambda step: 0.0, steps: int = STEPS, **changes: Any
    ) -> ComparedRun:
        rng, own = np.random.default_rng(seed), {**SETTINGS, "seed": seed, **changes.pop("settings", {})}
        held_out, tokenizer = changes.pop("held_out", "a.csv 1"), changes.pop("tokenizer", "t")
        drift, entries = rng.normal(0, 0.02), []
        for step in range(1, steps + 1):
            loss = 2 + 6 * math.exp(-step / 15) + drift + rng.normal(0, 0.08) + off(step)
            more = {"grad_norm": 0.5, "max_vio": [0.2, 0.3], **changes}
            if step % 20 == 0:
                more |= {"val_bits_per_byte": 0.3 * (loss + drift), "held_out": {"text": held_out}}
            entries.append(entry(step, loss=loss, tokens=step * 1000, **more))
        folder = write_run(tmp_path / f"run{len([*tmp_path.iterdir()])}", *entries)
        (folder / "config.yaml").write_text(yaml.safe_dump(own), encoding="utf8")
        (folder / "final" / "training").mkdir(parents=True)
        progress = asdict(Progress(step=steps, tokens=steps * 1000, finished=True, run={"tokenizer": tokenizer}))
        (folder / "final" / "training" / "progress.json").write_text(json.dumps(progress), encoding="utf8")
        return ComparedRun.open(str(folder))

    return make


@pytest.fixture
def demo(make) -> Curve:
    """Of four seeds."""
    return measure_band("demo", [make(seed) for seed in range(4)])


def said(curve: Curve, run: ComparedRun) -> str:
    return "\n".join(report(curve, run, compare_with(curve, run)))


def test_a_curve_is_the_mean_over_the_seeds_with_the_spread_between_them(make, tmp_path):
    runs = [make(seed) for seed in range(4)]
    curve = measure_band("demo", runs)
    last = curve.points["val_bits_per_byte"][-1]
    values = [run.entries[-1]["val_bits_per_byte"] for run in runs]
    assert last.tokens == STEPS * 1000 and last.mean == pytest.approx(np.mean(values))
    near = [[run.entries[step - 1]["val_bits_per_byte"] for run in runs] for step in (60, 80, 100, 120)]
    assert last.sigma == pytest.approx(math.sqrt(np.mean([np.var(own, ddof=1) for own in near])))
    whole = curve.points["loss"]
    assert [point.tokens for point in whole] == sorted(point.tokens for point in whole) and 20 < len(whole) <= 40
    assert 0.05 < whole[-1].step < 0.11  # 0.08, of which a stretch has seven steps
    files = write_curve(curve, runs, tmp_path / "curves")
    assert files[1].read_bytes().startswith(b"\x89PNG")
    again = read_curve(str(files[0]))
    assert again.facts == curve.facts and again.points["loss"][-1].mean == pytest.approx(whole[-1].mean, rel=1e-4)
    assert str(tmp_path) not in files[0].read_text(encoding="utf8")


def test_further_seeds_are_within_the_band_however_often_they_log(demo, make):
    outside = 0
    for seed in range(10, 22):
        run = make(seed)
        outside += "left the band" in said(demo, run)
        seldom = ComparedRun(run.name, run.entries[19::20], {}, run.folder)
        outside += "left the band" in said(demo, seldom)
    assert outside <= 3  # of 24


def test_what_a_run_logs_before_the_curve_begins_is_not_compared(demo, make):
    run = make(9)
    for step in (5, 10):  # the curve's first validation is at 20
        run.entries[step - 1] |= {"val_bits_per_byte": 2.5, "held_out": run.entries[19]["held_out"]}
    verdict = next(one for one in compare_with(demo, run) if one.measure == "val_bits_per_byte")
    tokens, off, allowed = verdict.deviations[0]
    assert tokens == 20_000 and abs(off) < allowed


def test_a_run_that_strays_is_told_where_and_on_which_side(demo, make):
    above = said(demo, make(9, lambda step: 0.5 * (step > 60)))
    assert (
        "loss (nats a token): left the band at 6" in above and "above" in above and "nothing in its settings" in above
    )
    (loss, *_) = compare_with(demo, make(9, lambda step: 0.5 * (step > 60)))
    assert 60_000 < loss.left < 70_000 and loss.above
    assert "(still there)" in above and "(now above)" in said(demo, make(9, lambda step: -0.7 if step < 60 else 0.7))
    assert "(inside again)" in said(demo, make(9, lambda step: 0.7 * (40 < step < 80)))
    below = compare_with(demo, make(9, lambda step: -0.5 * (step > 100)))
    assert 100_000 < below[0].left < 112_000 and not below[0].above
    spike = compare_with(demo, make(9, lambda step: 2.0 * (step == 60)))[0]
    assert spike.left is None  # one stretch


def test_the_usual_causes_are_named(demo, make):
    def strays(step: int) -> float:
        return 0.5

    found = said(demo, make(9, strays, settings={"optim": {"lr": 0.03, "betas": [0.9, 0.99]}}, grad_norm=4.0))
    assert "different: optim.lr is 0.03, not 0.003" in found
    assert "hint: the gradient's norm is 4 in the median, the reference's 0.5: learning rate, or data" in found
    found = said(demo, make(9, strays, max_vio=[0.2, 3.0], settings={"bias_speed": 0.0}))
    assert "different: bias_speed is 0.0, not {'0': 0.01}" in found and "hint: MaxVio is 3" in found
    found = said(demo, make(9, strays, tokenizer="other"))
    assert "different: another tokenizer" in found
    found = said(demo, make(9, strays, settings={"model": {"preset": "26m"}}, held_out="b.csv 2"))
    assert "model.preset is 26m, not demo" in found and "other held-out text" in found
    assert "val_bits_per_byte" not in found
    found = said(demo, make(9, steps=60))
    assert "the budget is 60,000 tokens, not 120,000" in found
    found = said(demo, make(9, strays, settings={"model": {"preset": "demo", "n_routed_experts": 4}}))
    assert "model.n_routed_experts is 4, not the preset's" in found
    found = said(demo, make(9, strays, settings={"optim": {"lr": "\x1b[2J"}}))  # which would clear the screen
    assert "optim.lr is \\x1b[2J, not 0.003" in found
    fine = said(demo, make(10, grad_norm=4.0))
    assert "hint" not in fine and "different" not in fine


def test_runs_that_are_no_seeds_of_one_recipe_make_no_band(make):
    one = make(0)
    for other, message in [
        (make(1, settings={"optim": {"lr": 1e-3, "betas": [0.9, 0.99]}}), "optim.lr is 0.001, not 0.003"),
        (make(0), "seeds 0, 0: two runs have the same"),
        (make(1, steps=60), "the budget is 60,000 tokens"),
    ]:
        with pytest.raises(UserError, match=message):
            measure_band("x", [one, other])
    with pytest.raises(UserError, match="two seeds or more make a band"):
        measure_band("x", [one])


def test_the_script_makes_a_band_and_says_whether_a_run_is_within(make, run, tmp_path):
    runs = [make(seed).folder for seed in range(3)]
    folder = ["--curves", tmp_path / "curves"]
    made = run(main, *runs, "--band", "demo", *folder)
    assert made.code == 0 and (tmp_path / "curves" / "demo.png").is_file(), made.err
    found = run(main, make(7).folder, "--reference", "demo", *folder, "--out", tmp_path / "out")
    assert found.code == 0 and "loss (nats a token): within the band; at 120,000 tokens" in found.out, found.out
    assert (tmp_path / "out" / "reference.png").read_bytes().startswith(b"\x89PNG")
    unknown = run(main, runs[0], "--reference", "64m", *folder)
    assert unknown.code == 2 and "--reference 64m: no such curve" in unknown.err and "there are: demo" in unknown.err
    (tmp_path / "curves" / "demo.csv").write_text("nonsense")
    damaged = run(main, runs[0], "--reference", "demo", *folder)
    assert damaged.code == 2 and "demo.csv: not a reference curve" in damaged.err
    (Path(runs[0]) / "config.yaml").unlink()
    nothing = run(main, *runs, "--band", "demo", *folder)
    assert nothing.code == 2 and "config.yaml: no settings of a run" in nothing.err
