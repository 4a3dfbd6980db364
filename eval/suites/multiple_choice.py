"""Multiple choice by likelihood: the choice that the model finds likeliest after the question is its answer."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from errors import UserError
from eval.opened_model import Choices, OpenedModel
from eval.suites.choice_rows import ChoiceItem, read_choices
from eval.suites.estimates import Z, wilson
from eval.suites.suite import Row, Score, spread
from text.chats.chat_template import Message

SHOWN = 60  # characters of a question in messages


class Asked(NamedTuple):
    """A question with the worked ones before it."""

    item: ChoiceItem
    shots: tuple[ChoiceItem, ...]


@dataclass(kw_only=True)
class MultipleChoice:
    """Questions with one right choice each, asked as lm-evaluation-harness asks them.

    Args:
        data: folder, file, Hub data set or name in datasets.yaml; see eval/suites/choice_rows.py for layouts.
        split: that is measured. shots: worked questions before each, the first ones of `shots_split` in its subject.
        shots_split: where they are taken from. shots_data: other data than `data` to take them from.
        subjects: only these; empty for all.
        form: letters (the choices are listed, and a letter is scored) or text (the choice itself is scored).
        intro: what stands before everything; {subject} becomes the subject. cue: what stands before the answer.
        separator: between cue and answer.
        chat: ask as a person in the model's chat template, and score the assistant's answer.
        chunk: questions that are measured together.
    """

    data: str
    split: str = "test"
    shots: int = 0
    shots_split: str = "dev"
    shots_data: str = ""
    subjects: list[str] = field(default_factory=list)
    form: str = "letters"
    intro: str = ""
    cue: str = "Answer:"
    separator: str = " "
    chat: bool = False
    chunk: int = 64

    def __post_init__(self) -> None:
        if self.form not in ("letters", "text"):
            raise UserError(f"form {self.form!r}: one of letters, text")
        if self.shots < 0 or self.chunk < 1:
            raise UserError("shots must be 0 or more, chunk 1 or more")

    def items(self, limit: int) -> list[Asked]:
        asked = read_choices(self.data, self.split, self.subjects)
        shots = self._worked(list(asked))
        return spread([Asked(item, shots[item.subject]) for items in asked.values() for item in items], limit)

    def measure(self, model: OpenedModel, items: Sequence[Asked], seed: int) -> list[Row]:
        encoded, cut = [], []
        for asked in items:
            context, choices = self._encode(model, asked)
            longest = max(map(len, choices))
            if longest > model.context:
                place = f"{asked.item.subject}: {asked.item.question[:SHOWN]!r}"
                raise UserError(f"{place} has a choice of {longest} tokens, the model reads {model.context}; drop it")
            room = model.context + 1 - longest
            cut.append(len(context) > room)
            encoded.append((context[-room:], choices))
        nats = model.continuation_nats(encoded)
        return [{"nats": own, "cut": was_cut} for own, was_cut in zip(nats, cut, strict=True)]

    def scores(self, items: Sequence[Asked], rows: Sequence[Row]) -> list[Score]:
        groups: dict[str, list[tuple[bool, bool, float]]] = {}
        for asked, row in zip(items, rows, strict=True):
            item, nats = asked.item, row["nats"]
            # lm-evaluation-harness divides by the characters of the choice, without the space before it.
            lengths = [len(text) for text in self._choices(item)]
            normal = [value / length for value, length in zip(nats, lengths, strict=True)]
            right = (_best(nats) == item.answer, _best(normal) == item.answer, 1 / len(nats))
            groups.setdefault(item.subject, []).append(right)
        whole = [right for group in groups.values() for right in group]
        scores = _accuracies("all", whole)
        if len(groups) > 1:
            scores += _means(list(groups.values()))
            for subject, group in groups.items():
                scores += _accuracies(subject, group)
        return scores

    def _worked(self, subjects: list[str]) -> dict[str, tuple[ChoiceItem, ...]]:
        """The worked questions of each subject; where there is one list of them, they serve all subjects."""
        if not self.shots:
            return {subject: () for subject in subjects}
        place = self.shots_data or self.data
        worked = read_choices(place, self.shots_split, [])
        if len(worked) == 1:
            worked = dict.fromkeys(subjects, next(iter(worked.values())))
        for subject in subjects:
            count = len(worked.get(subject, ()))
            if count < self.shots:
                remedy = f"set shots to {count} or less" if count else "add some"
                raise UserError(f"{place}: {subject} has {count} questions in split {self.shots_split!r}; {remedy}")
        return {subject: tuple(worked[subject][: self.shots]) for subject in subjects}

    def _choices(self, item: ChoiceItem) -> Sequence[str]:
        return string.ascii_uppercase[: len(item.choices)] if self.form == "letters" else item.choices

    def _encode(self, model: OpenedModel, asked: Asked) -> Choices:
        item, choices = asked.item, self._choices(asked.item)
        intro = self.intro.replace("{subject}", item.subject.replace("_", " "))
        if self.chat:
            messages: list[Message] = []
            for shot in asked.shots:
                answer = self._choices(shot)[shot.answer]
                messages += [{"role": "user", "content": self._asked(shot)}, {"role": "assistant", "content": answer}]
            messages.append({"role": "user", "content": self._asked(item)})
            messages[0]["content"] = intro + messages[0]["content"]
            return model.encode_chat(messages), [model.encode_bare(choice) for choice in choices]
        shots = [f"{self._asked(shot)}{self.separator}{self._choices(shot)[shot.answer]}\n\n" for shot in asked.shots]
        context = intro + "".join(shots) + self._asked(item)
        return encode_pairs(model, context, [self.separator + choice for choice in choices])

    def _asked(self, item: ChoiceItem) -> str:
        lines = [item.question]
        if self.form == "letters":
            lines += [
                f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, item.choices, strict=False)
            ]
        return "\n".join([*lines, self.cue] if self.cue else lines)


def encode_pairs(model: OpenedModel, context: str, continuations: Sequence[str]) -> Choices:
    """Context and continuations as ids: each pair is encoded as one text, and cut where the context alone ends.

    White space that ends the context belongs to the continuation: tokenizers join it with what follows.
    """
    bare = context.rstrip()
    space, ids = context[len(bare) :], model.encode(bare) if bare else [model.bos]
    if not bare:
        return ids, [model.encode_bare(space + text) for text in continuations]
    pairs = [model.encode(bare + space + text)[len(ids) :] for text in continuations]
    # Where the texts join into the context's own last token, nothing would be left to score.
    return ids, [pair or model.encode_bare(text) for pair, text in zip(pairs, continuations, strict=True)]


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _accuracies(group: str, right: Sequence[tuple[bool, bool, float]]) -> list[Score]:
    chance = sum(guess for *_, guess in right) / len(right)
    scores = []
    for place, metric in enumerate(("acc", "acc_norm")):
        share = sum(row[place] for row in right) / len(right)
        scores.append(Score(group, metric, share, *wilson(share, len(right)), chance, len(right)))
    return scores


def _means(groups: Sequence[Sequence[tuple[bool, bool, float]]]) -> list[Score]:
    """The mean over subjects, each of the same weight; a normal interval from the subjects' own variances."""
    scores, count = [], sum(map(len, groups))
    chance = sum(sum(guess for *_, guess in group) / len(group) for group in groups) / len(groups)
    for place, metric in enumerate(("acc", "acc_norm")):
        shares = [sum(row[place] for row in group) / len(group) for group in groups]
        # As if two right and two wrong answers came before: a subject that is all right is not certain.
        careful = [(share * len(group) + 2) / (len(group) + 4) for share, group in zip(shares, groups, strict=True)]
        variances = [p * (1 - p) / len(group) for p, group in zip(careful, groups, strict=True)]
        mean, width = sum(shares) / len(shares), Z * math.sqrt(sum(variances)) / len(groups)
        low, high = max(mean - width, 0.0), min(mean + width, 1.0)
        scores.append(Score("mean of subjects", metric, mean, low, high, chance, count))
    return scores
