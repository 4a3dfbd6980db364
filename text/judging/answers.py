"""The final answer in a reply: the places where it is looked for, in one order, and one guess in each.

1. Where there are tags, what `<answer>...</answer>` hold, which must stand there once; else what follows `</think>`.
2. Within that the last `\\boxed{...}`, else the line behind the last `####`, else, of tags, all that they hold.
3. The sentence behind the last "answer is", "Answer:", 答案是, 选.
4. The last line that has an answer of the reference's kind: a number, a formula, a choice's letter; of a text, what
   follows the last "is".

The first of these places decides. Of a sentence its last number or formula is taken, behind its last equals sign. Of
one that says several things ("6 or 7", "1 2 3") nothing is.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from text.judging.pieces import Piece, is_calculation, pieces, without
from text.judging.quantity import LONGEST_ANSWER, bare, cleaned, plain, quantity

Kind = Literal["number", "choice", "formula", "text"]
SEVERAL = ""  # in place of an answer: more than one guess

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(\{|[^\s{$\\]+)")
_ANCHOR = re.compile(
    r"\banswer\b[^.\n:：=]{0,60}?(?:\bis\b|\bwas\b|[:：=])|答案[^。，,\n:：=]{0,8}?[是为:：=]|(?:^|\n)\s*答[:：]"
    r"|选(?:择|项)?[:：为是]{0,2}(?=\s*[(（]?[A-Z](?![A-Za-z]))",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[。！？\n]|[.;；!?](?=\s|$)")
_COPULA = re.compile(r"\b(?:is|are|was|were)\b|[是为叫:：]")
_LETTER = re.compile(r"(?<![A-Za-z\d\\])\(?([A-Z])\)?(?![A-Za-z\d'’])")
_ARTICLE = re.compile(r"\b(?:A(?= (?!or\b|and\b)[a-z])|I(?=[ '’]))")
_OR = re.compile(r"\b(?:or|either)\b|或|还是", re.IGNORECASE)
_SEPARATOR = re.compile(r"\s*(?:[,;、，；&\s]|\band\b|\bor\b|和|或|\b[A-Za-z]\s*=)\s*")
_ASIDE = re.compile(r"\([^()]*(?:[A-Za-z]{2}|[\u3400-\u9fff])[^()]*\)")
_ITEM = re.compile(r"(?:[-+•]|\(?\d{1,2}[.)、])\s+")  # the mark in front of an item of a list
_AREA = re.compile(r"\s(?:[mck]?m|in|ft|yd)(?:\^[23])?$")
_JOINED = re.compile(r"\d+(?:[:/.-]\d+)+")  # a time, a ratio, a date


def answer_part(text: str) -> str | None:
    """Return what a reply says to the person; None when it was cut off in its thoughts or its tags are out of order."""
    if "<answer>" in text or "</answer>" in text:
        before, _, rest = text.partition("<answer>")
        inside, _, after = rest.partition("</answer>")
        if text.count("<answer>") != 1 or text.count("</answer>") != 1 or "</answer>" in before:
            return None
        if "</think>" in after or "think>" in inside:  # an answer within the thoughts was not given to anybody
            return None
        return inside
    if text.count("<think>") > text.count("</think>"):
        return None
    return text.rpartition("</think>")[2]


def declared_answer(text: str) -> str | None:
    """Return the content of the last box, else the line behind the last `####`, else all of it; None without any."""
    part = answer_part(text)
    if part is None:
        return None
    boxed = _boxed(part)
    declared = _marked(part) if boxed is None else boxed
    return cleaned(part if declared is None else declared) or None


@lru_cache(maxsize=4096)
def kind_of_answer(reference: str) -> Kind:
    """Return how a reference is compared: as a number, a choice's letter, a formula (by math-verify) or a text."""
    text = cleaned(reference)
    if text.endswith("!"):
        return "formula"
    if quantity(text) is not None:
        return "number"
    if re.fullmatch(r"\(?[A-Z]\)?", text):
        return "choice"
    if ":" in text or re.fullmatch(r"[\d\s-]*", text) or re.search(r"[\u3400-\u9fff]", text):
        return "text"
    found = pieces(text)
    return "formula" if "\\" in text or (found and not _SEPARATOR.sub("", without(text, found))) else "text"


def final_answer(text: str, reference: str) -> str | None:
    """Return what a reply gives as an answer of the reference's kind; None when it gives none or more than one."""
    part, kind = answer_part(text), kind_of_answer(reference)
    if part is None or not part.strip():
        return None
    take = _TAKE[kind]
    if (boxed := _boxed(part)) is not None:
        return take(cleaned(boxed), reference, True) or None
    if (line := _marked(part)) is not None:
        line = cleaned(line)
        is_heading = re.search(r"[A-Za-z]{3}|[\u3400-\u9fff]{3}", line) and quantity(line) is None
        if kind in ("choice", "text") or not is_heading:  # "#### Step 3: the total"
            return take(line, reference, True) or None
    if "<answer>" in text and (found := take(cleaned(part), reference, True)) is not None:
        return found or None
    if (sentence := _anchored(part)) and (found := take(sentence, reference, True)) is not None:
        return found or None
    return _last(part, reference, kind) or None


def conclusion(reply: str) -> str:
    """Return what an explained reply comes to, the sentence after its last "so"; any other reply as it is."""
    return re.split("，所以|, so ", reply)[-1]


def same_text(one: str, other: str) -> bool:
    """Return whether both are equal but for case, spaces and punctuation at the ends."""
    return _folded(one) == _folded(other) != ""


def problem_with(answer: str) -> str | None:
    """Return why no reply could ever be right for this reference answer; None when one can be."""
    if not answer.strip():
        return "the answer is empty"
    if len(answer) > LONGEST_ANSWER or "\n" in answer.strip():
        return f"the answer has {len(answer)} characters in {answer.count(chr(10)) + 1} lines and no '#### result'"
    if not _folded(answer):
        return f"the answer {answer.strip()!r} has no letter or digit"
    return None


# Of a text without its punctuation: the answer of a kind, SEVERAL, or None where there is none. `declared`: whether the
# text was marked as the answer, and not only stands last.


def _number(text: str, reference: str, declared: bool) -> str | None:
    if quantity(text) is not None:
        return text
    found = pieces(text)
    found = [piece for piece in found if not _is_aside(text, piece)] or found
    if not found:
        return None
    if len(found) > 1:
        either = declared and _OR.search(text[found[0].end : found[-1].begin])
        if either or not _SEPARATOR.sub("", without(text, found)):
            return SEVERAL
    # "The answer is 72 clips in 2 months": what stands right behind the mark is meant.
    chosen = found[0] if declared and found[0].begin == 0 and "=" not in text else found[-1]
    sides = [side.strip() for side in re.split("[=≈]", chosen.text)]
    return next((side for side in reversed(sides) if quantity(side) is not None), sides[-1])


def _formula(text: str, reference: str, declared: bool) -> str | None:
    found, target = pieces(text), plain(reference)
    if declared and _OR.search(text) and not _OR.search(target):
        return SEVERAL
    if not found:
        return text if declared and "\\" in text else None
    has_list = "," in re.sub(r"[(\[{].*[)\]}]", "", target)
    has_words = re.search(r"[A-Za-z]{3}|[\u3400-\u9fff]", without(text, found))
    if "\\begin" in text or (declared and not has_words and (has_list or len(found) == 1)):
        taken = _AREA.sub("", text)
    elif has_list:
        first = len(found) - 1
        while first and not _SEPARATOR.sub("", text[found[first - 1].end : found[first].begin]):
            first -= 1
        taken = ",".join(piece.text for piece in found[first:])
    else:
        taken = found[-1].text
    return taken if has_list or re.search("[=<>≤≥]", target) else re.split("[=≈]", taken)[-1].strip()


def _choice(text: str, reference: str, declared: bool) -> str | None:
    if leading := re.match(r"\(?([A-Z])(?:\)|[.:,](?=\s|[\u3400-\u9fff]|$)|[、。]|$)|[a-z]$", text):
        return leading[1] or text
    letters = {found[1] for found in _LETTER.finditer(_ARTICLE.sub("", text))}
    return None if not letters else letters.pop() if len(letters) == 1 else SEVERAL


def _text(text: str, reference: str, declared: bool) -> str | None:
    if _JOINED.fullmatch(plain(reference)):
        found = _JOINED.findall(re.sub(r"(?<=\d) ?: ?(?=\d)", ":", text))
        return None if not found else found[-1] if not declared or len(set(found)) == 1 else SEVERAL
    return text if declared or same_text(text, reference) else bare(_COPULA.split(text)[-1]) or None


_TAKE = {"number": _number, "formula": _formula, "choice": _choice, "text": _text}


def _last(part: str, reference: str, kind: Kind) -> str | None:
    """Return what the reply itself says last; SEVERAL or None as above."""
    whole = cleaned(part) if kind in ("choice", "text") else ""
    if whole and (same_text(whole, reference) or (kind == "choice" and re.match(r"\(?[A-Z][).:,、。]", whole))):
        return _TAKE[kind](whole, reference, True)
    for line in reversed(part.split("\n")):
        text = cleaned(line)
        if item := _ITEM.match(text):
            text = text[item.end() :]
        if text and (found := _TAKE[kind](text, reference, False)) is not None:
            return found
    return None


def _anchored(part: str) -> str | None:
    """Return the sentence behind the last "answer is"; None without one."""
    if not any(word in part for word in ("nswer", "NSWER", "答", "选")):
        return None
    anchors = list(_ANCHOR.finditer(part))
    rest = part[anchors[-1].end() :].lstrip(" \t\r\n*:：") if anchors else ""
    end = _SENTENCE_END.search(rest)
    return cleaned(rest[: end.start()] if end else rest) or None


def _marked(part: str) -> str | None:
    """Return the line behind the last `####`; None without one."""
    return part.rpartition("####")[2].strip().partition("\n")[0] if "####" in part else None


def _boxed(text: str) -> str | None:
    """Return the content of the last box, inner braces included, "" when it never closes; None without one."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    begin, depth = boxes[-1].end(), 1
    if boxes[-1][1] != "{":  # \boxed 7
        return boxes[-1][1]
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return ""  # cut off


def _is_aside(text: str, piece: Piece) -> bool:
    """Return whether the piece is a remark in brackets: `72 (48+24)`, `72 clips (24 of them in May)`."""
    if piece.text[0] == "(" and is_calculation(piece.text):
        return piece.begin > 0
    return any(found.start() < piece.begin < found.end() for found in _ASIDE.finditer(text))


def _folded(text: str) -> str:
    return re.sub(r"\s+", " ", cleaned(text)).casefold()
