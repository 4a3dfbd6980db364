"""How answers look, without a judge: repetition, variety, length, language, format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.opened_model import OpenedModel
from eval.suites.asking import ask, check_asking
from eval.suites.suite import Row, Score, spread
from text.chats.problems import Problem
from text.chats.prompts import Prompt, read_prompts
from text.sources.registry import find_sources
from training.alignment.rewards import Sample, language, loose_format, strict_format

# A Chinese character is a unit, and so is a run of letters or digits; punctuation and spaces are none.
_UNITS = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W\d_\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+|\d+")
_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
REPEATED = 4  # n of the n-grams whose repetition is counted
RESAMPLES = 1000


@dataclass(kw_only=True)
class Quality:
    """Sampled answers to prompts, described by numbers.

    Args:
        data: prompts in any layout that collect.py reads. system: system prompt for those that have none.
        max_new_tokens: most tokens of an answer. temperature: of the sampling; 0 takes the likeliest token.
        chunk: prompts that are asked together.
    """

    data: str
    system: str = ""
    max_new_tokens: int = 128
    temperature: float = 0.7
    chunk: int = 32

    def __post_init__(self) -> None:
        check_asking(self.max_new_tokens, self.chunk, self.temperature)

    def items(self, limit: int) -> list[Prompt]:
        return spread(list(read_prompts(find_sources(self.data, kind=None), self.system, on_error="stop")), limit)

    def measure(self, model: OpenedModel, items: Sequence[Prompt], seed: int) -> list[Row]:
        replies = ask(model, [item.messages for item in items], self.max_new_tokens, self.temperature, seed)
        return [{"reply": reply} for reply in replies]

    def scores(self, items: Sequence[Prompt], rows: Sequence[Row]) -> list[Score]:
        replies = [row["reply"] for row in rows]
        samples = [
            Sample(Problem(item.messages[-1]["content"], "", ""), reply, 0, 1)
            for item, reply in zip(items, replies, strict=True)
        ]
        said = [reply for reply in replies if units(reply)]
        means = {
            f"repeated_{REPEATED}-grams": [repetition(reply) for reply in said],
            "own_language": language(samples),
            "chinese": [chinese_share(reply) for reply in said],
            "strict_format": strict_format(samples),
            "loose_format": loose_format(samples),
            "empty": [float(not units(reply)) for reply in replies],
        }
        scores = [_mean("characters", [float(len(reply)) for reply in replies], share=False)]
        scores += [_mean(name, values) for name, values in means.items() if values]
        return scores + [Score("all", f"distinct_{n}", distinct(replies, n), items=len(replies)) for n in (1, 2)]


def units(text: str) -> list[str]:
    """Words: Chinese characters, runs of other letters in lower case, runs of digits."""
    return [unit.lower() for unit in _UNITS.findall(text)]


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def repetition(text: str, n: int = REPEATED) -> float:
    """The share of an answer's n-grams that stood in it before: 1 - different / all (Welleck et al. 2020)."""
    found = ngrams(units(text), n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of all answers together (Li et al. 2016); less the more answers."""
    found = [gram for text in texts for gram in ngrams(units(text), n)]
    return len(set(found)) / len(found) if found else 0.0


def chinese_share(text: str) -> float:
    """The share of a text's words that are Chinese characters."""
    words = units(text)
    return sum(bool(_CHINESE.match(word)) for word in words) / max(len(words), 1)


def _mean(metric: str, values: Sequence[float], share: bool = True) -> Score:
    """With the 95% interval of the mean, by the bootstrap."""
    found = np.array(values, dtype=float)
    drawn = found[np.random.default_rng(0).integers(len(found), size=(RESAMPLES, len(found)))].mean(1)
    low, high = (float(edge) for edge in np.quantile(drawn, (0.025, 0.975)))
    return Score("all", metric, float(found.mean()), low, high, items=len(found), share=share)
