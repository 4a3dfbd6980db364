"""Draw docs/model.svg, the README's figure: a token's way through the network, with the file and lines of each part.

python docs/figure.py [--check]      --check fails where the picture is older than the code
"""

from __future__ import annotations

import argparse
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STYLE = """
  text { font: 13px system-ui, 'Noto Sans CJK SC', sans-serif; fill: #1f2328; text-anchor: middle }
  .name { font-weight: 600; font-size: 14px }  .file { font-size: 11.5px; fill: #57606a }  .note { font-size: 12px }
  rect { stroke-width: 1.4; rx: 7 }  .frame { fill: none; stroke: #8c959f; stroke-dasharray: 5 4 }
  .plain { fill: #f6f8fa; stroke: #8c959f }  .mla { fill: #ddf4ff; stroke: #0969da }
  .moe { fill: #fff1e5; stroke: #bc4c00 }  .mtp { fill: #dafbe1; stroke: #1a7f37 }
  path { stroke: #57606a; stroke-width: 1.6; fill: none; marker-end: url(#tip) }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }  .file { fill: #9198a1 }
    .plain { fill: #151b23; stroke: #656c76 }  .frame { stroke: #656c76 }
    .mla { fill: #0c2d4d; stroke: #4493f8 }  .moe { fill: #3d1f0a; stroke: #f0883e }
    .mtp { fill: #0f2f18; stroke: #3fb950 }  path { stroke: #9198a1 }
  }
"""


def lines(file: str) -> int:
    """Count the lines of a file of the repository."""
    return (ROOT / file).read_text(encoding="utf8").count("\n")


def box(x: int, y: int, width: int, height: int, kind: str, name: str, note: str = "", files: tuple[str, ...] = ()):
    """Return the SVG of one part: its name, a line about it, its files with their lines. x, y: top left, pixels."""
    rows = [("name", name), *([("note", note)] if note else [])]
    rows += [("file", f"{Path(file).name} · {lines(file)}") for file in files]
    top = y + height / 2 - 9 * (len(rows) - 1) + 5
    texts = "".join(
        f'<text class="{style}" x="{x + width / 2:g}" y="{top + 18 * row:g}">{escape(text)}</text>'
        for row, (style, text) in enumerate(rows)
    )
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}"/>{texts}'


def arrow(*points: tuple[int, int]) -> str:
    """Return a line through points (pixels) with a tip at its end."""
    return f'<path d="M{" L".join(f"{x} {y}" for x, y in points)}"/>'


def figure() -> str:
    """Return the whole picture."""
    parts = [
        box(4, 60, 132, 78, "plain", "token t", "embedding", ("model/transformer.py",)),
        '<rect class="frame" x="152" y="22" width="586" height="154"/>',
        '<text class="note" x="445" y="42">L layers, each a norm and a sum with the residual stream</text>',
        f'<text class="file" x="445" y="168">layer.py · {lines("model/layer.py")} &#160; norm.py · '
        f"{lines('model/norm.py')} &#160; ops.py · {lines('model/ops.py')}</text>",
        box(168, 54, 270, 96, "mla", "Multi-head Latent Attention", "one small latent a token is all it caches",
            ("model/mla.py", "model/cache.py")),
        box(460, 54, 262, 96, "moe", "DeepSeekMoE", "K of E experts, balanced by a bias",
            ("model/moe.py", "model/experts.py")),
        box(760, 60, 120, 78, "plain", "head", "norm, logits"),
        '<text class="name" x="946" y="104">token t+1</text>',
        box(168, 212, 270, 78, "plain", "RoPE, YaRN; causal mask", "", ("model/rope.py", "model/attention.py")),
        box(460, 212, 262, 78, "mtp", "Multi-Token Prediction", "one more layer; drafts when decoding",
            ("model/mtp.py",)),
        '<text class="name" x="946" y="256">token t+2</text>',
        arrow((136, 99), (164, 99)), arrow((438, 99), (456, 99)), arrow((722, 99), (756, 99)),
        arrow((880, 99), (896, 99)), arrow((303, 212), (303, 154)),
        arrow((745, 99), (745, 196), (591, 196), (591, 208)), arrow((722, 251), (896, 251)),
        arrow((70, 138), (70, 310), (591, 310), (591, 294)),
        '<text class="file" x="330" y="326">embedding of token t+1</text>',
    ]  # fmt: skip
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" style="marker-end:none;stroke:none;fill:#8c959f"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 990 336" role="img" aria-label="DeepSeek-V3, by file">'
        f"<style>{STYLE}</style>{tip}{''.join(parts)}</svg>\n"
    )


def main() -> None:
    """Write the picture, or compare it."""
    parser = argparse.ArgumentParser(description="Draw docs/model.svg.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where it would change")
    place, new = ROOT / "docs" / "model.svg", figure()
    if not parser.parse_args().check:
        place.write_text(new, encoding="utf8")
    elif place.read_text(encoding="utf8") != new:
        sys.exit("error: docs/model.svg is older than the code; run python docs/figure.py")


if __name__ == "__main__":
    main()
