"""On-policy distillation: in some steps the student samples the answers, and the teacher judges every token.

The student is then trained on what it will see when it answers (MiniLLM, Gu et al. 2024; GKD, Agarwal et al. 2024,
Algorithm 1). No gradient goes through the sampling.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset import ChatDataset
from errors import check_least, require
from model import MiniDeepSeek
from text.chats.packing import pack_best_fit, write_row
from text.order import WORD, scramble
from training.alignment.sampler import Sampler, sample_groups, uniforms
from training.distill.distillation import SAMPLED
from training.losses import Batch
from training.parallel.ranks import Ranks
from training.run.interrupt import Stopped

CHOICE, SAMPLING = 0x6F6E706F, 0x6F776E61  # keep these random numbers apart from those of the data order


@dataclass(kw_only=True)
class OnPolicySettings:
    """When and how the student answers itself.

    Args:
        on_policy: share of the steps whose answers the student samples itself.
        max_new_tokens: most tokens of an answer, sampled or of a teacher.
        sample_temperature: of sampled answers, the student's or the teacher's.
        rollout_rows: most answers sampled at a time on one rank.
    """

    on_policy: float = 0.0
    max_new_tokens: int = 256
    sample_temperature: float = 1.0
    rollout_rows: int = 256

    def check_sampling(self) -> None:
        """Raises `UserError` for a value that makes no sense."""
        require(0 <= self.on_policy <= 1, f"--on_policy {self.on_policy:g}: a share of the steps, from 0 to 1")
        check_least(1, max_new_tokens=self.max_new_tokens, rollout_rows=self.rollout_rows)
        finite = 0 <= self.sample_temperature < float("inf")
        require(finite, f"--sample_temperature {self.sample_temperature:g}: must be at least 0")


class TaughtChats:
    """Conversations with something of the teacher or the student beside or in place of their answers."""

    def __init__(self, chats: ChatDataset) -> None:
        self.chats = chats

    @property
    def identity(self) -> str:
        """As of the conversations."""
        return self.chats.identity

    def __len__(self) -> int:
        return len(self.chats)

    def describe(self, index: int) -> str:
        """As of the conversations."""
        return self.chats.describe(index)


class OnPolicyChats(TaughtChats):
    """A `PolicyDataset` over conversations: in a share of the steps the student samples their last answers.

    Which steps these are, and the answers, are functions of (seed, step) and the weights: nothing needs to be saved to
    resume, and the number of ranks changes nothing.

    Args:
        rows: of a step, over all ranks. stop: the token that ends an answer.
    """

    def __init__(
        self, chats: ChatDataset, sampler: Sampler, settings: OnPolicySettings, rows: int, stop: int, ranks: Ranks
    ) -> None:
        super().__init__(chats)
        self.sampler, self.settings, self.rows, self.stop, self.ranks = sampler, settings, rows, stop, ranks
        self.sampled: list[dict[str, np.ndarray]] | None = None

    def is_on_policy(self, step: int) -> bool:
        """Return whether the student answers in this step."""
        return scramble(self.chats.seed, CHOICE, step) < self.settings.on_policy * WORD

    def prepare(self, step: int, model: MiniDeepSeek) -> dict[str, Any]:
        """Sample the answers of a step, if it is one of those. Returns what is logged of them."""
        self.sampled = None
        return self._sample(step) if self.is_on_policy(step) else {"on_policy": 0}

    def batch(self, indices: Sequence[int]) -> Batch:
        """As `ChatDataset.batch`, with `sampled` where the answers are the student's."""
        if self.sampled is None:
            return self.chats.batch(indices)
        rows = [self.sampled[index % self.rows] for index in indices]
        batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        return {**batch, SAMPLED: torch.tensor(1)}

    def state(self) -> dict[str, Tensor]:
        """Nothing: every step makes its own."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""

    def _sample(self, step: int) -> dict[str, Any]:
        begin, length = time.perf_counter(), self.chats.sequence_length
        members = [int(m) for row in range(step * self.rows, (step + 1) * self.rows) for m in self.chats.members(row)]
        prompts = [prompt_of(*self.chats.chats[member]) for member in members]
        # Prompts of similar length together, a fair share of them for each rank.
        mine = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))[self.ranks.rank :: self.ranks.world]
        answers = self._answers(step, prompts, mine) if mine else {}
        for other, stopped in self.ranks.gather((answers, self.ranks.watch.asked)):
            if stopped:
                raise Stopped
            answers |= other
        conversations = []
        for place, prompt in enumerate(prompts):
            answer = answers[place][: length + 1 - len(prompt)]
            mask = np.repeat(np.array([0, 1], np.uint8), [len(prompt), len(answer)])
            conversations.append((np.concatenate([prompt, answer]), mask))
        packed, kept = rows_that_fit(conversations, length, self.rows)
        filled = packed + [[]] * (self.rows - len(packed))
        self.sampled = [write_row([conversations[c] for c in row], length, self.chats.pad_id) for row in filled]
        return {
            "on_policy": 1,
            "completion_length": float(np.mean([len(answer) for answer in answers.values()])),
            "ended": float(np.mean([ids[-1] == self.stop for ids, _ in conversations])),
            "left_out": 1 - kept / len(conversations),
            "rollout_seconds": time.perf_counter() - begin,
        }

    def _answers(self, step: int, prompts: list[np.ndarray], places: list[int]) -> dict[int, np.ndarray]:
        """Sample answers to some prompts; each depends on the weights, its prompt, the seed, step and place."""
        settings, room = self.settings, self.chats.sequence_length + 1
        drawn = uniforms([(self.chats.seed, SAMPLING, step, place) for place in places], 1, settings.max_new_tokens)
        asked = [prompts[place].tolist() for place in places]
        fitting = [own[:, : max(room - len(ids), 1)] for own, ids in zip(drawn, asked, strict=True)]
        limits = self.stop, settings.sample_temperature, settings.rollout_rows
        # Of some only, after a signal.
        made = sample_groups(self.sampler.refresh(), asked, fitting, *limits, self.ranks.watch)
        return {place: group.tokens[0, : group.lengths[0]].numpy() for place, group in zip(places, made, strict=False)}


def prompt_of(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return a conversation up to where its last answer begins."""
    begins = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0) == 1)
    return ids[: begins[-1]].astype(np.int64)


def rows_that_fit(
    conversations: list[tuple[np.ndarray, np.ndarray]], capacity: int, most: int
) -> tuple[list[list[int]], int]:
    """Return the first conversations that `most` rows hold, packed, and how many these are.

    Sampled answers are longer or shorter than the data's; when they are longer, the last conversations stay out.
    """
    lengths = np.array([len(ids) - 1 for ids, _ in conversations])
    count = len(lengths)
    while len(packed := pack_best_fit(lengths[:count], capacity)) > most:
        count -= max((len(packed) - most) * count // len(packed) // 2, 1)
    return packed, count
