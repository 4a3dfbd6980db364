"""A teacher's answers to prompts: asked once, written down as they come, and never asked for again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from rich.console import Console
from rich.progress import track

from errors import UserError, naming
from text.chats.chat_template import Message
from text.chats.prompts import Prompt
from text.files import json_text

MOST_FAILURES = 25  # one after the other, before the teacher is taken to be gone
MOST_REASONS = 10  # shown; a provider may put an id or a time into each


@dataclass(frozen=True)
class Answer:
    """An answer. `finish`: stop, length where it was cut, or content_filter; `tokens`: 0 where unknown."""

    text: str
    finish: str
    tokens: int = 0


@dataclass(frozen=True)
class Failure:
    """Why there is no answer."""

    reason: str


@dataclass(frozen=True)
class Ask:
    """A question to a teacher. `key`: 16 hex digits of all that the answer depends on; `sample`: its number, from 0."""

    messages: tuple[Message, ...] = field(compare=False)
    sample: int = field(compare=False)
    key: str

    @classmethod
    def of(cls, messages: Sequence[Message], sample: int, *facts: object) -> Ask:
        """facts: of the teacher and the sampling."""
        content = json.dumps([list(messages), sample, *facts], ensure_ascii=False)
        return cls(tuple(messages), sample, hashlib.blake2b(content.encode(), digest_size=8).hexdigest())


class AnsweringTeacher(Protocol):
    """Answers questions in any order, each with an answer or the reason why there is none."""

    def answers(self, asks: Sequence[Ask]) -> Generator[tuple[Ask, Answer | Failure], None, None]: ...


class Journal:
    """JSONL of answers, one flushed line each, so that a killed run loses none.

    Attributes: known: answers by the key of their question.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there. A last line that was torn is cut off; any other broken line raises `UserError`."""
        self.path = path
        self.known: dict[str, Answer] = {}
        self._file: IO[bytes] | None = None
        with naming(path):
            content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                row = json.loads(line)
                key, text, finish, tokens = (row[name] for name in ("key", "answer", "finish", "tokens"))
                if not all(isinstance(part, str) for part in (key, text, finish)) or type(tokens) is not int:
                    raise TypeError("of another type")
                self.known[key] = Answer(text, finish, tokens)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"{path}:{number}: not an answer as this program wrote it; remove the line") from None
        if len(whole) < len(content):
            with naming(path), path.open("r+b") as file:
                file.truncate(len(whole))

    def __enter__(self) -> Journal:
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, ask: Ask, answer: Answer) -> None:
        """Write an answer down before anything else is done with it."""
        row = {"key": ask.key, "messages": ask.messages, "sample": ask.sample}
        row |= {"answer": answer.text, "finish": answer.finish, "tokens": answer.tokens}
        with naming(self.path):
            self._file.write(json_text(row).encode() + b"\n")
            self._file.flush()
        self.known[ask.key] = answer


@dataclass
class AskReport:
    """What came of the questions. `before`: answered in an earlier run; `failures`: why others have no answer."""

    questions: int = 0
    before: int = 0
    answered: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.questions} questions: {self.before} answered before, {self.answered} now"]
        shown = self.failures.most_common(MOST_REASONS)
        lines += [f"  {count} without an answer: {reason}" for reason, count in shown]
        rest = self.failures.total() - sum(count for _, count in shown)
        return lines + [f"  {rest} without an answer for other reasons"] * bool(rest)


def ask_all(teacher: AnsweringTeacher, asks: Sequence[Ask], journal: Journal) -> AskReport:
    """Put to the teacher what the journal does not know.

    Raises `UserError` when many questions in a row get no answer; what was answered is kept.
    """
    left = [ask for ask in asks if ask.key not in journal.known]
    report, in_a_row = AskReport(len(asks), len(asks) - len(left)), 0
    bar = Console(stderr=True)
    # Closed at once when something is wrong: a teacher far away must not be waited for.
    with journal, closing(teacher.answers(left)) as replies:
        shown = track(replies, "asking", total=len(left), console=bar, transient=True, disable=not bar.is_terminal)
        for ask, answer in shown:
            if isinstance(answer, Answer):
                journal.add(ask, answer)
                report.answered, in_a_row = report.answered + 1, 0
                continue
            report.failures[answer.reason] += 1
            in_a_row += 1
            if in_a_row >= MOST_FAILURES:
                raise UserError(
                    f"--teacher: {in_a_row} questions in a row without an answer, the last: {answer.reason}; "
                    f"{journal.path} keeps {len(journal.known)} answers, --resume continues from there"
                )
    return report


def questions(prompts: Sequence[Prompt], samples: int, *facts: object) -> list[list[Ask]]:
    """`samples` questions of each prompt, without the marks of turns that only training reads."""
    asked = [[{"role": turn["role"], "content": turn["content"]} for turn in prompt.messages] for prompt in prompts]
    return [[Ask.of(messages, sample, *facts) for sample in range(samples)] for messages in asked]
