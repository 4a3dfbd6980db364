"""The texts of the errors that the sources raise, out of their syntax trees: what differs from time to time is `…`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = {"UserError", "DamagedCheckpoint", "ConfigError"}
ENDS = {"SystemExit", "exit", "fail"}  # `raise SystemExit(text)`, `sys.exit(text)`, `ranks.fail(text)`
FOLDERS = ("model", "text", "training", "eval", "bench")
DIFFERS = "…"


def raised_in(source: str) -> list[str]:
    """The texts of every error of a source, in order, each once; where one of several is chosen, each of them."""
    found: dict[str, None] = {}
    module = ast.parse(source)
    _search(module, _named(module), found)
    return list(found)


def _search(scope: ast.AST, named: dict[str, list[ast.expr]], found: dict[str, None]) -> None:
    """Put the texts of a module or a function into `found`. named: what the names around it may stand for."""
    for node in _inside(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            _search(node, {**named, **_named(node)}, found)
        elif isinstance(node, ast.Call) and node.args and _is_error(node.func):
            for text in _texts(node.args[0], named):
                text = re.sub(rf"{DIFFERS}+", DIFFERS, " ".join(text.split())).removeprefix("error: ")
                if text.strip(f"{DIFFERS}:; "):
                    found[text] = None


def _inside(scope: ast.AST) -> Iterator[ast.AST]:
    """What a scope holds, down to where functions in it begin."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _inside(node)


def _named(scope: ast.AST) -> dict[str, list[ast.expr]]:
    """The texts that are given names in a scope."""
    named: dict[str, list[ast.expr]] = {}
    for node in _inside(scope):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant | ast.JoinedStr | ast.IfExp):
                named.setdefault(target.id, []).append(node.value)
    return named


def _is_error(called: ast.expr) -> bool:
    if isinstance(called, ast.Attribute):
        return called.attr in ENDS
    return isinstance(called, ast.Name) and called.id in KINDS | ENDS


def _texts(node: ast.expr, named: dict[str, list[ast.expr]]) -> list[str]:
    """What an expression may say; `…` for what the source does not tell."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.FormattedValue):
        if isinstance(node.value, ast.BoolOp):  # f"{names or 'no file'}: ..."
            return [DIFFERS]
        texts = _texts(node.value, named)
        return texts if any(" " in text for text in texts) else [DIFFERS]  # single words are names of things
    if isinstance(node, ast.JoinedStr | ast.BinOp):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node.left, node.right]
        return ["".join(chosen) for chosen in product(*(_texts(part, named) for part in parts))]
    if isinstance(node, ast.Name) and node.id in named:
        return [text for value in named[node.id] for text in _texts(value, {})]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body, named), *_texts(node.orelse, named)]
    if isinstance(node, ast.BoolOp):  # report.first_problem or f"..."
        return _texts(node.values[-1], named)
    return [DIFFERS]


def sources() -> list[Path]:
    """The files of the project that a person's command may run."""
    return sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
