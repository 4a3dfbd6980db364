"""Programs measured in turn, each in its own process: A B A B ..., so that a noisy machine is noisy to all."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from device import add_device, memory_mb
from findings import Findings, Verdict

from errors import quiet_imports
from LMConfig import LMConfig
from model import MiniDeepSeek
from training.machine import DTYPES


@dataclass
class Contender:
    """A program in its own process. It prints `{}` when warm, then answers each line with a JSON object of numbers."""

    name: str
    command: list[str]
    results: list[dict[str, float]] = field(default_factory=list)

    def start(self) -> None:
        """Start the process and wait until it has warmed up."""
        self.process = subprocess.Popen(
            [sys.executable, *self.command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def run(self, keep: bool = True) -> None:
        """One measurement."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        result = self._read()
        if keep:
            self.results.append(result)

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


def options_of(doc: str, peers: tuple[str, ...], **numbers: int) -> argparse.Namespace:
    """What `parser_of` reads from the command line."""
    return parser_of(doc, peers, **numbers).parse_args()


def parser_of(doc: str, peers: tuple[str, ...], **numbers: int) -> argparse.ArgumentParser:
    """The command line that every comparison with transformers has, and these numbers with their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="64m")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    for name, default in {**numbers, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--peers", nargs="*", default=peers, help="transformers: experts_implementation, or that/attn_implementation"
    )
    parser.add_argument("--json", help="write the measurements to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    add_device(parser)
    return parser


def open_peer(folder: str, peer: str, dtype: torch.dtype) -> Any:
    """transformers' model of a folder, quietly. peer: see --peers; its own choices are grouped_mm and sdpa."""
    experts, _, attention = peer.partition("/")
    chosen = {"experts_implementation": experts} | ({"attn_implementation": attention} if attention else {})
    with quiet_imports():
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **chosen)


def against_transformers(
    script: str, options: argparse.Namespace, also: Sequence[str] = ()
) -> tuple[LMConfig, Contender, list[Contender]]:
    """Measure `script --worker NAME` for ours and each peer in turn, all on one checkpoint without MTP.

    also: further workers of ours, which come first among the peers.
    """
    config = LMConfig.preset(options.preset, num_nextn_predict_layers=0)
    own = {"peers", "json", "worker", "folder", "rounds", "quantize"}
    values = {name: value for name, value in vars(options).items() if name not in own and value is not False}
    given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        MiniDeepSeek(config).save_pretrained(folder)
        command = [script, "--folder", folder, *given]
        ours = Contender("ours", [*command, "--worker", "ours"])
        peers = [Contender(f"ours {name}", [*command, "--worker", name]) for name in also]
        peers += [Contender(f"transformers {peer}", [*command, "--worker", peer]) for peer in options.peers]
        compare([ours, *peers], options.rounds)
    return config, ours, peers


def serve(measure: Callable[[], dict[str, float]], device: torch.device, warm_up: int = 2) -> None:
    """The other side of `Contender`: measure once for each line on stdin, and report the peak memory too."""
    for _ in range(warm_up):
        measure()
    print("{}", flush=True)
    for _ in sys.stdin:
        result = measure()
        result["memory_mb"] = memory_mb(device)
        print(json.dumps(result), flush=True)


def compare(contenders: list[Contender], rounds: int) -> None:
    """Start all, then measure them in turn."""
    for contender in contenders:
        contender.start()
    for _ in range(rounds):
        for contender in contenders:
            contender.run()
    for contender in contenders:
        contender.stop()


def verdict(ours: Contender, peer: Contender, key: str) -> Verdict:
    """The ratio of medians; as text it refuses to call a difference smaller than the spread a win."""
    return Verdict.of(key, peer.name, ours.values(key), peer.values(key))


def findings(title: str, contenders: Sequence[Contender]) -> Findings:
    """What these measured, ready for verdicts and facts."""
    return Findings(title, {contender.name: contender.results for contender in contenders})
