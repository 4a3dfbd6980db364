"""The whole path of `make demo` at a tiny size, once for all tests of what it leaves."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import dpo_train
import full_sft
import grpo_train
import pretrain
import world.__main__
from cli import call
from train_tokenizer import train_tokenizer
from training.run.log import RunLog


def stage(main: Callable[[], None], *arguments: object) -> str:
    """A script to its end, in this process. Returns what it printed."""
    from conftest import call_main

    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert call_main(main, *arguments) == 0
    return shown.getvalue()


def terminated(step: int, *arguments: object) -> str:
    """pretrain.py, which is sent SIGTERM when it has logged a step."""
    write = RunLog.write

    def signalling(self: RunLog, metrics: dict[str, Any]) -> None:
        write(self, metrics)
        if metrics["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "write", signalling)
        return stage(pretrain.main, *arguments)


def walk(folder: Path, recipe: dict[str, Any]) -> None:
    """Every stage once; pretraining is terminated and resumed on the way. said.txt: what they printed."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe), encoding="utf8")
    said = [stage(world.__main__.main, "--out", folder / "world", "--scale", 0.01)]
    corpus = folder / "world" / "pretrain.csv"
    options = ["--data", corpus, "--out", folder / "tokenizer", "--vocab_size", 500]
    said.append(stage(lambda: call(train_tokenizer, ""), *options))
    arguments = ["--config", folder / "tiny.yaml", "--data", corpus, "--tokenizer", folder / "tokenizer"]
    arguments += ["--shards", folder / "shards", "--max_steps", 40, "--out", folder / "pretrain"]
    said.append(shown := terminated(3, *arguments))
    (saved,) = (folder / "pretrain").glob("step-*")
    assert f"interrupted: saved {saved}; the same command with --resume continues from there" in shown
    said.append(shown := stage(pretrain.main, *arguments, "--resume"))
    assert f"resuming from {saved}" in shown and "finished: " in shown
    rows = ["--batch_tokens", 1024, "--micro_tokens", 512, "--log_every", 1, "--dtype", "fp32"]
    chats = ["--ckpt", folder / "pretrain" / "final", "--data", folder / "world" / "sft.jsonl", "--sequence_length", 64]
    said.append(stage(full_sft.main, *chats, *rows, "--out", folder / "sft", "--max_steps", 30, "--optim.lr", 5e-3))
    pairs = ["--ckpt", folder / "sft" / "final", "--data", folder / "world" / "preferences.jsonl"]
    pairs += ["--val_text", folder / "world" / "heldout.txt", "--sequence_length", 128, "--val_tokens", 1024]
    said.append(stage(dpo_train.main, *pairs, *rows, "--out", folder / "dpo", "--max_steps", 2, "--optim.lr", 1e-3))
    sums = ["--ckpt", folder / "dpo" / "final", "--data", "arithmetic:1", "--rewards", '{"tag_count": 1, "near": 1}']
    shape = ["--sequence_length", 64, "--max_new_tokens", 24, "--prompts", 4, "--group", 4, "--dtype", "fp32"]
    said.append(stage(grpo_train.main, *sums, *shape, "--out", folder / "grpo", "--max_steps", 2, "--val_problems", 8))
    (folder / "said.txt").write_text("".join(said), encoding="utf8")
    for name, few in (("favours", 40), ("questions", 30)):
        lines = (folder / "world" / f"heldout_{name}.jsonl").read_text(encoding="utf8").splitlines()[::few]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf8")
