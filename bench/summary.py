"""One table and one picture of what the benches found.

python bench/summary.py out/bench        reads its *.json, writes summary.md and summary.png there
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from errors import UserError, command_line

LESS_IS_BETTER = ("memory", "cache", "numbers", "seconds", "bits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    benches = [json.loads(file.read_text("utf8")) for file in sorted(folder.glob("*.json"))]
    if not benches:
        raise UserError(f"{folder}: no *.json of a bench; run make bench, or a bench with --json {folder}/NAME.json")
    text = table(benches)
    (folder / "summary.md").write_text(text, "utf8")
    draw(benches, folder / "summary.png")
    print(text)
    print(f"{folder / 'summary.md'}, {folder / 'summary.png'}")


def table(benches: list[dict[str, Any]]) -> str:
    """Markdown: a section a bench, a line a verdict, then the facts."""
    lines = []
    for bench in benches:
        lines += [f"**{bench['title']}**", "", f"`{bench['command']}`, {bench['machine']}", ""]
        if bench["verdicts"]:
            lines += ["| quantity | ours | peer | against | ratio (spread) |", "|---|---|---|---|---|"]
        for v in bench["verdicts"]:
            shown = f"{v['ratio']:.2f}x ({v['low']:.2f} - {v['high']:.2f})" + ("" if v["clear"] else ", not shown")
            lines.append(
                f"| {v['quantity']} | {number(v['ours'])} | {number(v['theirs'])} | {v['peer']} | {shown} |"
            )  # fmt: skip
        lines += ["", *(f"- {name}: {value}" for name, value in bench["facts"].items()), ""]
    return "\n".join(lines)


def number(value: float) -> str:
    """Three significant digits, whole numbers from 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(benches: list[dict[str, Any]], file: Path) -> None:
    """A bar for each verdict, its spread as a line: ours over the peer, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [(f"{bench['title'].split(';')[0]}: {v['quantity']}", v) for bench in benches for v in bench["verdicts"]]
    figure, axes = pyplot.subplots(figsize=(13, 1 + 0.32 * len(bars)), layout="constrained")
    for place, (_, v) in enumerate(bars):
        less = any(word in v["quantity"] for word in LESS_IS_BETTER)
        better = v["high"] < 1 if less else v["low"] > 1
        axes.barh(place, v["ratio"] - 1, left=1, color="tab:green" if better else "tab:gray", height=0.7)
        axes.plot((v["low"], v["high"]), (place, place), color="black", linewidth=1)
        axes.annotate(f" {v['ratio']:.2f}x", (max(v["high"], 1), place), va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [f"{name}\nagainst {v['peer']}" for name, v in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.15)  # room for the last number
    axes.set_xlabel("ours over the peer's (logarithmic)\nblack: what the measurements allow; green: shown to be better")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    command_line(main)
