"""docs/rewards.md is enough to write a reward: its examples run, from the folder that a command is given in."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import grpo_train
from text.chats.problems import Problem
from training.alignment.rewards import Rewards, Sample
from training.run.log import read_metrics

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGES = ("rewards.md", "rewards_zh.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf8"), re.MULTILINE | re.DOTALL
    )


@pytest.fixture(params=PAGES)
def page(request, tmp_path, monkeypatch) -> str:
    """A page, whose examples are my_rewards.py in the current folder, which Python has no other reason to look into."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    *examples, _ = blocks(request.param, "python")
    (tmp_path / "my_rewards.py").write_text("\n\n".join(examples), encoding="utf8")
    sys.modules.pop("my_rewards", None)
    yield request.param
    sys.modules.pop("my_rewards", None)


def test_the_examples_give_what_the_page_shows(page, capsys):
    *_, trial = blocks(page, "python")
    (shown,) = blocks(page, "text")
    exec(compile(trial, page, "exec"), {})
    assert capsys.readouterr().out == shown


def test_the_examples_give_what_they_say(page):
    sums = Problem("What is 2 + 3?", "5", "all")
    samples = [
        Sample(sums, "2 + 3 = 5", 5, 20), Sample(sums, "2 + 3 = 5", 5, 20), Sample(sums, "It is 5.", 20, 20, False),
        Sample(Problem("What is 1 + 4?", "5", "all"), "2 + 3 = 6, so 5", 10, 20),
    ]  # fmt: skip
    _, values = Rewards.of({f"my_rewards:{name}": 1 for name in ("brief", "worked_out", "varied")})(samples)
    assert values == {
        "my_rewards:brief": [0.75, 0.75, 0.0, 0.5],
        "my_rewards:worked_out": [1.0, 1.0, 0.5, 0.5],
        "my_rewards:varied": [0.5, 0.5, 1.0, 1.0],
    }


def test_a_run_finds_them_in_the_current_folder(page, run, pretrained, tmp_path):
    given = ["--ckpt", pretrained / "final", "--data", "arithmetic:1", "--out", "run", "--rewards"]
    given += ['{correct: 1, "my_rewards:brief": 0.2}', "--max_new_tokens", 4, "--sequence_length", 48, "--prompts", 2]
    given += ["--group", 2, "--val_problems", 0, "--max_steps", 1, "--dtype", "fp32", "--device", "cpu"]
    done = run(grpo_train.main, *given)
    assert done.code == 0, done.err
    assert "reward_my_rewards:brief" in read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]


def test_the_table_names_what_a_sample_has():
    sample = Sample(Problem("?", "1", "all"), "1", 1, 9)
    for page in PAGES:
        named = re.findall(r"^\| `([\w.]+): (\w+)` \|", (DOCS / page).read_text(encoding="utf8"), re.MULTILINE)
        assert len(named) == 8
        for name, kind in named:
            value = sample
            for part in name.split("."):
                value = getattr(value, part)
            assert type(value).__name__ == kind


def test_both_pages_have_the_same_examples():
    assert blocks(PAGES[0], "python") == blocks(PAGES[1], "python")
    assert blocks(PAGES[0], "bash") == blocks(PAGES[1], "bash")
