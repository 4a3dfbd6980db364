"""A reply of an OpenAI-compatible endpoint: an answer with its thoughts, or the provider's reason why there is none.

Endpoints agree on `choices[0].message.content` and on little else. Thoughts come under `reasoning_content` (DeepSeek,
SGLang), `reasoning` (vLLM, Ollama, OpenRouter), `reasoning_details` (OpenRouter) or as parts of the content (Mistral);
an error of the provider behind a gateway comes with status 200, in place of the choices or beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from errors import one_line
from text.chats.turns import THOUGHTS, thought_and_answer
from training.distill.answers import Answer

NAMES = (*THOUGHTS, "reasoning_details")  # of thoughts; often the same under two of them
WORDS = ("text", "thinking", "summary")  # keys of a part's text; encrypted parts have none
ERRORS = ("error", "detail", "message")  # where servers put what is wrong
BROKEN_OFF = ("error", "abort")  # reasons to finish that leave half an answer
LONGEST_REASON = 200  # characters


class NoAnswer(Exception):
    """A reply without an answer, in the provider's words. `status`: its HTTP status, or the one that its body names."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def read_reply(status: int, content: bytes) -> Answer:
    """Return the answer of a reply, its thoughts between <think> and </think>. Raises `NoAnswer`."""
    reply = None
    try:
        reply = json.loads(content)
        if status == 200:
            return _answer(reply)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        pass  # it has another shape: what it says of an error is looked for below
    error = _error_of(reply)
    # What the provider says is wrong, in one short line; all that it sent where it names no error.
    words = ": ".join(dict.fromkeys(_texts(error))) or content.decode("utf8", "replace")
    reason = one_line(" ".join(words.split())[:LONGEST_REASON]) or "an empty reply"
    if status != 200:
        raise NoAnswer(status, f"status {status} ({reason})")
    named = error if isinstance(error, dict) else reply
    code = str(named.get("code")) if isinstance(named, dict) else ""
    if re.fullmatch("[45][0-9]{2}", code):
        raise NoAnswer(int(code), f"status 200 with error {code} ({reason})")
    raise NoAnswer(200, f"status 200 with no answer ({reason})")


def _answer(reply: dict) -> Answer:
    choice = reply["choices"][0]
    finish = choice.get("finish_reason") or "stop"
    if reply.get("error") or choice.get("error") or finish in BROKEN_OFF or not isinstance(finish, str):
        raise ValueError("no answer, or half of one")
    tokens = int((reply.get("usage") or {}).get("completion_tokens") or 0)
    return Answer(_with_thoughts(choice["message"]), finish, tokens)


def _with_thoughts(message: dict) -> str:
    content = message.get("content") or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "".join(_words(part) for part in parts if not _is_thought(part))
    found = (_paragraphs(value) for value in (*map(message.get, NAMES), [part for part in parts if _is_thought(part)]))
    thoughts = next(filter(None, found), "")
    if thoughts and "<think>" not in text:  # some endpoints have put them there, or in both places
        return thought_and_answer(thoughts, text)
    # <think> may have ended the prompt: it does in the chat templates of many models that always think.
    return f"<think>\n{text.lstrip()}" if "</think>" in text and "<think>" not in text else text


def _paragraphs(value: object) -> str:
    """Return the text of thoughts, each part a paragraph."""
    parts = value if isinstance(value, list) else [value]
    return "\n\n".join(words for words in (_words(part).strip() for part in parts) if words)


def _words(part: object) -> str:
    """Return the text of a text, of a part or of parts; parts of other kinds, such as images, have none."""
    if part is None or isinstance(part, str):
        return part or ""
    if isinstance(part, list):
        return "".join(map(_words, part))
    return _words(next((part[key] for key in WORDS if part.get(key)), None))


def _is_thought(part: dict) -> bool:
    return str(part.get("type")).startswith(("thinking", "reasoning"))


def _error_of(reply: object) -> object:
    """Return what a body says of an error: a text, or an object or list that holds texts; None where it is silent."""
    if not isinstance(reply, dict):
        return None
    try:
        of_choice = reply["choices"][0]["error"]
    except (LookupError, TypeError):
        of_choice = None
    found = (of_choice, *map(reply.get, ERRORS))
    return next((error for error in found if isinstance(error, str | dict | list) and error), None)


def _texts(value: object, depth: int = 8) -> Iterator[str]:
    """Yield the texts in an error: its message, and often a type or what a provider further behind has said."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list) and depth:
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part, depth - 1)
