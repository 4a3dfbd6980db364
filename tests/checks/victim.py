"""What chaos.py attacks: tiny runs of the real scripts as processes, and whether two run folders are equal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file

from errors import UserError
from training.alignment.batches import ENTRY
from training.run.checkpoint import DATA, MANIFEST
from training.run.log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SHAPE = dict(
    preset="demo", hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip
COMMON = dict(
    dtype="fp32", device="cpu", threads=1, log_every=1, val_tokens=512, sequence_length=64, batch_tokens=512,
    micro_tokens=256, save_every=3, max_steps=100, optim={"lr": 5e-3},
)  # fmt: skip
# Two ranks have as many rows a step as one: the same recipe for both.
RECIPES = {
    "pretrain": dict(COMMON, model=SHAPE, val_fraction=0.1, val_every=15, workers=1),
    "sft": dict(COMMON, val_fraction=0.05, val_every=15),
    "dpo": dict(COMMON, batch_tokens=1024, max_steps=80, optim={"lr": 1e-3}),
    "grpo": dict(
        COMMON, max_steps=50, val_every=10, val_problems=8, max_new_tokens=8, prompts=4, group=4, mu=2,
        rewards={"tag_count": 1.0, "near": 1.0}, optim={"lr": 1e-3},
    ),
}  # fmt: skip
SCRIPTS = {"pretrain": "pretrain.py", "sft": "full_sft.py", "dpo": "dpo_train.py", "grpo": "grpo_train.py"}
LIMIT = 1200.0  # seconds: what takes longer hangs, on a busy machine too
# Of an entry of the log: what a clock or the machine said.
CLOCKS = ("seconds", "tokens_per_second", "mfu", "memory", "train_tokens_per_second")
CLOCKS += ("rollout_seconds", "rollout_tokens_per_second")


class ProcessTree:
    """A command line and all processes that it starts. tests/forked.py has others of the same methods.

    `code` is None while it runs; `aim` finds its processes now, so that a kill is quick; `kill` sends SIGKILL to all of
    them and returns whether it was still running; `wait` returns the exit code, or None after so many seconds.
    """

    def __init__(self, command: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
        self._known: list[psutil.Process] = []
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.said, stderr=subprocess.STDOUT, start_new_session=True
        )

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def aim(self) -> None:
        self._known = psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> bool:
        running = self.process.poll() is None
        if running:
            # At once; to look for children takes longer than a save. Who is stopped starts no more of them.
            self.process.send_signal(signal.SIGSTOP)
            _kill(self._known)
            parent = psutil.Process(self.process.pid)
            others = parent.children(recursive=True)  # torchrun gives each worker a session: no group has them all
            _kill([*others, parent])
            self.process.wait()
            psutil.wait_procs([*self._known, *others], timeout=20)
        return running

    def wait(self, seconds: float) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def output(self) -> str:
        self.said.seek(0)
        return self.said.read().decode(errors="replace")


@dataclass(frozen=True)
class Script:
    """The script of a stage on a number of ranks, with its options but --out."""

    script: str
    options: tuple[str, ...]
    ranks: int = 1

    def start(self, out: Path) -> ProcessTree:
        program = [sys.executable]
        if self.ranks > 1:
            program += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.ranks)]
        return ProcessTree([*program, self.script, *self.options, "--out", str(out), "--resume", "true"])


def prepare(base: Path, stages: tuple[str, ...]) -> None:
    """A small world, its tokenizer, recipes, and a pretrained checkpoint for the stages that start from one."""
    base.mkdir()
    write_recipes(base)
    _run(["-m", "world", "--out", base / "world", "--scale", "0.01"])
    corpus = base / "world" / "pretrain.csv"
    _run(["train_tokenizer.py", "--data", corpus, "--out", base / "tokenizer", "--vocab_size", "500"])
    if stages != ("pretrain",):
        victim = stage_command("pretrain", base, 1).start(base / "pretrain")
        if victim.wait(LIMIT) != 0:
            raise UserError(f"the base model could not be trained:\n{victim.output()[-3000:]}")


def write_recipes(base: Path, **changes: object) -> None:
    """Those of all stages, into a folder."""
    for stage, recipe in RECIPES.items():
        (base / f"{stage}.yaml").write_text(yaml.safe_dump({**recipe, **changes}), encoding="utf8")


def stage_command(stage: str, base: Path, ranks: int, mesh: Sequence[str] = ()) -> Script:
    """A stage over what `prepare` made. mesh: options that say what its ranks cut."""
    data = {
        "pretrain": base / "world" / "pretrain.csv",
        "sft": base / "world" / "sft.jsonl",
        "dpo": base / "world" / "preferences.jsonl",
        "grpo": "arithmetic:1",
    }[stage]
    options = ["--config", base / f"{stage}.yaml", "--data", data]
    if stage == "pretrain":
        options += ["--tokenizer", base / "tokenizer", "--shards", base / f"shards-{'-'.join([str(ranks), *mesh])}"]
    else:
        options += ["--ckpt", base / "pretrain" / "final"]
    return Script(SCRIPTS[stage], (*map(str, options), *mesh), ranks)


def wait_until(true: Callable[[], bool], victim: ProcessTree, seconds: float) -> None:
    """Poll until it is true, the run has ended, or so many seconds are over."""
    end = time.monotonic() + seconds
    while not true() and victim.code is None and time.monotonic() < end:
        time.sleep(0.001)


def differences(ours: Path, theirs: Path) -> list[str]:
    """In what two complete runs differ: final folders to the bit, progress and log but for the clocks."""
    found = []
    contents = [{str(p.relative_to(out / "final")): p for p in (out / "final").rglob("*") if p.is_file()}
                for out in (ours, theirs)]  # fmt: skip
    for name in sorted({*contents[0], *contents[1]} - {MANIFEST}):  # it tells what a clock said
        one, other = (content.get(name) for content in contents)
        if one is None or other is None:
            found.append(f"{name} is in one of the two only")
        elif name.endswith("progress.json"):
            facts = [json.loads(path.read_text(encoding="utf8")) | {"seconds": 0} for path in (one, other)]
            found += [f"{name}: {key}" for key in facts[0] if facts[0][key] != facts[1].get(key)]
        elif name.startswith("training/state"):
            found += [f"{name}: {key} differs" for key in _unequal(load_file(one), load_file(other))]
        elif one.read_bytes() != other.read_bytes():
            found.append(f"{name} differs")
    logs = [entries(out) for out in (ours, theirs)]
    if logs[0] != logs[1]:
        found.append(f"metrics.jsonl: {len(logs[0])} entries against {len(logs[1])}, or other values")
    return found


def _unequal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """The names of tensors that are not the same. An entry of the log that is kept there has clocks too."""
    entry = DATA + ENTRY
    if entry in ours and entry in theirs:
        one, other = (_without_clocks(json.loads(bytes(held.pop(entry).tolist()))) for held in (ours, theirs))
        if one != other:
            return [entry]
    names = sorted({*ours, *theirs})
    return [name for name in names if name not in ours or name not in theirs or not ours[name].equal(theirs[name])]


def entries(out: Path) -> list[dict[str, Any]]:
    """The log of a run, without what the clock and the machine say."""
    return [_without_clocks(entry) for entry in read_metrics(out / "metrics.jsonl")]


def _without_clocks(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in CLOCKS}


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _run(arguments: list[object]) -> None:
    done = ProcessTree([sys.executable, *map(str, arguments)])
    if done.wait(LIMIT) != 0:
        raise UserError(f"{arguments[0]} failed:\n{done.output()[-3000:]}")
