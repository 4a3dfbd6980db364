"""What the policy is trained on: completions that it made itself, their rewards and their advantages."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataset import PromptDataset
from errors import UserError
from model import MiniDeepSeek
from text.chats.problems import Problem
from training.alignment.policy import advantages, completion_hidden
from training.alignment.rewards import Rewards, Sample
from training.alignment.rollout import (
    Completions,
    RolloutSettings,
    Sampler,
    chances,
    completion_texts,
    joined,
    sample_groups,
)
from training.log_probs import label_log_probs
from training.losses import IGNORE, Batch
from training.machine import autocast
from training.parallel.ranks import Ranks
from training.run.interrupt import Stopped

# A product of a new shape costs a CPU 10 ms of code generation: batches have a multiple of so many rows and positions.
ROWS, WIDTH = 16, 8
SHOWN = 60  # characters of a prompt, and of a completion, in a message
ENTRY = "entry"  # the log's entry among the saved tensors, as JSON in bytes
CHANCES = 0x6772706F  # keeps the numbers of sampling apart from those of the data order


@dataclass
class Group:
    """One prompt with its completions: (group, new) tensors, rewards by name, and what came of them."""

    prompt: list[int]
    problem: Problem
    texts: list[str]
    completions: Completions
    total: Tensor
    rewards: dict[str, list[float]]
    advantages: Tensor
    silent: bool


class Experience:
    """A `PolicyDataset`: each batch of completions is trained on for `mu` steps, the same on every rank.

    The prompts and the chances of a step are functions of (seed, step), and the completions of these and the weights.
    So nothing needs to be saved between batches of completions; between the `mu` steps on one, the batch is.

    Args:
        reference: frozen model for the KL term, or None.
    """

    def __init__(
        self,
        prompts: PromptDataset,
        rewards: Rewards,
        sampler: Sampler,
        settings: RolloutSettings,
        sequence_length: int,
        micro_rows: int,
        ranks: Ranks,
        dtype: torch.dtype,
        reference: MiniDeepSeek | None = None,
    ) -> None:
        settings.check()
        if settings.prompts % ranks.world:
            raise UserError(f"--prompts {settings.prompts}: does not divide among {ranks.world} ranks")
        self.prompts, self.rewards, self.sampler, self.settings = prompts, rewards, sampler, settings
        self.sequence_length, self.micro_rows = sequence_length, micro_rows
        self.ranks, self.dtype, self.reference = ranks, dtype, reference
        self.tokenizer = prompts.tokenizer
        self.held: dict[str, Tensor] = {}
        self.entry: dict[str, Any] = {}

    def __len__(self) -> int:
        """Rows of an epoch: each prompt's group, `mu` times."""
        return len(self.prompts) * self.settings.group * self.settings.mu

    @property
    def identity(self) -> str:
        """What the order of the problems depends on beside the seed, and in which steps they are asked."""
        mu = self.settings.mu
        return self.prompts.identity if mu == 1 else f"{self.prompts.identity}, each for {mu} steps"

    @property
    def content(self) -> str:
        """As of the problems."""
        return self.prompts.content

    def prepare(self, step: int, model: MiniDeepSeek) -> dict[str, Any]:
        """Sample, judge and exchange completions every `mu` steps. Returns what is logged of them."""
        if step % self.settings.mu == 0:
            self._collect(step // self.settings.mu, model)
        return self.entry

    def batch(self, indices: Sequence[int]) -> Batch:
        """Rows for `GRPOLoss`. Rows without anything to learn are left out, so that they cost nothing."""
        rows = self.order[torch.tensor(indices) % len(self.order)]
        rows = rows[(self.held["left_out"][rows] > 0).int().argsort(stable=True)]
        silent = rows[self.held["left_out"][rows] == 1]
        tokens = (self.held["lengths"] - self.held["prompt_lengths"])[silent].sum()
        # Those with something to learn come first; what fills up the last few rows has no labels.
        learnt = int((self.held["left_out"][rows] == 0).sum())
        shown = rows[: max(-(-learnt // ROWS) * ROWS, 1)]
        return {**self._rows(shown), "absent": torch.stack((torch.tensor(len(rows) - len(shown)), tokens))}

    def describe(self, index: int) -> str:
        """The end of the prompt and the completion of a row."""
        row = int(self.order[index % len(self.order)])
        begin, end = int(self.held["prompt_lengths"][row]), int(self.held["lengths"][row])
        tokens = self.held["tokens"][row].tolist()
        prompt, completion = self.tokenizer.decode(tokens[:begin]), self.tokenizer.decode(tokens[begin:end])
        return f"prompt {prompt[-SHOWN:]!r}, completion {completion[:SHOWN]!r}"

    def state(self) -> dict[str, Tensor]:
        """The completions in use, if another step uses them."""
        if self.settings.mu == 1:
            return {}
        entry = torch.tensor(list(json.dumps(self.entry).encode()), dtype=torch.uint8)
        return {**self.held, ENTRY: entry}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        if state:
            self.held = dict(state)
            self.entry = json.loads(bytes(self.held.pop(ENTRY).tolist()))
            self._arrange()

    def _collect(self, number: int, model: MiniDeepSeek) -> None:
        begin, settings, ranks = time.perf_counter(), self.settings, self.ranks
        share = settings.prompts // ranks.world
        slots = range(
            number * settings.prompts + ranks.rank * share, number * settings.prompts + (ranks.rank + 1) * share
        )
        policy = self.sampler.refresh()
        groups = self._sample(policy, list(slots), 0)
        first, redrawn = list(groups), 0
        for turn in range(1, settings.resample + 1):
            places = [place for place, group in enumerate(groups) if group.silent]
            redrawn += len(places)
            for place, group in zip(places, self._sample(policy, [slots[p] for p in places], turn), strict=True):
                groups[place] = group
        held = self._table(groups)
        everything = ranks.gather((held, self._counts(first, redrawn)))
        self.held = {name: torch.cat([part[name] for part, _ in everything]) for name in held}
        self._arrange()
        if settings.mu > 1:
            self.held["old_log_probs"] = self._log_probs(model)
        if self.reference is not None:
            self.held["reference_log_probs"] = self._log_probs(self.reference)
        totals = {name: sum(counts[name] for _, counts in everything) for name in everything[0][1]}
        self.entry = self._entry(totals, first[0], time.perf_counter() - begin)

    def _sample(self, policy: MiniDeepSeek, slots: list[int], turn: int) -> list[Group]:
        """A group for each slot: its prompt and chances depend on the slot and the turn only.

        Raises `Stopped` on all ranks if a signal came to one of them meanwhile.
        """
        made, settings = [], self.settings
        if slots:
            problems = [self.prompts.problem(slot, turn) for slot in slots]
            ids = self.prompts.encode(problems)
            keys = [(self.prompts.seed, CHANCES, slot, turn) for slot in slots]
            drawn = chances(keys, settings.group, settings.max_new_tokens)
            limits = self.tokenizer.eos_id, settings.temperature, settings.rollout_rows
            made = list(sample_groups(policy, ids, drawn, *limits, self.ranks.watch))
        if self.ranks.asked_to_stop():
            raise Stopped
        return self._judge(problems, ids, joined(made)) if slots else []

    def _judge(self, problems: list[Problem], ids: list[list[int]], made: Completions) -> list[Group]:
        group = self.settings.group
        texts = completion_texts(self.tokenizer, made)
        samples = [
            Sample(problems[row // group], text, length, self.settings.max_new_tokens, ended)
            for row, (text, length, ended) in enumerate(
                zip(texts, made.lengths.tolist(), made.ended.tolist(), strict=True)
            )
        ]
        totals, values = self.rewards(samples)
        total_PG = torch.tensor(totals).view(-1, group)
        advantages_PG, silent_P = advantages(total_PG, self.settings.loss)
        groups = []
        for place, problem in enumerate(problems):
            rows = slice(place * group, (place + 1) * group)
            own = Completions(made.tokens[rows], made.lengths[rows], made.log_probs[rows], made.ended[rows])
            by_name = {name: value[rows] for name, value in values.items()}
            groups.append(
                Group(
                    ids[place], problem, texts[rows], own, total_PG[place], by_name, advantages_PG[place],
                    bool(silent_P[place]),
                )
            )  # fmt: skip
        return groups

    def _table(self, groups: list[Group]) -> dict[str, Tensor]:
        """The groups' completions as rows of tensors, all of the same widths on every rank."""
        group, longest = self.settings.group, self.sequence_length
        rows = len(groups) * group
        tokens = torch.full((rows, longest), self.tokenizer.pad_id)
        prompt_lengths = torch.tensor([len(each.prompt) for each in groups]).repeat_interleave(group)
        for place, each in enumerate(groups):
            mine, begin = slice(place * group, (place + 1) * group), len(each.prompt)
            tokens[mine, :begin] = torch.tensor(each.prompt)
            tokens[mine, begin : begin + each.completions.tokens.shape[1]] = each.completions.tokens
        silent = torch.tensor([each.silent for each in groups]).repeat_interleave(group)
        cut = ~torch.cat([each.completions.ended for each in groups]) & (self.settings.overlong == "filter")
        return {
            "tokens": tokens,
            "prompt_lengths": prompt_lengths,
            "lengths": prompt_lengths + torch.cat([each.completions.lengths for each in groups]),
            "sampled_log_probs": torch.cat([each.completions.log_probs for each in groups]),
            "advantages": torch.cat([each.advantages for each in groups]),
            # 1: without variance, which counts as nothing gained; 2: overlong, whose tokens do not count
            "left_out": torch.where(cut, 2, silent.long()),
        }

    def _arrange(self) -> None:
        """Deal the groups to the ranks, the longest first: equal work for all, and little padding in a batch."""
        held, group = self.held, self.settings.group
        weight = held["lengths"] - (held["left_out"] > 0) * (self.sequence_length + 1)
        ranked = weight.view(-1, group).amax(1).argsort(descending=True, stable=True)
        dealt = torch.cat([ranked[rank :: self.ranks.world] for rank in range(self.ranks.world)])
        self.order = (dealt.unsqueeze(1) * group + torch.arange(group)).flatten()

    def _rows(self, rows: Tensor) -> Batch:
        """Prompts, inputs, labels and what belongs to each label; completions are padded on the right.

        Of a row that is left out nothing is a label.
        """
        held = {name: value[rows] for name, value in self.held.items()}
        groups, prompt_of = (rows // self.settings.group).unique(return_inverse=True)
        firsts = groups * self.settings.group
        sizes = self.held["prompt_lengths"][firsts]
        longest = _multiple(int(sizes.max()))
        padding = longest - sizes
        prompt_places = (torch.arange(longest) - padding.unsqueeze(1)).clamp(min=0)

        new = (held["lengths"] - held["prompt_lengths"]).masked_fill(held["left_out"] > 0, 0).unsqueeze(1)
        time = torch.arange(_multiple(int(new.max()) - 1) + 1)
        places = (held["prompt_lengths"].unsqueeze(1) + time).clamp(max=self.sequence_length - 1)
        completions, labelled = held["tokens"].gather(1, places), time < new
        batch = {
            "prompt_ids": self.held["tokens"][firsts].gather(1, prompt_places),
            "prompt_padding": padding,
            "prompt_of": prompt_of,
            "input_ids": completions[:, :-1],
            "labels": completions.masked_fill(~labelled, IGNORE),
            "advantages": held["advantages"],
        }
        place = time.clamp(max=self.settings.max_new_tokens - 1).expand_as(places)
        for name in ("sampled_log_probs", "old_log_probs", "reference_log_probs"):
            if name in held:
                batch[name] = held[name].gather(1, place) * labelled
        return batch

    @torch.no_grad()
    def _log_probs(self, model: MiniDeepSeek) -> Tensor:
        """(rows, new) of another model, or of the policy before its steps; every rank computes its share."""
        device, out = self.ranks.device, torch.zeros_like(self.held["sampled_log_probs"])
        mine = self.order.view(self.ranks.world, -1)[self.ranks.rank]
        learnt = mine[self.held["left_out"][mine] == 0]
        # A rank may have nothing to learn from, and an empty tensor splits into one empty part.
        for rows in learnt.split(self.micro_rows) if len(learnt) else ():
            batch = {name: value.to(device) for name, value in self._rows(rows).items()}
            with autocast(self.dtype, device):
                found = label_log_probs(*completion_hidden(model, batch), batch["labels"], self.settings.temperature)
            for row, values, labels in zip(rows.tolist(), found.cpu(), batch["labels"].cpu(), strict=True):
                own = values[labels != IGNORE]
                out[row, : len(own)] = own
        return sum(self.ranks.gather(out))

    def _counts(self, groups: list[Group], redrawn: int) -> dict[str, float]:
        """Sums over this rank's first groups: before resampling, so that they measure the policy on the data."""
        lengths = torch.cat([each.completions.lengths for each in groups])
        counts = {
            "groups": len(groups),
            "rows": len(lengths),
            "tokens": lengths.sum().item(),
            "ended": torch.cat([each.completions.ended for each in groups]).sum().item(),
            "silent": sum(each.silent for each in groups),
            "redrawn": redrawn,
            "reward": sum(each.total.sum().item() for each in groups),
        }
        return counts | {
            f"reward_{name}": sum(sum(each.rewards[name]) for each in groups) for name in self.rewards.functions
        }

    def _entry(self, totals: dict[str, float], shown: Group, seconds: float) -> dict[str, Any]:
        rows = totals["rows"]
        # Redrawn groups are not in the sums: they are taken to be as long as the others.
        tokens = totals["tokens"] * (1 + totals["redrawn"] / totals["groups"])
        return {
            **{name: value / rows for name, value in totals.items() if name.startswith("reward")},
            "completion_length": totals["tokens"] / rows,
            "ended": totals["ended"] / rows,
            "zero_variance": totals["silent"] / totals["groups"],
            "redrawn": totals["redrawn"] / totals["groups"],
            "rollout_seconds": seconds,
            "rollout_tokens_per_second": tokens / seconds,
            "sample": {
                "question": shown.problem.question,
                "answer": shown.problem.answer,
                "completion": shown.texts[0],
                "rewards": {name: values[0] for name, values in shown.rewards.items()},
            },
        }


def _multiple(size: int) -> int:
    """The next multiple of `WIDTH`, at least one."""
    return max(-(-size // WIDTH), 1) * WIDTH
