"""The final answer in a text, and plain numbers as exact fractions. What needs algebra is left to math-verify."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

LONGEST_ANSWER = 200  # characters; a longer "answer" is an essay that no verifier can judge

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
_PLAIN = re.compile(rf"({_NUMBER.pattern})(?:\s*/\s*({_NUMBER.pattern}))?")
# A sign right after a digit or a letter is an operator: the last number of "20-8=12" is 12, of "20-8" it is 8.
_LAST = re.compile(rf"(?:(?<![\w)])[-+])?(?:{_NUMBER.pattern.replace('[-+]?', '')})(?:/\d+)?")
_LEADING = " \t\r\n\"'“”‘’$￥¥*`"  # no dot: .5 is a half
_TRIMMED = " \t\r\n.。,，;；:：!！?？\"'“”‘’$￥¥*`"


def normal(text: str) -> str:
    """Full-width characters and other minus signs in their ASCII form, white space at the ends removed."""
    return unicodedata.normalize("NFKC", text).replace("−", "-").replace("–", "-").strip()


def as_number(text: str) -> Fraction | None:
    """`12`, `1,000`, `0.50`, `1/2`, `-3.` as a fraction; None when the text is anything else."""
    match = _PLAIN.fullmatch(normal(text).lstrip(_LEADING).rstrip(_TRIMMED))
    if match is None or len(text) > LONGEST_ANSWER:
        return None
    above, below = match.groups()
    denominator = Fraction(below.replace(",", "")) if below else Fraction(1)
    return Fraction(above.replace(",", "")) / denominator if denominator else None


def same_text(one: str, other: str) -> bool:
    """Equal but for case, spaces and punctuation at the ends: the fallback where nothing can be calculated."""
    return _folded(one) == _folded(other) != ""


def final_answer(text: str, numeric: bool = True) -> str | None:
    """What a completion gives as its answer, or None when it gives none or more than one.

    The content of `<answer>...</answer>`, which must then be there exactly once; else what follows `</think>`. Within
    that the last `\\boxed{...}`, what follows `####`, or, if a number is wanted, the last number. So a text can make
    one guess only, and reasoning that was cut off before its end is no answer.
    """
    if "<answer>" in text or "</answer>" in text:
        before, _, rest = text.partition("<answer>")
        inside, _, after = rest.partition("</answer>")
        if text.count("<answer>") != 1 or text.count("</answer>") != 1 or "</answer>" in before:
            return None
        if "</think>" in after or "think>" in inside:  # an answer within the thoughts was not given to anybody
            return None
        text = inside
    elif text.count("<think>") > text.count("</think>"):
        return None
    else:
        text = text.rpartition("</think>")[2]
    text = normal(text)
    if (boxed := _boxed(text)) is not None:
        text = boxed
    elif "####" in text:
        text = text.rpartition("####")[2]
    if not numeric or as_number(text) is not None:
        return text.strip() or None
    if "\\" in text:
        return text.strip(_TRIMMED) or None
    numbers = _LAST.findall(text)
    return numbers[-1] if numbers else text.strip() or None


def is_calculation(text: str) -> bool:
    """Whether the text still has something to work out, such as `1+2`: a question is not an answer to itself."""
    return bool(re.search(r"[\w)}]\s*(?:[-+*×÷]|\\times|\\cdot|\\div)\s*[\w({\\]", normal(text)))


def is_latex(text: str) -> bool:
    """Whether the text looks like a formula rather than like words."""
    return "\\" in text or bool(re.search(r"\d\s*[%^*+=]|\d\s*sqrt|[()\[\]]\s*\d", text))


def problem_with(answer: str) -> str | None:
    """Why no verifier could ever say "right" for this reference answer; None when one can."""
    if not answer.strip():
        return "the answer is empty"
    if as_number(answer) is not None or is_latex(answer):
        return None if len(answer) <= LONGEST_ANSWER else f"the formula has {len(answer)} characters"
    if len(answer) > LONGEST_ANSWER or "\n" in answer.strip():
        return f"the answer has {len(answer)} characters in {answer.count(chr(10)) + 1} lines and no '#### result'"
    if not _folded(answer):
        return f"the answer {answer.strip()!r} has no letter or digit"
    return None


def _folded(text: str) -> str:
    return re.sub(r"\s+", " ", normal(text).strip(_TRIMMED)).casefold()


def _boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}`, inner braces included; None without one or when it never closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin, depth = start + len("\\boxed{"), 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None
