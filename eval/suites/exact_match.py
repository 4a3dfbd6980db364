"""Problems with one right answer, compared by math-verify: exact match, pass@k and majority vote."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from errors import UserError
from eval.opened_model import OpenedModel
from eval.suites.asking import ask
from eval.suites.estimates import majority, pass_at_k, wilson
from eval.suites.suite import Row, Score, rows_of, sources_of, spread
from text.chats.chat_template import Message
from text.chats.problems import Problem, open_problems, to_problem
from text.judging.quantity import as_number
from text.sources.registry import GENERATORS, Source
from text.sources.row_report import RowError
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
        chunk: problems that are asked together.
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
    chunk: int = 64

    def __post_init__(self) -> None:
        if min(self.samples, self.chunk, self.problems, self.max_new_tokens) < 1 or self.temperature < 0:
            raise UserError("samples, problems, max_new_tokens and chunk must be 1 or more, temperature 0 or more")
        if self.samples > 1 and not self.temperature:
            raise UserError(f"samples {self.samples}: greedy answers are all the same; set a temperature")
        if not self.k or not all(1 <= k <= self.samples for k in self.k):
            raise UserError(f"k {self.k}: each from 1 to samples = {self.samples}")
        if self.shots and not self.shots_data:
            raise UserError(f"shots {self.shots}: worked problems are taken from shots_data; give a file")

    def items(self, limit: int) -> list[Problem]:
        found: list[Problem] = []
        for source in sources_of(self.data, self.split, "prompt"):
            is_made = source.path.partition(":")[0] in GENERATORS and not Path(source.path).exists()
            found += open_problems(source).held_out(self.problems) if is_made else _problems(source)
        return spread(found, limit)

    def measure(self, model: OpenedModel, items: Sequence[Problem], seed: int) -> list[Row]:
        before = self._before()
        asked = [
            [*before, {"role": "user", "content": problem.question}] for problem in items for _ in range(self.samples)
        ]
        answers = iter(ask(model, asked, self.max_new_tokens, self.temperature, seed))
        rows = []
        for problem in items:
            own = [next(answers) for _ in range(self.samples)]
            rows.append({"answers": own, "right": [is_correct(problem, answer) for answer in own]})
        return rows

    def scores(self, items: Sequence[Problem], rows: Sequence[Row]) -> list[Score]:
        groups: dict[str, list[tuple[Problem, Row]]] = {}
        for problem, row in zip(items, rows, strict=True):
            groups.setdefault(problem.kind, []).append((problem, row))
        scores = self._scores("all", list(zip(items, rows, strict=True)))
        if len(groups) > 1:
            for kind, group in groups.items():
                scores += self._scores(kind, group)
        return scores

    def _scores(self, group: str, asked: Sequence[tuple[Problem, Row]]) -> list[Score]:
        values = {}
        if self.samples == 1:
            values["exact_match"] = [float(row["right"][0]) for _, row in asked]
        else:
            for k in self.k:
                values[f"pass@{k}"] = [pass_at_k(self.samples, sum(row["right"]), k) for _, row in asked]
            values[f"maj@{self.samples}"] = [majority(_votes(problem, row), RIGHT) for problem, row in asked]
        scores = []
        for metric, found in values.items():
            share = sum(found) / len(found)
            scores.append(Score(group, metric, share, *wilson(share, len(found)), items=len(found)))
        return scores

    def _before(self) -> list[Message]:
        """System prompt and worked problems."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        if not self.shots:
            return messages
        source, *more = sources_of(self.shots_data, "train", "prompt")
        if more:
            raise UserError(f"shots_data {self.shots_data}: one place is wanted; put the worked problems into one file")
        worked: list[Message] = []
        for place, row in rows_of(source):
            row = source.layout.arrange(row) if source.layout.format else row
            if not isinstance(row, dict) or not {"question", "answer"} <= set(row):
                raise UserError(f"{place}: not an object with question and answer; correct the row")
            worked += [{"role": "user", "content": str(row["question"])}]
            worked += [{"role": "assistant", "content": str(row["answer"])}]
            if len(worked) == 2 * self.shots:
                return messages + worked
        raise UserError(f"{self.shots_data}: {len(worked) // 2} problems; set shots to that or less")


def _problems(source: Source) -> Iterator[Problem]:
    """Every row as a problem, those that are asked twice too. Raises `UserError` for the first that is none."""
    for place, row in rows_of(source):
        try:
            yield to_problem(row, source.layout)
        except RowError as error:
            raise UserError(f"{place}: {error}; correct the row") from None


def _votes(problem: Problem, row: Row) -> list[Hashable | None]:
    """What each answer votes for; an answer that gives nothing has no vote."""
    votes: list[Hashable | None] = []
    for answer, right in zip(row["answers"], row["right"], strict=True):
        given = taken_answer(problem, answer)
        number = as_number(given) if given else None
        votes.append(RIGHT if right else given if number is None else number)
    return votes
