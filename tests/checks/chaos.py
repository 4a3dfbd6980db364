"""Kill training runs with SIGKILL at random moments and during saves, resume them, compare them with unbroken ones.

python tests/checks/chaos.py --kills 100            all stages, one and two ranks, and each mesh: what `make chaos` does
python tests/checks/chaos.py --kills 12 --stage grpo --ranks 2

Every start is the stage's script as a person starts it (with two ranks through torchrun), at a tiny size. A kill
takes the script and all processes it started. When a run is complete at last, its final folder (weights, optimiser
state, tokenizer) and its log must be those of a run that nobody disturbed, to the bit. Exit code 1 if
any is not.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from victim import LIMIT, ProcessTree, Script, differences, prepare, stage_command, wait_until

from errors import UserError, command_line

STAGES = ("pretrain", "sft", "dpo", "grpo")
FOLDED = "--dist.schedule dualpipev --model.num_hidden_layers 4 --micro_tokens 64 --max_steps 40"
MESHES = (  # of pretraining: ranks, and what they cut
    (2, "--dist.zero 1"),
    (2, "--dist.zero 3"),
    (2, "--dist.ep 2"),
    (2, "--dist.pp 2"),
    (4, f"--dist.pp 2 --dist.ep 2 {FOLDED}"),
)
AIMED = 0.4  # of the kills: at a save, when its temporary folder appears
EARLY = 0.1  # of the kills: before training has begun


@dataclass
class Score:
    """What one stage on one number of ranks went through.

    Attributes: kills; in_saves: those that left a half-written checkpoint; runs: that came to their end;
    differences: of these from the unbroken run.
    """

    stage: str
    ranks: int
    kills: int
    in_saves: int
    runs: int
    differences: list[str]


class Attack:
    """Kills of one stage on one number of ranks."""

    def __init__(self, command: Script, folder: Path, seed: str) -> None:
        self.command, self.folder = command, folder
        self.random = random.Random(seed)
        self.kills = self.in_saves = 0

    def run(self, kills: int) -> tuple[int, list[str]]:
        """Kill until there were so many, finishing every run that was begun. Returns runs and differences."""
        whole = self.folder / "whole"
        begin = time.monotonic()
        self._finish(self.command.start(whole))
        self.seconds = time.monotonic() - begin
        runs, found = 0, []
        while self.kills < kills:
            out = self.folder / f"killed-{runs}"
            while self.kills < kills and self._killed(out):
                self.kills += 1
            if self.kills == kills:
                self._finish(self.command.start(out))
            runs += 1
            found += [f"{out}: {difference}" for difference in differences(out, whole)]
        return runs, found

    def _killed(self, out: Path) -> bool:
        """Start a run, wait for a random moment and kill. Returns False if the run came to its end before."""
        left = half_written(out)  # by the kills before
        victim, kind = self.command.start(out), self.random.random()
        if kind < EARLY:
            time.sleep(self.random.uniform(0, self.seconds / 2))
        else:
            # The resolved settings are written when training begins.
            started, before = out / "config.yaml", time.time()
            wait_until(lambda: started.is_file() and started.stat().st_mtime >= before, victim, LIMIT)
            if victim.code is None:
                victim.aim()
            if kind < EARLY + AIMED:
                skipped = self.random.randrange(4)
                for _ in range(skipped + 1):
                    wait_until(lambda: not half_written(out) - left, victim, LIMIT)
                    wait_until(lambda: bool(half_written(out) - left), victim, LIMIT)
                time.sleep(self.random.uniform(0, 0.015))  # as long as a save of this size takes
            else:
                time.sleep(self.random.uniform(0, self.seconds / 6))
        if victim.kill():
            self.in_saves += bool(half_written(out) - left)
            return True
        self._finish(victim)
        return False

    def _finish(self, victim: ProcessTree) -> None:
        if victim.wait(LIMIT) != 0:
            raise UserError(f"a run failed by itself with code {victim.code}:\n{victim.output()[-3000:]}")


def half_written(out: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, or that a kill left so: names and times of their last change."""
    found = set()
    for path in out.glob(".*.partial"):
        with suppress(FileNotFoundError):  # it has just become whole
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def attack(
    base: Path, folder: Path, stage: str, ranks: int, kills: int, seed: int, mesh: tuple[str, ...] = ()
) -> Score:
    """All kills of one stage on one number of ranks."""
    command = stage_command(stage, base, ranks, mesh)
    stage = " ".join([stage, *mesh])
    place = folder / f"{stage}-{ranks}".replace(" ", "")
    place.mkdir()
    runs, found = (each := Attack(command, place, f"{seed} {stage} {ranks}")).run(kills)
    score = Score(stage, ranks, each.kills, each.in_saves, runs, found)
    print(
        f"{stage:>20}, ranks {ranks}: {score.kills} kills survived, {score.in_saves} of them in a save; {runs} runs "
        f"completed, {len(found)} different from the unbroken run",
        flush=True,
    )
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all; at least one for each combination")
    parser.add_argument("--stage", default="all", choices=("all", *STAGES))
    parser.add_argument("--ranks", default="both", choices=("1", "2", "both"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--json", type=Path, help="write the scores to this file too")
    options = parser.parse_args()
    stages = STAGES if options.stage == "all" else (options.stage,)
    worlds = (1, 2) if options.ranks == "both" else (int(options.ranks),)
    pairs = [(world, stage, ()) for world, stage in product(worlds, stages)]
    if 2 in worlds and "pretrain" in stages:
        pairs += [(world, "pretrain", tuple(mesh.split())) for world, mesh in MESHES]
    shares = [max(options.kills // len(pairs) + (place < options.kills % len(pairs)), 1) for place in range(len(pairs))]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        prepare(folder / "base", stages)
        with ThreadPoolExecutor(options.jobs) as pool:
            tasks = [
                pool.submit(attack, folder / "base", folder, stage, world, share, options.seed, mesh)
                for (world, stage, mesh), share in zip(pairs, shares, strict=True)
            ]
            scores = [task.result() for task in tasks]
    kills, saves, found = (
        sum(score.kills for score in scores), sum(score.in_saves for score in scores),
        [line for score in scores for line in score.differences],
    )  # fmt: skip
    print(
        f"{kills} kills survived, {saves} of them in a save; {sum(score.runs for score in scores)} runs completed; "
        f"differences: {len(found) or 'none'}; {time.monotonic() - begin:.0f} s"
    )
    print("\n".join(found))
    if options.json:
        options.json.write_text(json.dumps([asdict(score) for score in scores], indent=2), encoding="utf8")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    command_line(main)
