"""A reply's tokens as what a client is sent: text up to where it stops, thoughts apart, calls of tools apart."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from text.stream_decoder import StreamDecoder
from text.tokenizer import Tokenizer

THINK, ANSWER = "<think>", "</think>"


class Piece(NamedTuple):
    """Some more of a reply. `kind`: content, reasoning_content or tool_calls, of which `text` is one call."""

    kind: str
    text: Any


class StopFilter:
    """Ends a text before the first of some texts, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.stopped = stops, "", False

    def push(self, text: str) -> str:
        """Return what is certain to come before a stop; after one, nothing."""
        if self.stopped or not self.stops:
            return "" if self.stopped else text
        self.held += text
        found = [place for place in map(self.held.find, self.stops) if place >= 0]
        if found:
            self.stopped, safe, self.held = True, self.held[: min(found)], ""
            return safe
        safe = len(self.held) - max(overlap(self.held, stop) for stop in self.stops)
        out, self.held = self.held[:safe], self.held[safe:]
        return out

    def flush(self) -> str:
        """Return what was held back, at the end of the reply."""
        out, self.held = self.held, ""
        return out


class ChatSplitter:
    """Parts an answer into thoughts, content and calls, as `text.chats.turns` joins them for training.

    A call is a line {"name": ..., "arguments": {...}} that names one of `tools`; nothing is sent of a line that may
    still become one.
    """

    def __init__(self, tools: Sequence[str] = ()) -> None:
        self.tools = tools
        self.held, self.place = "", "start"  # start, thoughts, gap (between thoughts and answer), answer
        self.space, self.in_line = "", False  # line ends not sent yet; whether the line that follows them has begun

    def push(self, text: str) -> Iterator[Piece]:
        """Take some more text; yield the pieces that it settles."""
        self.held += text
        while True:
            place = self.place
            yield from getattr(self, f"_{place}")()
            if place == self.place:
                return

    def flush(self) -> Iterator[Piece]:
        """Yield the rest, at the end of the reply."""
        if self.place == "thoughts" and self.held.strip():
            yield Piece("reasoning_content", self.held.rstrip())
        elif self.place == "start" and self.held:
            self.place = "answer"
            yield from self._answer()
        if self.place == "answer":
            yield from self._line(self.held)
            if self.space:
                yield Piece("content", self.space)
        self.held = self.space = ""

    def _start(self) -> Iterator[Piece]:
        text = self.held.lstrip()
        if text.startswith(THINK):
            self.held, self.place = text[len(THINK) :], "thoughts"
        elif not THINK.startswith(text):
            self.place = "answer"
        yield from ()

    def _thoughts(self) -> Iterator[Piece]:
        if not self.in_line:
            self.held = self.held.lstrip()
        thought, ended, rest = self.held.partition(ANSWER)
        safe = thought.rstrip() if ended else self.held[: len(self.held) - overlap(self.held, ANSWER)].rstrip()
        if safe:
            self.in_line = True
            yield Piece("reasoning_content", safe)
        self.held = self.held[len(safe) :]
        if ended:
            self.held, self.place, self.in_line = rest, "gap", False

    def _gap(self) -> Iterator[Piece]:
        self.held = self.held.lstrip()
        if self.held:
            self.place = "answer"
        yield from ()

    def _answer(self) -> Iterator[Piece]:
        if not self.tools:
            text, self.held = self.held, ""
            if text:
                yield Piece("content", text)
            return
        *lines, self.held = self.held.split("\n")
        for line in lines:
            yield from self._line(line)
            self.space, self.in_line = self.space + "\n", False
        if self.held and (self.in_line or not self.held.startswith("{")):
            text, self.held, self.in_line = self.space + self.held, "", True
            self.space = ""
            yield Piece("content", text)

    def _line(self, line: str) -> Iterator[Piece]:
        """Yield a line, or the rest of one, that is whole."""
        call = None if self.in_line else self._call(line)
        if call:
            self.space = ""
            yield Piece("tool_calls", call)
        elif line:
            text, self.space = self.space + line, ""
            yield Piece("content", text)

    def _call(self, line: str) -> dict[str, Any] | None:
        if not line.startswith("{"):
            return None
        try:
            call = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if call.get("name") not in self.tools or not isinstance(call.get("arguments"), dict):
            return None
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        name = f"call_{uuid.uuid4().hex[:24]}"
        return {"id": name, "type": "function", "function": {"name": call["name"], "arguments": arguments}}


class ReplyText:
    """One reply as it comes.

    Args:
        tools: names of the tools it may call; None: plain text, of which nothing is taken apart.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], tools: Sequence[str] | None) -> None:
        self.decoder, self.filter = StreamDecoder(tokenizer, skip_special_tokens=False), StopFilter(stops)
        self.splitter = None if tools is None else ChatSplitter(tools)
        self.called = False

    def push(self, token: int, finish: str) -> tuple[list[Piece], str]:
        """Take one token and how it ends the reply; return what it settles, and how the reply ends.

        A character that the limit cut is left out.
        """
        text = self.filter.push(self.decoder.flush() if finish == "stop" else self.decoder.push(token))
        if self.filter.stopped:
            finish = "stop"
        elif finish:
            text += self.filter.flush()
        pieces = self._split(text, bool(finish))
        self.called = self.called or any(piece.kind == "tool_calls" for piece in pieces)
        return pieces, "tool_calls" if finish == "stop" and self.called else finish

    def _split(self, text: str, ended: bool) -> list[Piece]:
        if self.splitter is None:
            return [Piece("content", text)] if text else []
        pieces = list(self.splitter.push(text))
        return [*pieces, *self.splitter.flush()] if ended else pieces


def overlap(text: str, mark: str) -> int:
    """Count the last characters of a text that may be the beginning of a mark."""
    longest = min(len(text), len(mark) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(mark[:count])), 0)
