"""What the task files name after `!function`, when lm-evaluation-harness reads them by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from eval.tasks.docs import Docs
from eval.tasks.opened import KINDS
from eval.tasks.problems import judge
from eval.tasks.replies import describe, distinct_1, distinct_2, judge_answer, judge_style

__all__ = ["describe", "distinct_1", "distinct_2", "judge", "judge_answer", "judge_style"]


def _data_set(kind: type) -> Callable[..., dict[str, Docs]]:
    """Return a data set with the split `test`; the model's arguments, which come with the settings, are left out."""
    known = {field.name for field in fields(kind)}
    return lambda **given: {"test": kind(**{name: given[name] for name in known & given.keys()}).docs()}


text, multiple_choice, exact_match = (_data_set(KINDS[name]) for name in ("text", "multiple_choice", "exact_match"))
questions, style, quality = (_data_set(KINDS[name]) for name in ("questions", "style", "quality"))
