"""The notebooks in both languages, each from one source: python notebooks/build.py [--check]

`notebooks/N_name.md` is jupytext's Markdown; a region marked `lang="zh"` or `lang="en"` is for that language alone. It
becomes notebooks/zh/N_name.ipynb and notebooks/en/N_name.ipynb, without outputs. --check: fail where one is old.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
LANGUAGES = ("zh", "en")


def sources() -> list[Path]:
    return sorted(FOLDER.glob("[0-9]_*.md"))


def notebook(source: Path, language: str) -> NotebookNode:
    """The cells of a source that one language has."""
    made = jupytext.read(source)
    cells = [cell for cell in made.cells if cell.metadata.pop("lang", language) == language and cell.source.strip()]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
        cell.metadata.clear()
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def built() -> dict[Path, str]:
    """What each notebook should contain."""
    return {
        FOLDER / language / f"{source.stem}.ipynb": nbformat.writes(notebook(source, language)) + "\n"
        for source in sources()
        for language in LANGUAGES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the notebooks from their sources.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where one is not current")
    check = parser.parse_args().check
    old = [path for path, text in built().items() if not path.is_file() or path.read_text(encoding="utf8") != text]
    if check and old:
        sys.exit(f"not current: {', '.join(map(str, old))}; run python notebooks/build.py")
    for path in old:
        path.parent.mkdir(exist_ok=True)
        path.write_text(built()[path], encoding="utf8")
    print(f"{len(old)} of {len(built())} notebooks written")


if __name__ == "__main__":
    main()
