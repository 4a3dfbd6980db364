"""Tokens and replies as the objects of OpenAI's API."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from eval.serving.worker import Alternatives, Token
from model import MiniDeepSeek
from text.stream_decoder import StreamDecoder


class TokenObjects:
    """Makes objects of a model's tokens."""

    def __init__(self, model: MiniDeepSeek, decoder: StreamDecoder) -> None:
        self.model, self.decoder = model, decoder

    def text(self, token: int) -> str:
        """Return a token as text; where its bytes are no whole characters, as OpenAI spells it: `bytes:\\\\xe4`."""
        data = self.decoder.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def named(self, token: int, log_prob: float) -> dict[str, Any]:
        return {"token": self.text(token), "logprob": log_prob, "bytes": list(self.decoder.bytes_of(token))}

    def chat_entry(self, token: Token, top: int) -> dict[str, Any]:
        """Return one element of a chat's `logprobs.content`, with `top` alternatives."""
        found = token.alternatives
        return {**self.named(token.id, found.log_prob), "top_logprobs": [self.named(*one) for one in found.top[:top]]}

    def legacy(self, tokens: Sequence[int], found: Sequence[Alternatives | None], start: int = 0) -> dict[str, Any]:
        """Return a completion's `logprobs`; a prompt's first token has none. start: of the text's offsets."""
        texts = [self.text(token) for token in tokens]
        offsets = [start]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        top = [
            None if one is None else {self.text(other): log_prob for other, log_prob in one.top} | {text: one.log_prob}
            for text, one in zip(texts, found, strict=True)
        ]
        log_probs = [None if one is None else one.log_prob for one in found]
        return {"tokens": texts, "token_logprobs": log_probs, "top_logprobs": top, "text_offset": offsets[:-1]}

    def inspected(self, token: Token) -> dict[str, Any]:
        """Return what a request with `inspect` gets beside each token."""
        found, inside = token.alternatives, token.inside
        top = [{"token": self.text(id), "id": id, "prob": math.exp(log_prob)} for id, log_prob in found.top]
        draft = None
        if inside.draft is not None:
            draft = {"token": self.text(inside.draft), "id": inside.draft, "accepted": inside.draft == token.id}
        return {
            "token": self.text(token.id),
            "id": token.id,
            "prob": math.exp(found.log_prob),
            "alternatives": top,
            "experts": inside.experts,
            "draft": draft,
            "cache": inside.cache(self.model),
        }
