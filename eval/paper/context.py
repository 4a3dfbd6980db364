"""The context of the base extended in two phases, and needles searched for before and after (section 4.3, Figure 8)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from errors import UserError
from eval.paper.arms import BASE, FOLDER, read_settings
from eval.paper.training import ROOT, Laboratory, start

FACTOR = 16  # of the last phase
TIMES, DEPTHS, TRIALS = (1, 4, 16), "0,50,100", 8  # lengths of contexts, over the trained one; and eval/needle.py's
BEFORE, SWITCHED, PHASES = "before", "YaRN alone", ("after phase 1", "after phase 2")


def extend(lab: Laboratory, long: str, needles: str, filler: str) -> None:
    """Write `context/seed-N/needle.json` of each seed: the base, YaRN switched on alone, after each phase.

    long: documents to extend with; needles, filler: of eval/needle.py. What is there already is left as it is.
    """
    settings = read_settings(FOLDER / "stages" / "extend.yaml")
    length = lab.arms[BASE].settings["sequence_length"]
    for seed in lab.seeds:
        out, base = folder(lab, seed), lab.final(BASE, seed)
        ends = [out / f"phase{phase}" / "final" for phase in (1, 2)]
        options = ["--ckpt", str(base), "--data", long, "--shards", lab.corpus.shards, "--seed", str(seed)]
        options += ["--device", lab.device, "--resume", "true"]
        if not (ends[1] / "config.json").is_file():
            print(f"extending the context of seed {seed}", flush=True)
            start(ROOT / "pretrain.py", out, settings, options)
        if not (out / "needle.json").is_file():
            print(f"looking for needles, seed {seed}", flush=True)
            lengths = ",".join(str(length * times) for times in TIMES)
            command = [sys.executable, str(ROOT / "eval" / "needle.py"), "--ckpt", ",".join(map(str, (base, *ends)))]
            command += ["--yarn", str(FACTOR), "--lengths", lengths, "--depths", DEPTHS, "--trials", str(TRIALS)]
            command += ["--needles", needles, "--data", filler, "--out", str(out), "--device", lab.device]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise UserError(f"eval/needle.py: {(ended.stderr or ended.stdout).strip().splitlines()[-1]}")


def folder(lab: Laboratory, seed: int) -> Path:
    """Return where the phases of a seed are, and its needle.json."""
    return lab.out / "context" / f"seed-{seed}"


def found(lab: Laboratory, seed: int) -> tuple[dict[str, Any], dict[str, list[list[float]]]]:
    """Return what eval/needle.py wrote of a seed, and the shares that each stage's model found: lengths, depths.

    Raises `UserError` where a stage is not there.
    """
    path = folder(lab, seed) / "needle.json"
    content = json.loads(path.read_text(encoding="utf8"))
    shares = {stage_of(model["name"]): model["chosen"] for model in content["models"]}
    if missing := [stage for stage in (BEFORE, SWITCHED, *PHASES) if stage not in shares]:
        raise UserError(f"{path}: has no model {missing[0]}; remove the file, it is made again")
    return content, shares


def stage_of(name: str) -> str:
    """Return which stage's a model of needle.json is: its name is that of its checkpoint, and what was switched on."""
    checkpoint, _, switched = name.partition(", YaRN")
    if switched:
        return SWITCHED
    return dict(zip(("phase1", "phase2"), PHASES, strict=True)).get(Path(checkpoint).parent.name, BEFORE)
