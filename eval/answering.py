"""A checkpoint that answers: its model in the fastest type of the machine, its tokenizer, and the chat layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from errors import UserError
from model import MiniDeepSeek
from model.decoding.engine import Engine
from model.decoding.generate import check_speculative, stream
from model.decoding.native import Drafter
from model.decoding.sampling import GREEDY, Sampling
from model.decoding.scheduler import Request
from model.decoding.speculative import stream_speculative
from text.chats.chat_template import Message, encode_chat, encode_chats
from text.stream_decoder import StreamDecoder
from text.tokenizer import Tokenizer
from training.machine import choose_dtype
from training.parallel.ranks import Ranks
from training.startup import open_checkpoint

SLOTS = 64


@dataclass(frozen=True)
class Answerer:
    """A model and its tokenizer, ready to generate."""

    model: MiniDeepSeek
    tokenizer: Tokenizer

    @classmethod
    def open(cls, ckpt: str, device: str = "auto", dtype: str = "auto", lora: str = "", quantize: str = "") -> Answerer:
        """Load a checkpoint folder for inference, with the adapter of the folder `lora` in its weights.

        quantize: int8 keeps the layers' matrices in 8 bits with a scale for each row; empty keeps them as they are.
        """
        if quantize not in ("", "int8"):
            raise UserError(f"--quantize {quantize}: int8, or leave it out")
        place = Ranks.start(device).device
        if lora:
            from training.adapters.adapter import open_adapted  # peft takes seconds to import

            model, tokenizer = open_adapted(ckpt, lora)
        else:
            model, tokenizer = open_checkpoint(ckpt)
        chosen = choose_dtype(dtype, place)
        if quantize:
            from training.adapters.frozen import shrink_frozen  # torchao takes a second to import

            # From the checkpoint's own float32, not from what bfloat16 left of it.
            shrink_frozen(model.requires_grad_(False), quantize, chosen)
        return cls(model.to(place, chosen).eval(), tokenizer)

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @cached_property
    def drafter(self) -> Drafter | None:
        """Lighter copies for speculative decoding, made when first asked for; None where they would not be used."""
        return Drafter(self.model) if self.model.mtp and self.device.type == "cpu" else None

    def stream_reply(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int | None = None,
        speculative: bool = False,
        draft_tokens: int = 0,
        accepted: list[tuple[int, int]] | None = None,
    ) -> Iterator[tuple[str, int]]:
        """Yield pieces of the answer to the last message, whole characters only, each with the number of tokens so far.

        The last two options are those of `stream_speculative`.
        """
        ids, _ = encode_chat(self.tokenizer, messages, add_generation_prompt=True)
        prompt = torch.tensor([ids], device=self.device)
        stop = (self.tokenizer.eos_id,)
        room = self.model.config.max_position_embeddings - len(ids)
        if room < 1:
            raise UserError(
                f"the conversation has {len(ids)} tokens, the model reads {len(ids) + room}; begin again with /reset"
            )
        limit = min(max_new_tokens, room)
        if speculative:
            check_speculative(self.model, prompt, sampling)
            options = draft_tokens, sampling, seed, self.drafter
            tokens = stream_speculative(self.model, prompt, limit, stop, accepted, *options)
        else:
            tokens = (int(step) for step in stream(self.model, prompt, limit, sampling, stop, seed))
        decoder = StreamDecoder(self.tokenizer, skip_special_tokens=False)
        for count, token in enumerate(tokens, start=1):
            if token in stop:
                yield decoder.flush(), count
                return
            yield decoder.push(token), count
        # A character that the limit cut is left out.

    def replies(
        self, conversations: Sequence[Sequence[Message]], max_new_tokens: int = 64, sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> Iterator[str]:  # fmt: skip
        """Answer many conversations, `SLOTS` at a time, in their order.

        seed: of the sampling. An answer depends on it, its conversation and its place among them.
        """
        encoded = [ids for ids, _ in encode_chats(self.tokenizer, conversations, add_generation_prompt=True)]
        return self.completions(encoded, max_new_tokens, sampling, seed)

    def completions(
        self, prompts: Sequence[list[int]], max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Iterator[str]:
        """Continue many prompts, given as ids; see `replies`."""
        drawn = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))
        stop = (self.tokenizer.eos_id,)
        requests = [Request(ids, max_new_tokens, sampling, stop, row) for ids, row in zip(prompts, drawn, strict=True)]
        longest = max(map(len, prompts), default=0) + max_new_tokens
        for made in Engine(self.model, min(SLOTS, len(prompts)), longest).run(requests):
            ids = made.tokens[:-1] if made.finish == "stop" else made.tokens
            yield self.tokenizer.decode(ids, skip_special_tokens=False)
