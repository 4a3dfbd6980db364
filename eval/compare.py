"""Runs side by side: their curves and, where eval/run.py measured them, their scores.

python eval/compare.py out/a/pretrain out/b/pretrain --out out/comparison
"""

from __future__ import annotations

import argparse
from pathlib import Path

from errors import command_line, naming
from eval.compared_run import open_runs
from eval.comparison import AXES, draw, markdown


def main() -> None:
    """Write comparison.md and comparison.png, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, checkpoints in them, or folders with scores.json")
    parser.add_argument("--out", default="out/comparison", help="folder for comparison.md and comparison.png")
    parser.add_argument("--x", choices=AXES, default="tokens", help="what curves are drawn over (tokens)")
    given = parser.parse_args()
    runs, out = open_runs(given.runs), Path(given.out)
    page = markdown(runs)
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.md").write_text(page, encoding="utf8")
    draw(runs, out / "comparison.png", given.x)
    print(page)
    print(f"written: {out / 'comparison.md'}, {out / 'comparison.png'}")


if __name__ == "__main__":
    command_line(main)
