"""The context of the base extended in two phases, and needles searched for before and after (section 4.3, Figure 8)."""

from __future__ import annotations

import subprocess
import sys

from errors import UserError
from eval.paper.arms import BASE, FOLDER, read_settings
from eval.paper.training import ROOT, Laboratory, start

FACTOR = 16  # of the last phase
DEPTHS, TRIALS = "0,25,50,75,100", 20


def extend(lab: Laboratory, long: str, needles: str, filler: str) -> None:
    """Write `context/seed-N/needle.json` of each seed: the base, YaRN switched on alone, after each phase.

    long: documents to extend with; needles, filler: of eval/needle.py. What is there already is left as it is.
    """
    settings = read_settings(FOLDER / "stages" / "extend.yaml")
    length = lab.arms[BASE].settings["sequence_length"]
    for seed in lab.seeds:
        out, base = lab.out / "context" / f"seed-{seed}", lab.final(BASE, seed)
        ends = [out / f"phase{phase}" / "final" for phase in (1, 2)]
        options = ["--ckpt", str(base), "--data", long, "--shards", lab.corpus.shards, "--seed", str(seed)]
        options += ["--device", lab.device, "--resume", "true"]
        if not (ends[1] / "config.json").is_file():
            print(f"extending the context of seed {seed}", flush=True)
            start(ROOT / "pretrain.py", out, settings, options)
        if not (out / "needle.json").is_file():
            lengths = ",".join(str(length * times) for times in (1, 2, 4, 8, 16))
            command = [sys.executable, str(ROOT / "eval" / "needle.py"), "--ckpt", ",".join(map(str, (base, *ends)))]
            command += ["--yarn", str(FACTOR), "--lengths", lengths, "--depths", DEPTHS, "--trials", str(TRIALS)]
            command += ["--needles", needles, "--data", filler, "--out", str(out), "--device", lab.device]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise UserError(f"eval/needle.py: {(ended.stderr or ended.stdout).strip().splitlines()[-1]}")
