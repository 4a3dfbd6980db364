"""Rejection sampling: keep what a checkpoint got right, as conversations to fine-tune on (DeepSeek-R1 section 2.3.3).

python collect.py --ckpt out/grpo/final --data arithmetic:1-3 --out kept.jsonl --samples 8 --mix chats.jsonl
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track

from cli import parse
from dataset import PromptDataset
from errors import UserError, check_least, check_seed, command_line
from text.chats.chat_template import Message
from text.chats.conversations import read_conversations, write_chats
from text.chats.problems import Problem
from text.judging.answer_filter import shortest_different
from text.sources.registry import REGISTRY, Source, find_sources
from text.sources.row_report import RowReport, balance
from training.alignment.rewards import Rewards, Sample
from training.alignment.sampler import Completions, completion_texts, sample_groups, uniforms
from training.machine import choose_dtype
from training.parallel.ranks import Ranks
from training.startup import open_checkpoint

TRIES = 10  # numbers tried for each problem asked for, where problems come again by chance


@dataclass
class Statistics:
    """What was sampled and kept. `solved`: prompts with a right answer; `right`: answers; `by_kind`: of those kept."""

    prompts: int = 0
    solved: int = 0
    samples: int = 0
    right: int = 0
    repeated: int = 0
    beyond_keep: int = 0
    kept: int = 0
    mixed: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """For people."""
        kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(self.by_kind.items()))
        wrong = self.samples - self.right
        fates = {"kept": self.kept, "repeated": self.repeated, "beyond --keep": self.beyond_keep, "not right": wrong}
        return [
            f"{self.prompts} prompts, {self.samples} samples: {self.right} verified "
            f"({self.right / max(self.samples, 1):.1%}), {self.solved} prompts solved at least once",
            balance(self.samples, "samples", fates),
            f"{self.kept} kept ({kinds or 'none'}), {self.mixed} chats mixed in",
        ]


@dataclass(kw_only=True)
class CollectSettings:
    """Settings of rejection sampling.

    Args:
        ckpt: checkpoint folder.
        data: problems, as for grpo_train.py.
        out: file to write, one conversation a line.
        prompts: problems to ask, each once.
        samples: answers to each.
        keep: most answers kept of one problem, the shortest first.
        rewards: names and weights that judge an answer.
        at_least: the weighted sum from which an answer is kept.
        mix: general conversations to mix in, as for full_sft.py.
        mix_share: their share of what is written.
        system: system prompt that the problems are asked and written with.
        max_new_tokens: most tokens of an answer; what was cut is not kept.
        temperature: of the sampling.
        datasets: YAML file that gives data sets names.
        seed: of problems, samples and order.
        device: auto, cpu or cuda.
        dtype: auto, bf16 or fp32.
    """

    ckpt: str
    data: str
    out: str
    prompts: int = 1000
    samples: int = 8
    keep: int = 2
    rewards: dict[str, float] = field(default_factory=lambda: {"correct": 1.0})
    at_least: float = 1.0
    mix: str = ""
    mix_share: float = 0.5
    system: str = ""
    max_new_tokens: int = 256
    temperature: float = 1.0
    datasets: str = REGISTRY
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        check_least(1, max_new_tokens=self.max_new_tokens)
        check_seed(self.seed)
        if min(self.prompts, self.samples, self.keep) < 1 or self.temperature <= 0:
            raise UserError("--prompts, --samples, --keep and --temperature must be above 0")
        if not 0 <= self.mix_share < 1:
            raise UserError(f"--mix_share {self.mix_share}: must be at least 0 and below 1")


def main() -> None:
    settings = parse(CollectSettings, __doc__ or "")
    judge, place = Rewards.of(settings.rewards), Ranks.start(settings.device).device
    model, tokenizer = open_checkpoint(settings.ckpt)
    model = model.to(place, choose_dtype(settings.dtype, place)).eval()
    longest = model.config.max_position_embeddings - settings.max_new_tokens
    sources = find_sources(settings.data, settings.datasets, "prompt")
    # Before the minutes that sampling takes: a name that is nowhere.
    general_sources = find_sources(settings.mix, settings.datasets, "chat") if settings.mix else []
    asked = PromptDataset(sources, tokenizer, longest, settings.seed, settings.system)
    asked.print_summary("to ask")
    told, rows = Statistics(), []
    bar = Console(stderr=True)
    numbered = distinct(asked, settings.prompts)
    if len(numbered) < settings.prompts:
        print(f"notice: --data {settings.data} has no more than {len(numbered)} different problems")
    problems = list(numbered.values())
    drawn = uniforms([(settings.seed, number) for number in numbered], settings.samples, settings.max_new_tokens)
    groups = sample_groups(model, asked.encode(problems), drawn, tokenizer.eos_id, settings.temperature)
    shown = track(groups, "sampling", len(problems), console=bar, transient=True, disable=not bar.is_terminal)
    for problem, made in zip(problems, shown, strict=True):
        samples = judged_samples(problem, made, completion_texts(tokenizer, made), settings)
        for text in verified(samples, judge, settings.at_least, settings.keep, told):
            rows.append(conversation(settings.system, problem, text))
    if not rows:
        raise UserError(
            f"{settings.ckpt}: none of {told.samples} answers is worth {settings.at_least:g}; "
            "lower --at_least or train longer"
        )
    wanted = round(len(rows) * settings.mix_share / (1 - settings.mix_share))
    report = RowReport()
    chats = list(general(general_sources, wanted, settings.seed, report))
    if settings.mix:
        fates = {"mixed in": len(chats), "more than were needed": report.kept - len(chats), **report.unused}
        print("\n".join([*report.lines(), balance(report.rows, "rows of --mix", fates)]))
    told.mixed = len(chats)
    rows += chats
    random.Random(settings.seed).shuffle(rows)
    write_chats(Path(settings.out), rows)
    print("\n".join([*told.lines(), f"{settings.out}: {len(rows)} conversations"]))


def distinct(asked: PromptDataset, most: int) -> dict[int, Problem]:
    """The first `most` problems, each question once, by their numbers; fewer where the data has no more."""
    found, questions = {}, set()
    for number in range(max(len(asked), TRIES * most)):
        problem = asked.problem(number)
        if problem.question not in questions:
            questions.add(problem.question)
            found[number] = problem
            if len(found) == most:
                break
    return found


def judged_samples(problem: Problem, made: Completions, texts: list[str], settings: CollectSettings) -> list[Sample]:
    """The completions of a problem, ready to be judged."""
    return [
        Sample(problem, text, length, settings.max_new_tokens, ended)
        for text, length, ended in zip(texts, made.lengths.tolist(), made.ended.tolist(), strict=True)
    ]


def verified(samples: list[Sample], judge: Rewards, at_least: float, keep: int, told: Statistics) -> list[str]:
    """The answers to one problem that are worth keeping: different, complete, the shortest ones.

    Silence is no answer, and neither is a text with NUL, which readers of chats refuse.
    """
    totals, _ = judge(samples)
    paired = zip(samples, totals, strict=True)
    right = [sample.text for sample, total in paired if total >= at_least and sample.ended]
    right = [text for text in right if text.strip() and "\0" not in text]
    different = shortest_different(right, len(right))
    told.prompts += 1
    told.samples += len(samples)
    told.right += len(right)
    told.solved += bool(right)
    told.repeated += len(right) - len(different)
    told.kept += len(different[:keep])
    told.beyond_keep += len(different[keep:])
    told.by_kind[samples[0].problem.kind] += len(different[:keep])
    return different[:keep]


def conversation(system: str, problem: Problem, answer: str) -> list[Message]:
    """A problem and its answer as a chat."""
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": problem.question}, {"role": "assistant", "content": answer}]


def general(sources: list[Source], count: int, seed: int, report: RowReport) -> Iterator[list[Message]]:
    """`count` conversations of the sources, or all when there are fewer, in an order that the seed picks."""
    chats = [chat for source in sources for chat in read_conversations(source, report=report)]
    yield from random.Random(seed).sample(chats, min(count, len(chats)))


if __name__ == "__main__":
    command_line(main)
