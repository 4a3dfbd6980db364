"""What a completion is worth: small pure functions, named in the configuration with their weights.

    rewards: {correct: 1.0, strict_format: 0.2, "my_rewards:polite": 0.5}

A reward takes the samples of a step and returns a number for each. `@reward` makes one of a function of a single
sample. Put a function here to call it by its name, or in the folder that the command is given in, or anywhere on the
import path, to call it `package.module:function` (docs/rewards.md).
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from errors import UserError
from text.chats.problems import Problem
from text.judging.answers import declared_answer, final_answer
from text.judging.judge import is_equal
from text.judging.quantity import as_number

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_ANY_TAG = re.compile("|".join(TAGS))
# The dot meets line ends too: thoughts span lines.
_STRICT = re.compile(r"<think>\n.+?\n</think>\n<answer>\n.+?\n</answer>\n?", re.DOTALL)
_LOOSE = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_WORDS = {
    "zh": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"),
    "en": re.compile(r"[A-Za-z\u00c0-\u024f]+(?:['’][A-Za-z]+)?"),
}
OVERLONG_SHARE = 0.2  # DAPO: L_cache = 4096 of 20480


@dataclass(frozen=True)
class Sample:
    """A completion to be judged.

    Attributes:
        problem: what was asked. text: the completion, without the token that ended it.
        tokens: its length, the end token included; limit: the most it could have had.
        ended: whether it ended by itself.
    """

    problem: Problem
    text: str
    tokens: int
    limit: int
    ended: bool = True


Reward = Callable[[Sequence[Sample]], Sequence[float]]


def reward(judge: Callable[[Sample], float]) -> Reward:
    """Make a reward of a function that judges one sample."""

    @functools.wraps(judge)
    def judge_all(samples: Sequence[Sample]) -> list[float]:
        return [judge(sample) for sample in samples]

    judge_all.is_reward = True  # type: ignore[attr-defined]
    return judge_all


@reward
def correct(sample: Sample) -> float:
    """1 for the right answer: equal as numbers or formulas (math-verify), else as text."""
    return float(is_correct(sample.problem, sample.text))


@reward
def near(sample: Sample) -> float:
    """1 / (1 + distance to the right number); 0 without one. A slope where right answers are still too rare to find."""
    taken = taken_answer(sample.problem, sample.text)
    target, given = as_number(sample.problem.answer), as_number(taken or "")
    return 0.0 if target is None or given is None else 1 / (1 + float(abs(given - target)))


@reward
def digits_only(sample: Sample) -> float:
    """1 when the answer is a whole number and nothing else."""
    answer = declared_answer(sample.text)
    return float(answer is not None and re.fullmatch(r"-?[0-9]+", answer) is not None)


@reward
def strict_format(sample: Sample) -> float:
    """1 for thoughts and answer between their tags, every tag alone on its line and once, and nothing else."""
    once = _ANY_TAG.findall(sample.text) == list(TAGS)
    return float(once and _STRICT.fullmatch(sample.text) is not None)


@reward
def loose_format(sample: Sample) -> float:
    """1 when there are thoughts and after them an answer, wherever line ends are and whatever stands around them."""
    return float(_LOOSE.search(sample.text) is not None and _ANY_TAG.findall(sample.text) == list(TAGS))


@reward
def tag_count(sample: Sample) -> float:
    """A quarter for each of the four tags that occurs once and alone on its line: a slope towards the format."""
    lines = sample.text.split("\n")
    return sum(sample.text.count(tag) == 1 and lines.count(tag) == 1 for tag in TAGS) / len(TAGS)


@reward
def language(sample: Sample) -> float:
    """The share of words in the language of the question (DeepSeek-R1 section 2.3.2); 0 without a word.

    A Chinese character is a word, and so is a run of Latin letters; tags and formulas' commands are none.
    """
    text = re.sub(r"\\[A-Za-z]+", " ", _ANY_TAG.sub(" ", sample.text))
    counts = {name: len(words.findall(text)) for name, words in _WORDS.items()}
    return counts[sample.problem.language] / max(sum(counts.values()), 1)


@reward
def overlong(sample: Sample) -> float:
    """0, falling to -1 over the last fifth of the room (DAPO, Yu et al. 2025, Eq. 13)."""
    room = OVERLONG_SHARE * sample.limit
    excess = sample.tokens - (sample.limit - room)
    return -1.0 if not sample.ended else -min(max(excess / room, 0.0), 1.0)


def taken_answer(problem: Problem, text: str) -> str | None:
    """Return what of a completion is judged; None where it gives no answer, or several."""
    return declared_answer(text) if problem.score is not None else final_answer(text, problem.answer)


def is_correct(problem: Problem, text: str) -> bool:
    """Return whether a completion gives the problem's answer (`judge`), or satisfies the problem's own checker."""
    taken = taken_answer(problem, text)
    if taken is None:
        return False
    return problem.score(taken) >= 1 if problem.score is not None else is_equal(problem.answer, taken)


@dataclass(frozen=True)
class Rewards:
    """The rewards of a configuration. Attributes: functions and weights by the names they were given."""

    functions: dict[str, Reward]
    weights: dict[str, float]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> Rewards:
        """Find the functions. Raises `UserError` for an unknown name and for a weight that is not a number."""
        if not weights:
            raise UserError(f"rewards: none given; choose from {', '.join(names())}, such as {{correct: 1.0}}")
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise UserError(f"rewards: the weight of {name!r} is {weight!r}; give a number")
        return cls({name: find(name) for name in weights}, dict(weights))

    def __call__(self, samples: Sequence[Sample]) -> tuple[list[float], dict[str, list[float]]]:
        """Return the weighted sum of each sample, and the values of each reward before its weight.

        Raises `UserError` that names a reward which fails, or gives NaN or too few or too many numbers.
        """
        values = {name: _values(name, function, samples) for name, function in self.functions.items()}
        weighted = ([self.weights[name] * value for value in row] for name, row in values.items())
        return [sum(parts) for parts in zip(*weighted, strict=True)], values


def names() -> list[str]:
    """Return the rewards of this file."""
    return sorted(name for name, value in vars(sys.modules[__name__]).items() if getattr(value, "is_reward", False))


def find(name: str) -> Reward:
    """Return a reward of this file, or `package.module:function`, which may lie in the current folder."""
    module, yours, function = name.partition(":")
    if not yours:
        if name not in names():
            raise UserError(f"reward {name!r}: not one of {', '.join(names())}; or name yours package.module:function")
        return getattr(sys.modules[__name__], name)
    # Python looks there only for `python -m`. Last, so that nothing of Python or of this project is hidden; and for
    # good, since the module may import others later.
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # an import runs anything
        raise UserError(
            f"reward {name!r}: cannot be imported ({type(error).__name__}: {error}); name it MODULE:FUNCTION, and put "
            "the module into the folder you are in or into one of PYTHONPATH"
        ) from error
    if not callable(found):
        raise UserError(f"reward {name!r}: is {type(found).__name__}; it must be a function of a list of samples")
    return found


def _values(name: str, function: Reward, samples: Sequence[Sample]) -> list[float]:
    remedy = f"fix it (a function of one sample needs @reward), or take {name} out of rewards"
    try:
        values = [float(value) for value in function(samples)]
    except UserError:
        raise
    except Exception as error:  # a person's own code
        raise UserError(f"reward {name!r}: failed with {type(error).__name__}: {error}; {remedy}") from error
    if len(values) != len(samples):
        raise UserError(f"reward {name!r}: gave {len(values)} numbers for {len(samples)} samples; {remedy}")
    for value, sample in zip(values, samples, strict=True):
        if not math.isfinite(value):
            raise UserError(f"reward {name!r}: gave {value} for {sample.text[:80]!r}; {remedy}")
    return values
