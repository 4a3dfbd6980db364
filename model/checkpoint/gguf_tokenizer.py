"""This project's tokenizer in GGUF's terms, read from tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from errors import UserError
from LMConfig import LMConfig

# llama.cpp does not read a tokenizer's splitting rule, it knows some by name. This is the one it calls "qwen2".
PRE_TOKENIZER = "qwen2"
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GENERATION_MARK = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType


def read_tokenizer(folder: Path, config: LMConfig) -> dict[str, Any]:
    """Read a checkpoint folder's tokenizer: the methods of gguf's writer to call, each with its argument.

    Raises:
        UserError: no tokenizer, or one that splits text in another way than llama.cpp's "qwen2".
    """
    try:
        return _methods(folder, config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        path = folder / "tokenizer.json"
        raise UserError(f"{path}: was not written by this project ({error!r}); restore the file") from error


def _methods(folder: Path, config: LMConfig) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    content, settings = _read(path), _read(folder / "tokenizer_config.json")
    if not _splits_like_qwen2(content):
        remedy = "convert this folder with llama.cpp's own convert_hf_to_gguf.py"
        raise UserError(f"{path}: not a tokenizer of train_tokenizer.py, its rules are others; {remedy}")
    model, vocab = content["model"], config.vocab_size
    names = {number: token for token, number in model["vocab"].items()}
    added = {token["id"]: token for token in content["added_tokens"]}
    names.update({number: token["content"] for number, token in added.items()})
    if max(names) >= vocab:
        raise UserError(f"{path}: has {max(names) + 1} tokens, the model {vocab}; use the model's own tokenizer")
    kinds = {number: CONTROL if token["special"] else USER_DEFINED for number, token in added.items()}
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf8") if file.is_file() else settings.get("chat_template")
    # The marks around what is trained on mean something to training only, and not every program knows them.
    template = GENERATION_MARK.sub("", template) if isinstance(template, str) else None
    methods = {
        "add_tokenizer_model": "gpt2",  # byte-level BPE
        "add_tokenizer_pre": PRE_TOKENIZER,
        "add_token_list": [names.get(number, f"[PAD{number}]") for number in range(vocab)],
        "add_token_types": [kinds.get(number, NORMAL if number in names else UNUSED) for number in range(vocab)],
        "add_token_merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "add_bos_token_id": config.bos_token_id,
        "add_eos_token_id": config.eos_token_id,
        "add_pad_token_id": config.pad_token_id,
        "add_unk_token_id": next((n for n, token in added.items() if token["content"] == "<unk>"), None),
        "add_add_bos_token": bool(settings.get("add_bos_token", False)),
        "add_add_eos_token": False,
        "add_chat_template": template,
    }
    for text in (*methods["add_token_list"], *methods["add_token_merges"], template or ""):
        text.encode()  # raises an error for what is no text, or none that can be written
    return {method: value for method, value in methods.items() if value is not None}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a GGUF holds the tokenizer, give a folder that has one") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore the file") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; restore the file")
    return content


def _splits_like_qwen2(content: dict[str, Any]) -> bool:
    """Whether nothing but this project's rules turn text into ids: its split, bytes as letters, plain BPE."""
    model, pre = content.get("model") or {}, content.get("pre_tokenizer") or {}
    steps = [
        {key: step.get(key) for key in ("type", "pattern", "behavior", "invert")}
        for step in pre.get("pretokenizers", [])
    ]
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "pattern": None, "behavior": None, "invert": None}
    if pre.get("type") != "Sequence" or steps != [split, letters] or content.get("normalizer"):
        return False
    last = pre["pretokenizers"][1]
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges")
    plain = model.get("type") == "BPE" and not any(model.get(key) for key in odd)
    return plain and not last.get("add_prefix_space") and not last.get("use_regex")
