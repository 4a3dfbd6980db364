"""Tasks by name or file, with their settings checked: those of this folder, your own, and lm-evaluation-harness's.

multiple_choice:            # a file of your own: the kind, and its settings
  data: exams/law.jsonl
  shots: 3
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jsonargparse import ArgumentError, ArgumentParser

from cli import check_values
from errors import UserError
from eval.tasks.choices import MultipleChoice
from eval.tasks.docs import Docs
from eval.tasks.problems import ExactMatch
from eval.tasks.replies import Quality, Questions, Style
from eval.tasks.texts import Text
from text.files import read_yaml

FOLDER = Path(__file__).parent
KINDS: dict[str, type] = {
    "text": Text,
    "multiple_choice": MultipleChoice,
    "exact_match": ExactMatch,
    "questions": Questions,
    "style": Style,
    "quality": Quality,
}
RENAMED = {"demo-favours": "demo-style"}
SHARED_NAMES = ("cmmlu", "gsm8k", "mmlu")  # of tasks that lm-evaluation-harness has too
_NATIVE = re.compile(r"^(task|group|include)\s*:", re.MULTILINE)


class Settings(Protocol):
    """A kind of task: a dataclass whose fields are the settings.

    `docs` raises `UserError` for data that it cannot use.
    """

    data: str

    def docs(self, limit: int = 0) -> Docs: ...

    def keys(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Task:
    """A task by name. `settings`: None where the task is lm-evaluation-harness's own, a name of its or a file."""

    name: str
    kind: str = ""
    settings: Settings | None = None


def open_tasks(entries: str, theirs_first: bool = True) -> list[Task]:
    """Open `NAME`, `FILE.yaml`, or either followed by `=DATA` for the same task on other data, separated by commas.

    Args:
        theirs_first: take a bare name that lm-evaluation-harness may know, such as mmlu, for its own task.

    Raises `UserError` for an entry that is wrong, for none, and for one that is there twice.
    """
    tasks: dict[str, Task] = {}
    for entry in (part.strip() for part in entries.split(",")):
        if not entry:
            continue
        task = open_task(entry, theirs_first)
        if task.name in tasks and _data(tasks[task.name]) != _data(task):
            task = Task(f"{task.name}-{Path(_data(task)).stem}", task.kind, task.settings)
        if task.name in tasks:
            raise UserError(f"--tasks {entry}: is there twice; leave one out")
        tasks[task.name] = task
    if not tasks:
        raise UserError("--tasks: names nothing; give a name or a .yaml file")
    return list(tasks.values())


def open_task(entry: str, theirs_first: bool = True) -> Task:
    """Open one entry. Raises `UserError` for an unknown name or kind, or a wrong setting."""
    name, _, data = entry.partition("=")
    file = Path(name)
    if file.suffix not in (".yaml", ".yml"):
        name = RENAMED.get(name, name)
        file = FOLDER / f"{name}.yaml"
        known = sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))
        if name not in known:
            if theirs_first and not data and re.fullmatch(r"[\w.+-]+", name):
                return Task(name)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}, or give a .yaml file"
            raise UserError(f"--tasks {name}: no such task; {hint}")
        if theirs_first and not data and name in SHARED_NAMES:
            return Task(name)
        content = read_yaml(file)
        kind, settings = content["include"][1 : -len(".yaml")], dict(content["dataset_kwargs"])
    else:
        if _is_native(file) and not data:
            return Task(str(file))
        kind, settings = _read(file)
    if data:
        settings["data"] = data
    return Task(file.stem, kind, _settings(file, kind, settings))


def _settings(file: Path, kind: str, settings: dict[str, Any]) -> Settings:
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        raise UserError(
            f"{file}: kind {kind!r}; " + (f"did you mean {near[0]}?" if near else f"one of {', '.join(KINDS)}")
        )
    settings.pop("chunk", None)  # of files written for earlier versions
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(KINDS[kind])
    try:
        found = KINDS[kind](**vars(parser.instantiate(parser.parse_object(settings))))
        check_values(KINDS[kind], vars(found), "")
    # What the types of the parser cannot hold comes through it, such as 10**400 as a float.
    except (ArgumentError, UserError, ArithmeticError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from None
    return found


def _read(file: Path) -> tuple[str, dict[str, Any]]:
    content = read_yaml(file)
    if (
        not isinstance(content, dict)
        or len(content) != 1
        or not isinstance(settings := next(iter(content.values())), dict)
    ):
        raise UserError(f"{file}: must be one kind of task with its settings, as in multiple_choice: {{data: DIR}}")
    return str(next(iter(content))), dict(settings)


def _is_native(file: Path) -> bool:
    """Whether a file is in lm-evaluation-harness's own form, which it reads by itself."""
    try:
        return bool(_NATIVE.search(file.read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError):
        return False  # its reader says what is wrong


def _data(task: Task) -> str:
    return task.settings.data if task.settings else ""
