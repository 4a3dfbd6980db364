"""Every notebook, top to bottom, in a kernel of its own.

python tests/checks/check_notebooks.py [--only 3] [--language en]

`make check-notebooks` installs what it needs. The code of both languages is the same, so one is run. Prints the seconds
and what each cell printed last; with --figures DIR its figures are kept. Ends with code 1 if a cell fails.
"""

from __future__ import annotations

import base64
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from cli import call
from errors import command_line

ROOT = Path(__file__).parents[2]


def check_notebooks(language: str = "en", only: str = "", figures: str = "", limit: float = 900) -> None:
    """Run the notebooks.

    Args:
        language: en or zh
        only: numbers separated by commas; empty: all
        figures: folder for the figures
        limit: seconds that one cell may take
    """
    folder, failed = ROOT / "notebooks" / language, []
    for path in sorted(folder.glob("*.ipynb")):
        if only and path.name.split("_")[0] not in only.split(","):
            continue
        book, start = nbformat.read(path, as_version=4), time.monotonic()
        try:
            client = NotebookClient(
                book, timeout=limit, kernel_name="python3", resources={"metadata": {"path": folder}}
            )
            client.execute()
        except CellExecutionError as error:
            failed.append(path.name)
            print(error)
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)
        report(book, path.stem, Path(figures) if figures else None)
    if failed:
        print(f"failed: {', '.join(failed)}")
        sys.exit(1)


def report(book: nbformat.NotebookNode, name: str, figures: Path | None) -> None:
    """Print the last line that each cell printed, and keep its figures."""
    count = 0
    for cell in book.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stdout" and output.text.strip():
                print(f"    {output.text.strip().splitlines()[-1][:200]}")
            png = output.get("data", {}).get("image/png")
            if png and figures:
                figures.mkdir(parents=True, exist_ok=True)
                count += 1
                (figures / f"{name}-{count}.png").write_bytes(base64.b64decode(png))


if __name__ == "__main__":
    command_line(lambda: call(check_notebooks, __doc__ or ""))
