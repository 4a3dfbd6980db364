"""How a conversation becomes tokens: DeepSeek's layout, and which of the tokens are trained on.

    <s>[<|system|>S]<|user|>Q<|assistant|>A</s><|user|>Q2<|assistant|>A2</s>

Trained on are the assistant's words and the `</s>` that ends its turn, so the model learns to answer and to stop; a
turn with `train` False is context only. Only the layout's own marks become special tokens, and `<think>`, `</think>`
within an assistant's words. A person who types `</s>` or `<|assistant|>` has typed letters: `encode_chat` encodes each
text separately and never looks for marks in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from errors import UserError
from text.sources.row_report import kind_of

if TYPE_CHECKING:
    from text.tokenizer import Tokenizer


class _Marks(TypedDict, total=False):
    train: bool


class Message(_Marks):
    """One turn. `role` is system, user, assistant or tool; `content` is plain text.

    `train`: False on an assistant's turn that is context only; missing elsewhere.
    """

    role: str
    content: str


ROLE_MARKS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "tool": "<|tool|>"}

# The roles that may come before each role; None is the beginning. Several tools may answer one turn.
ALLOWED_BEFORE = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}

_THINK_MARKS = re.compile(r"(</?think>)")


def check_messages(messages: Sequence[Message], add_generation_prompt: bool = False) -> None:
    """Raise `UserError` unless roles are known, in an order the layout has, and every content is text."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise UserError("a conversation is a list of at least one message")
    before = None
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise UserError(f"message {number} is {kind_of(message)}; it must be an object with 'role' and 'content'")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLE_MARKS:
            raise UserError(f"message {number} has the unknown role {role!r}; use system, user, assistant or tool")
        if not isinstance(content, str):
            raise UserError(f"message {number} ({role}): 'content' is {kind_of(content)}; it must be text")
        if before not in ALLOWED_BEFORE[role]:
            place = "at the beginning" if before is None else f"after {before!r}"
            raise UserError(f"message {number}: role {role!r} cannot come {place}; {_remedy(role)}")
        before = role
    if add_generation_prompt and before not in ALLOWED_BEFORE["assistant"]:
        raise UserError(f"the last message is of {before!r}: there is nothing to answer; end with 'user' or 'tool'")


def render(messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """Return the conversation as one string, the same as `CHAT_TEMPLATE` gives. Raises `UserError` on wrong roles."""
    check_messages(messages, add_generation_prompt)
    turns = []
    for message in messages:
        end = "</s>" if message["role"] == "assistant" else ""
        turns.append(ROLE_MARKS[message["role"]] + message["content"] + end)
    return "<s>" + "".join(turns) + (ROLE_MARKS["assistant"] if add_generation_prompt else "")


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Return token ids of the conversation and a mask of the same length: 1 where the token is trained on, else 0.

    Raises `UserError` on wrong roles.
    """
    return encode_chats(tokenizer, [messages], add_generation_prompt)[0]


def encode_chats(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool = False
) -> list[tuple[list[int], list[int]]]:
    """Return `encode_chat` of many conversations, their texts encoded in one batch on all cores."""
    layouts = []
    for messages in conversations:
        check_messages(messages, add_generation_prompt)
        layouts.append(_layout(tokenizer, messages, add_generation_prompt))
    texts = [piece for layout in layouts for piece, _ in layout if isinstance(piece, str)]
    encoded = iter(tokenizer.encode_batch(texts))
    results = []
    for layout in layouts:
        ids: list[int] = []
        mask: list[int] = []
        for piece, trained in layout:
            tokens = next(encoded) if isinstance(piece, str) else [piece]
            ids += tokens
            mask += [trained] * len(tokens)
        results.append((ids, mask))
    return results


def _layout(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool
) -> list[tuple[str | int, int]]:
    """Return the conversation as pieces: a text or the id of a special token, each with its mask."""
    special = tokenizer.special_ids
    pieces: list[tuple[str | int, int]] = [(tokenizer.bos_id, 0)]
    for message in messages:
        role, content = message["role"], message["content"]
        pieces.append((special[ROLE_MARKS[role]], 0))
        if role == "assistant":
            trained = int(message.get("train", True))
            # split() with a group gives text, mark, text, mark, ..., text
            for number, part in enumerate(_THINK_MARKS.split(content)):
                pieces.append((special[part] if number % 2 else part, trained))
            pieces.append((tokenizer.eos_id, trained))
        else:
            pieces.append((content, 0))
    if add_generation_prompt:
        pieces.append((special[ROLE_MARKS["assistant"]], 0))
    return pieces


def _remedy(role: str) -> str:
    return {
        "system": "a system prompt comes first, once",
        "user": "a user's turn follows the system prompt or an assistant's turn",
        "assistant": "an assistant's turn follows a user's or a tool's",
        "tool": "a tool's answer follows the assistant's call",
    }[role]
