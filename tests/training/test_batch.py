"""A recipe's batch is a ceiling: small data get smaller steps, and a run says when it is too short."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from toy_stage import ROWS, TIME, Rows, files

import training.run.estimate
from cli import parse
from errors import INDENT, WIDTH
from LMConfig import LMConfig
from model import MiniDeepSeek
from training.parallel.ranks import Ranks
from training.run.estimate import fit_batch, fit_micro_batch, warn_of_few_steps
from training.settings import NextTokenSettings


class OnRank0(Ranks):
    """The main rank of `world`, whose word needs no other."""

    def __init__(self, world: int) -> None:
        super().__init__(0, world, torch.device("cpu"))

    def on_main(self, work):
        return work()


def read(*arguments: object, recipe: Path | None = None) -> NextTokenSettings:
    config = ["--config", str(recipe)] if recipe else []
    return parse(NextTokenSettings, "", ["--out", "nowhere", *config, *map(str, arguments)])


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"sequence_length": 10, "batch_tokens": 320}), encoding="utf8")
    return path


@pytest.mark.parametrize(
    ("arguments", "world", "samples", "rows"),
    [
        ([], 1, 91, 1),  # one pass is 91 steps at the most
        (["--epochs", 20], 1, 91, 18),  # 1820 rows: 102 steps
        (["--epochs", 20], 4, 91, 16),  # whole rows that the ranks share
        ([], 1, 3200, 32),  # large enough
        (["--max_tokens", 5000], 1, 91, 5),  # a limit in tokens is steps too
        (["--max_steps", 8], 1, 91, 32),  # no smaller batch makes more of these
        (["--max_steps", 8, "--epochs", 1], 1, 91, 12),  # no more than were allowed
        (["--max_minutes", 5], 1, 91, 32),  # a clock may go round as often as it likes
        (["--max_minutes", 5], 1, 28, 28),  # but no step sees a row twice
        (["--max_minutes", 5], 8, 28, 24),
        (["--max_minutes", 5], 8, 5, 8),  # a row each at the least
        (["--max_minutes", 5, "--max_steps", 8], 1, 28, 28),
        (["--max_steps", 8], 1, 21, 21),
        (["--max_minutes", 5, "--batch_tokens=320"], 1, 28, 32),
        (["--batch_tokens=320"], 1, 91, 32),
    ],
)
def test_a_batch_is_lowered_until_the_run_has_a_hundred_steps(arguments, world, samples, rows, recipe, capsys):
    settings = read(*arguments, recipe=recipe)
    fit_batch(settings, OnRank0(world), samples)
    said = capsys.readouterr().out.replace(f";\n{INDENT}", "; ")
    assert settings.rows == rows and rows % world == 0
    told = f"notice: {rows} row{'s' * (rows > 1)} a step instead of 32" if rows != 32 else ""
    assert said.startswith(told) and said.count("\n") == bool(told)
    again = read("--epochs", 1, "--batch_tokens", settings.batch_tokens, "--sequence_length", 10)
    assert again.rows == rows


@pytest.mark.parametrize(
    ("arguments", "kind", "gigabytes", "rows"),
    [
        ([], "cpu", 80, 16),  # 8192 tokens
        ([], "cuda", 80, 64),  # the whole step
        ([], "cuda", 16, 32),  # two passes
        ([], "cuda", 6, 16),  # what does not fit is for the warning to say
        (["--micro_tokens", 8192], "cuda", 80, 16),
        (["--micro_tokens", 4096], "cuda", 80, 8),
    ],
)
def test_a_gpu_is_filled_by_a_pass_where_nobody_said_how_much(arguments, kind, gigabytes, rows, monkeypatch):
    monkeypatch.setattr(training.run.estimate, "memory_of", lambda device: gigabytes * 1e9)
    with torch.device("meta"):
        model = MiniDeepSeek(LMConfig.preset("64m"))
    settings = read("--batch_tokens", 32768, *arguments)
    fit_micro_batch(settings, Ranks(0, 1, torch.device(kind)), model, torch.bfloat16)
    assert settings.micro_rows == rows


def test_ranks_and_recipes_keep_their_share_of_a_pass(recipe, monkeypatch):
    monkeypatch.setattr(training.run.estimate, "memory_of", lambda device: 80e9)
    with torch.device("meta"):
        model = MiniDeepSeek(LMConfig.preset("demo"))
    settings = read("--batch_tokens", 65536)
    fit_micro_batch(settings, Ranks(1, 4, torch.device("cuda", 1)), model, torch.bfloat16)
    assert settings.micro_tokens == 16384 and settings.rows // 4 == settings.micro_rows
    recipe.write_text(yaml.safe_dump({"micro_tokens": 4096}), encoding="utf8")
    settings = read("--batch_tokens", 65536, recipe=recipe)
    fit_micro_batch(settings, Ranks(0, 1, torch.device("cuda", 0)), model, torch.bfloat16)
    assert settings.micro_tokens == 4096


def test_settings_that_no_command_line_gave_hold():
    settings = NextTokenSettings(out="nowhere", sequence_length=10, batch_tokens=320)
    fit_batch(settings, OnRank0(1), 91)
    assert settings.batch_tokens == 320


@pytest.mark.parametrize(
    ("arguments", "said"),  # a step takes 2 seconds
    [
        ([], "ends after 3 steps (--epochs 1), too few to learn; give --epochs 36 for 100 steps, or a smaller --batch"),
        (["--max_steps", 2], "ends after 2 steps (--max_steps 2), too few to learn; raise --max_steps"),
        (["--epochs", 7], ""),
        (["--max_minutes", 1], ""),
        (
            ["--max_minutes", 0.3],
            "ends after about 9 steps (--max_minutes 0.3), too few to learn; give --max_minutes 4 for",
        ),
        (
            ["--max_minutes", 0.01],
            "ends after about 1 step (--max_minutes 0.01), too few to learn; give --max_minutes 4",
        ),
        (["--max_minutes", 0.3, "--epochs", 9], "ends after about 9 steps (--max_minutes 0.3), too few to learn; give"),
        (
            ["--max_minutes", 0.3, "--max_steps", 2],
            "ends after 2 steps (--max_steps 2), too few to learn; raise --max_s",
        ),
    ],
)
def test_a_run_of_a_few_steps_says_so_once(arguments, said, recipe, capsys):
    warn_of_few_steps(read("--batch_tokens", 320, *arguments, recipe=recipe), OnRank0(1), 90, 2.0)
    shown = capsys.readouterr().out
    assert all(len(line) <= WIDTH for line in shown.splitlines())
    shown = shown.replace(f"\n{INDENT}", " ")
    assert said in shown and shown.count("\n") == bool(said)


def test_the_lowered_batch_is_in_the_saved_config_and_stays_on_resume(make):
    """With ten times the passes on resume, the rows of the recipe would do; the run has those that it began with."""
    options = dict(max_steps=None, save_every=40, by_hand=set())
    first = make(epochs=1, **options)
    first.run()
    assert yaml.safe_load((first.out / "config.yaml").read_text(encoding="utf8"))["batch_tokens"] == TIME
    assert first.progress.step == len(Rows())
    longer = make(epochs=1.1, resume=True, **options)
    longer.run()
    assert longer.settings.rows == 1 and longer.progress.step == 44


def test_a_run_from_before_batches_were_lowered_resumes_with_its_own(make):
    old = make("whole", max_steps=6, save_every=2)
    old.run()
    want = files(old.out / "final")
    shutil.rmtree(old.out / "final")
    path = old.out / "step-4" / "training" / "progress.json"
    saved = json.loads(path.read_text(encoding="utf8"))
    path.write_text(json.dumps({k: v for k, v in saved.items() if k not in ("best", "stale")}), encoding="utf8")
    (old.out / "step-4" / "training" / "manifest.json").unlink()
    resumed = make("whole", max_steps=None, epochs=1.2, batch_tokens=ROWS * TIME, resume=True, by_hand=set())
    resumed.run()
    assert resumed.settings.rows == ROWS and resumed.progress.step == 6
    assert files(old.out / "final").keys() == want.keys()
    assert files(old.out / "final")["model.safetensors"] == want["model.safetensors"]
