"""Curves and samples also go where a person asked for, and nowhere else; a resumed run continues them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import pretrain
import training.run.trackers
from errors import UserError
from training.run.log import RunLog, read_metrics
from training.run.samples import Samples
from training.run.trackers import check_installed, open_trackers, tracker_names
from training.trainer import Trainer


def sampled(trainer: Trainer) -> Trainer:
    """With samples of two prompts after each step."""
    trainer.samples = Samples(1, [[3, 120, 130], [3, 140]], trainer.tokenizer, trainer.out, trainer.ranks, False)
    return trainer


def of_file(out: Path, step: int) -> list[list[str]]:
    """The samples of a step, prompt and text."""
    lines = map(json.loads, (out / "samples.jsonl").read_text(encoding="utf8").splitlines())
    return [[line["prompt"], line["text"]] for line in lines if line["step"] == step]


@pytest.fixture
def hosted(monkeypatch) -> Callable[[str], SimpleNamespace]:
    """`hosted(name)`: what a library in the place of wandb or swanlab is given, without keys in the environment."""
    for variable in ("API_KEY", "MODE"):
        monkeypatch.delenv(f"WANDB_{variable}", raising=False)
        monkeypatch.delenv(f"SWANLAB_{variable}", raising=False)

    def stand_in(name: str) -> SimpleNamespace:
        seen = SimpleNamespace(runs=[], logged=[], finished=0)
        library = SimpleNamespace(
            log=lambda values, step: seen.logged.append((step, values)),
            finish=lambda: setattr(seen, "finished", seen.finished + 1),
            Table=lambda columns, data: data,
            Text=lambda text, caption: [caption, text],
        )
        library.init = lambda **options: seen.runs.append(options) or library
        monkeypatch.setitem(sys.modules, name, library)
        return seen

    return stand_in


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_tracker_is_given_each_step_and_the_samples_and_stays_offline_without_a_key(name, make, hosted):
    seen = hosted(name)
    trainer = sampled(make(log_to=name, max_steps=2))
    trainer.run()
    (options,) = seen.runs
    assert (options["project"], options["mode"], seen.finished) == ("mini-deepseek-v3", "offline", 1)
    assert options["config"]["max_steps"] == 2
    numbers = {step: values for step, values in seen.logged if "samples" not in values}
    entries = read_metrics(trainer.out / "metrics.jsonl")
    assert [numbers[step].get("loss") for step in (0, 1, 2)] == [entry.get("loss") for entry in entries]
    assert numbers[1]["max_vio/layer_2"] == entries[1]["max_vio"][-1] and "max_vio" not in numbers[1]
    texts = {step: values["samples"] for step, values in seen.logged if "samples" in values}
    assert texts == {step: of_file(trainer.out, step) for step in (0, 1, 2)} and len(texts[2]) == 2


def test_a_wandb_project_implies_wandb(make, hosted):
    seen = hosted("wandb")
    make(wandb="mini", max_steps=1).run()
    assert seen.runs[0]["project"] == "mini" and [step for step, _ in seen.logged] == [0, 1]
    assert tracker_names(" tensorboard, wandb", "mini") == ["tensorboard", "wandb"]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
@pytest.mark.parametrize(
    ("environment", "mode"),
    [({}, "offline"), ({"API_KEY": "k"}, "online"), ({"API_KEY": "k", "MODE": "offline"}, "offline"),
     ({"MODE": "disabled"}, "disabled")],
)  # fmt: skip
def test_the_environment_decides_what_leaves_the_machine(environment, mode, name, hosted, monkeypatch, tmp_path):
    seen = hosted(name)
    for variable, value in environment.items():
        monkeypatch.setenv(f"{name.upper()}_{variable}", value)
    open_trackers([name], tmp_path, 0, "", {})
    assert seen.runs[0]["mode"] == mode


def test_a_resumed_run_is_the_same_one_there_and_a_new_run_another(make, hosted):
    both = [hosted(name) for name in ("wandb", "swanlab")]
    make(log_to="wandb,swanlab", max_steps=2).run()
    make(log_to="wandb,swanlab", max_steps=4, resume=True).run()
    shutil.rmtree(make().out / "final")
    make(log_to="wandb,swanlab", max_steps=1).run()
    for seen in both:
        assert [step for step, _ in seen.logged] == [0, 1, 2, 3, 4, 0, 1]
        first, resumed, new = (run["id"] for run in seen.runs)
        assert first == resumed == both[0].runs[0]["id"] and new == both[0].runs[2]["id"] != first
        assert len(new) == 21 and {run["resume"] for run in seen.runs} == {"allow"}


def test_the_real_tensorboard_reads_one_curve_of_a_resumed_run(make):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # the web page's
    from tensorboard.util.tensor_util import make_ndarray

    out = sampled(make(log_to="tensorboard", max_steps=4, save_every=2)).run().parent
    shutil.rmtree(out / "final")  # as if a kill had come after step 4 was logged
    sampled(make(log_to="tensorboard", max_steps=4, save_every=2, resume=True)).run()
    read = EventAccumulator(str(out / "tensorboard"))
    read.Reload()
    entries = [entry for entry in read_metrics(out / "metrics.jsonl") if "loss" in entry]
    losses = [(event.step, make_ndarray(event.tensor_proto).item()) for event in read.Tensors("loss")]
    assert losses == [(entry["step"], pytest.approx(entry["loss"], rel=1e-6)) for entry in entries]
    texts = read.Tensors("sample/1/text_summary")
    assert [event.step for event in texts] == [0, 1, 2, 3, 4]
    assert of_file(out, 4)[0][1] in texts[-1].tensor_proto.string_val[0].decode().replace("\n    ", "\n")


def test_the_completion_of_a_validation_goes_to_the_tracker_too(tmp_path, hosted):
    """Reinforcement learning logs one with each entry."""
    seen = hosted("wandb")
    sample = {"question": "3+4?", "completion": "7", "answer": "7", "rewards": {"correct": 1.0}}
    with RunLog(tmp_path, 0, True, open_trackers(["wandb"], tmp_path, 0, "", {})) as log:
        log.write({"step": 1, "tokens": 10, "sample": sample})
        log.write({"step": 2, "tokens": 20, "sample": sample, "val_accuracy": 1.0})
    assert [(step, values["samples"]) for step, values in seen.logged if "samples" in values] == [(2, [["3+4?", "7"]])]


def test_a_name_that_is_none_and_a_library_that_is_missing_are_one_line(pretrain_arguments, tmp_path, run, monkeypatch):
    with pytest.raises(UserError, match="--log_to tensorbord: one or more of tensorboard,wandb,swanlab"):
        tracker_names("wandb,tensorbord", "")
    monkeypatch.setattr(training.run.trackers, "find_spec", lambda name: None)
    done = run(pretrain.main, *pretrain_arguments, "--out", tmp_path / "run", "--log_to", "tensorboard,swanlab")
    assert done.code == 2 and done.err == (
        "error: --log_to tensorboard,swanlab: not installed; pip install tensorboard swanlab\n"
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    check_installed([])
