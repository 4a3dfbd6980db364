"""A checkpoint of this project's network, measured from its latent cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from eval.answering import Answerer
from eval.opened_model import Choices, Window, batches, name_of, padded, rounded
from model.cache import LatentCache, cache_dtype
from model.decoding.generate import generate
from model.decoding.sampling import Sampling
from model.ops import head_logits
from text.chats.chat_template import Message, encode_chat
from training.losses import IGNORE, token_losses

SHARED = 32  # tokens that contexts must have in common for it to be worth reading them apart


@dataclass(frozen=True)
class OwnModel:
    """See `eval.opened_model.OpenedModel`."""

    name: str
    answerer: Answerer
    chats = True

    @classmethod
    def open(cls, folder: str, device: str, dtype: torch.dtype) -> OwnModel:
        return cls(folder, Answerer.open(folder, device, name_of(dtype)))

    @property
    def context(self) -> int:
        return self.answerer.model.config.max_position_embeddings

    @property
    def bos(self) -> int:
        return self.answerer.tokenizer.bos_id

    @property
    def eos(self) -> int:
        return self.answerer.tokenizer.eos_id

    @property
    def dtype(self) -> str:
        return name_of(self.answerer.model.lm_head.weight.dtype)

    def encode(self, text: str) -> list[int]:
        return self.answerer.tokenizer.encode(text)

    encode_bare = encode

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return encode_chat(self.answerer.tokenizer, messages, add_generation_prompt=True)[0]

    @torch.inference_mode()
    def continuation_nats(self, items: Sequence[Choices]) -> list[list[float]]:
        """A context is read once; then each of its continuations has a row of the cache.

        Continuations of one token, such as letters, need no more than the context; and what the contexts have in common
        from their beginning on, such as worked questions, is read once for all of them.
        """
        nats: list[list[float]] = [[] for _ in items]
        letters = [place for place, (_, choices) in enumerate(items) if all(len(choice) == 1 for choice in choices)]
        for shared, places in _same_beginnings([(place, items[place][0]) for place in letters]):
            for part in batches(places, lambda place, shared=shared: len(items[place][0]) - shared):
                chosen = [places[number] for number in part]
                log_probs = self._next_log_probs([items[place][0] for place in chosen], shared)
                for place, row in zip(chosen, log_probs, strict=True):
                    nats[place] = row[[choice[0] for choice in items[place][1]]].double().tolist()
        others = [place for place in range(len(items)) if not nats[place]]
        for part in batches(others, lambda place: len(items[place][0]) + sum(map(len, items[place][1]))):
            chosen = [others[number] for number in part]
            contexts, choices = zip(*(items[place] for place in chosen), strict=True)
            scored = iter(self._continued(contexts, [choice for own in choices for choice in own], choices))
            for place, own in zip(chosen, choices, strict=True):
                nats[place] = [next(scored) for _ in own]
        return nats

    def _next_log_probs(self, contexts: Sequence[list[int]], shared: int) -> torch.Tensor:
        """(contexts, vocab) float32 of the token after each context; the first `shared` tokens are the same in all."""
        model, device, pad = self.answerer.model, self.answerer.device, self.answerer.tokenizer.pad_id
        width = rounded(max(map(len, contexts)) - shared)
        cache = None
        if shared:
            cache = LatentCache(model.config, 1, shared + width, cache_dtype(model), device)
            model(torch.tensor([contexts[0][:shared]], device=device), cache=cache)
            cache.keep_rows(torch.zeros(len(contexts), dtype=torch.long, device=device))
        # Padding is on the right, where no earlier position sees it.
        out = model(padded([ids[shared:] for ids in contexts], width, pad).to(device), cache=cache)
        last = torch.tensor([len(ids) - shared - 1 for ids in contexts], device=device)
        hidden = out.hidden[torch.arange(len(contexts), device=device), last]
        return head_logits(hidden, out.head).log_softmax(-1)

    def _continued(
        self, contexts: Sequence[list[int]], flat: Sequence[list[int]], choices: Sequence[list[list[int]]]
    ) -> list[float]:
        """The log-likelihood of each continuation of all contexts, in order."""
        model, device = self.answerer.model, self.answerer.device
        longest, rest = rounded(max(map(len, contexts))), max(map(len, flat)) - 1
        rest = rounded(rest) if rest else 0
        padding = torch.tensor([longest - len(ids) for ids in contexts], device=device)
        ids = padded(contexts, longest, self.answerer.tokenizer.pad_id, left=True).to(device)
        cache = LatentCache(
            model.config, len(contexts), longest + rest, cache_dtype(model), device, padding if padding.any() else None
        )
        out = model(ids, cache=cache)
        rows = torch.arange(len(contexts), device=device).repeat_interleave(
            torch.tensor([len(own) for own in choices], device=device)
        )
        first = torch.tensor([choice[0] for choice in flat], device=device)
        nats = head_logits(out.hidden[:, -1], out.head).log_softmax(-1)[rows, first].double()
        if rest:
            cache.keep_rows(rows)
            out = model(
                padded([choice[:-1] for choice in flat], rest, self.answerer.tokenizer.pad_id).to(device), cache=cache
            )
            labels = padded([choice[1:] for choice in flat], rest, IGNORE).to(device)
            nats = nats - token_losses(out.hidden, out.head, labels).double().sum(1)
        return nats.tolist()

    @torch.inference_mode()
    def window_nats(self, windows: Sequence[Window]) -> list[float]:
        nats = [0.0] * len(windows)
        for part in batches(windows, lambda window: len(window[0])):
            rows = [windows[place] for place in part]
            width = rounded(max(len(ids) for ids, _ in rows) - 1)
            labels = [[IGNORE] * (scored - 1) + ids[scored:] for ids, scored in rows]
            out = self.answerer.model(
                padded([ids[:-1] for ids, _ in rows], width, self.answerer.tokenizer.pad_id).to(self.answerer.device)
            )
            lost = token_losses(out.hidden, out.head, padded(labels, width, IGNORE).to(self.answerer.device))
            for place, row in zip(part, lost.double().sum(1).tolist(), strict=True):
                nats[place] = -row
        return nats

    def reply(
        self, prompts: Sequence[Sequence[Message] | str], max_new_tokens: int, temperature: float, seed: int
    ) -> list[str]:
        if not isinstance(prompts[0], str):
            return self.answerer.reply(prompts, max_new_tokens, Sampling(temperature=temperature), seed)
        tokenizer, device = self.answerer.tokenizer, self.answerer.device
        # An empty text has nothing to be continued: it follows the end of another.
        encoded = [tokenizer.encode(text) or [tokenizer.eos_id] for text in prompts]
        width = max(map(len, encoded))
        out = generate(
            self.answerer.model,
            padded(encoded, width, tokenizer.pad_id, left=True).to(device),
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_id,
            attention_mask=padded([[1] * len(ids) for ids in encoded], width, 0, left=True).to(device),
            temperature=temperature,
            seed=seed if temperature else None,
        )
        texts = []
        for row in out[:, width:].tolist():
            ids = row[: row.index(tokenizer.eos_id)] if tokenizer.eos_id in row else row
            texts.append(tokenizer.decode(ids, skip_special_tokens=False))
        return texts


def _same_beginnings(contexts: Sequence[tuple[int, list[int]]]) -> Iterator[tuple[int, list[int]]]:
    """(tokens that they share, places) of contexts that begin alike; each has a token of its own left.

    contexts: (place, ids).
    """
    groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for place, ids in contexts:
        groups.setdefault(tuple(ids[:SHARED]), []).append((place, ids))
    for group in groups.values():
        own = min(len(ids) for _, ids in group) - 1
        columns = zip(*(ids[:own] for _, ids in group), strict=True)
        shared = next((place for place, column in enumerate(columns) if len(set(column)) > 1), own)
        yield shared if len(group) > 1 and shared >= SHARED else 0, [place for place, _ in group]
