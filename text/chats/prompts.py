"""Prompts for a teacher to answer, out of conversations, problems and bare questions.

conversations   any layout of `text.chats.conversations`; what follows the last question is left out
problems        any layout of `text.chats.problems`, or a generator such as arithmetic:1-3: answers can be verified
questions       {"prompt": Q}, {"question": Q}, {"instruction": Q, "input": more of Q}, messages ending with a question

The layout is seen row by row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from errors import UserError
from text.chats.chat_template import Message, check_messages
from text.chats.conversations import check_texts, question_of, to_messages, turns_to_messages, with_system
from text.chats.literals import turns_of
from text.chats.problems import Problem, is_generated, open_problems, to_problem
from text.chats.turns import SEEN
from text.sources.formats import Layout
from text.sources.registry import Source
from text.sources.row_report import RowError, RowReport, UnwantedRow, kind_of
from text.sources.rows import placed_rows
from text.tokenizer import characters

TRIES = 10  # problems made for each one asked for, where a generator repeats some by chance
QUESTIONS = ("instruction", "prompt", "question", "problem", "question_zh-cn", "query")


@dataclass(frozen=True)
class Prompt:
    """Messages that end with a question. `problem`: the question with its right answer, where the data has one."""

    messages: tuple[Message, ...]
    problem: Problem | None = None


def read_prompts(
    sources: Sequence[Source | str | Path],
    system: str = "",
    most: int = 0,
    seed: int = 0,
    on_error: str = "skip",
    report: RowReport | None = None,
) -> Iterator[Prompt]:
    """Yield the prompts of sources and generators in their order, each once; of each source at most `most`, or all (0).

    system: a system prompt for those that have none. Rows that are no prompt are counted in `report`, or raise
    `UserError` with `on_error="stop"`; those that were asked before are counted. A generator's problems are rows too.
    Raises `UserError` when there is none at all.
    """
    report = RowReport() if report is None else report
    seen: set[str] = set()
    for source in map(Source.of, sources):
        if is_generated(source):
            found = _generated(source, most, seed, report)
        else:
            found = placed_rows(source, partial(to_prompt, layout=source.layout), on_error, report)
        before = others = report.accepted
        for place, prompt in found:
            if system and prompt.messages[0]["role"] != "system":
                prompt = Prompt(({"role": "system", "content": system}, *prompt.messages), prompt.problem)
            key = json.dumps(prompt.messages, ensure_ascii=False)
            if key in seen:
                report.accepted -= 1
                report.add_problem(place, UnwantedRow("question asked before", "the question was asked before"))
                continue
            seen.add(key)
            others += 1
            yield prompt
            if others - before == most:
                break
        report.left_out += report.accepted - others  # of the samples of a source, those beyond `most`
        report.accepted = others
    if not seen:
        names = ", ".join(map(str, sources))
        raise UserError(f"{names or 'no file'}: no prompt to ask; {report.why_empty()}")


def to_prompt(row: object, layout: Layout = SEEN) -> Prompt:
    """Return one row of any layout, or of the one that its source names, as a prompt. Raises `RowError`."""
    if not isinstance(row, dict | list):
        raise RowError("not a prompt", f"the row is {kind_of(row)}; it must be an object or a list of messages")
    try:
        return _of_turns("the conversation", to_messages(row, layout))
    except RowError:  # no conversation, or one without an answer, which a prompt does not need
        return _bare(layout.rename(row))


def _generated(source: Source, most: int, seed: int, report: RowReport) -> Iterator[tuple[str, Prompt]]:
    """Yield the first problems of a generator, each with its place."""
    problems = open_problems(source)
    for number in range(TRIES * most or len(problems)):
        report.rows, report.accepted = report.rows + 1, report.accepted + 1
        yield f"{source} #{number + 1}", _of_problem(problems.problem(number, seed))


def _bare(row: dict | list) -> Prompt:
    """Return a question that nobody has answered, or whose answer is the bare result."""
    if isinstance(row, list):
        return _of_turns("the list", turns_to_messages("the list", row))
    for name in ("messages", "conversations"):
        if name in row:
            return _of_turns(repr(name), with_system(row, turns_to_messages(repr(name), row[name])))
    name = next((name for name in QUESTIONS if row.get(name) is not None), None)
    if name is None:
        shown = ", ".join(map(repr, row)) or "no keys"
        raise RowError("unknown layout", f"has {shown}, but no 'messages', 'conversations', 'instruction' or 'prompt'")
    # A question whose answer is missing, or an essay, is a prompt all the same; its answer cannot be verified.
    with suppress(RowError):
        return _of_problem(to_problem(row))
    turns = turns_of(repr(name), row[name])
    if isinstance(turns, list | tuple | dict):
        messages = turns_to_messages(repr(name), [turns] if isinstance(turns, dict) else turns)
    else:
        messages = [question_of(row if name == "instruction" else {name: row[name]}, name)]
    return _of_turns(repr(name), with_system(row, messages))


def _of_problem(problem: Problem) -> Prompt:
    return Prompt(({"role": "user", "content": problem.question},), problem)


def _of_turns(name: str, messages: list[Message]) -> Prompt:
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    try:
        check_messages(messages, add_generation_prompt=True)
    except UserError as error:
        raise RowError("no question", f"{name}: {error}") from error
    check_texts(messages, ("user",))
    return Prompt(tuple({**message, "content": characters(message["content"])} for message in messages))
