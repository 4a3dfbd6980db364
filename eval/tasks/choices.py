"""Multiple-choice questions of C-Eval, CMMLU, MMLU and ARC, from their folders or the Hub, and of files like them.

C-Eval   val/law_val.csv        id,question,A,B,C,D,answer[,explanation]
CMMLU    test/agronomy.csv      ,Question,A,B,C,D,Answer
MMLU     test/anatomy_test.csv  question,A,B,C,D,answer without a header
Hub      the same columns, or question, choices and answer, a number counted from 0; a subset a subject
ARC      question, choices {"text": [...], "label": [...]} and answerKey, one of the labels
one file of any of these, or of JSON lines, with `subject` where it has several
"""

from __future__ import annotations

import csv
import re
import string
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError
from eval.tasks.docs import Docs, as_turns, evenly_spaced
from text.sources.data_file import DataFile
from text.sources.folders import SAVED, SHARD, SPLIT_OF, Folder
from text.sources.registry import Source, find_sources
from text.sources.row_report import RowReport
from text.sources.rows import SUFFIXES, every_row, rows_of

LETTERS = string.ascii_uppercase


class ChoiceItem(NamedTuple):
    """A question, its choices, and the place of the right one among them."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(kw_only=True)
class MultipleChoice:
    """Questions with one right choice each, the likeliest of which is the model's answer.

    Args:
        data: folder, file, Hub data set or name in datasets.yaml, in one of the layouts above.
        split: that is measured. shots: worked questions before each, the first ones of `shots_split` in its subject.
        shots_split: where they are taken from. shots_data: other data than `data` to take them from.
        subjects: only these; empty for all.
        form: letters (the choices are listed, and a letter is scored) or text (the choice itself is scored).
        intro: what stands before everything; {subject} becomes the subject. cue: what stands before the answer.
        separator: between cue and answer.
        chat: ask as a person in the model's chat template, and score the assistant's answer.
    """

    data: str
    split: str = "test"
    shots: int = 0
    shots_split: str = "dev"
    shots_data: str = ""
    subjects: list[str] = field(default_factory=list)
    form: str = "letters"
    intro: str = ""
    cue: str = "Answer:"
    separator: str = " "
    chat: bool = False

    def __post_init__(self) -> None:
        if self.form not in ("letters", "text"):
            raise UserError(f"form {self.form!r}: one of letters, text")
        if self.shots < 0:
            raise UserError("shots must be 0 or more")

    def docs(self, limit: int = 0) -> Docs:
        """Return the questions: `prompt` is all that stands before the answer, `turns` the same as a conversation."""
        asked = read_choices(self.data, self.split, self.subjects)
        shots = self._shots(list(asked))
        items = evenly_spaced([item for own in asked.values() for item in own], limit)
        return Docs(self._doc(item, shots[item.subject]) for item in items)

    def keys(self) -> dict[str, Any]:
        return {"target_delimiter": "" if self.chat else self.separator}

    def _shots(self, subjects: list[str]) -> dict[str, tuple[ChoiceItem, ...]]:
        """Return the worked questions of each subject; where there is one list of them, they serve all subjects."""
        if not self.shots:
            return dict.fromkeys(subjects, ())
        place = self.shots_data or self.data
        worked = read_choices(place, self.shots_split, [])
        if len(worked) == 1:
            worked = dict.fromkeys(subjects, next(iter(worked.values())))
        for subject in subjects:
            count = len(worked.get(subject, ()))
            if count < self.shots:
                remedy = f"set shots to {count} or less" if count else "add some"
                raise UserError(f"{place}: {subject} has {count} questions in split {self.shots_split!r}; {remedy}")
        return {subject: tuple(worked[subject][: self.shots]) for subject in subjects}

    def _doc(self, item: ChoiceItem, shots: tuple[ChoiceItem, ...]) -> dict[str, Any]:
        intro = self.intro.replace("{subject}", item.subject.replace("_", " "))
        pairs = [(self._asked(shot), self._choices(shot)[shot.answer]) for shot in shots]
        question = self._asked(item)
        doc = {"group": item.subject, "choices": self._choices(item), "answer": item.answer, "shots": len(shots)}
        doc["prompt"] = intro + "".join(f"{asked}{self.separator}{answer}\n\n" for asked, answer in pairs) + question
        if self.chat:
            doc["turns"] = as_turns([*pairs, (question, "")])
            doc["turns"][0]["content"] = intro + doc["turns"][0]["content"]
        return doc

    def _choices(self, item: ChoiceItem) -> list[str]:
        return list(LETTERS[: len(item.choices)] if self.form == "letters" else item.choices)

    def _asked(self, item: ChoiceItem) -> str:
        lines = [item.question]
        if self.form == "letters":
            lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False)]
        return "\n".join([*lines, self.cue] if self.cue else lines)


def read_choices(data: str, split: str, subjects: list[str]) -> dict[str, list[ChoiceItem]]:
    """Return the questions of a split by subject, all of them or the given ones.

    Raises `UserError` for data that is not there or has no such split, and for the first row that is not a question.
    """
    sources = find_sources(data, kind=None)
    if len(sources) != 1:
        raise UserError(f"--tasks data {data}: one place is needed; make a task of each")
    found: dict[str, list[ChoiceItem]] = {}
    for subject, source in _by_subject(sources[0], split, subjects):
        for place, row in _rows(source):
            item = to_item(place, row, subject)
            if not subjects or item.subject in subjects:
                found.setdefault(item.subject, []).append(item)
    missing = [subject for subject in subjects if subject not in found]
    if missing or not found:
        what = f"subject {missing[0]!r}" if missing else "question"
        raise UserError(f"{data}: no {what} in split {split!r}; it has {', '.join(found) or 'nothing'}")
    return found


def to_item(place: str, row: object, subject: str) -> ChoiceItem:
    """Return a row as a question. Raises `UserError` that names its place."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: not an object with question, choices and answer; correct the row")
    columns = {str(name).strip().lower() if len(str(name)) > 1 else str(name): value for name, value in row.items()}
    if columns.get("answer") is None:
        columns["answer"] = columns.get("answerkey")
    for name in ["question", "answer"] + ([] if "choices" in columns else ["A", "B"]):
        if columns.get(name) is None:
            shown = ", ".join(map(repr, row)) or "none"
            raise UserError(
                f"{place}: no column {name!r}, the columns are {shown}; rename one, or take a split with answers"
            )
    try:
        labels, given, named = _given_choices(columns)
        # A null, as in tables whose rows have three choices or four, is not a choice.
        choices = {label: str(text).strip() for label, text in zip(labels, given, strict=True) if text is not None}
        question = str(columns["question"]).strip()
        for name, text in [("question", question), *choices.items()]:
            if not text:
                raise ValueError(f"{name} is empty")
        if not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f"{len(choices)} choices, not 2 to {len(LETTERS)}")
        label = _answer(columns["answer"], labels, named)
        if label not in choices:
            raise ValueError(f"the answer is {columns['answer']!r}, not one of {', '.join(choices)}")
    except ValueError as error:
        raise UserError(f"{place}: {error}; correct the row") from None
    subject = str(columns.get("subject") or subject)
    return ChoiceItem(subject, question, tuple(choices.values()), list(choices).index(label))


def _given_choices(columns: dict[str, Any]) -> tuple[list[str], list[Any], bool]:
    """Return the labels of the choices, the choices, and whether the row names the labels itself."""
    if "choices" not in columns:
        letters = [letter for letter in LETTERS if columns.get(letter) is not None]
        while len(letters) > 2 and columns[letters[-1]] == "":  # how CSV has a null
            letters.pop()
        if letters != list(LETTERS[: len(letters)]):
            raise ValueError(f"choices {', '.join(letters)} with one missing in between")
        return letters, [columns[letter] for letter in letters], False
    given, labels = columns["choices"], None
    if isinstance(given, dict):
        given, labels = given.get("text"), given.get("label")
    if not isinstance(given, list) or not all(isinstance(choice, str | int | float | None) for choice in given):
        raise ValueError("'choices' is not a list of texts")
    if labels is None:
        if len(given) > len(LETTERS):
            raise ValueError(f"{len(given)} choices, not 2 to {len(LETTERS)}")
        return list(LETTERS[: len(given)]), given, False
    labels = [_label(label) for label in labels] if isinstance(labels, list) else []
    if not len(set(labels)) == len(labels) == len(given):
        raise ValueError(f"{len(given)} choices and not as many different labels")
    return labels, given, True


def _answer(answer: Any, labels: list[str], named: bool) -> str | None:
    """Return the label that is meant: a number is one if labels are numbers, else it counts them from 0."""
    if isinstance(answer, str) or (named and any(label.isdigit() for label in labels)):
        return _label(answer)
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool) and answer == answer // 1
    return labels[int(answer)] if is_number and 0 <= answer < len(labels) else None


def _label(label: Any) -> str:
    """Return a label as text: `b`, 2 and 2.0, as pandas makes 2 beside a null, are B, 2 and 2."""
    return str(int(label) if isinstance(label, float) and label.is_integer() else label).strip().upper()


def _by_subject(source: Source, split: str, subjects: list[str]) -> Iterator[tuple[str, Source]]:
    """Yield (subject, what to read) for each subject of a split."""
    path = Path(source.path)
    if source.is_hub:
        for subject in [source.subset] if source.subset else subjects or _subsets(source):
            yield subject, Source(source.path, is_hub=True, subset=subject, split=split)
    elif not path.is_dir():
        yield path.stem, source
    elif any((path / name).is_file() for name in SAVED):
        yield path.name, replace(source, split=split)
    else:
        folder = Folder.read(path, SUFFIXES, split)
        if not folder.splits:
            kinds = ", ".join(SUFFIXES)
            raise UserError(f"{path}: no {split}/ folder with {kinds} files and no *_{split} files; check both")
        for file in folder.files:
            name = re.sub(rf"_({'|'.join(SPLIT_OF)})$", "", SHARD.sub("", file.name).removesuffix(file.suffix))
            # In a snapshot of the Hub files have the names of splits, and subjects are folders.
            names = [name, *reversed(file.relative_to(path).parts[:-1]), path.name]
            subject = next(name for name in names if name not in ("data", *SPLIT_OF))
            if not subjects or subject in subjects:
                yield subject, Source(str(file))


def _subsets(source: Source) -> list[str]:
    import datasets  # slow to import, and needed for the Hub alone

    try:
        return sorted(datasets.get_dataset_config_names(source.path))
    except Exception as error:  # the Hub's client raises of every kind
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source.path}: no such path here, and the Hub does not give it ({what}); check the path or the network"
        ) from None


def _rows(source: Source) -> Iterator[tuple[str, object]]:
    """Yield (place, row) of each row; a CSV file without a header, as MMLU's, has a row that ends in a letter first."""
    fields, file = [], source.path
    if not source.is_hub and file.lower().endswith(".csv"):
        # The reader of rows says what is wrong with a file.
        with suppress(OSError, UnicodeDecodeError, csv.Error), open(file, encoding="utf-8-sig", newline="") as stream:
            fields = [field.strip() for field in next(csv.reader(stream), [])]
    if "question" in map(str.lower, fields) or len(fields) < 4 or fields[-1] not in [*LETTERS[: len(fields) - 2]]:
        return every_row(source)
    header = ["question", *LETTERS[: len(fields) - 2], "answer"]
    return rows_of([DataFile(file, RowReport(), on_error="refuse", header=header)], source)
