"""Answers of a teacher, cleaned, verified and filtered, as conversations to fine-tune on.

From another model this is black-box distillation, from the policy itself rejection sampling (DeepSeek-R1, 2.3.3).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from errors import UserError, check_least, require
from text.chats.chat_template import Message
from text.chats.conversations import read_conversations
from text.chats.prompts import Prompt, read_prompts
from text.files import write_json_lines
from text.judging.answer_filter import AnswerFilter, clean, shortest_different
from text.sources.registry import Source
from text.sources.row_report import RowReport, balance
from training.alignment.rewards import Rewards, Sample
from training.distill.answers import Answer, AnsweringTeacher, Ask, Journal, ask_all, questions

JOURNAL, CHATS, FILE = "answers.jsonl", "sft.jsonl", ".jsonl"
UNFIT = {"length": "cut at the limit", "content_filter": "refusal"}  # reasons to finish


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
        mix: general conversations to mix in, named as for full_sft.py.
        mix_share: their share of what is written.
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
    mix: str = ""
    mix_share: float = 0.5
    system: str = ""
    concurrency: int = 8
    timeout: float = 120.0

    def check_answers(self) -> None:
        """Raises `UserError` for a value that makes no sense."""
        self.check_filter()
        check_least(1, samples=self.samples, keep_answers=self.keep_answers, concurrency=self.concurrency)
        limits = f"--prompts {self.prompts}, --timeout {self.timeout:g}"
        require(self.prompts >= 0 and self.timeout > 0, f"{limits}: must be at least 0 and above 0")
        require(0 <= self.mix_share < 1, f"--mix_share {self.mix_share:g}: must be at least 0 and below 1")


def gather_answers(
    out: Path, sources: Sequence[Source], resume: bool, on_error: str, settings: AnswerSettings,
    teacher: AnsweringTeacher, seed: int, facts: Sequence[object], max_new_tokens: int, mix: Sequence[Source] = (),
) -> Path:  # fmt: skip
    """Ask the teacher all that is not known yet, and write what is fit to learn from. Returns that file.

    Args:
        out: a folder, for answers.jsonl and sft.jsonl, or a file FILE.jsonl, beside which its FILE.answers.jsonl lies.
        facts: of the teacher and its sampling; answers under other facts are other answers.
        mix: general conversations for a share `mix_share` of the file.
    """
    is_file = out.suffix == FILE
    path, file = (out.with_suffix(f".{JOURNAL}"), out) if is_file else (out / JOURNAL, out / CHATS)
    rewards, report, mix_report = Rewards.of(settings.rewards), RowReport(), RowReport()
    general = [chat for source in mix for chat in read_conversations(source, report=mix_report)]
    prompts = list(read_prompts(sources, settings.system, settings.prompts, seed, on_error, report))
    print("\n".join([*report.lines(), balance(report.rows, "rows", {"prompts to ask": len(prompts), **report.unused})]))
    if not resume and path.exists() and path.stat().st_size:  # empty where an earlier run had no answer
        raise UserError(f"{path}: holds answers already; add --resume to continue, or choose another --out")
    journal, asks = Journal(path), questions(prompts, settings.samples, *facts)
    failures = ask_all(teacher, [ask for some in asks for ask in some], journal)
    conversations, answers = curate(prompts, asks, journal.known, settings, rewards, max_new_tokens)
    if failures and not answers:
        raise UserError(
            f"--teacher: not one of {failures.total()} questions has an answer, mostly "
            f"{failures.most_common(1)[0][0]}; remove the cause and run the same command again"
        )
    if not conversations:
        raise UserError(f"{path}: none of {answers} answers is fit to learn from; see what was dropped and why")
    if mix:
        count = round(len(conversations) * settings.mix_share / (1 - settings.mix_share))
        chosen = random.Random(seed).sample(general, min(count, len(general)))
        fates = {"mixed in": len(chosen), "more than were needed": len(general) - len(chosen), **mix_report.unused}
        print("\n".join([*mix_report.lines(), balance(mix_report.rows, "rows of --mix", fates)]))
        conversations += chosen
        random.Random(seed).shuffle(conversations)
    write_json_lines(file, ({"messages": messages} for messages in conversations))
    print(f"{file}: {len(conversations)} conversations")
    return file


def curate(
    prompts: Sequence[Prompt], asks: Sequence[Sequence[Ask]], known: dict[str, Answer], settings: AnswerSettings,
    rewards: Rewards, limit: int,
) -> tuple[list[list[Message]], int]:  # fmt: skip
    """Return conversations out of the answers that are complete, clean and, where the right one is known, right.

    Prints what became of the answers, and returns how many there were.
    """
    count, dropped, conversations = Counter(), Counter(), []
    for prompt, own in zip(prompts, asks, strict=True):
        samples = []
        for answer in (known[ask.key] for ask in own if ask.key in known):
            text = clean(answer.text)
            if fault := UNFIT.get(answer.finish) or settings.fault(text):
                dropped[fault] += 1
            else:
                samples.append(Sample(prompt.problem, text, answer.tokens, limit))
        good = [sample.text for sample in samples]
        if prompt.problem is not None and samples:
            totals, _ = rewards(samples)
            good = [text for text, total in zip(good, totals, strict=True) if total >= settings.at_least]
        chosen = shortest_different(good, settings.keep_answers)
        dropped["wrong"] += len(samples) - len(good)
        dropped["duplicate"] += len(good) - len(set(good))
        dropped["more than --keep_answers"] += len(set(good)) - len(chosen)
        count["unanswered"] += not chosen
        count["unverified"] += len(chosen) if prompt.problem is None else 0
        conversations += [[*prompt.messages, {"role": "assistant", "content": text}] for text in chosen]
    kept, answers = len(conversations), len(conversations) + dropped.total()
    unverified = f", {count['unverified']} of them unverified" if count["unverified"] else ""
    print(
        f"{answers} answers to {len(prompts)} prompts: {kept} kept{unverified}, {dropped.total()} dropped; "
        f"{count['unanswered']} prompts without an answer"
    )
    for reason, number in (+dropped).most_common():
        print(f"  {number} x {reason}")
    return conversations, answers
