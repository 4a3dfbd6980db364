"""Bits per byte of held-out text against minutes of training from nothing: this project and minimind's own trainer.

    python bench/race.py --data corpus.csv --peer MINIMIND --out out/race [--minutes 10] [--threads 2]

MINIMIND is a checkout of minimind. Its trainer/train_pretrain.py runs as it is, with its own tokenizer and defaults,
once for each --sizes; ours is pretrain.py with a tokenizer trained on the same training text. One after the other, each
alone with the same number of threads. The texts are taken once each (exact duplicates go) and some are held out before
anything is trained. What counts as time is explained in bench/watched.py; each document is scored by itself, with as
much of its own past as the contender was trained on. Writes OUT/race.json and OUT/race.png.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from errors import UserError, command_line
from text.corpus.corpus import Corpus
from training.run.plots import load_pyplot

ROOT = Path(__file__).resolve().parent.parent
MOMENTS = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # shares of the time
SHOWN = (0.1, 0.2, 0.5, 1.0)
BASELINE_LENGTH = 340  # minimind's --max_seq_len, its default
NEVER = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the text: whatever pretrain.py reads")
    parser.add_argument("--out", required=True, help="a new folder for everything")
    parser.add_argument("--peer", help="folder of a checkout of minimind; left out: only ours runs")
    parser.add_argument("--sizes", nargs="*", default=["512x8", "256x4"], help="of minimind: hidden size x layers")
    parser.add_argument("--peer_options", default="", help="further options of its train_pretrain.py, in one string")
    recipe = str(ROOT / "configs" / "minutes.yaml")
    parser.add_argument("--config", nargs="*", default=[recipe], help="ours, one or several")
    parser.add_argument("--vocab_size", type=int, default=6400, help="of our tokenizer")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0, help="of our weights and data order; minimind has its own")
    parser.add_argument("--held_out_kb", type=int, default=150)
    options = parser.parse_args()
    out = Path(options.out).resolve()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {options.out}: not empty; choose another folder")
    contenders = [ours(Path(config).resolve(), out, options) for config in options.config]
    if options.peer:
        contenders += [minimind(Path(options.peer).resolve(), size, out, options) for size in options.sizes]
    out.mkdir(parents=True, exist_ok=True)
    print(split_text(options.data, out, options.held_out_kb * 1000), flush=True)
    tokenizer = ["--data", out / "train.jsonl", "--out", out / "tokenizer", "--vocab_size", options.vocab_size]
    run(out / "tokenizer.log", ROOT, os.cpu_count(), ROOT / "train_tokenizer.py", *tokenizer)
    results = {}
    for contender in contenders:
        results[contender["name"]] = race(contender, out, options)
        print(f"{contender['name']}: {results[contender['name']]['points'][-1]['bits_per_byte']:.4f}", flush=True)
        (out / "race.json").write_text(json.dumps(results, ensure_ascii=False, indent=2), encoding="utf8")
    draw(results, out / "race.png")
    print(table(results, 60 * options.minutes))


def split_text(data: str, out: Path, held_out_bytes: int) -> str:
    """Write OUT/train.jsonl and OUT/heldout.jsonl, no text in both or twice. Returns a line about them."""
    texts = list(dict.fromkeys(document.text for document in Corpus(data) if not document.text.isspace()))
    random.Random(0).shuffle(texts)
    held_out, size = [], 0
    while texts and size < held_out_bytes:
        held_out.append(texts.pop())
        size += len(held_out[-1].encode("utf8"))
    if not texts:
        raise UserError(f"{data}: nothing is left to train on; give more text or lower --held_out_kb")
    for name, part in (("train", texts), ("heldout", held_out)):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf8")
    train = sum(len(text.encode("utf8")) for text in texts)
    return f"{len(texts):,} texts, {train / 1e6:.2f} MB; held out {len(held_out):,} texts, {size:,} bytes"


def run(log: Path, modules: str | Path, threads: int, *command: object) -> None:
    """A Python program to its end, alone with so many threads. modules: where it finds its own."""
    with open(log, "w", encoding="utf8") as file:
        arguments = [sys.executable, *map(str, command)]
        done = subprocess.run(arguments, env=environment(modules, threads), stdout=file, stderr=file)
    if done.returncode:
        raise UserError(f"{command[0]}: ended with code {done.returncode}; see {log}")


def environment(modules: str | Path, threads: int) -> dict[str, str]:
    """Where a contender finds its modules, and how many threads it may use; nothing is written beside its sources."""
    own = {"PYTHONPATH": str(modules), "OMP_NUM_THREADS": str(threads), "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **own}


def ours(config: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """pretrain.py with a recipe; nothing more is held out, and only the end is saved."""
    if not config.is_file():
        raise UserError(f"{config}: no such file; give a recipe such as configs/minutes.yaml")
    name, recipe = config.stem, yaml.safe_load(config.read_text(encoding="utf8"))
    given = {
        "config": config, "data": out / "train.jsonl", "tokenizer": out / "tokenizer", "shards": out / "shards",
        "out": out / name / "run", "seed": options.seed, "threads": options.threads, "max_minutes": options.minutes,
        "val_fraction": 0, "save_every": 0,
    }  # fmt: skip
    return {
        "name": f"ours, {name}", "program": str(ROOT / "pretrain.py"), "arguments": as_options(given),
        "folder": str(ROOT), "modules": str(ROOT), "out": str(out / name), "tokenizer": str(out / "tokenizer"),
        "begin": "eos", "window": recipe.get("sequence_length", 512),
    }  # fmt: skip


def minimind(folder: Path, size: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """train_pretrain.py from its own folder, as minimind's README starts it; its checkpoints are left out."""
    program = folder / "trainer" / "train_pretrain.py"
    if not program.is_file():
        raise UserError(f"{program}: no such file; --peer needs a checkout of minimind")
    hidden, _, layers = size.partition("x")
    if not (hidden.isdigit() and layers.isdigit()):
        raise UserError(f"--sizes {size}: write hidden size x layers, such as 512x8")
    given = {
        "hidden_size": hidden, "num_hidden_layers": layers, "data_path": out / "train.jsonl",
        "save_dir": out / f"minimind-{size}" / "run", "save_interval": NEVER, "max_seq_len": BASELINE_LENGTH,
    }  # fmt: skip
    return {
        "name": f"minimind {size}{', --peer_options' if options.peer_options else ''}", "program": str(program),
        "arguments": as_options(given) + options.peer_options.split(), "folder": str(program.parent),
        "modules": str(folder), "out": str(out / f"minimind-{size}"), "tokenizer": str(folder / "model"),
        "begin": "bos", "window": BASELINE_LENGTH - 1,
    }  # fmt: skip


def as_options(given: dict[str, object]) -> list[str]:
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


def race(contender: dict[str, Any], out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one contender in its own process, to the end of its time. Return its size and its points."""
    folder = Path(contender["out"])
    folder.mkdir()
    moments = [60 * options.minutes * share for share in MOMENTS]
    described = {**contender, "moments": moments, "threads": options.threads, "held_out": str(out / "heldout.jsonl")}
    (folder / "contender.json").write_text(json.dumps(described, ensure_ascii=False, indent=2), encoding="utf8")
    watched = ROOT / "bench" / "watched.py", folder / "contender.json"
    run(folder / "log.txt", contender["modules"], options.threads, *watched)
    return json.loads((folder / "result.json").read_text(encoding="utf8"))


def table(results: dict[str, Any], seconds: float) -> str:
    """Return bits per byte at some moments, and how much fewer ours are at the end than the best baseline's."""
    lines = [f"{'':40}{'parameters':>12}" + "".join(f"{share * seconds / 60:>8.3g} min" for share in SHOWN)]
    for name, result in results.items():
        points = result["points"]
        bits = [min(points, key=lambda p: abs(p["seconds"] - share * seconds))["bits_per_byte"] for share in SHOWN]
        lines.append(f"{name:40}{result['parameters']:>12,}" + "".join(f"{value:>12.3f}" for value in bits))
    ends = {name: result["points"][-1]["bits_per_byte"] for name, result in results.items()}
    best = min((bits for name, bits in ends.items() if not name.startswith("ours")), default=None)
    for name in (name for name in ends if best and name.startswith("ours")):
        lines.append(f"{name} ends with {1 - ends[name] / best:.1%} fewer bits than the best baseline")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Bits per byte against minutes."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, result in results.items():
        points = [(point["seconds"] / 60, point["bits_per_byte"]) for point in result["points"]]
        style = "o-" if name.startswith("ours") else "s--"
        axes.plot(*zip(*points, strict=True), style, markersize=4, label=f"{name} ({result['parameters'] / 1e6:.1f} M)")
    axes.set(xlabel="minutes of training", ylabel="bits per byte of held-out text")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    command_line(main)
