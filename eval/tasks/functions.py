"""What the task files name after `!function`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from eval.tasks.choices import MultipleChoice
from eval.tasks.docs import Docs
from eval.tasks.problems import ExactMatch, judge
from eval.tasks.replies import Quality, Questions, Style, describe, distinct_1, distinct_2, judge_answer, judge_style
from eval.tasks.texts import Text

__all__ = ["describe", "distinct_1", "distinct_2", "judge", "judge_answer", "judge_style"]


def _data_set(kind: type) -> Callable[..., dict[str, Docs]]:
    """A data set with the split `test`; the model's arguments, which come with the settings, are left out."""

    def data_set(**settings: Any) -> dict[str, Docs]:
        known = {field.name for field in fields(kind)}
        return {"test": kind(**{name: value for name, value in settings.items() if name in known}).docs()}

    return data_set


multiple_choice, text, exact_match = _data_set(MultipleChoice), _data_set(Text), _data_set(ExactMatch)
questions, style, quality = _data_set(Questions), _data_set(Style), _data_set(Quality)
