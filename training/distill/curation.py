"""Black-box distillation: a teacher's answers, asked for, cleaned, verified and filtered, as conversations to learn."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from errors import UserError, check_least
from text.chats.chat_template import Message
from text.chats.conversations import write_chats
from text.chats.prompts import Prompt, read_prompts
from text.judging.answer_filter import AnswerFilter, clean, shortest_different
from text.sources.registry import Source
from text.sources.row_report import RowReport, balance
from training.alignment.rewards import Rewards, Sample
from training.distill.answers import Answer, AnsweringTeacher, Ask, Journal, ask_all, questions
from training.distill.endpoint import Endpoint
from training.distill.local_teacher import open_local

JOURNAL, CHATS = "answers.jsonl", "sft.jsonl"


@dataclass(kw_only=True)
class AnswerSettings(AnswerFilter):
    """What a teacher is asked, and which of its answers are kept.

    Args:
        teacher_model: the name under which an endpoint serves the teacher.
        prompts: most prompts of each source; 0: all.
        samples: answers asked for to each prompt.
        keep_answers: most answers kept to each prompt, the shortest first.
        rewards: names and weights that judge answers to prompts whose right answer is known.
        at_least: the weighted sum from which such an answer is kept.
        system: system prompt for prompts that have none.
        concurrency: questions put to an endpoint at a time.
        timeout: seconds without a byte before a question to an endpoint is put again.
    """

    teacher_model: str = ""
    prompts: int = 0
    samples: int = 1
    keep_answers: int = 1
    rewards: dict[str, float] = field(default_factory=lambda: {"correct": 1.0})
    at_least: float = 1.0
    system: str = ""
    concurrency: int = 8
    timeout: float = 120.0

    def check_answers(self) -> None:
        """Raises `UserError` for a value that makes no sense."""
        self.check_filter()
        check_least(1, samples=self.samples, keep_answers=self.keep_answers, concurrency=self.concurrency)
        if self.prompts < 0 or self.timeout <= 0:
            raise UserError(f"--prompts {self.prompts}, --timeout {self.timeout:g}: must be at least 0 and above 0")


@dataclass
class Curated:
    """What became of the answers. `dropped`: why not kept; `unverified`: kept without a known right answer."""

    prompts: int = 0
    with_answer: int = 0
    answers: int = 0
    kept: int = 0
    unverified: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """For people."""
        told = f", {self.unverified} of them unverified" if self.unverified else ""
        lines = [
            f"{self.answers} answers to {self.prompts} prompts: {self.kept} kept{told}, "
            f"{self.dropped.total()} dropped; {self.prompts - self.with_answer} prompts without an answer"
        ]
        return lines + [f"  {count} x {reason}" for reason, count in self.dropped.most_common()]


def is_endpoint(teacher: str) -> bool:
    """Whether a teacher is named by its address."""
    return teacher.startswith(("http://", "https://"))


def open_answering(
    teacher: str, settings: AnswerSettings, temperature: float, max_new_tokens: int, seed: int,
    dtype: torch.dtype, device: torch.device,
) -> AnsweringTeacher:  # fmt: skip
    """An endpoint, whose key is OPENAI_API_KEY in the environment, or a model on this machine."""
    if not is_endpoint(teacher):
        return open_local(teacher, temperature, max_new_tokens, seed, dtype, device)
    if not settings.teacher_model:
        raise UserError(f"--teacher {teacher}: give the name that it serves the model under, --teacher_model NAME")
    key = os.environ.get("OPENAI_API_KEY", "").strip()  # a key read from a file often ends with its line
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY: has a character that no HTTP header can hold; set it again")
    return Endpoint(
        teacher, settings.teacher_model, key, temperature, max_new_tokens, settings.concurrency, settings.timeout
    )


def gather_answers(
    out: Path, sources: Sequence[Source], resume: bool, on_error: str, settings: AnswerSettings,
    teacher: AnsweringTeacher, seed: int, facts: Sequence[object], max_new_tokens: int,
) -> Path:  # fmt: skip
    """Ask the teacher all that is not known yet, and write what is fit to learn from. Returns that file.

    facts: of the teacher and its sampling; answers under other facts are other answers.
    """
    judge, report = Rewards.of(settings.rewards), RowReport()
    prompts = list(read_prompts(sources, settings.system, settings.prompts, seed, on_error, report))
    print("\n".join([*report.lines(), balance(report.rows, "rows", {"prompts to ask": len(prompts), **report.unused})]))
    path = out / JOURNAL
    if not resume and path.exists() and path.stat().st_size:  # empty where an earlier run had no answer
        raise UserError(f"{path}: holds answers already; add --resume to go on, or choose another --out")
    journal, asks = Journal(path), questions(prompts, settings.samples, *facts)
    told = ask_all(teacher, [ask for some in asks for ask in some], journal)
    print("\n".join(told.lines()))
    conversations, curated = curate(prompts, asks, journal.known, settings, judge, max_new_tokens)
    print("\n".join(curated.lines()))
    if told.failures and not curated.answers:
        (reason, _), *_ = told.failures.most_common(1)
        raise UserError(
            f"--teacher: not one of {told.questions} questions has an answer, mostly {reason}; "
            "remove the cause and run the same command again"
        )
    if not conversations:
        raise UserError(f"{path}: none of {curated.answers} answers is fit to learn from; see what was dropped and why")
    write_chats(out / CHATS, conversations)
    print(f"{out / CHATS}: {len(conversations)} conversations")
    return out / CHATS


def curate(
    prompts: Sequence[Prompt], asks: Sequence[Sequence[Ask]], known: dict[str, Answer], settings: AnswerSettings,
    judge: Rewards, limit: int,
) -> tuple[list[list[Message]], Curated]:  # fmt: skip
    """Conversations out of the answers that are complete, clean and, where the right answer is known, right."""
    told, conversations = Curated(prompts=len(prompts)), []
    for prompt, own in zip(prompts, asks, strict=True):
        answers = [known[ask.key] for ask in own if ask.key in known]
        told.answers += len(answers)
        cleaned = [(fit(answer, settings, told.dropped), answer.tokens) for answer in answers]
        good = [text for text, _ in cleaned if text is not None]
        if prompt.problem is not None and good:
            samples = [Sample(prompt.problem, text, tokens, limit) for text, tokens in cleaned if text is not None]
            totals, _ = judge(samples)
            good = [sample.text for sample, total in zip(samples, totals, strict=True) if total >= settings.at_least]
            told.dropped["wrong"] += len(samples) - len(good)
        different = len(set(good))
        chosen = shortest_different(good, settings.keep_answers)
        told.dropped["duplicate"] += len(good) - different
        told.dropped["more than were wanted"] += different - len(chosen)
        told.kept += len(chosen)
        told.with_answer += bool(chosen)
        told.unverified += len(chosen) if prompt.problem is None else 0
        conversations += [[*prompt.messages, {"role": "assistant", "content": text}] for text in chosen]
    told.dropped = +told.dropped  # those that were met
    return conversations, told


def fit(answer: Answer, wanted: AnswerFilter, dropped: Counter[str]) -> str | None:
    """The cleaned text of an answer; None, with the reason counted, when it is not fit to learn from."""
    text = clean(answer.text)
    if answer.finish == "length":
        fault: str | None = "cut at the limit"
    elif answer.finish == "content_filter":
        fault = "refusal"
    else:
        fault = wanted.fault(text)
    if fault is None:
        return text
    dropped[fault] += 1
    return None
