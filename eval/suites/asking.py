"""Questions put to any model: in its chat template, or as text to be continued where it has none."""

from __future__ import annotations

from collections.abc import Sequence

from errors import UserError
from eval.opened_model import OpenedModel
from text.chats.chat_template import Message

ENDS = ("\n\n", "\nQuestion:")  # a model without turns goes on and asks itself the next question


def check_asking(max_new_tokens: int, chunk: int, temperature: float = 0.0) -> None:
    """Raises `UserError` for settings with which nothing can be asked."""
    if max_new_tokens < 1 or chunk < 1 or temperature < 0:
        raise UserError("max_new_tokens and chunk must be 1 or more, temperature 0 or more")


def ask(
    model: OpenedModel, conversations: Sequence[Sequence[Message]], max_new_tokens: int, temperature: float, seed: int
) -> list[str]:
    """The answer to each conversation; empty where question and answer have no room in the context.

    Raises `UserError` where no question would have any.
    """
    if max_new_tokens >= model.context:
        raise UserError(f"max_new_tokens {max_new_tokens}: the model reads {model.context} tokens in all; lower it")
    prompts = [conversation if model.chats else as_text(conversation) for conversation in conversations]
    lengths = [len(model.encode_chat(prompt) if model.chats else model.encode(prompt)) for prompt in prompts]
    fitting = [place for place, length in enumerate(lengths) if length + max_new_tokens <= model.context]
    answers = [""] * len(prompts)
    if fitting:
        replies = model.reply([prompts[place] for place in fitting], max_new_tokens, temperature, seed)
        for place, reply in zip(fitting, replies, strict=True):
            answers[place] = reply if model.chats else _first(reply)
    return answers


def as_text(conversation: Sequence[Message]) -> str:
    """A conversation as questions and answers, up to where the next answer begins."""
    names = {"user": "Question: ", "assistant": "Answer: "}
    parts = [names.get(message["role"], "") + message["content"] for message in conversation]
    return "\n\n".join([*parts, "Answer:"]).replace("\n\nAnswer:", "\nAnswer:")


def _first(reply: str) -> str:
    reply = reply.lstrip()
    for end in ENDS:
        reply = reply.partition(end)[0]
    return reply.strip()
