"""Whether a reply is right: its final answer against the reference, as numbers, formulas, letters or text."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import NamedTuple

from text.judging.answers import final_answer, kind_of_answer, same_text
from text.judging.pieces import is_calculation
from text.judging.quantity import LONGEST_ANSWER, Quantity, cleaned, plain, quantity
from text.judging.verifier import shared_verifier

_LATEX = {
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "×": r"\times ", "÷": r"\div ",
    "·": r"\cdot ", "$": "", "%": r"\%",
}  # fmt: skip


class Verdict(NamedTuple):
    """`right`: whether the reply earns its reward. `taken`: what was taken as its answer; None without one guess."""

    right: bool
    taken: str | None

    def as_json(self) -> str:
        """Return one object on one line."""
        return json.dumps(self._asdict(), ensure_ascii=False)


def judge(reference: str, reply: str) -> Verdict:
    """Judge a whole reply by the bare reference answer. `answers` says where in it the answer is looked for."""
    taken = final_answer(reply, reference)
    return Verdict(taken is not None and is_equal(reference, taken), taken)


def is_equal(reference: str, given: str) -> bool:
    """Return whether a bare answer equals the reference.

    Numbers are compared exactly, without another process; formulas, and numbers that have to be worked out
    (`\\sqrt{49}`), by math-verify; a sum (`3+4`) is no answer. What is no formula is compared as text.
    """
    kind = kind_of_answer(reference)
    if kind == "choice":
        return reference.strip(" ().$").casefold() == given.casefold() or same_text(reference, given)
    if kind == "text":
        return same_text(reference, given)
    if kind == "number":
        number = quantity(given)
        if number is not None:
            return _reference(reference).equals(number)
        if is_calculation(given) or ":" in given or not re.search(r"[\dπ\\]", given):
            return False
    elif re.sub(r"\s", "", given) == re.sub(r"\s", "", plain(reference)):
        return True
    if len(given) > LONGEST_ANSWER:
        return False
    return shared_verifier().equal(_as_latex(reference), _as_latex(given)) is True


@lru_cache(maxsize=4096)
def _reference(answer: str) -> Quantity:
    number = quantity(cleaned(answer))
    assert number is not None  # its kind says so
    return number


def _as_latex(text: str) -> str:
    text = re.sub(r"√\s*(?:(\w+)|\(([^()]*)\))", lambda root: rf"\sqrt{{{root[1] or root[2]}}}", plain(text))
    text = re.sub(r"(?<![\\A-Za-z])(sin|cos|tan|cot|log|ln|exp)(?![A-Za-z])", r"\\\1", text)
    return "".join(_LATEX.get(letter, letter) for letter in re.sub(r"\^(-\d+)", r"^{\1}", text))
