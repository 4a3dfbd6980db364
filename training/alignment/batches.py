"""Batches of rollouts for the policy loss: the completions of all ranks as rows, dealt out by length.

R = prompts * group rows, one a completion, the completions of a prompt together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model import MiniDeepSeek
from text.files import json_text
from training.alignment.policy_loss import completion_hidden
from training.alignment.rollouts import Group, Rollouts
from training.log_probs import label_log_probs
from training.losses import IGNORE, PLACES, Batch, located
from training.machine import autocast, to_device
from training.step import positions

if TYPE_CHECKING:
    from training.alignment.preference import Ask
    from training.parallel.sharding import Shards

# A product of a new shape costs a CPU 10 ms of code generation: batches have a multiple of so many rows and positions.
ROWS, WIDTH = 16, 8
SHOWN = 60  # characters of a prompt, and of a completion, in a message
COUNTED = ", tokens of completions"  # in the identity of runs that count these; older ones count positions
PATIENCE = 20  # rollouts without anything to learn, after which a line says so
ENTRY = "entry"  # the log's entry among the saved tensors, as JSON in bytes


class LeftOut(IntEnum):
    """Why a row has no labels."""

    NO = 0
    ZERO_VARIANCE = 1  # its group teaches nothing; its tokens count in the loss's denominator all the same
    OVERLONG = 2  # cut at the limit; its tokens do not count


@dataclass
class Rows:
    """What is known of the completions. `tokens_RT` has prompt, completion and padding; `lengths_R` counts both.

    `experts_RT`: (R, T, MoE layers, K) int16 of each position, where they are replayed; -1 where none was recorded.
    """

    tokens_RT: Tensor
    prompt_lengths_R: Tensor
    lengths_R: Tensor
    sampled_log_probs_RT: Tensor
    advantages_R: Tensor
    left_out_R: Tensor
    old_log_probs_RT: Tensor | None = None
    reference_log_probs_RT: Tensor | None = None
    experts_RT: Tensor | None = None

    @classmethod
    def of(cls, groups: list[Group], sequence_length: int, pad_id: int, filter_overlong: bool) -> Rows:
        """Return the rows of groups of equal size, `sequence_length` tokens wide."""
        made, size = [group.completions for group in groups], len(groups[0].samples_G)
        tokens_RT = torch.full((len(groups) * size, sequence_length), pad_id)
        for rows_GT, group in zip(tokens_RT.split(size), groups, strict=True):
            begin, new = len(group.prompt_T), group.completions.tokens.shape[1]
            rows_GT[:, :begin] = torch.tensor(group.prompt_T)
            rows_GT[:, begin : begin + new] = group.completions.tokens
        prompt_lengths_R = torch.tensor([len(group.prompt_T) for group in groups]).repeat_interleave(size)
        zero_variance_R = torch.tensor([group.zero_variance for group in groups]).repeat_interleave(size)
        cut_R = ~torch.cat([completions.ended for completions in made]) & filter_overlong
        return cls(
            tokens_RT,
            prompt_lengths_R,
            prompt_lengths_R + torch.cat([completions.lengths for completions in made]),
            torch.cat([completions.log_probs for completions in made]),
            torch.cat([group.advantages_G for group in groups]),
            torch.where(cut_R, LeftOut.OVERLONG, zero_variance_R * LeftOut.ZERO_VARIANCE),
            experts_RT=_padded([experts for completions in made for experts in completions.experts], sequence_length),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names without the suffix, as checkpoints keep them."""
        named = {each.name.rpartition("_")[0]: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Rows:
        """The inverse of `tensors`."""
        return cls(*(tensors.get(each.name.rpartition("_")[0]) for each in fields(cls)))

    @property
    def new_R(self) -> Tensor:
        """Tokens of each completion."""
        return self.lengths_R - self.prompt_lengths_R


@dataclass
class Experience:
    """A `PolicyDataset`: each batch of completions is trained on for `mu` steps, the same on every rank.

    The rollouts of a step are a function of (seed, step) and the weights. So nothing needs to be saved between batches
    of completions; between the `mu` steps on one, the batch is.

    Attributes:
        sequence_length: most tokens of a prompt and its completion. micro_rows: rows of a forward pass.
        reference: frozen model for the KL term, or None. counts_positions: as tokens of the run, padding among them.
    """

    rollouts: Rollouts
    sequence_length: int
    micro_rows: int
    dtype: torch.dtype
    reference: Ask | None = None
    counts_positions: bool = False
    rows: Rows | None = None
    entry: dict[str, Any] = field(default_factory=dict)
    _barren: int = 0  # rollouts since one that taught something

    def __post_init__(self) -> None:
        self.prompts, self.settings, self.ranks = self.rollouts.prompts, self.rollouts.settings, self.rollouts.ranks
        self.content = self.prompts.content
        # Beside the problems' order, in which steps they are asked.
        again = f", each for {self.settings.mu} steps" if self.settings.mu > 1 else ""
        self.identity = self.prompts.identity + again + ("" if self.counts_positions else COUNTED)

    def __len__(self) -> int:
        """Return the rows of an epoch: each prompt's group, `mu` times."""
        return len(self.prompts) * self.settings.group * self.settings.mu

    def prepare(self, step: int, model: MiniDeepSeek) -> dict[str, Any]:
        """Make the rollouts every `mu` steps. Returns what is logged of them."""
        if step % self.settings.mu == 0:
            self._collect(step // self.settings.mu, model)
        return self.entry

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return rows for `GRPOLoss`. Rows without labels are left out, so that they cost nothing."""
        rows = self.order[torch.tensor(indices) % len(self.order)]
        rows = rows[(self.rows.left_out_R[rows] > 0).int().argsort(stable=True)]
        left_out = self.rows.left_out_R[rows]
        absent_tokens = self.rows.new_R[rows[left_out == LeftOut.ZERO_VARIANCE]].sum()
        # Those with labels come first; what fills up the last few rows has none.
        trained = int((left_out == LeftOut.NO).sum())
        used = rows[: max(-(-trained // ROWS) * ROWS, 1)]
        return {**self._tensors(used), "absent": torch.stack((torch.tensor(len(rows) - len(used)), absent_tokens))}

    def count_tokens(self, batch: Batch) -> int:
        """Return the tokens of the completions that are trained on, of a batch that `GRPOLoss` has prepared."""
        return positions(batch) if self.counts_positions else len(batch[PLACES])

    def describe(self, index: int) -> str:
        """Return the end of the prompt and the beginning of the completion of a row."""
        row = int(self.order[index % len(self.order)])
        begin, end = int(self.rows.prompt_lengths_R[row]), int(self.rows.lengths_R[row])
        tokens, decode = self.rows.tokens_RT[row].tolist(), self.prompts.tokenizer.decode
        return f"prompt {decode(tokens[:begin])[-SHOWN:]!r}, completion {decode(tokens[begin:end])[:SHOWN]!r}"

    def take_shards(self, shards: Shards) -> None:
        """Sample by weights that are gathered from the ranks."""
        self.rollouts.sampler.shards = shards

    def state(self) -> dict[str, Tensor]:
        """Return the completions in use, if another step uses them."""
        if self.settings.mu == 1 or self.rows is None:
            return {}
        entry = torch.tensor(list(json_text(self.entry).encode()), dtype=torch.uint8)
        return {**self.rows.tensors, ENTRY: entry}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        if state:
            self.rows = Rows.of_tensors(state)
            self.entry = json.loads(bytes(state[ENTRY].tolist()))
            self.arrange()

    def _collect(self, number: int, model: MiniDeepSeek) -> None:
        begin = time.perf_counter()
        groups, sums = self.rollouts.collect(number)
        mine = Rows.of(
            groups, self.sequence_length, self.prompts.tokenizer.pad_id, self.settings.overlong == "filter"
        ).tensors
        everything = self.ranks.gather((mine, sums))
        self.rows = Rows.of_tensors({name: torch.cat([rows[name] for rows, _ in everything]) for name in mine})
        self.arrange()
        if self.settings.mu > 1:
            self.rows.old_log_probs_RT = self._log_probs(model)
        if self.reference is not None:
            self.rows.reference_log_probs_RT = self.reference(self._log_probs)
        totals = {name: sum(counts[name] for _, counts in everything) for name in sums}
        self.entry = log_entry(totals, groups[0], time.perf_counter() - begin)
        self._barren = self._barren + 1 if (self.rows.left_out_R > 0).all() else 0
        if self._barren and self._barren % PATIENCE == 0:
            why = "all completions of a prompt have the same reward, or are cut"
            remedy = "look at `sample` in metrics.jsonl; give easier problems, or another --rewards"
            self.ranks.say(
                f"warning    nothing to learn in {self._barren} rollouts in a row: {why};\n{' ' * 11}{remedy}"
            )

    def arrange(self) -> None:
        """Deal the groups to the ranks, the longest first: equal work for all, and little padding in a batch."""
        size = self.settings.group
        weight_R = self.rows.lengths_R - (self.rows.left_out_R > 0) * (self.sequence_length + 1)
        ranked_P = weight_R.view(-1, size).amax(1).argsort(descending=True, stable=True)
        dealt_P = torch.cat([ranked_P[rank :: self.ranks.world] for rank in range(self.ranks.world)])
        self.order = (dealt_P.unsqueeze(1) * size + torch.arange(size)).flatten()

    def _tensors(self, rows: Tensor) -> Batch:
        """Return prompts, inputs, labels and what belongs to each label; completions are padded on the right.

        Of a row that is left out nothing is a label.
        """
        known, size = self.rows, self.settings.group
        prompts_P, prompt_of = (rows // size).unique(return_inverse=True)
        sizes_P = known.prompt_lengths_R[prompts_P * size]
        longest = _multiple(int(sizes_P.max()))
        padding_P = longest - sizes_P
        prompt_places = (torch.arange(longest) - padding_P.unsqueeze(1)).clamp(min=0)
        new_R = known.new_R[rows].masked_fill(known.left_out_R[rows] > 0, 0)
        time_T = torch.arange(_multiple(int(new_R.max()) - 1) + 1)
        places_RT = (known.prompt_lengths_R[rows].unsqueeze(1) + time_T).clamp(max=self.sequence_length - 1)
        completions_RT, is_label_RT = known.tokens_RT[rows].gather(1, places_RT), time_T < new_R.unsqueeze(1)
        batch = {
            "prompt_ids": known.tokens_RT[prompts_P * size].gather(1, prompt_places),
            "prompt_padding": padding_P,
            "prompt_of": prompt_of,
            "input_ids": completions_RT[:, :-1],
            "labels": completions_RT.masked_fill(~is_label_RT, IGNORE),
            "advantages": known.advantages_R[rows],
        }
        if known.experts_RT is not None:
            batch["prompt_experts"] = known.experts_RT[(prompts_P * size).unsqueeze(1), prompt_places]
            batch["experts"] = known.experts_RT[rows.unsqueeze(1), places_RT[:, :-1]]
        place_RT = time_T.clamp(max=self.settings.max_new_tokens - 1).expand_as(places_RT)
        for name, log_probs_RT in known.tensors.items():
            if name.endswith("log_probs"):
                batch[name] = log_probs_RT[rows].gather(1, place_RT) * is_label_RT
        return batch

    @torch.no_grad()
    def _log_probs(self, model: MiniDeepSeek) -> Tensor:
        """Return (R, new) of another model, or of the policy before its steps; every rank computes its share."""
        device, out = self.ranks.device, torch.zeros_like(self.rows.sampled_log_probs_RT)
        mine = self.order.view(self.ranks.world, -1)[self.ranks.rank]
        trained = mine[self.rows.left_out_R[mine] == LeftOut.NO]
        # A rank may have nothing to train on, and an empty tensor splits into one empty part.
        parts = trained.split(self.micro_rows) if len(trained) else ()
        if self.ranks.in_step:  # all make as many passes; of rows that are left out nothing is a label
            parts = [*parts, *[mine[:1]] * (max(self.ranks.gather(len(parts))) - len(parts))]
        for rows in parts:
            batch = to_device(located(self._tensors(rows)), device)
            with autocast(self.dtype, device):
                hidden, head = completion_hidden(model, batch)
                found = label_log_probs(hidden, head, batch["labels"], self.settings.temperature, batch[PLACES])
            for row, values, labels in zip(rows.tolist(), found.cpu(), batch["labels"].cpu(), strict=True):
                own = values[labels != IGNORE]
                out[row, : len(own)] = own
        return sum(self.ranks.gather(out))


def log_entry(totals: dict[str, float], shown: Group, seconds: float) -> dict[str, Any]:
    """Return what is logged of rollouts: means of the sums over all ranks, and a sample."""
    rows, sample = totals["rows"], shown.samples_G[0]
    # Redrawn groups are not in the sums: they are taken to be as long as the others.
    tokens = totals["tokens"] * (1 + totals["redrawn"] / totals["groups"])
    return {
        **{name: value / rows for name, value in totals.items() if name.startswith("reward")},
        "completion_length": totals["tokens"] / rows,
        "ended": totals["ended"] / rows,
        "zero_variance": totals["zero_variance"] / totals["groups"],
        "redrawn": totals["redrawn"] / totals["groups"],
        "rollout_seconds": seconds,
        "rollout_tokens_per_second": tokens / seconds,
        "sample": {
            "question": sample.problem.question,
            "answer": sample.problem.answer,
            "completion": sample.text,
            "rewards": {name: values[0] for name, values in shown.values.items()},
        },
    }


def _padded(experts: list[Tensor], time: int) -> Tensor | None:
    """(positions, MoE layers, K) of each row -> (rows, time, MoE layers, K), or None where nothing was recorded."""
    if not experts:
        return None
    padded = experts[0].new_full((len(experts), time, *experts[0].shape[1:]), -1)
    for row_TLK, known in zip(padded, experts, strict=True):
        row_TLK[: len(known)] = known
    return padded


def _multiple(size: int) -> int:
    """Return the next multiple of `WIDTH`, at least one."""
    return max(-(-size // WIDTH), 1) * WIDTH
