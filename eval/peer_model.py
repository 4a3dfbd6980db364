"""Any causal language model that transformers opens, measured by the same suites as this project's."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from errors import UserError
from eval.opened_model import Choices, Window, batches, name_of, padded, rounded
from text.chats.chat_template import Message
from training.run.quiet import quiet_imports

LOGITS = 2**26  # numbers at once: with a vocabulary of 150,000 they, not the layers, fill the memory


@dataclass(frozen=True)
class PeerModel:
    """See `eval.opened_model.OpenedModel`. `network` and `tokenizer` are transformers'."""

    name: str
    network: Any
    tokenizer: Any
    context: int

    @classmethod
    def open(cls, folder: Path, gguf: str, device: torch.device, dtype: torch.dtype) -> PeerModel:
        """Raises `UserError` where transformers, or what it needs for this folder, is missing, or does not open it."""
        try:
            with quiet_imports():
                from transformers import AutoModelForCausalLM, AutoTokenizer
                from transformers.utils import logging
        except ImportError:
            raise UserError(f"{folder}: needs transformers; pip install -r requirements.txt") from None
        logging.disable_progress_bar()
        given, name = ({"gguf_file": gguf}, folder / gguf) if gguf else ({}, folder)
        try:
            with quiet_imports():  # transformers imports torchao here
                tokenizer = AutoTokenizer.from_pretrained(folder, **given)
                network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given)
        except ImportError as error:
            what = str(error).strip().splitlines()[0]
            raise UserError(f"{name}: {what}; pip install -r requirements-dev.txt") from None
        except Exception as error:  # transformers and safetensors raise of every kind
            what = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"{name}: transformers does not open it ({what}); give another folder") from None
        text_config = network.config.get_text_config()
        context = getattr(text_config, "max_position_embeddings", None) or 2048
        return cls(str(name), network.to(device).eval(), tokenizer, context)

    @property
    def chats(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @property
    def bos(self) -> int:
        return self.eos if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{self.name}: its tokenizer has no end token; mend tokenizer_config.json")
        return self.tokenizer.eos_token_id

    @property
    def dtype(self) -> str:
        return name_of(self.network.dtype)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def encode_bare(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        ids = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        return list(ids["input_ids"])

    @torch.inference_mode()
    def continuation_nats(self, items: Sequence[Choices]) -> list[list[float]]:
        """Continuations of one token share a row: all they need of it is its last position."""
        nats: list[list[float]] = [[0.0] * len(choices) for _, choices in items]
        rows: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for item, (context, choices) in enumerate(items):
            for number, choice in enumerate(choices):
                rows.setdefault((*context, *choice[:-1]), []).append((item, number))
        unique = list(rows)
        for part in batches(unique, len):
            ids = [unique[place] for place in part]
            lowest = min(len(items[item][0]) for row in ids for item, _ in rows[row]) - 1
            for row, log_probs in zip(ids, self._log_probs(ids, lowest), strict=True):
                for item, number in rows[row]:
                    first = len(items[item][0]) - 1 - lowest
                    choice = torch.tensor(items[item][1][number], device=log_probs.device)
                    found = log_probs[first : first + len(choice)].gather(1, choice[:, None])
                    nats[item][number] = found.double().sum().item()
        return nats

    @torch.inference_mode()
    def window_nats(self, windows: Sequence[Window]) -> list[float]:
        nats = []
        for ids, scored in windows:
            (log_probs,) = self._log_probs([ids[:-1]], scored - 1)
            labels = torch.tensor(ids[scored:], device=log_probs.device)
            nats.append(log_probs[: len(labels)].gather(1, labels[:, None]).double().sum().item())
        return nats

    @torch.inference_mode()
    def reply(
        self, prompts: Sequence[Sequence[Message] | str], max_new_tokens: int, temperature: float, seed: int
    ) -> list[str]:
        is_text = isinstance(prompts[0], str)
        encoded = [(self.encode(prompt) or [self.bos]) if is_text else self.encode_chat(prompt) for prompt in prompts]
        width, device = max(map(len, encoded)), self.network.device
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
            torch.manual_seed(seed)
        out = self.network.generate(
            input_ids=padded(encoded, width, self.eos, left=True).to(device),
            attention_mask=padded([[1] * len(ids) for ids in encoded], width, 0, left=True).to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=self.eos,
            **sampling,
        )
        ends = self.network.generation_config.eos_token_id
        ends = {self.eos, *(ends if isinstance(ends, list) else [ends])}
        texts = []
        for row in out[:, width:].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            # Marks such as <think> are part of an answer, and special tokens to some tokenizers.
            texts.append(self.tokenizer.decode(row[:end], skip_special_tokens=False))
        return texts

    def _log_probs(self, rows: Sequence[Sequence[int]], first: int) -> Iterator[torch.Tensor]:
        """Of each row (width - first, vocab) float32, of the positions from `first` on; padding is on the right."""
        width, device = min(rounded(max(map(len, rows))), self.context), self.network.device
        ids = padded(rows, width, self.eos).to(device)
        mask = padded([[1] * len(row) for row in rows], width, 0).to(device)
        can_keep = "logits_to_keep" in inspect.signature(self.network.forward).parameters
        more = {"logits_to_keep": torch.arange(first, width, device=device)} if can_keep else {}
        vocabulary = self.network.config.get_text_config().vocab_size
        size = max(LOGITS // ((width - first if can_keep else width) * vocabulary), 1)
        for start in range(0, len(rows), size):
            some = slice(start, start + size)
            logits = self.network(input_ids=ids[some], attention_mask=mask[some], use_cache=False, **more).logits
            for row in logits if can_keep else logits[:, first:]:
                yield row.float().log_softmax(-1)
