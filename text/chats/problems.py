"""Problems with an answer that can be checked, from files and from generators.

GSM8K          {"question": Q, "answer": "... #### 42"}
its Chinese    {"question_zh-cn": Q, "answer_only": "42"}
generic        {"question": Q, "answer": A}, {"problem": Q, "answer": A} or {"prompt": Q, "answer": A}
arithmetic:1-3       generated, level 1 to 4 (`text.chats.arithmetic`)
reasoning_gym:NAME   a task of the reasoning_gym package, when it is installed
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from errors import UserError
from text.chats.arithmetic import arithmetic_problem
from text.chats.turns import question_text
from text.judging.answers import final_answer, kind_of_answer, problem_with
from text.order import content_hash, shuffled
from text.sources.formats import Layout
from text.sources.registry import GENERATORS, Source
from text.sources.row_report import RowError, RowReport, UnwantedRow, kind_of
from text.sources.rows import placed_rows
from text.tokenizer import characters

# Question and answer columns; the first pair that a row has is taken.
COLUMNS = (
    ("question_zh-cn", "answer_only"),
    ("question", "answer"),
    ("problem", "answer"),
    ("prompt", "answer"),
    ("question", "answer_only"),
    ("question_zh-cn", "answer"),
)
EPOCH = 10_000  # problems that a generator's "epoch" counts
_CHINESE = re.compile(r"[\u3400-\u9fff]")


@dataclass(frozen=True)
class Problem:
    """A question with the answer that is right.

    Attributes:
        answer: the bare result. kind: what accuracies are grouped by. language: zh or en, as the question.
        score: a checker of the problem's own, from a final answer to 0 .. 1; it replaces the comparison with `answer`.
    """

    question: str
    answer: str
    kind: str
    score: Callable[[str], float] | None = None

    @property
    def language(self) -> str:
        return "zh" if _CHINESE.search(self.question) else "en"


@dataclass(frozen=True)
class Problems:
    """A source: `len` problems an epoch; `problem(index, seed)`, the index counted from the start, is one to train on.

    `content` is the same for the same problems, the held-out ones too; held_problem: number, from 0, to a problem that
    is never trained on; held: how many there are of these.
    """

    size: int
    content: str
    problem: Callable[[int, int], Problem]
    held_problem: Callable[[int], Problem]
    held: int = sys.maxsize

    @classmethod
    def listed(cls, train: list[Problem], held: list[Problem]) -> Problems:
        """Return problems of which each is shown once an epoch, in a new order."""

        def problem(index: int, seed: int) -> Problem:
            epoch, place = divmod(index, len(train))
            return train[shuffled(place, len(train), seed, epoch)]

        content = content_hash((one.question, one.answer, one.kind) for one in [*train, *held])
        return cls(len(train), content, problem, held.__getitem__, len(held))

    def __len__(self) -> int:
        return self.size

    def held_out(self, count: int) -> list[Problem]:
        """Return `count` held-out problems, the same for every seed, or as many as there are."""
        return [self.held_problem(number) for number in range(min(count, self.held))]


def is_generated(source: Source) -> bool:
    """Return whether there is no file: the problems are made up as they are asked for."""
    return source.path.partition(":")[0] in GENERATORS and not Path(source.path).exists()


def open_problems(source: Source | str | Path) -> Problems:
    """Open a source of rows, `arithmetic:LEVELS` or `reasoning_gym:TASK`. Raises `UserError`."""
    source = Source.of(source)
    if is_generated(source):
        kind, _, which = source.path.partition(":")
        return {"arithmetic": _arithmetic, "reasoning_gym": _reasoning_gym}[kind](source.path, which)
    return Problems.listed(*read_problems(source))


def read_problems(
    source: Source | str | Path, on_error: str = "skip", report: RowReport | None = None, val_fraction: float = 0.0
) -> tuple[list[Problem], list[Problem]]:
    """Return the problems of a file to train on, and those held out.

    Rows without a question, or with an answer that no verifier can parse, are counted in `report` or, with
    `on_error="stop"`, raise `UserError`. So does a source without any problem.
    """
    source, report = Source.of(source), RowReport() if report is None else report
    problems = [problem for _, problem in placed_rows(source, problem_reader(source), on_error, report)]
    train = [problem for problem in problems if _place(problem) >= val_fraction]
    if not train:
        first = next((examples[0] for examples in report.examples.values()), "all of it is held out")
        raise UserError(f"{source.path}: no problem to train on; {first}")
    return train, sorted((problem for problem in problems if _place(problem) < val_fraction), key=_place)


def problem_reader(source: Source) -> Callable[[object], Problem]:
    """Return what turns the rows of a source into problems, each question once; it raises `RowError` for the others."""
    asked: set[str] = set()

    def fresh(row: object) -> Problem:
        problem = to_problem(row, source.layout)
        if problem.question in asked:
            raise UnwantedRow("question asked before", "the question was asked in an earlier row")
        asked.add(problem.question)
        return problem

    return fresh


def to_problem(row: object, layout: Layout | None = None) -> Problem:
    """Return one row of any layout, or of the one that its source names, as a problem. Raises `RowError`."""
    row = layout.arrange(row) if layout else row
    if not isinstance(row, dict):
        raise RowError("not a problem", f"the row is {kind_of(row)}; it must be an object with question and answer")
    columns = next((pair for pair in COLUMNS if not any(is_missing(row.get(column)) for column in pair)), None)
    if columns is None:
        asked = any(not is_missing(row.get(question)) for question, _ in COLUMNS)
        shown = ", ".join(map(repr, row)) or "no keys"
        what = "no answer" if asked else "unknown layout"
        raise RowError(what, f"has {shown}, but not 'question' and 'answer' with something in both")
    question = question_text(repr(columns[0]), row[columns[0]])
    answer = written_number(row[columns[1]])
    for column, value in zip(columns, (question, answer), strict=True):
        if not isinstance(value, str):
            raise RowError("wrong type", f"{column!r} is {kind_of(value)}; it must be text")
    if not question.strip():
        raise RowError("empty question", "the question is empty")
    if not answer.strip():
        raise RowError("no answer", "the answer is empty")
    result = bare_answer(answer)
    if not result:
        shown = answer.rpartition("####")[2].strip()[:40]
        raise RowError("unparsable answer", f"what follows '####' is {shown!r}, not one number, formula or letter")
    if problem := problem_with(result):
        raise RowError("unparsable answer", f"no verifier can parse it: {problem}")
    return Problem(*(characters(text).strip() for text in (question, result, str(row.get("kind", "all")))))


def bare_answer(answer: str) -> str:
    """Return the reference itself: what follows GSM8K's `####`, where there is one; "" where that is not one answer."""
    _, mark, result = (part.strip() for part in answer.rpartition("####"))
    if not mark:
        return result
    line = result.partition("\n")[0]
    return (final_answer(line, "0") or "") if kind_of_answer(line) == "text" else line


def is_missing(value: object) -> bool:
    """Return whether a field holds nothing: null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def written_number(value: object) -> object:
    """Return a number of JSON in digits, 1e20 and 0.00001 too; any other value as it is."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return value
    return format(Decimal(repr(value)), "f") if math.isfinite(value) else repr(value)


def _arithmetic(name: str, which: str) -> Problems:
    """Return generated arithmetic, its levels alternating."""
    found = re.fullmatch(r"([1-4])(?:-([1-4]))?", which or "1-3")
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise UserError(f"--data {name}: write arithmetic:LEVEL or arithmetic:FIRST-LAST, levels 1 to 4")
    levels = tuple(range(int(found[1]), int(found[2] or found[1]) + 1))

    def draw(index: int, seed: int | str) -> Problem:
        level, held_out = levels[index % len(levels)], seed == "held out"
        question, answer = arithmetic_problem(random.Random(f"{seed}/{index}"), level, held_out)
        return Problem(question, re.findall(r"\d+", answer)[-1], f"level {level}")

    return Problems(EPOCH, f"arithmetic {levels}", draw, lambda number: draw(number, "held out"))


def _reasoning_gym(name: str, task: str) -> Problems:
    """Return a task of reasoning_gym; its own scoring decides."""
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(f"--data {name}: needs the package; pip install reasoning-gym") from None

    @cache
    def opened(seed: int) -> Any:
        return reasoning_gym.create_dataset(task, size=EPOCH, seed=seed % 2**31)

    def draw(index: int, seed: int) -> Problem:
        data = opened(seed)
        entry = data[index % len(data)]
        return Problem(entry["question"], str(entry["answer"]), task, lambda given: data.score_answer(given, entry))

    try:
        opened(0)
    except Exception as error:  # the package raises what it likes for a name that it does not know
        raise UserError(f"--data {name}: reasoning_gym does not make it ({error}); see its list of tasks") from None
    # Training uses no negative seed.
    return Problems(EPOCH, f"reasoning_gym {task}", draw, lambda number: draw(number, -1))


def _place(problem: Problem) -> float:
    """Return a hash of the question, from 0 to 1: it stays on its side of the split when other rows come or go."""
    digest = hashlib.blake2b(problem.question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
