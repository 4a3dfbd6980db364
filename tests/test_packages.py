"""An installed copy has what the scripts import and read: pyproject.toml names every package, module and data file."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("model", "text", "world", "training", "eval")
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf8")  # tomllib came with Python 3.11


def listed(name: str) -> list[str]:
    """Return the strings of a list."""
    (content,) = re.findall(rf'(?:^|[{{,] )"?{re.escape(name)}"? = \[(.*?)\]', TEXT, re.M | re.S)
    return re.findall(r'"([^"]+)"', content)


def files(*suffixes: str) -> list[Path]:
    """Return the paths from the root of the files in the rooms that end so."""
    return [path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in suffixes]


def test_every_folder_with_code_is_a_package_and_every_script_a_module():
    folders = {path.parent for path in files(".py")}
    assert {".".join(folder.parts) for folder in folders} == {*listed("packages")}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
    assert {path.stem for path in ROOT.glob("*.py")} == {*listed("py-modules")}


def test_what_lies_beside_the_code_is_data_of_a_package():
    beside = files(".c", ".h", ".yaml", ".jinja", ".html", ".css", ".js")
    found = {
        path.relative_to(ROOT)
        for name in ("model.kernels", "text.chats", "eval.tasks", "world", "eval")
        for pattern in listed(name)
        for path in (ROOT / name.replace(".", "/")).glob(pattern)
    }
    assert len(beside) > 40 and not {*beside} - found
