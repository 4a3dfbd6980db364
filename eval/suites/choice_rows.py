"""Multiple-choice questions of C-Eval, CMMLU and MMLU, from their CSV folders or the Hub, and of files like them.

C-Eval   val/law_val.csv        id,question,A,B,C,D,answer[,explanation]
CMMLU    test/agronomy.csv      ,Question,A,B,C,D,Answer
MMLU     test/anatomy_test.csv  question,A,B,C,D,answer without a header
Hub      the same columns, or question, choices and answer, a number counted from 0; a subset a subject
one file of any of these, or of JSON lines, with `subject` where it has several
"""

from __future__ import annotations

import csv
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from eval.suites.suite import rows_of
from text.registry import Source, find_sources

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
ALSO = {"val": ("val", "validation", "valid"), "validation": ("validation", "val", "valid")}


@dataclass(frozen=True)
class ChoiceItem:
    """A question, its choices, and the place of the right one among them."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int


def read_choices(data: str, split: str, subjects: list[str]) -> dict[str, list[ChoiceItem]]:
    """The questions of a split by subject, all of them or the given ones.

    Raises `UserError` for data that is not there or has no such split, and for the first row that is no question.
    """
    sources = find_sources(data, kind=None)
    if len(sources) != 1:
        raise UserError(f"--suite data {data}: one place is wanted; make a suite of each")
    found: dict[str, list[ChoiceItem]] = {}
    for subject, source in _by_subject(sources[0], split, subjects):
        for place, row in _rows(source):
            item = to_item(place, row, subject)
            found.setdefault(item.subject, []).append(item)
    if subjects and Path(sources[0].path).is_file():
        found = {subject: items for subject, items in found.items() if subject in subjects}
    missing = [subject for subject in subjects if subject not in found]
    if missing or not found:
        what = f"subject {missing[0]!r}" if missing else "question"
        raise UserError(f"{data}: no {what} in split {split!r}; it has {', '.join(found) or 'nothing'}")
    return found


def to_item(place: str, row: object, subject: str) -> ChoiceItem:
    """One row. Raises `UserError` that names its place."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: not an object with question, choices and answer; correct the row")
    columns = {str(name).strip().lower() if len(str(name)) > 1 else str(name): value for name, value in row.items()}
    letters = [letter for letter in string.ascii_uppercase if columns.get(letter) is not None]
    names = ["question", "answer"] + ([] if "choices" in columns else ["A", "B"])
    for name in names:
        if columns.get(name) is None:
            shown = ", ".join(map(repr, row)) or "none"
            raise UserError(
                f"{place}: no column {name!r}, the columns are {shown}; rename one, or take a split with answers"
            )
    if "choices" in columns:
        given = columns["choices"]
        if isinstance(given, dict):  # ARC's {"text": [...], "label": [...]}
            given = given.get("text")
        if not isinstance(given, list):
            raise UserError(f"{place}: 'choices' is no list; correct the row")
        choices = tuple(str(choice).strip() for choice in given)
    else:
        choices = tuple(str(columns[letter]).strip() for letter in letters)
        if letters != list(string.ascii_uppercase[: len(letters)]):
            raise UserError(f"{place}: choices {', '.join(letters)} with one missing in between; correct the row")
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise UserError(f"{place}: {len(choices)} choices; give 2 to {len(string.ascii_uppercase)}")
    question = str(columns["question"]).strip()
    for name, text in [("question", question), *zip(string.ascii_uppercase, choices, strict=False)]:
        if not text:
            raise UserError(f"{place}: {name} is empty; correct the row")
    return ChoiceItem(
        str(columns.get("subject") or subject), question, choices, _answer(place, columns["answer"], len(choices))
    )


def _answer(place: str, answer: Any, count: int) -> int:
    letters = string.ascii_uppercase[:count]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < count:
        return answer
    text = str(answer).strip().upper()
    if isinstance(answer, str) and len(text) == 1 and text in letters:
        return letters.index(text)
    raise UserError(f"{place}: the answer is {answer!r}, not one of {', '.join(letters)}; correct the row")


def _by_subject(source: Source, split: str, subjects: list[str]) -> Iterator[tuple[str, Source]]:
    """(subject, what to read) for each subject of a split."""
    if source.is_hub:
        for subject in [source.subset] if source.subset else subjects or _subsets(source):
            yield subject, Source(source.path, is_hub=True, subset=subject, split=split)
        return
    path = Path(source.path)
    if not path.is_dir():
        yield path.stem, source
        return
    names = ALSO.get(split, (split,))
    files = [
        (file.stem.removesuffix(f"_{name}"), file)
        for name in names
        for file in [*sorted((path / name).glob("*")), *sorted(path.glob(f"*_{name}.*"))]
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise UserError(
            f"{path}: no {split}/ folder with {', '.join(SUFFIXES)} files and no *_{split} files; check path and split"
        )
    for subject, file in files:
        if not subjects or subject in subjects:
            yield subject, Source(str(file))


def _subsets(source: Source) -> list[str]:
    import datasets  # slow to import, and wanted for the Hub alone

    try:
        return sorted(datasets.get_dataset_config_names(source.path))
    except Exception as error:  # the Hub's client raises of every kind
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source.path}: no such path here, and the Hub does not give it ({what}); check the path or the network"
        ) from None


def _rows(source: Source) -> Iterator[tuple[str, object]]:
    if not source.is_hub and source.path.lower().endswith(".csv") and _is_headerless(Path(source.path)):
        yield from _headerless_rows(Path(source.path))
        return
    yield from rows_of(source)


def _is_headerless(file: Path) -> bool:
    """Whether the first row is a question already, as in MMLU's files: its last field is the letter of a choice."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            first = next(csv.reader(stream), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return False  # the reader of rows says what is wrong
    if any(field.strip().lower() == "question" for field in first):
        return False
    return len(first) >= 4 and first[-1].strip() in tuple(string.ascii_uppercase[: len(first) - 2])


def _headerless_rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader, line = csv.reader(stream, strict=True), 1
            for fields in reader:
                if not 4 <= len(fields) <= len(string.ascii_uppercase) + 2:
                    raise UserError(
                        f"{file}:{line}: {len(fields)} fields; write question, choices and the answer's letter"
                    )
                choices = zip(string.ascii_uppercase, fields[1:-1], strict=False)
                yield f"{file}:{line}", {"question": fields[0], **dict(choices), "answer": fields[-1]}
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason}); convert it with iconv -f GB18030 -t UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{file}:{line}: not CSV ({error}); mend the row") from None
