"""The demo world's held-out questions, answered to the letter, and its favours, answered in the preferred style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.opened_model import OpenedModel
from eval.questions import Question, Result, read_questions
from eval.style import Favour, in_style, read_favours
from eval.suites.asking import ask, check_asking
from eval.suites.estimates import wilson
from eval.suites.suite import Row, Score, spread


@dataclass(kw_only=True)
class Questions:
    """Questions with one right answer, to the letter, as eval/questions.py counts them; greedy.

    Args:
        data: JSONL with question, answer and kind. max_new_tokens: most tokens of an answer.
        chunk: questions that are asked together.
    """

    data: str
    max_new_tokens: int = 48
    chunk: int = 64

    def __post_init__(self) -> None:
        check_asking(self.max_new_tokens, self.chunk)

    def items(self, limit: int) -> list[Question]:
        return spread(read_questions(Path(self.data)), limit)

    def measure(self, model: OpenedModel, items: Sequence[Question], seed: int) -> list[Row]:
        replies = ask(model, [_turn(item.question) for item in items], self.max_new_tokens, 0.0, seed)
        return [{"reply": reply} for reply in replies]

    def scores(self, items: Sequence[Question], rows: Sequence[Row]) -> list[Score]:
        right = [Result(item, row["reply"]).correct for item, row in zip(items, rows, strict=True)]
        return _shares("exact_match", right, [item.kind for item in items])


@dataclass(kw_only=True)
class Style:
    """Favours answered in the preferred style, as eval/style.py counts them; sampled.

    Args:
        data: JSONL with question, answer, opening and closing. max_new_tokens: most tokens of an answer.
        temperature: of the sampling. chunk: favours that are asked together.
    """

    data: str
    max_new_tokens: int = 48
    temperature: float = 0.7
    chunk: int = 64

    def __post_init__(self) -> None:
        check_asking(self.max_new_tokens, self.chunk, self.temperature)

    def items(self, limit: int) -> list[Favour]:
        return spread(read_favours(Path(self.data)), limit)

    def measure(self, model: OpenedModel, items: Sequence[Favour], seed: int) -> list[Row]:
        replies = ask(model, [_turn(item.question) for item in items], self.max_new_tokens, self.temperature, seed)
        return [{"reply": reply} for reply in replies]

    def scores(self, items: Sequence[Favour], rows: Sequence[Row]) -> list[Score]:
        pairs = [(row["reply"], item) for item, row in zip(items, rows, strict=True)]
        exact: Callable[[str, Favour], bool] = lambda reply, item: reply.strip() == item.answer.strip()  # noqa: E731
        kinds = ["all"] * len(pairs)
        return _shares("preferred", [in_style(*pair) for pair in pairs], kinds) + _shares(
            "exact_match", [exact(*pair) for pair in pairs], kinds
        )


def _turn(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _shares(metric: str, right: Sequence[bool], kinds: Sequence[str]) -> list[Score]:
    """The share of right answers, of all and of each kind."""
    scores = []
    for kind in ["all", *sorted(set(kinds) - {"all"})]:
        found = [is_right for is_right, own in zip(right, kinds, strict=True) if kind in ("all", own)]
        share = sum(found) / len(found)
        scores.append(Score(kind, metric, share, *wilson(share, len(found)), items=len(found)))
    return scores
