"""Runs side by side: their curves and, where eval/run.py measured them, their scores.

python eval/compare.py out/a/pretrain out/b/pretrain --out out/comparison
python eval/compare.py --watch out/a/pretrain out/b/pretrain        the picture is drawn again as they train
python eval/compare.py out/a/pretrain --reference demo              is its loss normal? beside docs/curves/demo.csv
python eval/compare.py --band demo out/seed0 out/seed1 out/seed2    makes that reference of runs of several seeds
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from errors import UserError, command_line, naming
from eval.compared_run import ComparedRun, open_runs
from eval.comparison import AXES, draw, markdown
from eval.curves import FOLDER, measure_band, read_curve, write_curve
from eval.curves import draw as draw_curve
from eval.verdict import compare_with, report
from text.files import replacing


def main() -> None:
    """Write comparison.md and comparison.png, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, checkpoints in them, or folders with scores.json")
    parser.add_argument("--out", default="out/comparison", help="folder for comparison.md and comparison.png")
    parser.add_argument("--x", choices=AXES, default="tokens", help="what curves are drawn over (tokens)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--watch", action="store_true", help="draw again whenever a run has logged more, until Ctrl-C")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks with --watch (10)")
    instead.add_argument("--reference", metavar="NAME", help="say whether each run is within a reference curve's band")
    instead.add_argument("--band", metavar="NAME", help="make a reference curve of runs that differ in their seed")
    parser.add_argument("--curves", default=str(FOLDER), help=f"folder of reference curves ({FOLDER})")
    given = parser.parse_args()
    if not 0 < given.every < 1e6:
        raise UserError(f"--every {given.every:g}: give a number of seconds above 0")
    out = Path(given.out)
    if given.reference is not None:
        refer([ComparedRun.open(folder) for folder in given.runs], given.reference, out, Path(given.curves))
    elif given.band is not None:
        band([ComparedRun.open(folder) for folder in given.runs], given.band, Path(given.curves))
    elif given.watch:
        watch(given.runs, out, given.x, given.every)
    else:
        print(write(open_runs(given.runs), out, given.x))
        print(f"written: {out / 'comparison.md'}, {out / 'comparison.png'}")


def band(runs: Sequence[ComparedRun], name: str, folder: Path) -> None:
    """Write a reference curve."""
    if Path(name).name != name or not name:
        raise UserError(f"--band {name}: give a name for the curve, not a path; --curves names the folder")
    files = write_curve(measure_band(name, runs), runs, folder)
    print(f"written: {', '.join(map(str, files))}")


def refer(runs: Sequence[ComparedRun], name: str, out: Path, folder: Path) -> None:
    """Say of each run whether it is within the band, and draw them over it."""
    curve = read_curve(name, folder)
    for run in runs:
        print("\n".join([*report(curve, run, compare_with(curve, run)), ""]))
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
    draw_curve(curve, runs, out / "reference.png")
    print(f"written: {out / 'reference.png'}")


def write(runs: Sequence[ComparedRun], out: Path, x: str) -> str:
    """Write page and picture, each whole at any moment, so that a viewer can follow them. Returns the page."""
    page = markdown(runs)
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / "comparison.md") as file:
            file.write(page.encode("utf8", "backslashreplace"))
        with replacing(out / "comparison.png") as file:
            draw(runs, file, x)
    return page


def watch(folders: Sequence[str], out: Path, x: str, every: float) -> None:
    """Write whenever the entries or scores of a run have changed, looking every so many seconds, until Ctrl-C."""
    print(f"drawing {out / 'comparison.png'} as they train; Ctrl-C ends it")
    last = None
    try:
        while True:
            runs = open_runs(folders, live=True)
            if runs != last:
                write(runs, out, x)
                steps = ", ".join(f"{run.name} {run.last('step') or 0:,}" for run in runs)
                print(f"{time.strftime('%H:%M:%S')}  steps: {steps}")
                last = runs
            time.sleep(every)
    except KeyboardInterrupt:
        print(f"\nwritten: {out / 'comparison.md'}, {out / 'comparison.png'}")


if __name__ == "__main__":
    command_line(main)
