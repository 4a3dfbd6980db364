"""The kinds of suites by the names that their files give them."""

from __future__ import annotations

from eval.suites.exact_match import ExactMatch
from eval.suites.multiple_choice import MultipleChoice
from eval.suites.quality import Quality
from eval.suites.replies import Questions, Style
from eval.suites.text_likelihood import TextLikelihood

KINDS: dict[str, type] = {
    "text": TextLikelihood,
    "multiple_choice": MultipleChoice,
    "exact_match": ExactMatch,
    "questions": Questions,
    "style": Style,
    "quality": Quality,
}
