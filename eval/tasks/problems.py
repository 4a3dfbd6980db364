"""Problems with one right answer, compared by math-verify: exact match, pass@k and majority vote."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from errors import UserError
from eval.tasks.docs import Docs, as_turns, evenly_spaced, sources_of
from eval.tasks.replies import generation_keys, replies_of
from text.chats.problems import Problem, is_generated, open_problems, to_problem
from text.judging.quantity import as_number
from text.sources.registry import Source
from text.sources.row_report import RowError
from text.sources.rows import every_row
from training.alignment.rewards import is_correct, taken_answer

RIGHT = ("right",)  # under which all right answers vote, however they are written


@dataclass(kw_only=True)
class ExactMatch:
    """Problems as for grpo_train.py, judged as it judges them.

    Args:
        data: files, Hub data sets, names, or generators such as arithmetic:1-2, whose held-out problems are asked.
        split: of data on the Hub. problems: of a generator.
        shots: worked problems before each, the first rows of `shots_data` with the whole of their answers.
        shots_data: a file of problems that are not asked.
        system: system prompt.
        max_new_tokens: most tokens of an answer.
        samples: answers to each problem. temperature: 0 takes the likeliest tokens, for one sample only.
        k: pass@k for each of these, none above `samples`.
    """

    data: str
    split: str = "test"
    problems: int = 256
    shots: int = 0
    shots_data: str = ""
    system: str = ""
    max_new_tokens: int = 256
    samples: int = 1
    temperature: float = 0.0
    k: list[int] = field(default_factory=lambda: [1])

    def __post_init__(self) -> None:
        if min(self.samples, self.problems, self.max_new_tokens) < 1 or self.temperature < 0:
            raise UserError("samples, problems and max_new_tokens must be 1 or more, temperature 0 or more")
        if self.samples > 1 and not self.temperature:
            raise UserError(f"samples {self.samples}: greedy answers are all the same; set a temperature")
        if not self.k or not all(1 <= k <= self.samples for k in self.k):
            raise UserError(f"k {self.k}: each from 1 to samples = {self.samples}")
        if self.shots and not self.shots_data:
            raise UserError(f"shots {self.shots}: worked problems are taken from shots_data; give a file")

    def docs(self, limit: int = 0) -> Docs:
        found: list[Problem] = []
        for source in sources_of(self.data, self.split, "prompt"):
            made = is_generated(source)
            found += open_problems(source).held_out(self.problems) if made else _problems(source)
        worked = self._worked()
        return Docs(
            {
                "group": problem.kind, "question": problem.question, "answer": problem.answer, "problem": problem,
                "k": self.k, "turns": as_turns([*worked, (problem.question, "")], self.system),
            }
            for problem in evenly_spaced(found, limit)
        )  # fmt: skip

    def keys(self) -> dict[str, Any]:
        return generation_keys(self.max_new_tokens, self.temperature, self.samples)

    def _worked(self) -> list[tuple[str, str]]:
        """Return question and answer of the worked problems."""
        worked: list[tuple[str, str]] = []
        for source in sources_of(self.shots_data, "train", "prompt") if self.shots else []:
            for place, row in islice(every_row(source), self.shots - len(worked)):
                row = source.layout.arrange(row) if source.layout.format else row
                if not isinstance(row, dict) or not {"question", "answer"} <= set(row):
                    raise UserError(f"{place}: not an object with question and answer; correct the row")
                worked.append((str(row["question"]), str(row["answer"])))
        if len(worked) < self.shots:
            raise UserError(f"{self.shots_data}: {len(worked)} problems; set shots to that or less")
        return worked


def judge(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """exact_match of one answer; of several pass@k and the majority's vote."""
    problem, answers = doc["problem"], replies_of(results)
    right = [is_correct(problem, answer) for answer in answers]
    if len(answers) == 1:
        return {"exact_match": float(right[0])}
    votes: list[Hashable | None] = []
    for answer, is_right in zip(answers, right, strict=True):
        given = taken_answer(problem, answer)
        number = as_number(given) if given else None
        votes.append(RIGHT if is_right else given if number is None else number)
    values = {f"pass@{k}": pass_at_k(len(right), sum(right), k) for k in doc["k"]}
    return {**values, f"maj@{len(right)}": majority(votes, RIGHT)}


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the chance that one of k samples is right, from n of which c are: 1 - C(n-c, k) / C(n, k), without bias.

    Chen et al. 2021 (Codex), Eq. 1. k must not be above `samples`.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(answers: Sequence[Hashable | None], right: Hashable) -> float:
    """Return 1 if the most frequent answer is the right one, 0 if not, and 1/t if it is one of t with most votes.

    None has no vote. (Self-consistency, Wang et al. 2022.)
    """
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    return 1 / len(winners) if right in winners else 0.0


def _problems(source: Source) -> Iterator[Problem]:
    """Yield every row as a problem, repeated ones too. Raises `UserError` for the first that is not one."""
    for place, row in every_row(source):
        try:
            yield to_problem(row, source.layout)
        except RowError as error:
            raise UserError(f"{place}: {error}; correct the row") from None
