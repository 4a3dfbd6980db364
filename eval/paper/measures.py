"""What is measured for each claim, and what can be said of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from eval.needle import Found, draw
from eval.paper import context as needles
from eval.paper import figures, probes
from eval.paper.arms import BASE
from eval.paper.bench import BITS, Bench
from eval.paper.differences import DOES_NOT, HOLDS, UNKNOWN, Difference, centre, noise, reaches, weakest

LENGTHS = (1024, 8192, 32768)  # positions that decoding is measured after
ACCEPTED = 0.85  # of second tokens (section 5.4.3)
FOUND = 50  # per cent of needles; the paper finds all
FP8_BOUND = 0.0025  # of the loss (section 3.3)
SWEPT = ("bias-slow", "bias-slower", "alpha-0", "alpha-1e-2", "scale-2.5", "groups")


@dataclass
class Result:
    """Of one claim.

    Attributes: rows: a table under `header`; verdict: one of `differences`, or which of several arms are clearly better
    or worse; note: what the table alone does not say;
    figures: files in figures/, or paths from there.
    """

    header: Sequence[str]
    rows: list[Sequence[str]]
    verdict: str
    note: str = ""
    figures: list[str] = field(default_factory=list)


BITS_HEADER = ("arm", "held-out bits per byte", "difference from the first")


def balance(bench: Bench) -> Result:
    arms = (BASE, "balance-aux", "balance-none")
    violations = {arm: bench.ends(arm, "max_vio_worst") for arm in arms}
    rows = [[*row, centre(violations[row[0]], "{:.2f}")] for row in bench.bits(*arms[1:])]
    figures.curves(bench.figure("balance"), {arm: bench.runs(arm) for arm in arms}, "max_vio_worst",
                   "MaxVio of the worst layer")  # fmt: skip
    verdicts = [bench.against(arm).verdict(lower=False) for arm in arms[1:]]
    collapsed = Difference.of(violations[BASE], violations["balance-none"])
    note = f"Without balancing MaxVio is {collapsed.text('{:+.2f}')} higher at the end."
    return Result((*BITS_HEADER, "MaxVio at the end"), rows, weakest(verdicts), note, ["balance.png"])


def scope(bench: Bench) -> Result:
    arms = (BASE, "balance-aux", "balance-aux-batch")
    found = {arm: [probes.expert_loads(one, bench.domains) for one in bench.answerers(arm)] for arm in arms}
    distances = {arm: [probes.apart(counts) for counts in each] for arm, each in found.items()}
    rows = [[*row, centre(distances[row[0]], "{:.3f}")] for row in bench.bits("balance-aux-batch", other="balance-aux")]
    rows.append([BASE, centre(bench.finals(BASE)), "", centre(distances[BASE], "{:.3f}")])
    figures.loads(bench.figure("scope"), {arm: each[0] for arm, each in found.items()})
    special = Difference.of(distances["balance-aux"], distances["balance-aux-batch"])
    biased = Difference.of(distances["balance-aux"], distances[BASE])
    note = f"Experts are {special.text('{:+.3f}')} further apart by domain with the batch-wise loss, "
    note += f"{biased.text('{:+.3f}')} with the bias; bits per byte with the batch-wise loss: "
    note += f"{bench.against('balance-aux-batch', 'balance-aux').text()}."
    header = (*BITS_HEADER, "distance of the domains' experts")
    return Result(header, rows, special.verdict(lower=False), note, ["scope.png"])


def mtp(bench: Bench) -> Result:
    arms = (BASE, "mtp", "base-longer")
    right = {arm: [probes.accuracy(one, bench.texts) for one in bench.answerers(arm)] for arm in arms}
    tokens = {arm: f"{bench.runs(arm)[0].last('tokens'):,.0f}" for arm in arms}
    rows = [[*row, centre(right[row[0]], "{:.4f}"), tokens[row[0]]] for row in bench.bits(*arms[1:])]
    figures.curves(bench.figure("mtp"), {arm: bench.runs(arm) for arm in arms}, BITS, "held-out bits per byte")
    equal, timed = bench.against("mtp"), bench.against("mtp", "base-longer")
    note = f"At equal tokens {equal.text()}: {equal.verdict()}; at equal time {timed.text()}: {timed.verdict()}."
    return Result((*BITS_HEADER, "next-token accuracy", "tokens"), rows, equal.verdict(), note, ["mtp.png"])


def acceptance(bench: Bench) -> Result:
    found = {}
    for name, texts in bench.domains.items():
        found[name] = [probes.drafts(one, texts) for one in bench.answerers("mtp")]
    rows = [
        [name, centre([100 * one.accepted for one in each], "{:.1f}"),
         f"{mean(one.drafted_rate for one in each):,.0f}", f"{mean(one.plain_rate for one in each):,.0f}",
         centre([one.drafted_rate / one.plain_rate for one in each], "{:.2f}")]
        for name, each in found.items()
    ]  # fmt: skip
    shares = [mean(each[seed].accepted for each in found.values()) for seed in range(len(bench.lab.seeds))]
    figures.points(bench.figure("acceptance"), {n: [100 * o.accepted for o in e] for n, e in found.items()},
                   "second tokens accepted (%)")  # fmt: skip
    header = ("domain", "second tokens accepted, %", "tokens/s with drafts", "without", "ratio")
    note = f"Mean of the domains: {centre([100 * s for s in shares], '{:.1f}')} %."
    return Result(header, rows, reaches(shares, ACCEPTED), note, ["acceptance.png"])


def attention(bench: Bench) -> Result:
    arms = (BASE, "mha", "gqa")
    configs = {"mla" if arm == BASE else arm: bench.config(arm) for arm in arms}
    device = torch.device("cuda" if torch.cuda.is_available() and bench.lab.device != "cpu" else "cpu")
    rates = probes.decoding(configs, LENGTHS, device)
    fastest = probes.decoding({"mla": configs["mla"]}, LENGTHS, device, fastest=True)["mla"]
    rows = []
    for (name, *row), (kind, config) in zip(bench.bits(*arms[1:]), configs.items(), strict=True):
        speed = [f"{rate:,.0f}" for rate in rates[kind]]
        rows.append([f"{kind} ({name})", *row, f"{probes.cache_bytes(config):,}", *speed])
    rows.append(["mla, fastest runner", "", "", "", *(f"{rate:,.0f}" for rate in fastest)])
    figures.lines(bench.figure("attention"), LENGTHS, {**rates, "mla, fastest runner": fastest},
                  ("positions in the cache", "tokens a second, one row"))  # fmt: skip
    verdicts = [bench.against("mha").verdict(lower=False), bench.against("gqa").verdict(lower=False)]
    note = f"MLA beats MHA: {verdicts[0]}; MLA beats GQA: {verdicts[1]}, in bits per byte at equal parameters."
    header = (*BITS_HEADER, "cache, bytes a token", *(f"tokens/s at {length:,}" for length in LENGTHS))
    return Result(header, rows, weakest(verdicts), note, ["attention.png"])


def fp8(bench: Bench) -> Result:
    relative, final = [], []
    for plain, rounded in zip(bench.logs(BASE, "loss"), bench.logs("fp8", "loss"), strict=True):
        half = len(plain) // 2
        relative.append(float(((rounded[half:, 1] - plain[half:, 1]) / plain[half:, 1]).mean()))
    for before, after in zip(bench.finals(BASE, "val_loss"), bench.finals("fp8", "val_loss"), strict=True):
        final.append(after / before - 1)
    rows = [["training loss, second half", centre([100 * r for r in relative], "{:+.3f}")],
            ["held-out loss at the end", centre([100 * r for r in final], "{:+.3f}")]]  # fmt: skip
    figures.curves(
        bench.figure("fp8"), {BASE: bench.runs(BASE), "fp8": bench.runs("fp8")}, "loss", "training loss, nats"
    )
    worst = [abs(mean(each)) + noise(each) for each in (relative, final)]
    best = [abs(mean(each)) - noise(each) for each in (relative, final)]
    verdict = HOLDS if max(worst) <= FP8_BOUND else DOES_NOT if max(best) > FP8_BOUND else UNKNOWN
    return Result(("loss", "FP8 over the base's type, %"), rows, verdict, "", ["fp8.png"])


def experts(bench: Bench) -> Result:
    arms = ("coarse", "unshared")
    figures.points(bench.figure("experts"), {a: bench.finals(a) for a in (BASE, *arms)}, "held-out bits per byte")
    verdicts = [bench.against(arm).verdict(lower=False) for arm in arms]
    note = f"Finer experts are better: {verdicts[0]}; a shared expert is better: {verdicts[1]}."
    return Result(BITS_HEADER, bench.bits(*arms), weakest(verdicts), note, ["experts.png"])


def dense(bench: Bench) -> Result:
    arms = ("dense", "dense-longer")
    rows = [[*row, f"{bench.runs(row[0])[0].last('tokens'):,.0f}"] for row in bench.bits(*arms)]
    figures.curves(bench.figure("dense"), {a: bench.runs(a) for a in (BASE, *arms)}, BITS, "held-out bits per byte")
    equal, timed = (bench.against(arm).verdict(lower=False) for arm in arms)
    note = f"At equal tokens: {equal}; at equal time: {timed}."
    return Result((*BITS_HEADER, "tokens"), rows, equal, note, ["dense.png"])


def context(bench: Bench) -> Result:
    """Reads what eval/needle.py wrote of each seed: before, after the switch alone, after both phases."""
    near: dict[str, list[float]] = {}
    far: dict[str, list[float]] = {}
    maps: dict[str, list[list[list[float]]]] = {}
    for seed in bench.lab.seeds:
        content, shares = needles.found(bench.lab, seed)
        for stage, cells in shares.items():
            means = dict(zip(content["lengths"], (100 * mean(row) for row in cells), strict=True))
            near.setdefault(stage, []).append(means.pop(min(means)))  # the length of training
            far.setdefault(stage, []).append(mean(means.values()))
            maps.setdefault(stage, []).append(cells)
    rows = [[stage, centre(near[stage], "{:.1f}"), centre(far[stage], "{:.1f}")] for stage in near]
    drawn = [Found(stage, np.mean(cells, 0).tolist(), []) for stage, cells in maps.items()]
    draw(drawn, content["lengths"], content["depths"], content["chance"], bench.figure("context"))
    chance = 100 * content["chance"]
    gain = Difference.of(far[needles.BEFORE], far[needles.PHASES[-1]])
    known = Difference.of([chance] * len(near[needles.BEFORE]), near[needles.BEFORE])
    note = f"Beyond the trained length {gain.text('{:+.1f}')} points by the stage; guessing finds {chance:.0f} %."
    if not (known.is_clear and known.mean > 0):
        note += " Before, no more than that is found at the trained length either: there is nothing to carry further."
    header = ("model", "needles found at the trained length, %", "at longer ones, %")
    return Result(header, rows, reaches(far[needles.PHASES[-1]], FOUND), note, ["context.png"])


def sweeps(bench: Bench) -> Result:
    rows = [[*row, centre(bench.ends(row[0], "max_vio_worst"), "{:.2f}")] for row in bench.bits(*SWEPT)]
    figures.points(bench.figure("sweeps"), {a: bench.finals(a) for a in (BASE, *SWEPT)}, "held-out bits per byte")
    found = {arm: bench.against(arm) for arm in SWEPT}
    clear = {arm: each for arm, each in found.items() if each.is_clear}
    said = [f"{arm} is {'worse' if each.mean > 0 else 'better'}, {each.text()}" for arm, each in clear.items()]
    said += [f"{UNKNOWN} of the others" if said else UNKNOWN] if len(clear) < len(found) else []
    unseen = max((each.noise for arm, each in found.items() if arm not in clear), default=0.0)
    note = (
        f"Where nothing can be told, effects of up to {unseen:.4f} bits per byte would not be seen."
        if unseen > 0
        else ""
    )
    return Result((*BITS_HEADER, "MaxVio at the end"), rows, "; ".join(said), note, ["sweeps.png"])


def reasoning(bench: Bench) -> Result:
    """Reads what eval/reasoning.py wrote of each stage of the R1 path."""
    path = bench.others.get("r1", Path("none")) / "table.json"
    if not path.is_file():
        return Result(("stage",), [["not run: make r1"]], UNKNOWN, f"{path} is not there; make r1 writes it.")
    stages: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf8"))
    names = [Path(stage["name"]).parent.name for stage in stages]  # of OUT/r1/NAME/final
    shares = [[f"{100 * stage[share]:.1f}" for share in ("correct", "strict_format", "language")] for stage in stages]
    rows = [[name, *row, f"{stage['tokens']:.1f}"] for name, row, stage in zip(names, shares, stages, strict=True)]
    right = {name: [100 * stage["correct"]] for name, stage in zip(names, stages, strict=True)}
    figures.points(bench.figure("r1"), right, "held-out sums right, %")
    note = "One seed: no noise is known. `sft` is distilled: the pretrained model fine-tuned on answers of `reasoning`."
    header = ("stage", "right, %", "strict format, %", "one language, %", "tokens")
    return Result(header, rows, UNKNOWN, note, ["r1.png"])
