"""Tokens become text as they arrive: a character split over several tokens is returned once it is complete."""

from __future__ import annotations

import codecs

from text.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_letters


class StreamDecoder:
    """Turns tokens into text as they come. A character split over several tokens is given out once it is whole.

    All that `push` and `flush` return, joined, equals `tokenizer.decode` of the same ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._byte_of = byte_letters()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take one token; return the characters it completes, maybe none. An id outside the vocabulary is nothing."""
        return self._decoder.decode(self.bytes_of(token_id))

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of UTF-8 that a token stands for; alone they may be no character."""
        if token_id < len(SPECIAL_TOKENS):
            return b"" if self._skip_special_tokens else SPECIAL_TOKENS[token_id].encode()
        token = self._tokenizer.raw.id_to_token(token_id) or ""
        return bytes(self._byte_of[letter] for letter in token)

    def flush(self) -> str:
        """End the text; return U+FFFD for a character that was left unfinished. The decoder can be used again."""
        return self._decoder.decode(b"", final=True)
