"""Contenders measured interleaved (A B A B ...), each in its own process, so that a noisy machine is noisy to all.

A bench starts itself again as a worker: `BENCH ... --worker NAME`, which calls `serve`. What was measured becomes
verdicts, whose ratios come with the range that the measurements allow; `--json` keeps them for bench/summary.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from errors import quiet_imports
from LMConfig import LMConfig
from model import MiniDeepSeek
from training.machine import DTYPES, memory_used
from training.parallel.ranks import Ranks

SPEED, MEMORY = "tokens/s", "memory_mb"


def parser_of(doc: str, preset: str = "64m", dtype: str = "bf16", **numbers: int) -> argparse.ArgumentParser:
    """Return the command line that every bench has, and these whole numbers with their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=preset)
    parser.add_argument("--dtype", default=dtype, choices=DTYPES)
    for name, default in {"rounds": 5, **numbers}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", help="write the measurements to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser


def add_peers(parser: argparse.ArgumentParser, *peers: str) -> None:
    """The option `--peers`: the baselines, with these as its default."""
    text = "of transformers: experts_implementation, or that/attn_implementation"
    parser.add_argument("--peers", nargs="*", default=peers, help=text)


def device_of(name: str) -> torch.device:
    """auto takes CUDA where there is some. Raises `UserError` where cuda was asked for and is not there."""
    return Ranks.start(name).device


def now(device: torch.device) -> float:
    """Return the time in seconds, once the device has done all that it was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory_mb(device: torch.device) -> float:
    """Return the most memory this process has used, in MB of 2^20 bytes: allocated on the GPU, or resident."""
    return memory_used(device) / 2**20


@contextmanager
def checkpoint(config: LMConfig) -> Iterator[str]:
    """A folder with a model of random weights."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        MiniDeepSeek(config).save_pretrained(folder)
        yield folder


def open_baseline(folder: str, name: str, dtype: torch.dtype) -> Any:
    """transformers' model of a folder, quietly. name: see `add_peers`; its own choices are grouped_mm and sdpa."""
    experts, _, attention = name.partition("/")
    chosen = {"experts_implementation": experts} | ({"attn_implementation": attention} if attention else {})
    with quiet_imports():
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **chosen)


@dataclass
class Contender:
    """A worker. It prints `{}` when warm, then answers each line on stdin with a JSON object of numbers."""

    name: str
    command: list[str]
    results: list[dict[str, float]] = field(default_factory=list)

    def start(self) -> None:
        """Start the process and wait until it has warmed up."""
        self.process = subprocess.Popen(
            [sys.executable, *self.command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def run(self) -> None:
        """One measurement."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.results.append(self._read())

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def values(self, key: str) -> list[float]:
        return [result[key] for result in self.results]

    def median(self, key: str) -> float:
        return statistics.median(self.values(key))

    def _read(self) -> dict[str, float]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"error: {self.name} ended early; run: python {' '.join(self.command)}")


def measured(workers: dict[str, str], rounds: int, folder: str = "") -> list[Contender]:
    """Measure this bench's workers interleaved. workers: label -> what `--worker` says; folder: of their checkpoint."""
    command = [*sys.argv, *(["--folder", folder] if folder else [])]
    contenders = [Contender(name, [*command, f"--worker={worker}"]) for name, worker in workers.items()]
    for contender in contenders:
        contender.start()
    for _ in range(rounds):
        for contender in contenders:
            contender.run()
    for contender in contenders:
        contender.stop()
    return contenders


def serve(measure: Callable[[], dict[str, float]], device: torch.device, warm_up: int = 2) -> None:
    """Be a worker: measure once for each line on stdin, and report the peak memory too."""
    for _ in range(warm_up):
        measure()
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps({MEMORY: memory_mb(device), **measure()}), flush=True)


def serving_callback(result: Callable[[float], dict[str, float]], device: torch.device, warm_up: int) -> Any:
    """Return what serves from inside a loop of transformers. result: what was measured, of the seconds of a step."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        left, start = warm_up, 0.0

        def on_step_begin(self, *_: object, **__: object) -> None:
            if self.left <= 0 and not sys.stdin.readline():
                sys.exit(0)
            self.start = now(device)

        def on_step_end(self, *_: object, **__: object) -> None:
            found, self.left = {MEMORY: memory_mb(device), **result(now(device) - self.start)}, self.left - 1
            if self.left <= 0:
                print("{}" if self.left == 0 else json.dumps(found), flush=True)

    return Callback()


@dataclass(frozen=True)
class Verdict:
    """Ours against a baseline in one quantity, each measured several times, interleaved.

    Attributes:
        ours, theirs: medians; ratio: of the medians, ours over theirs.
        low, high: the least and the largest ratio that the measurements allow.
    """

    quantity: str
    baseline: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float

    @staticmethod
    def of(quantity: str, baseline: str, ours: Sequence[float], theirs: Sequence[float]) -> Verdict:
        mine, other = statistics.median(ours), statistics.median(theirs)
        low, high = min(ours) / max(theirs), max(ours) / min(theirs)
        return Verdict(quantity, baseline, mine, other, mine / other, low, high)

    @staticmethod
    def between(ours: Contender, baseline: Contender, key: str, quantity: str = "") -> Verdict:
        return Verdict.of(quantity or key, baseline.name, ours.values(key), baseline.values(key))

    @property
    def clear(self) -> bool:
        """Whether the ranges of the measurements do not overlap: only then is a difference shown."""
        return self.low > 1 or self.high < 1

    def __str__(self) -> str:
        ratio = f"{self.ratio:.2f}x ({self.low:.2f} - {self.high:.2f})"
        return ratio if self.clear else f"{ratio}, but the ranges overlap: no difference shown"


def report(
    title: str,
    contenders: Sequence[Contender],
    columns: dict[str, str],
    verdicts: Sequence[Verdict],
    facts: dict[str, str],
    file: str | None,
) -> None:
    """Print medians (smallest - largest) of these columns, verdicts and facts; write all as JSON if a file is named.

    columns: key of the measurements -> format; facts: other figures by name, as text with their unit.
    """
    print(f"{title}\n{machine()}")
    width = max(len(contender.name) for contender in contenders)
    for contender in contenders:
        cells = []
        for key, form in columns.items():
            middle, low, high = (form.format(f(contender.values(key))) for f in (statistics.median, min, max))
            cells.append(f"{middle} ({low} - {high}) {key}")
        print(f"  {contender.name:<{width}}  " + "  ".join(cells))
    for verdict in verdicts:
        print(f"{verdict.quantity} against {verdict.baseline}: {verdict}")
    for name, value in facts.items():
        print(f"{name}: {value}")
    if not file:
        return
    shown = " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    content: dict[str, Any] = {"title": title, "command": f"python {shown}", "machine": machine(), "facts": facts}
    content["verdicts"] = [{**asdict(verdict), "clear": verdict.clear} for verdict in verdicts]
    content["measured"] = {contender.name: contender.results for contender in contenders}
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(content, ensure_ascii=False, indent=2), "utf8")


def machine() -> str:
    """Processor, threads and torch, in a line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    if (facts := Path("/proc/cpuinfo")).exists():
        pairs = (line.split(":", 1) for line in facts.read_text().splitlines() if ":" in line)
        known = {key.strip(): value.strip() for key, value in pairs}
        units = [unit for unit in ("amx_bf16", "avx512_bf16") if unit in known.get("flags", "").split()]
        name = " ".join([known.get("model name", name), *units])
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
