"""Exact resumes, signals, and the checkpoints that stay."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from forked import on_ranks
from safetensors.torch import load_file
from toy_stage import ROWS, TIME, Rows, files, interrupt_at, steps_logged
from victim import differences

import model.checkpoint.folder
import training.run.interrupt
from errors import UserError
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.checkpoint.folder import to_hugging_face
from training.optim.build import OptimSettings
from training.parallel.ranks import Ranks
from training.run.checkpoint import Snapshot
from training.run.log import RunLog, read_metrics
from training.run.progress import newest
from training.trainer import Trainer
from training.validation import BitsPerByte

CASES = {
    "accumulated": {"micro_tokens": 3 * TIME},
    "tied": {"model": {"tie_word_embeddings": True}},
    "bfloat16": {"optim": OptimSettings(kind="adamw_bf16")},
    "Muon": {"optim": OptimSettings(kind="muon", lr=3e-3)},
}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_exact(case, make):
    options = dict(max_steps=5, save_every=2, balance_weight=0.1, **CASES[case])
    whole = make("whole", **options)
    whole.run()
    again = make(**options, resume=True)
    shutil.copytree(whole.out, again.out, ignore=shutil.ignore_patterns("final", "step-4"))
    torch.rand(17)  # whatever happened to the random numbers meanwhile
    assert again.run() == again.out / "final"
    assert not differences(again.out, whole.out) and steps_logged(again) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ("897 samples of f71f0c0ffee0, shares 4096", "the data changed (897 samples before and now, other content)"),
        ("900 samples of f71f0c0ffee0, shares 4096", "the data changed (897 samples before, 900 now)"),
        (
            "897 samples of 62403e833234, shares 1:4095",
            "the data changed (897 samples before and now, in other shares)",
        ),
        ("9:4 windows, shares 3072:1024", "the data changed (10 windows before, 13 now)"),
        ("4:6 windows, shares 3072:1024", "the data changed (10 windows before and now, other content)"),
        ("9 windows, shares 4096", "was trained with data = 897 samples of 62403e833234, shares 4096, not 9 windows, "),
    ],
)
def test_a_resume_with_other_data_says_what_changed(now, said, make):
    first, second = Rows(), Rows()
    before = "9:1 windows, shares 3072:1024" if now.endswith(":1024") else "897 samples of 62403e833234, shares 4096"
    first.identity, second.identity = before, now
    trainer = make(dataset=first, max_steps=1)
    trainer.run()
    with pytest.raises(UserError, match=r"; a run cannot change it midway, a new one can: --ckpt DIR") as refused:
        make(dataset=second, max_steps=2, resume=True).run()
    assert f"{trainer.out / 'final'}: {said}" in str(refused.value)


def test_a_tied_checkpoint_without_its_head_is_resumed_to_the_bit(make, monkeypatch):
    """As this project once wrote them: the embedding alone."""
    options = dict(max_steps=4, save_every=2, model={"tie_word_embeddings": True})
    whole = make("whole", **options)
    whole.run()
    with monkeypatch.context() as patch:
        patch.setattr(model.checkpoint.folder, "to_hugging_face", without_head)
        begun = make(**options, dataset=interrupt_at(2, signal.SIGTERM))
        assert begun.run().name == "step-2"
    assert "lm_head.weight" not in load_file(begun.out / "step-2" / "model.safetensors")
    assert make(**options, resume=True).run() == begun.out / "final"
    assert files(begun.out / "final") == files(whole.out / "final")
    assert "lm_head.weight" in load_file(begun.out / "final" / "model.safetensors")


def without_head(state: dict[str, torch.Tensor], config: LMConfig) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in to_hugging_face(state, config).items() if name != "lm_head.weight"}


def test_a_resume_forgets_the_steps_it_makes_again(make):
    """A run that died at step 3 had logged more than it saved, and its last line only half."""

    def die(indices: Sequence[int]) -> None:
        if indices[0] >= 3 * ROWS:
            raise RuntimeError("the machine died")

    died = make(dataset=Rows(die), save_every=2)
    with pytest.raises(RuntimeError, match="the machine died"):
        died.run()
    with open(died.out / "metrics.jsonl", "a", encoding="utf8") as file:
        file.write('{"step": 4, "lo')
    assert steps_logged(died) == [0, 1, 2, 3]
    make(resume=True, save_every=2).run()
    assert steps_logged(died) == [0, 1, 2, 3, 4]
    assert (died.out / "metrics.jsonl").read_text(encoding="utf8").count("\n") == 5


def test_resume_without_a_run_begins_one(make):
    assert make(resume=True, max_steps=1).run().name == "final"


def test_a_folder_with_a_run_is_refused_without_resume(make):
    first = make()
    first.run()
    before = files(first.out / "final")
    with pytest.raises(UserError, match=r"run: holds a run already \(final\); add --resume"):
        make().run()
    assert files(first.out / "final") == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 1}, "seed = 0, not 1"),
        ({"batch_tokens": 2 * ROWS * TIME}, f"rows = {ROWS}, not {2 * ROWS}"),
        ({"model": {"kv_lora_rank": 20}}, "model.kv_lora_rank = 16, not 20"),
    ],
    ids=["seed", "batch", "model"],
)
def test_a_resume_that_would_change_the_run_is_refused(change, what, make):
    make(max_steps=2).run()
    with pytest.raises(UserError, match=what):
        make(resume=True, **change).run()


def test_a_complete_run_says_so_and_is_left_alone(make, capsys):
    first = make()
    first.run()
    before = files(first.out)
    assert make(resume=True).run() == first.out / "final"
    assert "already complete after 4 steps" in capsys.readouterr().out
    assert files(first.out) == before


def test_a_larger_budget_goes_on_from_the_end(make):
    make(max_steps=2, save_every=1).run()
    trainer = make(max_steps=5, resume=True, save_every=2)
    assert trainer.run() == trainer.out / "final"
    assert steps_logged(trainer) == [0, 1, 2, 3, 4, 5]
    saved = MiniDeepSeek.from_pretrained(trainer.out / "final").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())
    assert make(max_steps=5, resume=True).run() == trainer.out / "final"
    assert [path.name for path in trainer.out.glob(".*")] == [".lock"]


def test_a_run_that_was_interrupted_can_be_ended_there(make):
    make(max_steps=2).run()
    assert make(max_steps=6, resume=True, dataset=interrupt_at(4, signal.SIGTERM)).run().name == "step-4"
    ended = make(max_steps=4, resume=True)
    assert ended.run() == ended.out / "final" and newest(ended.out) == ended.out / "final"
    assert files(ended.out / "final") == files(ended.out / "step-4")


def test_the_last_checkpoints_are_kept(make):
    trainer = make(max_steps=7, save_every=1, keep=2)
    trainer.run()
    assert sorted(path.name for path in trainer.out.iterdir() if path.is_dir()) == ["final", "step-5", "step-6"]


def test_signals_that_arrive_together_are_one_request(make):
    """Ctrl-C reaches the workers of torchrun from the terminal, and from torchrun once more."""
    trainer = make(dataset=interrupt_at(2, signal.SIGINT, signal.SIGINT, signal.SIGTERM))
    assert trainer.run() == trainer.out / "step-2"


def cut_at(step: int, number: int, asked: list[list[int]], rank: int = 0, by: int = signal.SIGINT) -> Rows:
    """Rows of two-row micro-batches; a signal arrives in `number` of `step`, both from 0. `asked`: all that were."""

    def before(indices: Sequence[int]) -> None:
        asked.append(list(indices))
        if indices[0] == step * ROWS + rank * ROWS // 2 + 2 * number:
            os.kill(os.getpid(), by)

    return Rows(before)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_obeyed_at_the_next_micro_batch_and_the_step_is_as_if_it_had_not_begun(by, make, capsys):
    cut = dict(micro_tokens=2 * TIME)
    whole = make("whole", **cut)
    whole.run()
    asked, handler = [], signal.getsignal(by)
    trainer = make(dataset=cut_at(2, 1, asked, by=by), **cut)
    assert trainer.run() == trainer.out / "step-2"
    assert asked[-2:] == [[16, 17], [18, 19]] and len(asked) == 2 * 4 + 2 and signal.getsignal(by) is handler
    said = f"interrupted: saved {trainer.out / 'step-2'}; the same command with --resume continues from there"
    assert said in capsys.readouterr().out
    assert steps_logged(trainer) == [0, 1, 2] and not (trainer.out / "final").exists()
    make(resume=True, **cut).run()
    assert not differences(trainer.out, whole.out)


def test_a_signal_in_the_first_step_leaves_nothing_and_says_so(make, capsys):
    trainer = make(dataset=cut_at(0, 1, []), micro_tokens=2 * TIME)
    assert trainer.run() == trainer.out
    assert "interrupted: before the first step, so that there is nothing to save" in capsys.readouterr().out
    make(micro_tokens=2 * TIME, max_steps=1).run()
    assert (trainer.out / "final").is_dir()


def test_ranks_leave_a_step_together_wherever_the_signal_came(make, tmp_path):
    def train(rank: int) -> None:
        dataset = cut_at(1, 0, [], rank) if rank == 1 else Rows()
        make(dataset=dataset, ranks=Ranks.start("cpu", timeout=10.0), max_steps=50, micro_tokens=2 * TIME).run()

    assert [rank.code for rank in on_ranks(2, train, tmp_path)] == [0, 0]
    assert (tmp_path / "run" / "step-1").is_dir() and not (tmp_path / "run" / "final").exists()
    assert [entry["step"] for entry in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


def measured(trainer: Trainer, number: int = 0) -> Trainer:
    """Validated on three batches; before the one of this number, counted over all validations, a signal comes."""
    seen, forward = [], trainer.model.forward

    def counted(*given: object, **named: object) -> object:
        seen.append(trainer.model.training)
        if seen.count(False) == number and not trainer.model.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*given, **named)

    trainer.validation = BitsPerByte(trainer.validation.batches * 3, trainer.validation.token_bytes)
    trainer.model.forward = counted
    return trainer


def test_a_validation_that_is_cut_short_by_a_signal_is_made_on_resume(make):
    whole, trainer = measured(make("whole", val_every=2)), measured(make(val_every=2), 3 + 1)
    whole.run()
    assert trainer.run() == trainer.out / "step-2"
    assert steps_logged(trainer) == [0, 1]
    measured(make(val_every=2, resume=True)).run()
    assert not differences(trainer.out, whole.out)


def test_a_last_validation_that_is_cut_short_leaves_the_run_unfinished(make, capsys):
    """All steps are done: the resumed run only validates, and is the whole one then."""
    whole, trainer = measured(make("whole", max_steps=2)), measured(make(max_steps=2), 3 + 2)
    whole.run()
    capsys.readouterr()
    assert trainer.run() == trainer.out / "step-2"
    shown = capsys.readouterr().out
    assert "finished" not in shown and "interrupted: saved" in shown and steps_logged(trainer) == [0, 1]
    again = measured(make(max_steps=2, resume=True))
    assert again.run() == trainer.out / "final"
    shown = capsys.readouterr().out
    assert "validating step 2" in shown and "finished: " in shown and "takes" not in shown
    assert not differences(trainer.out, whole.out)


def test_a_first_validation_that_is_cut_short_is_not_logged(make):
    trainer = measured(make(), 2)
    assert trainer.run() == trainer.out and not read_metrics(trainer.out / "metrics.jsonl")


def test_torchruns_own_report_of_the_signal_is_announced(make, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    make(dataset=interrupt_at(2, signal.SIGTERM)).run()
    assert capsys.readouterr().out.splitlines()[-1].endswith("it is torchrun's report of the signal, not a fault)")


def test_ranks_agree_on_whether_the_step_is_saved_already(make, tmp_path):
    """One looks while the folder is being written, the other, late, when it is there."""
    write, leave = Snapshot.write, RunLog.__exit__

    def slow(before: Callable[..., None]) -> Callable[..., None]:
        return lambda *given: (time.sleep(0.5), before(*given))[1]

    def train(rank: int) -> None:
        Snapshot.write = slow(write)
        RunLog.__exit__ = slow(slow(leave)) if rank == 0 else leave
        dataset = interrupt_at(2, signal.SIGTERM) if rank == 0 else Rows()
        make(dataset=dataset, ranks=Ranks.start("cpu", timeout=10.0), max_steps=50, save_every=2).run()

    assert [rank.code for rank in on_ranks(2, train, tmp_path)] == [0, 0]
    assert (tmp_path / "run" / "step-2").is_dir()


def test_a_later_signal_stops_at_once(make, monkeypatch):
    monkeypatch.setattr(training.run.interrupt, "TOGETHER", -1.0)
    trainer = make(dataset=interrupt_at(2, signal.SIGINT, signal.SIGINT))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list(trainer.out.glob("step-*")) and not (trainer.out / "final").exists()
