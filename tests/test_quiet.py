"""A script starts without the libraries that few of its runs need, and these come without their remarks."""

from __future__ import annotations

import ast
import logging
import re
import warnings
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from errors import quiet_compiler, quiet_imports

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.py"), *ROOT.glob("eval/*.py")])
SLOW = {"transformers", "peft", "torchao", "matplotlib", "datasets", "bitsandbytes", "wandb", "swanlab", "tensorboard"}


def imported(body: list[ast.stmt]) -> list[str]:
    """The modules that are imported when a module is: not those in functions, nor for type checkers alone."""
    names = []
    for node in body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If | ast.With | ast.Try) and "TYPE_CHECKING" not in ast.unparse(node).splitlines()[0]:
            names += imported(node.body)
    return names


@cache
def imports_of(path: Path) -> tuple[set[Path], set[str]]:
    """The files of the project, and the names of other packages."""
    files, others = set(), set()
    for name in imported(ast.parse(path.read_text(encoding="utf8")).body):
        place = ROOT.joinpath(*name.split("."))
        found = {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
        files |= found
        others |= set() if found else {name.split(".")[0]}
    return files, others


def closure(script: str) -> tuple[set[str], set[str]]:
    """The files of the project, and the other packages, that importing a script imports, itself or through these."""
    seen, packages, todo = set(), set(), {ROOT / script}
    while todo:
        files, others = imports_of(path := todo.pop())
        seen.add(path)
        todo |= files - seen
        packages |= others
    return {path.relative_to(ROOT).as_posix() for path in seen}, packages


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_waits_for_no_library_that_takes_seconds(script):
    assert not closure(script)[1] & SLOW


def test_pretraining_imports_nothing_that_one_process_may_do_without():
    """Kernels, decoding, a resume, other ranks, tokenising: found by name where they are taken."""
    files, _ = closure("pretrain.py")
    optional = ("model/kernels/", "model/decoding/", "training/parallel/group.py", "training/parallel/rank_checks.py",
                *(f"training/run/{name}.py" for name in ("resume", "state", "plots", "samples")),
                *(f"text/{name}.py" for name in ("corpus/tokenising", "corpus/documents", "sources/rows")))  # fmt: skip
    assert [file for file in sorted(files) if file.startswith(optional)] == ["model/kernels/__init__.py"]
    assert {"model/transformer.py", "training/trainer.py", "text/corpus/shards.py"} <= files


def test_settings_need_no_slow_library_for_their_annotations():
    """The parser of the command line imports what a module with settings imports for type checkers."""
    for path in (ROOT / "training").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf8"))
        if any(isinstance(node, ast.ClassDef) and node.name.endswith("Settings") for node in tree.body):
            guarded = [node.body for node in tree.body if isinstance(node, ast.If)]
            names = {name.split(".")[0] for body in guarded for name in imported(body)}
            assert not names & SLOW, path


def test_imports_make_no_circle():
    places = [
        path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in ("model", "text", "training", "eval")
    ]
    TopologicalSorter({path: imports_of(path)[0] - {path} for path in places}).prepare()  # raises CycleError


def test_no_script_finds_other_folders_in_place_of_the_packages():
    """What lies beside a script is found before what is installed, a folder without __init__.py too."""
    scripts = re.findall(r"\$\(RUN\) (\S+\.py)", (ROOT / "Makefile").read_text(encoding="utf8"))
    folders = {(ROOT / script).parent for script in scripts} - {ROOT}
    ours = {path.name for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {folder.name for folder in folders} >= {"eval", "bench", "checks"}
    assert [path for folder in folders for path in folder.iterdir() if path.name in ours] == []


def test_the_closure_sees_through_modules_and_contexts():
    assert {"peft", "torch"} <= closure("training/adapters/adapter.py")[1]


def test_remarks_of_an_import_are_quiet_and_errors_are_not(caplog, monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    logger = logging.getLogger("torchao")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with quiet_imports():
            logger.warning("Skipping import of cpp extensions")
            logger.error("broken")
            warnings.warn("advice", FutureWarning, stacklevel=1)
        logger.warning("later")
    assert [record.message for record in caplog.records] == ["broken", "later"]
    assert not heard


def test_remarks_of_the_compiler_are_quiet():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet_compiler()
        warnings.warn("Dynamo detected a call to a `functools.lru_cache`-wrapped function at x.", stacklevel=1)
        warnings.warn("OptimState8bit does not implement _stable_hash_for_caching. For PT2", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["another"]
