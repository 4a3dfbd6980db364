"""Runs side by side: their curves and, where eval/run.py measured them, their scores.

python eval/compare.py out/a/pretrain out/b/pretrain --out out/comparison
python eval/compare.py --watch out/a/pretrain out/b/pretrain        the picture is drawn again as they train
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from errors import UserError, command_line, naming
from eval.compared_run import ComparedRun, open_runs
from eval.comparison import AXES, draw, markdown
from text.files import replacing


def main() -> None:
    """Write comparison.md and comparison.png, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, checkpoints in them, or folders with scores.json")
    parser.add_argument("--out", default="out/comparison", help="folder for comparison.md and comparison.png")
    parser.add_argument("--x", choices=AXES, default="tokens", help="what curves are drawn over (tokens)")
    parser.add_argument("--watch", action="store_true", help="draw again whenever a run has logged more, until Ctrl-C")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks with --watch (10)")
    given = parser.parse_args()
    if not 0 < given.every < 1e6:
        raise UserError(f"--every {given.every:g}: give a number of seconds above 0")
    out = Path(given.out)
    if given.watch:
        watch(given.runs, out, given.x, given.every)
    else:
        print(write(open_runs(given.runs), out, given.x))
        print(f"written: {out / 'comparison.md'}, {out / 'comparison.png'}")


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
