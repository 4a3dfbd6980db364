"""Tasks by name or file, with their settings checked: those of this folder, your own, and lm-evaluation-harness's.

multiple_choice:            # a file of your own: the kind, and its settings
  data: exams/law.jsonl
  shots: 3
"""

from __future__ import annotations

import difflib
import re
from contextlib import suppress
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

    `docs` raises `UserError` for data that it cannot use. `keys`: what follows from the settings of the keys of
    lm-evaluation-harness's task file.
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

    Raises `UserError` for an entry that is wrong or there twice, and for none.
    """
    tasks: dict[str, Task] = {}
    for entry in filter(None, map(str.strip, entries.split(","))):
        task = open_task(entry, theirs_first)
        known = tasks.get(task.name)
        if known and known.settings and task.settings and known.settings.data != task.settings.data:
            task = Task(f"{task.name}-{Path(task.settings.data).stem}", task.kind, task.settings)
        if task.name in tasks:
            raise UserError(f"--tasks {entry}: is there twice; leave one out")
        tasks[task.name] = task
    if not tasks:
        raise UserError("--tasks: names nothing; give a name or a .yaml file")
    return list(tasks.values())


def open_task(entry: str, theirs_first: bool = True) -> Task:
    """Open one entry. Raises `UserError` for an unknown name or kind, or a wrong setting."""
    name, _, data = entry.partition("=")
    file, kind = Path(name), ""
    if file.suffix not in (".yaml", ".yml"):
        name = RENAMED.get(name, name)
        file = FOLDER / f"{name}.yaml"
        known = sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))
        may_be_theirs = name in SHARED_NAMES or (name not in known and re.fullmatch(r"[\w.+-]+", name))
        if may_be_theirs and theirs_first and not data:
            return Task(name)
        if name not in known:
            raise UserError(f"--tasks {name}: no such task; {_hint(name, known)}")
        content = read_yaml(file)
        kind, settings = content["include"][1 : -len(".yaml")], dict(content["dataset_kwargs"])
    else:
        with suppress(OSError, UnicodeDecodeError):  # its reader says what is wrong
            if not data and _NATIVE.search(file.read_text(encoding="utf-8-sig")):
                return Task(str(file))
        content = read_yaml(file)
        if isinstance(content, dict) and len(content) == 1:
            ((kind, settings),) = content.items()
        if not kind or not isinstance(settings, dict):
            raise UserError(f"{file}: must be one kind of task with its settings, as in multiple_choice: {{data: DIR}}")
    return Task(file.stem, str(kind), _settings(file, str(kind), {**settings, **({"data": data} if data else {})}))


def _settings(file: Path, kind: str, settings: dict[str, Any]) -> Settings:
    if kind not in KINDS:
        raise UserError(f"{file}: kind {kind!r}; {_hint(kind, list(KINDS))}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(KINDS[kind])
    try:
        found = KINDS[kind](**vars(parser.instantiate(parser.parse_object(settings))))
        check_values(KINDS[kind], vars(found), "")
    # What the types of the parser cannot hold comes through it, such as 10**400 as a float.
    except (ArgumentError, UserError, ArithmeticError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from None
    return found


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
