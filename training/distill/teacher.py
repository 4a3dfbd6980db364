"""White-box teachers: a checkpoint folder of this project, or any causal language model that transformers opens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError, quiet_imports
from LMConfig import MODEL_TYPES
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.distill.distillation import Logits, Teacher
from training.losses import IGNORE, INPUTS, PLACES, Batch, located
from training.run.checkpoint import checksum
from training.startup import open_checkpoint

UNPACKED = ("unpacked_ids", "unpacked_row", "unpacked_column")  # in a batch: see `unpacked`
CLOSE = 1e-2  # of logits of order 1 to 10, from one product in two ways


@dataclass(frozen=True)
class CheckpointTeacher:
    """A frozen checkpoint of this project. Attributes: vocab_size: the student's, which its head is cut to."""

    model: MiniDeepSeek
    vocab_size: int

    def __call__(self, batch: Batch) -> Logits:
        out = self.model(**{name: batch[name] for name in INPUTS if name in batch})
        places = located(batch)[PLACES]
        return Logits(out.hidden.flatten(0, 1).index_select(0, places), out.head[: self.vocab_size])


@dataclass(frozen=True)
class TransformersTeacher:
    """A frozen causal language model of transformers.

    Packed conversations become separate rows, padded on the right where a causal model does not look, so that a
    model of any kind of attention keeps them apart.

    Attributes:
        model: as AutoModelForCausalLM gives it. plain: whether its logits are its head's product with its last states
            and nothing else; otherwise (capped or scaled logits) they are asked for whole.
    """

    model: nn.Module
    vocab_size: int
    plain: bool

    def __call__(self, batch: Batch) -> Logits:
        ids, row, column = (batch[name] for name in UNPACKED) if UNPACKED[0] in batch else unpacked(batch)
        cut = slice(self.vocab_size)
        if not self.plain:
            return Logits(self.model(input_ids=ids, use_cache=False).logits[row, column, cut], None)
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return Logits(hidden[row, column], head.weight[cut], None if bias is None else bias[cut])

    def prepare(self, batch: Batch) -> Batch:
        """Add the unpacked rows, whose number depends on the data."""
        return {**batch, **dict(zip(UNPACKED, unpacked(batch), strict=True))}


def unpacked(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return each segment of packed rows as a row: ids (segments, longest), and row and column of the N labels."""
    labels, inputs = batch["labels"], batch["input_ids"]
    if "segment_ids" not in batch:
        row, column = (labels != IGNORE).nonzero().unbind(1)
        return inputs, row, column
    segments = batch["segment_ids"]
    most = int(segments.max()) + 1
    number = torch.arange(len(inputs), device=inputs.device)[:, None] * most + segments
    is_token = segments >= 0
    names, row = number[is_token].unique(return_inverse=True)
    position = batch["position_ids"][is_token]
    ids = inputs.new_zeros(max(len(names), 1), int(position.max()) + 1 if len(position) else 1)
    ids[row, position] = inputs[is_token]
    counted = (labels != IGNORE)[is_token]
    return ids, row[counted], position[counted]


def open_teacher(name: str, tokenizer: Tokenizer, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Teacher:
    """Open the frozen teacher of a folder, or of a Hub id that transformers knows.

    vocab_size: of the student's head, which may be larger than its tokenizer. Raises `UserError` unless the teacher
    knows all of the student's tokens by the same numbers.
    """
    model, theirs = open_frozen(name, dtype, device)
    if isinstance(model, MiniDeepSeek):
        check_tokens(name, theirs.raw.get_vocab(), model.config.vocab_size, tokenizer, vocab_size)
        return CheckpointTeacher(model, vocab_size)
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"--teacher {name}: has no output embeddings; name a causal language model")
    check_tokens(name, theirs.get_vocab(), head.weight.shape[0], tokenizer, vocab_size)
    return TransformersTeacher(model, vocab_size, is_plain(model, device))


def open_frozen(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Open a folder's or Hub id's model, without gradients in the type that it computes in, and its tokenizer."""
    model, tokenizer = open_checkpoint(name) if is_ours(name) else open_transformers(name, dtype)
    return model.to(device, dtype).requires_grad_(False).eval(), tokenizer


def is_ours(name: str) -> bool:
    """Return whether a folder's config.json is that of a DeepSeek-V3, or of one with another attention."""
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") in MODEL_TYPES.values()


def open_transformers(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Open model and tokenizer. Raises `UserError` when transformers is missing or cannot open them."""
    path = Path(name)
    if not path.exists() and path.parent != Path() and path.parent.exists():  # a misspelled path is no Hub id
        raise UserError(f"--teacher {name}: no such folder; check the path")
    try:
        with quiet_imports():
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging
    except ImportError:
        raise UserError(
            f"--teacher {name}: is no checkpoint of this project; pip install transformers for it"
        ) from None
    logging.disable_progress_bar()
    try:
        with quiet_imports():  # transformers imports torchao here
            tokenizer = AutoTokenizer.from_pretrained(name)
            return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), tokenizer
    except Exception as error:  # transformers raises what it likes for a name or a folder that it cannot open
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--teacher {name}: cannot be opened ({type(error).__name__}: {reason}); check the name"
        ) from None


def check_tokens(name: str, theirs: dict[str, int], rows: int, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise `UserError` unless the teacher's first tokens are the student's.

    theirs: the teacher's tokens and ids; rows: of its head. vocab_size: of the student's head.
    """
    ours = tokenizer.raw.get_vocab()
    named = {number: token for token, number in theirs.items()}
    remedy = "let it write answers instead (--method answers)"
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if named.get(number, token) != token:
            raise UserError(
                f"--teacher {name}: its token {number} is {named[number]!r}, the student's {token!r}; "
                f"distributions are compared token by token; {remedy}"
            )
    if rows < vocab_size or len(theirs) < len(ours):
        known = min(rows, len(theirs))
        raise UserError(f"--teacher {name}: knows {known} tokens, the student {vocab_size}; {remedy}")


@torch.no_grad()
def is_plain(model: Any, device: torch.device) -> bool:
    """Return whether head times last state gives the model's logits: some models cap or scale them."""
    ids = torch.arange(8, device=device)[None]
    whole = model(input_ids=ids, use_cache=False).logits.float()
    base = getattr(model, "base_model", None) or model
    out = base(input_ids=ids, use_cache=False) if base is not model else None
    if getattr(out, "last_hidden_state", None) is None:
        return False
    parts = model.get_output_embeddings()(out.last_hidden_state).float()
    return parts.shape == whole.shape and bool((parts - whole).abs().max() <= CLOSE * whole.abs().max().clamp(min=1))


def identity(name: str) -> list[tuple[str, str]] | str:
    """Return what tells a folder's weights from others, wherever it lies: its files' names and checksums; of a Hub id
    the name."""
    files = sorted(path for path in Path(name).glob("*") if path.suffix in (".safetensors", ".bin", ".json"))
    return [(path.name, checksum(path)) for path in files] or name
