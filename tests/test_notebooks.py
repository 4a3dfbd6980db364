"""The notebooks are current, speak both languages, and the first one runs; `make check-notebooks` runs all."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("[0-9]_*.md"))


def code_of(source: Path) -> str:
    """The code of a source, without the lines that only a notebook understands."""
    cells = re.findall(r"^```python\n(.*?)^```", source.read_text(encoding="utf8"), re.S | re.M)
    return "\n".join(line for line in "\n".join(cells).splitlines() if not line.startswith(("%", "!")))


def test_there_are_eight_and_all_are_built_from_their_sources():
    built = runpy.run_path(str(ROOT / "notebooks" / "build.py"))["built"]()
    assert len(SOURCES) == 8 and len(built) == 16
    for path, text in built.items():
        assert path.read_text(encoding="utf8") == text, f"{path} is not current: python notebooks/build.py"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_each_says_the_same_in_both_languages(source):
    text = source.read_text(encoding="utf8")
    regions = {
        lang: re.findall(rf'<!-- #region lang="{lang}" -->\n(.*?)<!-- #endregion -->', text, re.S)
        for lang in ("en", "zh")
    }
    shapes = [[[line.split(" ")[0] for line in one.splitlines() if line.startswith(("#", "1.", "2.", "3."))]
               for one in regions[lang]] for lang in regions]  # fmt: skip
    formulas = [[len(re.findall(r"\$\$", one)) for one in regions[lang]] for lang in regions]
    assert shapes[0] == shapes[1] and formulas[0] == formulas[1]
    assert not any(re.search("[\u4e00-\u9fff]", one) for one in regions["en"])


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_each_section_measures_a_number_and_draws_a_figure(source):
    sections = re.split(r"^## .*", source.read_text(encoding="utf8"), flags=re.M)[1:]
    with_code = [section for section in sections if "```python" in section]
    assert len(with_code) >= 2
    for section in with_code:
        assert "print(" in section and "plt.show()" in section


def test_the_first_one_runs(monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT)
    source = code_of(SOURCES[0]).replace("300_000", "60_000").replace("4000]", "1500]").replace("2000, ", "")
    exec(compile(source, str(SOURCES[0]), "exec"), {})
