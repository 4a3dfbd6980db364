"""A model to be measured, whoever made it: what suites ask of it, and how a path becomes one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from errors import UserError
from text.chats.chat_template import Message
from text.tokenizer import Tokenizer
from training.machine import DTYPES, choose_dtype
from training.parallel.ranks import Ranks

AT_ONCE = 8192  # positions a forward pass
WIDTH = 16  # lengths are rounded up to it: CPU kernels are made for each new shape

Item = TypeVar("Item")
Choices = tuple[list[int], list[list[int]]]
"""A context and its continuations."""
Window = tuple[list[int], int]
"""Ids, and the place, at least 1, from which on they are scored."""


class OpenedModel(Protocol):
    """What suites ask of a model. Nats are log-likelihoods: 0 is certain.

    Attributes: name: for people. context: tokens that it reads. chats: whether it has a chat template.
        bos, eos: the tokens that a text can be said to follow. dtype: fp32 or bf16.
    """

    name: str
    context: int
    chats: bool
    bos: int
    eos: int
    dtype: str

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, as the tokenizer makes them by itself: some put a token in front."""

    def encode_bare(self, text: str) -> list[int]:
        """The ids of the text alone."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the next answer begins."""

    def continuation_nats(self, items: Sequence[Choices]) -> list[list[float]]:
        """For each context, the log-likelihood of each of its continuations; no list of ids may be empty."""

    def window_nats(self, windows: Sequence[Window]) -> list[float]:
        """For each window, the log-likelihood of the ids that it scores."""

    def reply(
        self, prompts: Sequence[Sequence[Message] | str], max_new_tokens: int, temperature: float, seed: int
    ) -> list[str]:
        """Answers to conversations, or continuations of texts; greedy at temperature 0.

        All prompts are of one kind, and each has room for its answer in the context.
        """


def open_model(path: str, device: str = "auto", dtype: str = "auto") -> OpenedModel:
    """A folder of this project, any folder that transformers opens, or a GGUF file (or a folder with one).

    A `deepseek_v3` folder is opened by this project's network, unless its tokenizer is another's.
    Raises `UserError` for a path that is none of these.
    """
    place = Ranks.start(device).device
    number_type = choose_dtype(dtype, place)
    folder, gguf = Path(path), ""
    if folder.suffix == ".gguf" and folder.is_file():
        folder, gguf = folder.parent, folder.name
    if not folder.is_dir():
        raise UserError(f"{path}: no such checkpoint; give a folder with config.json, or a .gguf file")
    if not gguf and not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        found = sorted(file.name for file in folder.glob("*.gguf"))
        if len(found) != 1:
            what = f"{len(found)} .gguf files; name one of them" if found else "no config.json and no .gguf file in it"
            raise UserError(f"{path}: {what}")
        gguf = found[0]
    if not gguf and _is_own(folder):
        from eval.own_model import OwnModel

        return OwnModel.open(path, str(place.type), number_type)
    from eval.peer_model import PeerModel

    return PeerModel.open(folder, gguf, place, number_type)


def _is_own(folder: Path) -> bool:
    """Whether this project's network and tokenizer are the ones to open a folder with."""
    if not (folder / "config.json").is_file():
        return True  # an adapter, for which the checkpoint's reader has a message
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf8")).get("model_type")
    except (ValueError, AttributeError, OSError):
        raise UserError(f"{folder / 'config.json'}: not a JSON object; restore the file") from None
    if kind != "deepseek_v3":
        return False
    if (folder / "tokenizer.json").is_file():
        try:
            Tokenizer.from_folder(folder)
        except UserError:
            print(f"notice: {folder}: another project's tokenizer; opened through transformers", file=sys.stderr)
            return False
    return True


def name_of(dtype: torch.dtype) -> str:
    """The name that --dtype gives a type."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def batches(items: Sequence[Item], length: Callable[[Item], int]) -> Iterator[list[int]]:
    """Places of items of similar length, at most `AT_ONCE` positions together, the longest first."""
    part: list[int] = []
    widest = 0
    for place in sorted(range(len(items)), key=lambda place: -length(items[place])):
        widest = widest or length(items[place])
        if part and widest * (len(part) + 1) > AT_ONCE:
            yield part
            part, widest = [], length(items[place])
        part.append(place)
    if part:
        yield part


def padded(rows: Sequence[Sequence[int]], width: int, fill: int, left: bool = False) -> torch.Tensor:
    """(rows, width) int64."""
    ids = torch.full((len(rows), width), fill)
    for row, values in enumerate(rows):
        ids[row, width - len(values) if left else 0 : width if left else len(values)] = torch.tensor(values)
    return ids


def rounded(length: int) -> int:
    return -(-length // WIDTH) * WIDTH
