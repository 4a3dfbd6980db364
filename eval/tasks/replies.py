"""Replies counted without a judge: the demo world's exact answers and preferred style, and how any answers look."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from eval.questions import Question, Result, read_questions
from eval.style import PoliteRequest, in_style, read_polite_requests
from eval.tasks.docs import Docs, as_turns, evenly_spaced
from text.chats.chat_template import Message
from text.chats.problems import Problem
from text.chats.prompts import read_prompts
from text.sources.registry import find_sources
from training.alignment.rewards import Sample, language, loose_format, strict_format

# A Chinese character is a unit, and so is a run of letters or digits; punctuation and spaces are not.
_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNITS = re.compile(rf"[{_HAN}]|[^\W\d_{_HAN}]+|\d+")
_CHINESE = re.compile(rf"[{_HAN}]")
REPEATED = 4  # n of the n-grams whose repetition is counted


class _Generated:
    """What the kinds of tasks have in common whose replies are generated, one to each item."""

    data: str
    max_new_tokens: int
    temperature = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise UserError("max_new_tokens must be 1 or more, temperature 0 or more")

    def keys(self) -> dict[str, Any]:
        return generation_keys(self.max_new_tokens, self.temperature)


@dataclass(kw_only=True)
class Questions(_Generated):
    """Questions with one right answer, to the letter, as eval/questions.py counts them; greedy.

    Args:
        data: JSONL with question, answer and kind. max_new_tokens: most tokens of an answer.
    """

    data: str
    max_new_tokens: int = 48

    def docs(self, limit: int = 0) -> Docs:
        asked = evenly_spaced(read_questions(Path(self.data)), limit)
        return Docs({"group": one.kind, **vars(one), "turns": as_turns([(one.question, "")])} for one in asked)


@dataclass(kw_only=True)
class Style(_Generated):
    """Requests answered in the preferred style, as eval/style.py counts them; sampled.

    Args:
        data: JSONL with question, answer, opening and closing. max_new_tokens: most tokens of an answer.
        temperature: of the sampling.
    """

    data: str
    max_new_tokens: int = 48
    temperature: float = 0.7

    def docs(self, limit: int = 0) -> Docs:
        requests = evenly_spaced(read_polite_requests(Path(self.data)), limit)
        return Docs({"group": "all", **vars(one), "turns": as_turns([(one.question, "")])} for one in requests)


@dataclass(kw_only=True)
class Quality(_Generated):
    """Sampled answers to prompts, described by numbers.

    Args:
        data: prompts in any layout that distill.py answers. system: system prompt for those that have none.
        max_new_tokens: most tokens of an answer. temperature: of the sampling; 0 takes the likeliest token.
    """

    data: str
    system: str = ""
    max_new_tokens: int = 128
    temperature: float = 0.7

    def docs(self, limit: int = 0) -> Docs:
        prompts = list(read_prompts(find_sources(self.data, kind=None), self.system, on_error="stop"))
        asked = [[dict(message) for message in prompt.messages] for prompt in evenly_spaced(prompts, limit)]
        return Docs({"group": "all", "question": turns[-1]["content"], "answer": "", "turns": turns} for turns in asked)


def generation_keys(max_new_tokens: int, temperature: float = 0.0, samples: int = 1) -> dict[str, Any]:
    """Return the keys of lm-evaluation-harness's task file for so many answers of at most so many tokens."""
    drawn = {"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {}
    sampling = {"do_sample": bool(temperature), **drawn}
    keys = {"generation_kwargs": {"until": [], "max_gen_toks": max_new_tokens, **sampling}}
    take = [{"name": "none", "filter": [{"function": "take_first_k", "k": samples}]}]
    return {**keys, "repeats": samples, "filter_list": take} if samples > 1 else keys


def replies_of(results: Sequence[Any]) -> list[str]:
    """Return the replies to an item, from what lm-evaluation-harness hands to `process_results`."""
    return list(results[0]) if isinstance(results[0], list) else [results[0]]


def as_text(conversation: Sequence[Message]) -> str:
    """Return a conversation as questions and answers, up to where the next answer begins."""
    names = {"user": "Question: ", "assistant": "Answer: "}
    parts = [names.get(message["role"], "") + message["content"] for message in conversation]
    return "\n\n".join([*parts, "Answer:"]).replace("\n\nAnswer:", "\nAnswer:")


def first_answer(reply: str) -> str:
    """Return a reply up to where a model without turns asks itself the next question."""
    reply = reply.lstrip()
    for end in ("\n\n", "\nQuestion:"):
        reply = reply.partition(end)[0]
    return reply.strip()


def judge_answer(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    question = Question(doc["question"], doc["answer"], doc["kind"])
    return {"exact_match": float(Result(question, replies_of(results)[0]).correct)}


def judge_style(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, float]:
    request = PoliteRequest(doc["question"], doc["answer"], doc["opening"], doc["closing"])
    reply = replies_of(results)[0]
    return {
        "preferred": float(in_style(reply, request)),
        "exact_match": float(reply.strip() == request.answer.strip()),
    }


def describe(doc: dict[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """Return numbers of one reply; the reply itself where a metric is of all replies together."""
    reply = replies_of(results)[0]
    samples = [Sample(Problem(doc["question"], "", ""), reply, 0, 1)]
    values = {
        "characters": float(len(reply)), f"repeated_{REPEATED}-grams": repetition(reply),
        "own_language": language(samples)[0], "chinese": chinese_share(reply),
        "strict_format": strict_format(samples)[0], "loose_format": loose_format(samples)[0],
        "empty": float(not units(reply)), "distinct_1": reply, "distinct_2": reply,
    }  # fmt: skip
    of_words = (f"repeated_{REPEATED}-grams", "chinese")  # which a reply without words does not have
    return {name: value for name, value in values.items() if units(reply) or name not in of_words}


def units(text: str) -> list[str]:
    """Return words: Chinese characters, runs of other letters in lower case, runs of digits."""
    return [unit.lower() for unit in _UNITS.findall(text)]


def repetition(text: str) -> float:
    """Return the share of an answer's 4-grams that stood in it before: 1 - different / all (Welleck et al. 2020)."""
    return 1 - distinct([text], REPEATED) if len(units(text)) >= REPEATED else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """Return different n-grams over all n-grams of all answers together (Li et al. 2016); less the more answers."""
    found = [gram for text in texts for gram in zip(*(units(text)[start:] for start in range(n)), strict=False)]
    return len(set(found)) / len(found) if found else 0.0


def distinct_1(texts: Sequence[str]) -> float:
    return distinct(texts, 1)


def distinct_2(texts: Sequence[str]) -> float:
    return distinct(texts, 2)


def chinese_share(text: str) -> float:
    """Return the share of a text's words that are Chinese characters."""
    words = units(text)
    return sum(bool(_CHINESE.match(word)) for word in words) / max(len(words), 1)
