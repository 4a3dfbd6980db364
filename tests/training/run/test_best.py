"""The best validation is kept beside the last, patience ends a run, and both continue exactly after a resume."""

from __future__ import annotations

import signal

import pytest
import toy_stage
from toy_stage import ROWS, Rows, files, interrupt_at, steps_logged

from errors import UserError
from training.run.lines import held_out_text
from training.run.progress import Progress, read_progress


class Measured:
    """A validation that gives the values of a list, by the number of steps of the model's run."""

    def __init__(self, values: dict[int, float], name: str = "val_bits_per_byte") -> None:
        self.values, self.name, self.trainer = values, name, None

    def __call__(self, *_: object) -> dict[str, float]:
        return {self.name: self.values[self.trainer.progress.step]}


@pytest.fixture
def measured(make):
    """`make` with a validation after every step that gives these values."""

    def build(values, name="val_bits_per_byte", **options):
        trainer = make(**{"val_every": 1, "keep_best": True, "max_steps": 6, **options})
        trainer.validation = Measured(dict(enumerate(values)), name)
        trainer.validation.trainer = trainer
        return trainer

    return build


@pytest.mark.parametrize(
    ("held_out", "better"),
    [
        ([{"val_bits_per_byte": 2.0}, {"val_bits_per_byte": 1.9}, {"val_bits_per_byte": 1.9}], [True, True, False]),
        ([{"val_accuracy": 0.5}, {"val_accuracy": 0.6}, {"val_accuracy": 0.4}], [True, True, False]),
        ([{"val_accuracy": 0.5, "val_loss": 2.0}, {"val_accuracy": 0.4, "val_loss": 1.0}], [True, False]),
        ([{"val_loss": float("nan")}, {"val_loss": 1.0}, {"val_loss": float("nan")}], [False, True, False]),
        ([{"val_loss": 1.0}, {"val_accuracy": 0.1}], [True, True]),  # another measure begins again
        ([{}, {"val_x": 3}], [False, False]),
    ],
    ids=["bits fall", "accuracy rises", "accuracy first", "not finite", "another measure", "nothing known"],
)  # fmt: skip
def test_a_stage_is_judged_by_its_own_measure(held_out, better):
    progress = Progress()
    assert [progress.judge(entry) for entry in held_out] == better
    assert progress.stale == (0 if better[-1] else 1 if any(better) else len(better))


def test_the_best_checkpoint_is_kept_beside_the_last(measured, capsys):
    trainer = measured([9.0, 5.0, 4.0, 3.0, 4.0, 3.5, 3.0], keep=9, save_every=1)
    assert trainer.run() == trainer.out / "final"
    assert read_progress(trainer.out / "best").step == 3 and read_progress(trainer.out / "final").step == 6
    assert files(trainer.out / "best").keys() == files(trainer.out / "final").keys()
    kept = files(trainer.out / "step-3")
    assert {name: files(trainer.out / "best")[name] for name in kept} == kept
    assert "best of step 3, 3.0000 bits/byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "name", "told"),
    [
        ([3.0, 5.0, 4.0, 4.5], "val_bits_per_byte", "3.0000 bits/byte at step 0, 4.0000 bits/byte at best"),
        ([4.0, 5.0, 4.0, 4.5], "val_bits_per_byte", "4.0000 bits/byte at step 0, 4.0000 bits/byte at best"),
        ([0.6, 0.4, 0.5, 0.3], "val_accuracy", "accuracy 60.0% at step 0, accuracy 50.0% at best"),
        ([0.4, 0.4, 0.5, 0.3], "val_accuracy", ""),
        ([4.5, 5.0, 4.0, 4.5], "val_bits_per_byte", ""),
    ],
)
def test_a_best_that_is_no_better_than_before_training_is_said_to_be(values, name, told, measured, capsys):
    """After a resume too: the log remembers."""
    options = dict(max_steps=3, save_every=1)
    measured(values, name, **options, dataset=interrupt_at(2, signal.SIGTERM)).run()
    assert "notice: no validation" not in capsys.readouterr().out
    measured(values, name, **options, resume=True).run()
    shown = capsys.readouterr().out
    assert shown.count("notice: no validation was better than before training") == bool(told)
    assert told in shown.partition("best: ")[2]


def test_the_best_is_shown_under_the_name_that_its_step_has():
    """Of pairs it is the share that is preferred, not of answers that are right."""
    assert held_out_text({"step": 3, "val_accuracy": 0.638, "val_margin": 0.2}, "val_accuracy") == "preferred 63.8%"
    assert held_out_text({"step": 3, "val_accuracy": 0.638}, "val_accuracy") == "accuracy 63.8%"


def test_patience_ends_a_run_and_a_resume_leaves_it_ended(measured, capsys):
    values = [0.5, 0.6, 0.55, 0.58, 0.5, 0.9, 0.9]
    trainer = measured(values, "val_accuracy", patience=2)
    assert trainer.run() == trainer.out / "final"
    assert steps_logged(trainer) == [0, 1, 2, 3]
    assert "(ended by --patience 2)" in capsys.readouterr().out
    before = files(trainer.out)
    measured(values, "val_accuracy", patience=2, resume=True).run()
    assert "already complete after 3 steps (--patience 2)" in capsys.readouterr().out and files(trainer.out) == before
    more = measured(values, "val_accuracy", patience=3, resume=True)
    more.run()
    assert steps_logged(more) == [0, 1, 2, 3, 4] and read_progress(more.out / "best").step == 1


def test_a_resume_remembers_the_best_value_and_the_patience(measured):
    values = [9.0, 5.0, 4.0, 4.5, 4.4, 4.3, 4.2]
    options = dict(patience=4, save_every=1, keep=9, max_steps=6)
    whole = measured(values, out="whole", **options)
    whole.run()
    stopped = measured(values, dataset=interrupt_at(3, signal.SIGTERM), **options)
    assert stopped.run().name == "step-3"
    again = measured(values, resume=True, **options)
    again.run()
    for name in ("best", "final"):
        assert files(again.out / name) == files(whole.out / name)
        first, second = (read_progress(trainer.out / name) for trainer in (whole, again))
        assert (first.best, first.stale, first.step) == (second.best, second.stale, second.step)


def test_a_best_checkpoint_alone_is_a_run_that_is_not_overwritten(measured):
    def die(indices):
        if indices[0] >= 2 * ROWS:
            raise RuntimeError("the machine died")

    values = [9.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5]
    with pytest.raises(RuntimeError):
        measured(values, dataset=Rows(die)).run()
    with pytest.raises(UserError, match=r"holds a run already \(best\); add --resume"):
        measured(values).run()
    whole = measured(values, resume=True)
    assert whole.run() == whole.out / "final" and read_progress(whole.out / "best").step == 6


@pytest.mark.parametrize("option", [{"keep_best": True}, {"patience": 2}])
def test_what_needs_validations_is_refused_without_any(option, make, monkeypatch):
    with pytest.raises(UserError, match="compare validations along the run; give --val_every N"):
        make(**option)
    monkeypatch.setattr(toy_stage, "BitsPerByte", lambda *_: None)
    with pytest.raises(UserError, match="nothing is held out to measure on; give --val_fraction"):
        make(**option, val_every=1)


def test_the_progress_of_an_older_checkpoint_opens():
    assert Progress(step=2, tokens=3, seconds=1.0, finished=True, run={}, skipped=0).best == {}
    whole = {"measure": "val_loss", "value": 1.0, "step": 2}
    assert Progress(best=whole).best == whole
    for damaged in ({"best": 3}, {"best": {"value": 1.0}}, {"best": {**whole, "value": "much"}}, {"stale": -1}):
        with pytest.raises((ValueError, TypeError, AttributeError)):
            Progress(**damaged)
