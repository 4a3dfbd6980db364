"""The texts of the errors that the sources raise, out of their syntax trees: what differs from time to time is `…`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = {"UserError", "DamagedCheckpoint", "ConfigError"}
FOLDERS = (".", "model", "text", "training", "eval")
DIFFERS = "…"


def raised_in(source: str) -> list[str]:
    """The texts of every error of `KINDS` that a source makes, in order, each once."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS and node.args:
            text = re.sub(rf"{DIFFERS}+", DIFFERS, _text(node.args[0], constants))
            if text.strip(f"{DIFFERS}:; "):
                found[text] = None
    return list(found)


def _text(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.Name) and isinstance(constants.get(node.id), ast.Constant | ast.JoinedStr):
        return _text(constants[node.id], {})
    if isinstance(node, ast.IfExp):
        return _text(node.body, constants)
    if isinstance(node, ast.BoolOp):  # report.first_problem or f"..."
        return _text(node.values[-1], constants)
    return DIFFERS


def sources() -> list[Path]:
    """The files of the project that a person's command may run."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
