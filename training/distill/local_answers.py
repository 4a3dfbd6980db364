"""Teachers that answer on this machine: a checkpoint of this project, or a model that transformers opens."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model import MiniDeepSeek
from text.chats.chat_template import encode_chats
from text.tokenizer import Tokenizer
from training.alignment.sampler import SLOTS, completion_texts, sample_groups, uniforms
from training.distill.answers import Answer, Ask, Failure
from training.distill.teacher import open_frozen

TOO_LONG = "the prompt leaves no room for an answer"


@dataclass(frozen=True)
class CheckpointAnswers:
    """A checkpoint of this project. An answer is a function of the weights, the question and the seed."""

    model: MiniDeepSeek
    tokenizer: Tokenizer
    temperature: float
    max_new_tokens: int
    seed: int
    block: int = 8 * SLOTS  # questions sorted by length together: what is written down early was asked early

    def answers(self, asks: Sequence[Ask]) -> Generator[tuple[Ask, Answer | Failure], None, None]:
        """The shortest prompts of each block first."""
        room = self.model.config.max_position_embeddings - self.max_new_tokens
        for start in range(0, len(asks), self.block):
            block = asks[start : start + self.block]
            encoded = [ids for ids, _ in encode_chats(self.tokenizer, [ask.messages for ask in block], True)]
            pairs = sorted(zip(encoded, block, strict=True), key=lambda pair: len(pair[0]))
            yield from ((ask, Failure(TOO_LONG)) for ids, ask in pairs if len(ids) > room)
            pairs = [pair for pair in pairs if len(pair[0]) <= room]
            if not pairs:
                continue
            prompts, fitting = zip(*pairs, strict=True)
            drawn = uniforms([(self.seed, int(ask.key, 16)) for ask in fitting], 1, self.max_new_tokens)
            groups = sample_groups(self.model, prompts, drawn, self.tokenizer.eos_id, self.temperature)
            for ask, made in zip(fitting, groups, strict=True):
                (text,) = completion_texts(self.tokenizer, made)
                yield ask, Answer(text, "stop" if made.ended[0] else "length", int(made.lengths[0]))


@dataclass(frozen=True)
class TransformersAnswers:
    """A causal language model of transformers, asked in its own chat layout, where its tokenizer has one."""

    model: Any
    tokenizer: Any
    temperature: float
    max_new_tokens: int
    seed: int
    at_once: int = 16

    @torch.no_grad()
    def answers(self, asks: Sequence[Ask]) -> Generator[tuple[Ask, Answer | Failure], None, None]:
        """In batches, in order."""
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        tokenizer = self.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        stops = self.model.generation_config.eos_token_id
        stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id}
        for start in range(0, len(asks), self.at_once):
            part = asks[start : start + self.at_once]
            inputs = tokenizer([self._text(ask) for ask in part], return_tensors="pt", padding=True,
                               add_special_tokens=not tokenizer.chat_template, return_token_type_ids=False)  # fmt: skip
            with torch.random.fork_rng():
                torch.manual_seed(self.seed ^ int(part[0].key[:8], 16))
                out = self.model.generate(
                    **inputs.to(self.model.device), max_new_tokens=self.max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id, top_k=0, top_p=1.0, **sampling,
                )  # fmt: skip
            for ask, row in zip(part, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in stops), None)
                text = tokenizer.decode(row[:end], skip_special_tokens=True)
                yield ask, Answer(text, "length" if end is None else "stop", len(row[:end]) + (end is not None))

    def _text(self, ask: Ask) -> str:
        if self.tokenizer.chat_template:
            return self.tokenizer.apply_chat_template(list(ask.messages), add_generation_prompt=True, tokenize=False)
        return "\n\n".join(message["content"] for message in ask.messages) + "\n\n"


def open_local(
    name: str, temperature: float, max_new_tokens: int, seed: int, dtype: torch.dtype, device: torch.device
) -> CheckpointAnswers | TransformersAnswers:
    """Open the teacher of a folder, or of a Hub id. Raises `UserError` when there is none."""
    model, tokenizer = open_frozen(name, dtype, device)
    kind = CheckpointAnswers if isinstance(model, MiniDeepSeek) else TransformersAnswers
    return kind(model, tokenizer, temperature, max_new_tokens, seed)
