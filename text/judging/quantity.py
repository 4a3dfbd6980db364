"""Numbers as people and LaTeX write them, read exactly: `-$5`, `1{,}500`, `1 1/2`, `½`, `1e5`, `25 cm²`, `50%`."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

LONGEST_ANSWER = 200  # characters; a longer "answer" is an essay that no verifier can judge
LONGEST_LINE = 1000  # of a longer text the end is read
LARGEST_EXPONENT = 400  # 1e999999999 as a fraction would fill the memory

CURRENCY = r"(?:(?:US|HK|CA|A)?\$|[¥€£₹₩₽]|(?:RMB|CNY|USD|EUR|GBP|Rs\.?)(?![A-Za-z])\x20?)"
NUMBER = r"(?:(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:\x20\d{3})+|\d+)(?!\d)(?:\.\d+)?|\.\d+)"
SCALES = {"万亿": 10**12, "亿": 10**8, "万": 10**4, "thousand": 10**3, "million": 10**6, "billion": 10**9}
# A number with what belongs to it. `5 1/2` is mixed, `1/2/3` is no fraction.
_VALUE = (
    rf"(?P<number>{NUMBER})"
    rf"(?:\x20(?P<above>\d{{1,9}})/(?P<of>\d{{1,9}})(?!\d)|\x20?/\x20?(?P<below>{NUMBER})"
    r"|[eE](?P<e>[-+]?\d{1,9})(?![\d.])"
    r"|\x20?[*×·x]\x20?10\^[{(]?(?P<ten>[-+]?\d{1,9})[})]?)?(?!/\d)"
    rf"(?:\x20?(?P<scale>{'|'.join(SCALES)})(?![a-z]))?(?P<percent>\x20?(?:%|per\x20?cent(?![a-z])))?"
)
VALUE = re.sub(r"\(\?P<\w+>", "(?:", _VALUE)
# `12 Angry Men` is a title, `12 men` is a number: a unit begins with a small letter, or is a symbol that does not.
_SYMBOL = r"[mgslLhtNWVJKA](?![A-Za-z])|°[CF]?|[kM]Wh|[kMG]?Hz|[kKMGT]B|mL"
_WORD = rf"(?:(?!or\b|and\b)[a-zμ]{{2,}}\.?|{_SYMBOL})(?:\^-?\d)?"
_UNIT = rf"(?:{_WORD}(?:(?:\x20?/\x20?|\x20per\x20){_WORD})?|[\u3400-\u9fff]{{1,4}}(?:/[\u3400-\u9fff]{{1,3}})?)"
_WHOLE = re.compile(
    rf"(?P<outer>[-+]?)\s?{CURRENCY}?\s?(?P<inner>-?){_VALUE}(?:\s?(?:(?P<unit>{_UNIT})|{CURRENCY}))?(?:\s?{CURRENCY})?"
)
_ENDS = " \t\r\n.。,，;；:：!！?？\"'“”‘’*`$"
_SYMBOLS = frozenset(re.findall(r"\S+", "mm cm dm m km mm^2 cm^2 m^2 km^2 cm^3 m^3 mg g kg t ml mL l L s min h"))


class Quantity(NamedTuple):
    """A number. Attributes: value: before the percent sign, when it has one (`percent`); unit: "" without one."""

    value: Fraction
    percent: bool = False
    unit: str = ""

    def equals(self, other: Quantity) -> bool:
        """Return whether both are one number. 50% is one half too and, as the answer to "how many percent", 50."""
        if {self.unit, other.unit} <= _SYMBOLS and self.unit != other.unit:
            return False  # 25 cm is not 25 m; a unit that only one of them has is not asked about
        if self.percent == other.percent:
            return self.value == other.value
        share, number = (self.value, other.value) if self.percent else (other.value, self.value)
        return share / 100 == number or (share == number and abs(share) >= 1)


def quantity(text: str) -> Quantity | None:
    """Return the number that a text is, with nothing but currency and unit around it; None when it is anything else.

    text: as `cleaned` leaves it.
    """
    if len(text) > LONGEST_ANSWER:
        return None
    match = _WHOLE.fullmatch(text)
    if match is None:
        return None
    value = _exact(match["number"])
    if match["of"]:
        above, below = Fraction(match["above"]), Fraction(match["of"])
        if above >= below:  # `3 4/2` is no mixed number
            return None
        value += above / below
    elif match["below"]:
        below = _exact(match["below"])
        if not below:
            return None
        value /= below
    elif exponent := int(match["e"] or match["ten"] or 0):
        if abs(exponent) > LARGEST_EXPONENT:
            return None
        value *= Fraction(10) ** exponent
    if match["scale"]:
        value *= SCALES[match["scale"]]
    negative = match["outer"] == "-" or match["inner"] == "-"
    return Quantity(-value if negative else value, match["percent"] is not None, match["unit"] or "")


def as_number(text: str) -> Fraction | None:
    """Return `12`, `1,000`, `0.50`, `1/2`, `$3`, `25 cm²`, `50%` (one half) as a fraction; None for anything else."""
    read = quantity(cleaned(text)) if len(text) <= LONGEST_ANSWER else None
    return None if read is None else read.value / 100 if read.percent else read.value


def cleaned(text: str) -> str:
    """Return the end of a text as `plain` and `bare` leave it."""
    return bare(plain(text[-LONGEST_LINE:]))


def bare(text: str) -> str:
    """Return the text without the punctuation around it. A dot in front stays, as in .5, and so does the mark of 5!."""
    text = text.lstrip(_ENDS.replace(".", ""))
    short = text.rstrip(_ENDS)
    return short + "!" if short[-1:].isdigit() and text[len(short) :][:1] == "!" else short


def _squared(found: re.Match[str]) -> str:
    """Return the one character ㎡ as m^2, where NFKC writes m2."""
    return re.sub("(?<=m)([23])$", r"^\1", unicodedata.normalize("NFKC", found[0]))


def _fraction(found: re.Match[str]) -> str:
    """Return a fraction of numbers; behind a digit it is the rest of a mixed number."""
    whole, above, below = found[1], found[2] or found[4], found[3] or found[5]
    return f"{whole} {above}/{below}" if whole else f"{above}/{below}"


def _exact(number: str) -> Fraction:
    return Fraction(number.replace(",", "").replace(" ", ""))


# Commands that only set type go, with what they set left; `frac` and `sqrt` mean something and stay.
_TYPE = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname|emph)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"\\(?:left|right|displaystyle|[bB]igg?[lr]?|quad|qquad)(?![A-Za-z])|(?<!\\)\\[,;:! ()\[\]]")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\[,;:! ]|~)(?=\d{3}(?!\d))")
_FRACTION = re.compile(r"(\d?)\s?\\[dtc]?frac\s*(?:(\d)\s*(\d)(?!\d)|\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\})")
_SIGNS = {
    "times": "*", "cdot": "*", "div": "/", "approx": "≈", "le": "≤", "leq": "≤", "leqslant": "≤", "ge": "≥",
    "geq": "≥", "geqslant": "≥", "lt": "<", "gt": ">", "ne": "≠", "neq": "≠", "pi": "π", "infty": "∞", "colon": ":",
    "degree": "°", "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac",
}  # fmt: skip
_COMMAND = re.compile(r"\\(" + "|".join(sorted(_SIGNS, key=len, reverse=True)) + r")(?![A-Za-z])")
_UNUSUAL = re.compile(r"[^\x00-\x7f\u3001\u3002\u3400-\u9fff，。]")


def plain(text: str) -> str:
    """Return the text in one spelling: ASCII digits and signs, `^` for powers, type-setting LaTeX and Markdown removed.

    Commands that mean something, `\\sqrt{2}`, `\\frac{a}{b}`, stay.
    """
    if _UNUSUAL.search(text):
        text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: "^" + unicodedata.normalize("NFKC", found[0]), text)
        text = re.sub("[¼-¾⅐-⅞]", lambda found: f" {unicodedata.normalize('NFKC', found[0])}", text)
        text = re.sub("[\u3380-\u33df]", _squared, text)
        text = re.sub("(?<=\\d)[\u00a0\u2007\u2009\u202f](?=\\d{3})", ",", text)
        text = re.sub("[−–﹣]", "-", unicodedata.normalize("NFKC", text)).replace("⁄", "/").replace("∶", ":")
    if "<<" in text:  # GSM8K's working for a calculator, before its result
        text = re.sub(r"<<[^<>]*>>", "", text)
    if "\\" in text or "{" in text:
        text = _THOUSANDS.sub(",", text)
        text = re.sub(r"\\([$%#&])", r"\1", _TYPE.sub(r" \1", text))
        text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "°", _SPACES.sub(" ", text))
        text = _FRACTION.sub(_fraction, text)
        text = _COMMAND.sub(lambda found: _SIGNS[found[1]], text)
        text = re.sub(r"\^\s*\{\s*(-?\d+)\s*\}(?!\d)", r"^\1", text)
    if "负" in text or "negative" in text:
        text = re.sub(r"(?<![\d十百千万])负(?=[\d$¥])|\bnegative (?=[\d$])", "-", text)
    if "*" in text or "`" in text:
        text = re.sub(r"(?<![\w)\]])(\*{1,3}|`)(?=\S)([^*`\n]+)(?<=\S)\1(?![\w(])|\*\*(?!\d)", r" \2 ", text)
    return re.sub(" {2,}", " ", text).strip() if "  " in text else text.strip()
