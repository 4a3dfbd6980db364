"""The arms trained: every arm and seed is a run of pretrain.py, several side by side, resumed where they stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from errors import UserError, naming
from eval.compared_run import ComparedRun
from eval.paper.arms import BASE, Arm
from eval.paper.speed import training_rates
from text.files import json_text

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Corpus:
    """What all arms read. Attributes: data, tokenizer: of pretrain.py; shards: folder for them."""

    data: str
    tokenizer: str
    shards: str


@dataclass
class Laboratory:
    """The runs of all arms in a folder.

    Attributes: arms: by name; seeds: of each; jobs: runs at once, each on `threads` threads where there is no GPU.
    """

    out: Path
    arms: dict[str, Arm]
    corpus: Corpus
    seeds: Sequence[int] = (0, 1, 2)
    jobs: int = 1
    threads: int = 1
    device: str = "auto"
    _rates: dict[str, float] = field(default_factory=dict)

    def folder(self, arm: str, seed: int) -> Path:
        """Return the run folder."""
        return self.out / arm / f"seed-{seed}"

    def final(self, arm: str, seed: int) -> Path:
        """Return the last checkpoint of a run."""
        return self.folder(arm, seed) / "final"

    def run(self, arm: str, seed: int) -> ComparedRun:
        """Return what a run has logged."""
        return ComparedRun.open(str(self.folder(arm, seed)))

    def train(self, names: Sequence[str]) -> None:
        """Train what is not there yet; seed by seed, so that an early end leaves whole comparisons.

        Raises `UserError` where a run ends in an error, and for folders of runs with other settings.
        """
        settings = {name: self._settings(name) for name in names}
        waiting = [(name, seed) for seed in self.seeds for name in names if not self._done(name, seed, settings[name])]
        if not waiting:
            return
        print(f"training {len(waiting)} runs, {self.jobs} at once, into {self.out}", flush=True)
        done = [lambda name=name, seed=seed: self._train(name, seed, settings[name]) for name, seed in waiting]
        print(f"1/{len(done)}  {done[0]()}", flush=True)  # alone: it makes the shards for all
        with ThreadPoolExecutor(min(self.jobs, len(done))) as pool:
            try:
                for count, line in enumerate(pool.map(lambda run: run(), done[1:]), 2):
                    print(f"{count}/{len(done)}  {line}", flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def rate(self, arm: str) -> float:
        """Return tokens per second of an arm's training, as measured beside the base's by turns."""
        path = self.out / "rates.json"
        if not self._rates and path.is_file():
            self._rates = json.loads(path.read_text(encoding="utf8"))
        if arm not in self._rates:
            print(f"measuring the speed of {arm}", flush=True)
            given = {name: self.arms[name].settings for name in (BASE, arm)}
            found = training_rates(given, self.corpus.tokenizer, self.device, self.threads)
            self._rates.setdefault(BASE, median(found[BASE]))
            if arm != BASE:  # the median over the rounds, whose pace cancels
                pairs = zip(found[arm], found[BASE], strict=True)
                self._rates[arm] = self._rates[BASE] * median(own / base for own, base in pairs)
            with naming(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json_text(self._rates) + "\n", encoding="utf8")
        return self._rates[arm]

    def _settings(self, name: str) -> dict[str, Any]:
        """Return those of pretrain.py, the tokens of equal time worked out, whole steps of them."""
        arm = self.arms[name]
        if not arm.equal_time_with:
            return arm.settings
        own = next(one for one in self.arms.values() if one.settings == arm.settings and not one.equal_time_with)
        step, tokens = arm.settings["batch_tokens"], arm.settings["max_tokens"]
        # The base last: it is measured beside the others.
        rates = {each: self.rate(each) for each in sorted((own.name, arm.equal_time_with), key=BASE.__eq__)}
        longer = tokens * rates[own.name] / rates[arm.equal_time_with]
        return {**arm.settings, "max_tokens": round(longer / step) * step}

    def _done(self, name: str, seed: int, settings: dict[str, Any]) -> bool:
        """Return whether a run is at its end. Raises `UserError` for one with other settings."""
        kept = self.folder(name, seed) / "arm.yaml"
        if kept.is_file() and yaml.safe_load(kept.read_text(encoding="utf8")) != settings:
            raise UserError(f"{kept.parent}: was trained with other settings than {name} has now; remove it")
        return (self.final(name, seed) / "config.json").is_file()

    def _train(self, name: str, seed: int, settings: dict[str, Any]) -> str:
        folder = self.folder(name, seed)
        start(ROOT / "pretrain.py", folder, settings, self._options(seed))
        run = ComparedRun.open(str(folder))
        return f"{name}, seed {seed}: {run.last('val_bits_per_byte'):.4f} bits per byte, {run.last('seconds'):.0f} s"

    def _options(self, seed: int) -> list[str]:
        options = ["--data", self.corpus.data, "--tokenizer", self.corpus.tokenizer, "--shards", self.corpus.shards]
        options += ["--seed", str(seed), "--device", self.device, "--threads", str(self.threads)]
        return [*options, "--resume", "true"]


def start(script: Path, folder: Path, settings: dict[str, Any], options: Sequence[str]) -> None:
    """Run a training script with settings in a file of the run's folder. Raises `UserError` with its last line."""
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "arm.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf8")
    command = [sys.executable, str(script), "--config", str(folder / "arm.yaml"), "--out", str(folder), *options]
    with open(folder / "console.txt", "a", encoding="utf8") as console:
        ended = subprocess.run(command, stdout=console, stderr=subprocess.STDOUT, check=False).returncode
    if ended:
        lines = (folder / "console.txt").read_text(encoding="utf8").strip().splitlines()
        raise UserError(f"{folder}: {lines[-1] if lines else f'ended with {ended}'}; all of it is in console.txt")
