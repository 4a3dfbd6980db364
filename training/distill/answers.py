"""A teacher's answers to prompts: asked once, written down as they come, and never asked for again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from errors import UserError, naming, tracked
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
    """JSONL of answers, each written before the next is waited for. `known`: answers by the key of their question."""

    def __init__(self, path: Path) -> None:
        """Read what is there. A last line that was torn is cut off; any other broken line raises `UserError`."""
        self.path = path
        self.known: dict[str, Answer] = {}
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

    def add(self, ask: Ask, answer: Answer) -> None:
        """Write an answer down before anything else is done with it."""
        row = {"key": ask.key, "messages": ask.messages, "sample": ask.sample}
        row |= {"answer": answer.text, "finish": answer.finish, "tokens": answer.tokens}
        with naming(self.path), self.path.open("ab") as file:
            file.write(json_text(row).encode() + b"\n")
        self.known[ask.key] = answer


def ask_all(teacher: AnsweringTeacher, asks: Sequence[Ask], journal: Journal) -> Counter[str]:
    """Put to the teacher what the journal does not know. Prints what came of it; returns why others have no answer.

    Raises `UserError` when many questions in a row get no answer; what was answered is kept.
    """
    with naming(journal.path):  # a folder that cannot be written to stops here, not after the first answer
        journal.path.parent.mkdir(parents=True, exist_ok=True)
        journal.path.touch()
    left = [ask for ask in asks if ask.key not in journal.known]
    failures, in_a_row = Counter(), 0
    # Closed at once when something is wrong: a teacher far away must not be waited for.
    with closing(teacher.answers(left)) as replies:
        for ask, answer in tracked(replies, "asking", len(left)):
            if isinstance(answer, Answer):
                journal.add(ask, answer)
                in_a_row = 0
                continue
            failures[answer.reason] += 1
            in_a_row += 1
            if in_a_row >= MOST_FAILURES:
                raise UserError(
                    f"--teacher: {in_a_row} questions in a row without an answer, the last: {answer.reason}; "
                    f"{journal.path} keeps {len(journal.known)} answers, --resume continues from there"
                )
    before, now = len(asks) - len(left), len(left) - failures.total()
    print(f"{len(asks)} questions: {before} answered before, {now} now")
    for reason, count in failures.most_common(MOST_REASONS):
        print(f"  {count} without an answer: {reason}")
    return failures


def questions(prompts: Sequence[Prompt], samples: int, *facts: object) -> list[list[Ask]]:
    """Return `samples` questions of each prompt, without the marks of turns that only training reads."""
    asked = [[{"role": turn["role"], "content": turn["content"]} for turn in prompt.messages] for prompt in prompts]
    return [[Ask.of(messages, sample, *facts) for sample in range(samples)] for messages in asked]
