"""Exact answers: ask a checkpoint a file of questions and compare its replies to the letter.

python eval/questions.py --ckpt out/demo/sft/final --file data/demo/heldout_questions.jsonl
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from cli import call
from errors import UserError, command_line, tracked
from eval.answering import Answerer
from model.decoding.sampling import GREEDY, Sampling
from text.files import json_text
from text.judging.answers import conclusion
from text.sources.registry import Source
from text.sources.rows import every_row

Row = TypeVar("Row")
MOST_TOKENS = 48  # of an answer


@dataclass(frozen=True)
class Question:
    """One line of the file: `question`, its one right `answer`, and the `kind` that scores are grouped by."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Result:
    """A question with the model's reply."""

    question: Question
    reply: str

    @property
    def correct(self) -> bool:
        """Equal to the letter, white space at the ends aside; a sum may be worked out first."""
        return self.question.answer.strip() in (self.reply.strip(), conclusion(self.reply.strip()))


def read_questions(path: Path) -> list[Question]:
    """Read JSONL with `question`, `answer` and optionally `kind`."""
    make = lambda row: Question(str(row["question"]), str(row["answer"]), str(row.get("kind", "all")))  # noqa: E731
    return read_lines(path, make, "question and answer")


def read_lines(path: Path, make: Callable[[Any], Row], columns: str) -> list[Row]:
    """Make something of each row of a file. Raises `UserError` for another row, and for none."""
    rows = []
    for place, row in every_row(Source(str(path))):
        try:
            rows.append(make(row))
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{place}: not an object with {columns}; correct the row") from None
    return rows


def ask(answerer: Answerer, questions: list[Question], sampling: Sampling = GREEDY, seed: int = 0) -> list[Result]:
    """Ask the questions; see `Answerer.replies`."""
    asked = [[{"role": "user", "content": question.question}] for question in questions]
    replies = tracked(answerer.replies(asked, MOST_TOKENS, sampling, seed), "asking", len(asked))
    return [Result(question, reply) for question, reply in zip(questions, replies, strict=True)]


def accuracy(results: list[Result]) -> dict[str, float]:
    """Return the share of right answers for each kind, and under `all` for the whole."""
    kinds: dict[str, list[bool]] = defaultdict(list)
    for result in results:
        for kind in {result.question.kind, "all"}:
            kinds[kind].append(result.correct)
    return {kind: sum(right) / len(right) for kind, right in sorted(kinds.items())}


def questions(
    ckpt: str, file: str, json: bool = False, show: int = 5, lora: str = "", device: str = "auto", dtype: str = "auto"
) -> None:
    """Print the share of questions answered to the letter.

    Args:
        ckpt: checkpoint folder
        file: JSONL with question, answer and kind
        json: print one JSON object instead of a table
        show: wrong answers to show
        lora: folder of an adapter that lora_sft.py made for this checkpoint
        device: auto, cpu or cuda
        dtype: auto, bf16 or fp32
    """
    asked = read_questions(Path(file))
    results = ask(Answerer.open(ckpt, device, dtype, lora), asked)
    scores = accuracy(results)
    if json:
        print(json_text(scores))
        return
    table, console = Table("kind", "questions", "exact answers"), Console()
    for kind, share in scores.items():
        table.add_row(kind, str(sum(kind in (one.kind, "all") for one in asked)), f"{share:.1%}")
    console.print(table)
    for result in [result for result in results if not result.correct][:show]:
        question = result.question
        console.print(f"{question.question}\n  expected {question.answer}\n  got      {result.reply}", markup=False)


if __name__ == "__main__":
    command_line(lambda: call(questions, __doc__ or ""))
