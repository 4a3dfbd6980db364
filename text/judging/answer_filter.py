"""Which of a teacher's answers are fit to learn from: cleaned, or the reason why not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from errors import UserError

GRAM = 4  # words or Chinese characters in a row
FEWEST_GRAMS = 20  # a shorter answer may repeat itself as it likes

_WORD = re.compile(r"[\u3400-\u9fff]|[^\W_]+", re.UNICODE)
_THINK = re.compile(r"</?think>")
_REFUSAL = re.compile(
    r"(?:(?:I['’]m|I am) (?:very |so )?sorry,? (?:but )?(?:I )?(?:can['’]t|cannot|can not|am not able|am unable)"
    r"|(?:Sorry, (?:but )?)?I (?:can['’]t|cannot|can not|am unable to|am not able to) "
    r"(?:help|assist|answer|provide|fulfil|comply|discuss|do that)"
    r"|As an AI(?: language model)?,? I (?:can['’]t|cannot|do not|don['’]t|am)"
    r"|(?:非常|很)?(?:抱歉|对不起)[，,。！!]?\s*(?:但)?我?(?:无法|不能|没有办法|没办法)"
    r"|我(?:无法|不能)(?:回答|提供|协助|帮助)"
    r"|作为(?:一个|一名)?(?:AI|人工智能)[^。]{0,12}(?:无法|不能))",
    re.IGNORECASE,
)


@dataclass(kw_only=True)
class AnswerFilter:
    """What an answer must be like.

    Args:
        min_chars: shorter answers are dropped, thoughts not counted.
        max_chars: longer answers are dropped, thoughts counted; 0: none is too long.
        most_repeated: share of an answer's runs of four words that may have stood in it before.
    """

    min_chars: int = 1
    max_chars: int = 0
    most_repeated: float = 0.5

    def check_filter(self) -> None:
        """Raise `UserError` for a value that makes no sense."""
        if min(self.min_chars, self.max_chars) < 0 or 0 < self.max_chars < self.min_chars:
            raise UserError(f"--min_chars {self.min_chars}, --max_chars {self.max_chars}: from 0 and in this order")
        if not 0 <= self.most_repeated <= 1:
            raise UserError(f"--most_repeated {self.most_repeated:g}: a share, from 0 to 1")

    def fault(self, text: str) -> str | None:
        """Return why a cleaned answer is dropped, in words to count by; None for a good one."""
        said = text.rpartition("</think>")[2].strip()
        if "\0" in text:
            return "has a NUL character"
        if not said:
            return "empty"
        if not is_well_formed(text):
            return "broken think part"
        if _REFUSAL.match(said):
            return "refusal"
        if len(said) < self.min_chars:
            return f"shorter than {self.min_chars} characters"
        if self.max_chars and len(text) > self.max_chars:
            return f"longer than {self.max_chars} characters"
        if repeated(text) > self.most_repeated:
            return "repeats itself"
        return None


def clean(text: str) -> str:
    """Line ends as \\n, no white space at the ends of lines and text, at most one empty line in a row."""
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def is_well_formed(text: str) -> bool:
    """Return whether there are no thoughts, or one part of them, at the beginning and closed."""
    marks = _THINK.findall(text)
    return not marks or (marks == ["<think>", "</think>"] and text.startswith("<think>"))


def repeated(text: str) -> float:
    """Return the share of runs of four words, or Chinese characters, that are repetitions; 0 for a short text."""
    words = _WORD.findall(text.lower())
    grams = [tuple(words[place : place + GRAM]) for place in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) >= FEWEST_GRAMS else 0.0


def shortest_different(texts: Iterable[str], most: int) -> list[str]:
    """Return at most `most` of the different texts, the shortest first."""
    return sorted(set(texts), key=lambda text: (len(text), text))[:most]
