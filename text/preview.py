"""Rows of data as the tokens they become, with what is trained on in colour and behind a `+`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from unicodedata import category

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from text.inspection import Limits, Sequences, encode_items, kind_of_source, lengths, no_usable, placed_items, trained
from text.sources.registry import Source
from text.sources.row_report import RowReport
from text.stream_decoder import StreamDecoder
from text.tokenizer import SPECIAL_TOKENS, Tokenizer

TRAINED, CONTEXT, MARK = ("bold green", "bold cyan"), ("white", "bright_black"), "magenta"
BETWEEN = "┊"
SHOWN = {"\n": "↵", "\t": "⇥"}
# Controls, directions of writing and line ends other than \n.
MOVING = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def show_rows(console: Console, source: Source, tokenizer: Tokenizer, rows: int, limits: Limits) -> None:
    """Print the first `rows` usable rows of a source. Raises `UserError` when there is none."""
    kind, report = kind_of_source(source), RowReport()
    found = list(islice(placed_items(source, kind, report), rows))
    if not found:
        raise no_usable(source, report)
    encoded = encode_items(tokenizer, kind, [item for _, item in found])
    layout = source.layout.format or f"{kind}, layout recognised row by row"
    console.print(Text(f"{source}: {layout}; + is trained on"), soft_wrap=True)
    for notice in report.unread:
        console.print(Text(notice), soft_wrap=True)
    for (place, item), sequences in zip(found, encoded, strict=True):
        sizes = " and ".join(str(size + 1) for size in lengths(sequences))
        console.print(
            Text(f"\n{place}   {sizes} tokens, {trained(sequences)} trained on", style="bold"), soft_wrap=True
        )
        names = ("chosen", "rejected") if kind == "preference" else ("",)
        for name, (ids, mask) in zip(names, sequences, strict=True):
            if name:
                console.print(Text(name, style="bold"))
            _print_tokens(console, tokenizer, ids, mask)
        if kind == "prompt":
            console.print(Text(f"  the answer to find: {item.answer}"))
        if remark := _remark(tokenizer, kind, sequences, limits):
            console.print(Text(f"  {remark}", style="yellow"), soft_wrap=True)
    for line in report.file_lines() + report.notice_lines():
        console.print(Text(_printable(line), style="yellow"), soft_wrap=True)


def _remark(tokenizer: Tokenizer, kind: str, sequences: Sequences, limits: Limits) -> str:
    """Return what the length of training does to a row."""
    used, fate = limits.settle(tokenizer, kind, sequences)
    if not fate:
        return ""
    words = "left out"
    if fate == "cut" and kind == "chat":
        words = f"cut after {len(used[0][0])} tokens, its last answer that fits,"
    elif fate == "cut":
        words = f"cut: {len(sequences[0][0]) - len(used[0][0])} tokens of the prompt, its oldest turns, are left out"
    return f"{words} with {limits.told(kind)}"


def _print_tokens(console: Console, tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int]) -> None:
    """Print one turn and one fate a line, broken between tokens where it is too long."""
    line, line_trained = Text(), False
    for number, (piece, is_special, is_trained) in enumerate(_pieces(tokenizer, ids, mask)):
        opens_turn = is_special and piece.startswith("<|")
        too_long = line.cell_len + cell_len(piece) > console.width - 3
        if line and (is_trained != line_trained or opens_turn or too_long):
            _print_line(console, line, line_trained)
            line = Text()
        if line:
            line.append(BETWEEN, style="dim")
        line_trained = is_trained
        line.append(piece, style=MARK if is_special else (TRAINED if is_trained else CONTEXT)[number % 2])
    _print_line(console, line, line_trained)


def _print_line(console: Console, line: Text, is_trained: bool) -> None:
    console.print(Text("+ " if is_trained else "  ", style="green") + line, soft_wrap=True)


def _pieces(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int]) -> Iterator[tuple[str, bool, bool]]:
    """Yield (text, is special, is trained on) of each token; tokens that share a character come as one."""
    decoder = StreamDecoder(tokenizer, skip_special_tokens=False)
    for token, is_trained in zip(ids, mask, strict=True):
        text = decoder.push(int(token))
        if text:
            yield _printable(text), token < len(SPECIAL_TOKENS), bool(is_trained)
    if rest := decoder.flush():
        yield _printable(rest), False, bool(mask[-1])


def _printable(text: str) -> str:
    """Return text in which nothing moves the cursor or sends the terminal a command."""
    return "".join(SHOWN.get(letter, ascii(letter)[1:-1] if category(letter) in MOVING else letter) for letter in text)
