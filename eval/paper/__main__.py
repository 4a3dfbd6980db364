"""The claims of the paper at a size that a person can train: each with its arms, seeds, noise, figure and verdict.

python -m eval.paper --tokenizer out/paper/tokenizer                      all of them, on the demo's world (make paper)
python -m eval.paper --tokenizer DIR --only mtp,fp8 --data my.csv --text my_heldout.txt
python -m eval.paper --tokenizer DIR --size configs/paper/sizes/64m.yaml --data seq_monkey.csv --device cuda

What is trained already is not trained again; an interrupted run is resumed.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping
from inspect import signature
from pathlib import Path

import torch

from cli import call
from errors import check_least, command_line, require
from eval.needle import read_texts
from eval.paper.arms import BASE, read_arms
from eval.paper.bench import Bench
from eval.paper.claims import CLAIMS
from eval.paper.context import extend
from eval.paper.page import write
from eval.paper.training import Corpus, Laboratory
from LMConfig import did_you_mean

MOST_SEEDS = 100


def paper(
    tokenizer: str,
    data: str = "data/demo/pretrain.csv",
    text: str = "data/demo/heldout.txt",
    long: str = "data/demo/long/long.jsonl",
    needles: str = "data/demo/long/needles.jsonl",
    r1: str = "out/demo/r1",
    only: str = "",
    size: str = "",
    seeds: int = 3,
    jobs: int = 0,
    out: str = "out/paper",
    device: str = "auto",
) -> None:
    """Train the arms that the claims need, measure them, and write OUT/paper.md with its figures.

    Args:
        tokenizer: folder that train_tokenizer.py wrote
        data: text to train on, as for pretrain.py
        text: held-out documents, separated by empty lines
        long: long documents to extend the context with
        needles: facts for eval/needle.py
        r1: folder of make r1, whose table is shown
        only: names of claims, separated by commas; left out: all
        size: YAML file that makes all arms larger; left out: minutes on two cores
        seeds: of each arm
        jobs: runs at once; 0: one a core, or one where there is a GPU
        out: folder for runs, figures and the page
        device: auto, cpu or cuda
    """
    command = repeated(locals())
    check_least(1, seeds=seeds)
    require(seeds <= MOST_SEEDS, f"--seeds {seeds}: {MOST_SEEDS} at most")
    check_least(0, jobs=jobs)
    known = {claim.name: claim for claim in CLAIMS}
    names = [name.strip() for name in only.split(",") if name.strip()] or [*known]
    for name in names:
        require(name in known, f"--only {name}: no such claim{did_you_mean(name, known)}; one of {', '.join(known)}")
    gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    began, arms, texts = time.monotonic(), read_arms(size), read_texts(Path(text))
    corpus = Corpus(data, tokenizer, str(Path(out) / "shards"))
    jobs = jobs or (1 if gpu else os.cpu_count() or 1)
    lab = Laboratory(Path(out), arms, corpus, range(seeds), jobs, 0 if gpu else 1, device)
    chosen = [known[name] for name in names]
    lab.train([*dict.fromkeys(arm for claim in chosen for arm in claim.arms)])
    if any(claim.name == "context" for claim in chosen):
        extend(lab, long, needles, text)
    bench, measured = Bench(lab, texts, {"r1": Path(r1)}), []
    for claim in chosen:
        print(f"measuring {claim.name}", flush=True)
        measured.append((claim, claim.measure(bench)))
    page = write(Path(out), head(lab), measured, command)
    print(f"written: {page}, in {(time.monotonic() - began) / 60:.0f} minutes")


def repeated(options: Mapping[str, str | int]) -> str:
    """Return the command with these options of `paper` that measures a claim again, its name to be added."""
    defaults = {name: parameter.default for name, parameter in signature(paper).parameters.items()}
    given = {name: value for name, value in options.items() if name != "only" and value != defaults[name]}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return shlex.join(["python", "-m", "eval.paper", *words, "--only"])


def head(lab: Laboratory) -> str:
    """Return what was trained, on what."""
    base = lab.arms[BASE].settings
    return (
        f"{len(lab.seeds)} seeds an arm, {base['max_tokens']:,} tokens of {lab.corpus.data} each, to the end of its "
        "learning-rate schedule. Beside a difference stand two standard deviations of it over the seeds; a difference "
        "that is smaller says nothing."
    )


if __name__ == "__main__":
    command_line(lambda: call(paper, __doc__ or ""))
