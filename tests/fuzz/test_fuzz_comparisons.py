"""What runs and measurements left, damaged, at the scripts that compare and draw it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eval.comparison
from eval.compared_run import open_runs
from eval.comparison import markdown
from eval.experts import draw as draw_loads
from eval.held_out import held_out_documents
from eval.scores import Measured, Score
from fuzz.hostile import Thrower, thrown
from fuzz.mutations import PLACES, damaged, put, strange_json
from fuzz.test_fuzz_settings import strange_yaml
from text.tokenizer import Tokenizer
from training.run.log import RunLog, read_metrics
from training.run.plots import draw_run

ENTRIES = [
    {
        "step": step, "tokens": 100 * step, "seconds": 1.5 * step, "loss": 5.0 - step, "lr": 0.1, "grad_norm": 1.0,
        "tokens_per_second": 100.0, "mfu": 0.1, "max_vio": [0.5, 0.25], "val_bits_per_byte": 2.0,
        "expert_load": [[0.5, 0.5], [0.25, 0.75]], "memory": 10**9, "skipped": 0,
        "held_out": {"text": "a.csv 01"},
    }
    for step in range(4)
]  # fmt: skip
METRICS = "".join(json.dumps(entry) + "\n" for entry in ENTRIES).encode()
SCORES = [Score("all", "acc", 0.5, 0.4, 0.6, 0.25, 10), Score("all", "bits_per_byte", 2.0, items=10, share=False)]
MEASURED = Measured("words", {"kind": "text", "window": 2}, SCORES, 10, 0, 1.0, "ab")
SCORED = json.dumps({"ckpt": "a", "weights": {}, "suites": {"words": asdict(MEASURED)}}).encode()


def two_runs(folder: Path) -> list[str]:
    for name in ("a", "b"):
        (folder / name / "eval" / "final").mkdir(parents=True)
        (folder / name / "metrics.jsonl").write_bytes(METRICS)
        (folder / name / "eval" / "final" / "scores.json").write_bytes(SCORED)
    return [str(folder / "a"), str(folder / "b")]


@st.composite
def damaged_logs(draw) -> bytes:
    """A line that is no entry, or other bytes."""
    if draw(st.booleans()):
        return draw(damaged(METRICS))
    lines = METRICS.splitlines()
    number = draw(st.integers(0, len(lines) - 1))
    lines[number] = draw(strange_json(lines[number]))
    return b"\n".join(lines)


def compared(runs: list[str]) -> str:
    return markdown(open_runs(runs))


def compared_and_drawn(runs: list[str], out: Path) -> None:
    """As eval/compare.py."""
    opened = open_runs(runs)
    eval.comparison.draw(opened, out, "tokens")


def damage_one(data: st.DataObject, folder: Path) -> list[str]:
    runs = two_runs(folder)
    if data.draw(st.booleans()):
        put(folder / "b" / "metrics.jsonl", data.draw(damaged_logs()), data.draw(st.sampled_from(PLACES)))
    else:
        file = folder / "b" / "eval" / "final" / "scores.json"
        put(file, data.draw(strange_json(SCORED)), data.draw(st.sampled_from(PLACES)))
    return runs


@thrown(0.5)
@given(data=st.data())
def test_a_comparison(throw: Thrower, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        throw(compared, damage_one(data, Path(folder)))


@pytest.fixture(scope="module")
def not_rendered() -> Iterator[None]:
    """Pictures are laid out, but not made, which would take seconds each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
        yield


@thrown(0.1)
@given(data=st.data())
def test_the_picture_of_a_comparison(not_rendered: None, throw: Thrower, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        throw(compared_and_drawn, damage_one(data, Path(folder)), Path(folder, "c.png"))


@thrown(0.5)
@given(names=st.lists(st.text(max_size=6) | st.sampled_from(("a", "b", "", ".", "a/../a", "/", "\0")), max_size=3))
def test_names_of_runs(throw: Thrower, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        two_runs(Path(folder))
        throw(compared, [str(Path(folder, name)) if name in ("a", "b") else name for name in names])


@thrown(0.1)
@given(content=damaged_logs())
def test_the_curves_of_a_run(not_rendered: None, throw: Thrower, content: bytes) -> None:
    """What every training script draws at its end, and eval/experts.py of the run that its checkpoint is from."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "metrics.jsonl").write_bytes(content)
        throw(draw_run, Path(folder))
        domains = {"a$b$": torch.ones(2, 4), "b": torch.ones(2, 4)}
        throw(draw_loads, "$x", domains, read_metrics(Path(folder, "metrics.jsonl")), Path(folder, "e.png"))


@thrown()
@given(content=damaged_logs())
def test_the_log_that_a_resumed_run_goes_on_with(throw: Thrower, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "metrics.jsonl")
        file.write_bytes(content)
        throw(RunLog, Path(folder), 2, True, "", {})
        assert all(entry["step"] <= 2 for entry in read_metrics(file))


@pytest.fixture(scope="module")
def pretraining(world: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a pretraining leaves that eval/held_out.py and eval/report.py ask for."""
    folder = tmp_path_factory.mktemp("pretraining")
    tokenizer.save(folder / "tokenizer")
    rows = (world / "pretrain.csv").read_text(encoding="utf8").splitlines(keepends=True)[:40]
    (folder / "text.csv").write_text("".join(rows), encoding="utf8")
    config = {
        "data": str(folder / "text.csv"), "tokenizer": str(folder / "tokenizer"), "ckpt": "", "column": None,
        "shards": str(folder / "shards"), "encoding": "utf-8", "min_chars": 1, "val_fraction": 0.3,
        "on_error": "skip", "sequence_length": 32, "val_tokens": 100, "micro_tokens": 64, "datasets": "none.yaml",
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf8")
    return folder


def documents_of(run: Path) -> list[str]:
    return list(held_out_documents(run))


@thrown(0.5)
@given(data=st.data())
def test_the_settings_of_a_pretraining(throw: Thrower, pretraining: Path, data: st.DataObject) -> None:
    whole = (pretraining / "config.yaml").read_bytes()
    content = data.draw(strange_yaml(whole))
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(pretraining, Path(folder, "run"))
        # What it makes for other settings belongs to the case.
        content = content.replace(bytes(pretraining), os.fsencode(Path(folder, "run")))
        put(Path(folder, "run", "config.yaml"), content, data.draw(st.sampled_from(PLACES)))
        os.chdir(folder)
        try:
            throw(documents_of, Path(folder, "run"))
        finally:
            os.chdir(before)


def test_a_whole_pretraining_has_held_out_documents(throw: Thrower, pretraining: Path) -> None:
    assert throw(documents_of, pretraining).value
