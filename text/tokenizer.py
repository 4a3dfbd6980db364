"""The tokenizer: byte-level BPE over `tokenizers`, in the folder layout that transformers, vLLM and llama.cpp open.

Nothing is normalised and all 256 bytes are tokens, so any Unicode text comes back from its tokens unchanged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from errors import UserError
from text.files import replacing

CHAT_TEMPLATE = Path(__file__).parent / "chats" / "chat_template.jinja"

SPECIAL_TOKENS: tuple[str, ...] = (
    "<unk>", "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>",
    "<think>", "</think>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
)  # fmt: skip

OURS = "use a tokenizer made by train_tokenizer.py"
STRIPPED = ("lstrip", "normalized", "rstrip", "single_word")
# Token shards are uint16, and 65,535 is left free as a mark.
MAX_VOCAB_SIZE = 65_535
MOST_SETTINGS = 50_000  # characters of tokenizer.json without vocabulary and merges; this project's has 4,000

# A character for each byte that UTF-8 may begin a character with, and for each that may follow.
EVERY_BYTE = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 0x800), *range(0xE000, 0x11_0000, 0x1000)]))


class Tokenizer:
    """Text to token ids and back. Text stays text: a special token that is spelled out in it is encoded as letters."""

    def __init__(self, raw: tokenizers.Tokenizer) -> None:
        """Raise `UserError` unless the special tokens are the project's at the lowest ids, and all text comes back."""
        for number, token in enumerate(SPECIAL_TOKENS):
            if raw.token_to_id(token) != number:
                raise UserError(f"special token {token!r} has id {raw.token_to_id(token)}, not {number}; {OURS}")
        # This flag is not part of tokenizer.json: it is set again here.
        raw.encode_special_tokens = True
        raw.no_truncation()
        raw.no_padding()
        self.raw = raw
        self.vocab_size = raw.get_vocab_size()
        if problem := _problem_with(raw):
            raise UserError(f"{problem}; {OURS}")
        self.special_ids: dict[str, int] = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
        self.unk_id, self.bos_id, self.eos_id, self.pad_id = range(4)
        self.token_bytes = self._count_bytes()
        self.fingerprint = self._fingerprint()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Open a tokenizer or checkpoint folder. Raises `UserError` when tokenizer.json is missing or broken."""
        file = Path(folder) / "tokenizer.json"
        try:
            text = file.read_bytes().decode("utf-8")
            _check_small(text)
            return cls(tokenizers.Tokenizer.from_str(text))
        except OSError as error:
            hint = "name a folder written by train_tokenizer.py or a checkpoint folder"
            raise UserError(f"{file}: {error.strerror}; {hint}") from error
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{file}: not a tokenizer ({error}); make it again with train_tokenizer.py") from error

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, each under a temporary name first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "tokenizer.json", self.raw.to_str(pretty=True))
        _write(folder / "tokenizer_config.json", json.dumps(self.settings(), ensure_ascii=False, indent=2))

    def settings(self) -> dict[str, Any]:
        """Return the content of tokenizer_config.json, the chat template among it."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "additional_special_tokens": list(SPECIAL_TOKENS[4:]),
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",  # the side that a batch of prompts must be padded on to be continued
            "model_max_length": 131072,  # DeepSeek-V3's context; the model's own limit is in its config.json
            "added_tokens_decoder": {
                str(number): {"content": token, **dict.fromkeys(STRIPPED, False), "special": True}
                for number, token in enumerate(SPECIAL_TOKENS)
            },
            "chat_template": _chat_template(),
        }

    def encode(self, text: str) -> list[int]:
        """Return the token ids of the text alone. Half a surrogate pair, which is no character, becomes U+FFFD."""
        return self.raw.encode(characters(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Do as `encode` of many texts, on all cores."""
        encodings = self.raw.encode_batch_fast([characters(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of the ids. Bytes that form no character become U+FFFD."""
        return self.raw.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def _count_bytes(self) -> np.ndarray:
        """Return how many bytes of text each id stands for, (vocab,) int32; 0 for special tokens."""
        count = np.zeros(self.vocab_size, dtype=np.int32)
        for token, number in self.raw.get_vocab(with_added_tokens=False).items():
            count[number] = len(token)  # the byte-level alphabet has one letter a byte
        count[: len(SPECIAL_TOKENS)] = 0
        return count

    def _fingerprint(self) -> str:
        """Return 16 hex digits of all that decides how text becomes ids; the same after being saved by other tools."""
        content = json.loads(self.raw.to_str())
        added = [(token["id"], token["content"]) for token in content["added_tokens"]]
        model = content["model"]
        parts = [model["vocab"], model["merges"], added, content["pre_tokenizer"], content["normalizer"]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _check_small(text: str) -> None:
    """Raise `ValueError` for what tokenizers might open only with more memory than there is, which ends the process.

    An added token becomes an automaton a hundred times as large, and a charsmap names the size of its own tables.
    """
    content = json.loads(text, object_pairs_hook=_without_doubles)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("no object with a model in it")
    if content.get("normalizer") is not None:
        raise ValueError("it normalises text")
    content["model"] = {**content["model"], "vocab": None, "merges": None}
    if len(json.dumps(content)) > MOST_SETTINGS:
        raise ValueError(f"more than {MOST_SETTINGS:,} characters beside its vocabulary and merges")


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in it")
    return found


def _problem_with(raw: tokenizers.Tokenizer) -> str:
    """Return why this is not byte-level BPE as this project and its checkpoints need it; nothing where it is."""
    content = json.loads(raw.to_str())
    if content["model"]["type"] != "BPE" or content["model"]["dropout"]:
        return "not BPE, or one that draws lots"
    if sorted(raw.get_vocab().values()) != list(range(raw.get_vocab_size())):
        return "the ids of its vocabulary are not 0, 1, 2, ..., each once"
    added = {token["content"]: token["special"] for token in content["added_tokens"]}
    if set(added) != set(SPECIAL_TOKENS) or not all(added.values()):  # others would be looked for in what people write
        return "its added tokens are not the special tokens of this project"
    letters = set().union(*content["model"]["vocab"].keys() - added.keys())
    if not letters <= byte_letters().keys():
        return "its tokens are not spelled in letters that stand for bytes"
    if raw.decode(raw.encode(EVERY_BYTE, add_special_tokens=False).ids) != EVERY_BYTE:
        return "text does not come back from its tokens as it was"
    return ""


def characters(text: str) -> str:
    """Return the text without half surrogate pairs, which a broken JSON escape leaves and UTF-8 cannot hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def byte_letters() -> dict[str, int]:
    """Return GPT-2's byte-level alphabet: printable Latin-1 stands for its own byte, the rest follows from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _write(file: Path, content: str) -> None:
    with replacing(file) as stream:
        stream.write(f"{content}\n".encode())


def _chat_template() -> str:
    """Return the template on one line, without its comment."""
    text = CHAT_TEMPLATE.read_text(encoding="utf-8").partition("#}")[2]
    return "".join(line.strip() for line in text.splitlines())
