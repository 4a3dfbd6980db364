"""One table and one picture of what the benches found.

python bench/summary.py out/bench        reads its *.json, writes summary.md and summary.png there
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from errors import UserError, command_line
from training.run.plots import load_pyplot


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) == 2 else "out/bench")
    benches = [json.loads(file.read_text("utf8")) for file in sorted(folder.glob("*.json"))]
    if not benches:
        raise UserError(f"{folder}: no *.json of a bench; run make bench, or a bench with --json {folder}/NAME.json")
    text = table(benches)
    (folder / "summary.md").write_text(text, "utf8")
    draw(benches, folder / "summary.png")
    print(text)
    print(f"{folder / 'summary.md'}, {folder / 'summary.png'}")


def table(benches: list[dict[str, Any]]) -> str:
    """Return Markdown: a section a bench, a line a verdict, then the facts."""
    lines = []
    for bench in benches:
        lines += [f"**{bench['title']}**", "", f"`{bench['command']}`, {bench['machine']}", ""]
        if bench["verdicts"]:
            lines += ["| quantity | ours | baseline | against | ratio (range) |", "|---|---|---|---|---|"]
        for v in bench["verdicts"]:
            ours, theirs = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (v["ours"], v["theirs"]))
            shown = f"{v['ratio']:.2f}x ({v['low']:.2f} - {v['high']:.2f})" + ("" if v["clear"] else ", not shown")
            lines.append(f"| {v['quantity']} | {ours} | {theirs} | {v['baseline']} | {shown} |")
        lines += ["", *(f"- {name}: {value}" for name, value in bench["facts"].items()), ""]
    return "\n".join(lines)


def draw(benches: list[dict[str, Any]], file: Path) -> None:
    """A bar for each verdict, its range as a line: ours over the baseline, on a logarithmic axis."""
    pyplot = load_pyplot()
    bars = [(f"{bench['title'].split(';')[0]}: {v['quantity']}", v) for bench in benches for v in bench["verdicts"]]
    figure, axes = pyplot.subplots(figsize=(13, 1 + 0.32 * len(bars)), layout="constrained")
    for place, (_, v) in enumerate(bars):
        better = v["high"] < 1 if "memory" in v["quantity"] else v["low"] > 1
        axes.barh(place, v["ratio"] - 1, left=1, color="tab:green" if better else "tab:gray", height=0.7)
        axes.plot((v["low"], v["high"]), (place, place), color="black", linewidth=1)
        axes.annotate(f" {v['ratio']:.2f}x", (max(v["high"], 1), place), va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [f"{name}\nagainst {v['baseline']}" for name, v in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.15)  # room for the last number
    axes.set_xlabel("ours over the baseline (logarithmic)\nblack: range of the measurements; green: shown to be better")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    command_line(main)
