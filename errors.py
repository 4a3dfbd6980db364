"""What a person sees when something is wrong: one line, an exit code, no traceback; and when it takes long."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from textwrap import fill
from typing import TypeVar
from unicodedata import category

Item = TypeVar("Item")
LONGEST = 1000  # characters of a message; data may be quoted in it
PATIENCE = 3.0  # seconds
WIDTH = 100  # characters of a line that a run says, paths aside
INDENT = " " * len("sample     ")
QUIET = 10.0  # seconds after which a log file is told how far something is
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space and run the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder you may write to"),
    **dict.fromkeys((errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "check the path"),
    **dict.fromkeys((errno.ELOOP, errno.ENAMETOOLONG), "check the path"),
}
# What torch's errors say when the memory of a GPU, or of the machine, is full.
MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")
MORE_MEMORY = (
    "in training lower --micro_tokens or pass --gradient_checkpointing (and --resume, if something was saved); "
    "elsewhere read less at once"
)


class UserError(Exception):
    """Something the person can fix. The message names the file, the place in it and the remedy. Exit code 2.

    Whatever the message quotes, of a file or another program, it is one line that a terminal only shows.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class DamagedCheckpoint(UserError):
    """A checkpoint that is truncated, incomplete or of another shape than its config says. Exit code 3."""

    exit_code = 3


def require(holds: bool, message: str) -> None:
    """Raise `UserError` with the message unless something holds."""
    if not holds:
        raise UserError(message)


def check_least(least: int, **values: int) -> None:
    """Raise `UserError` for an option that is below."""
    for name, value in values.items():
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")


def is_broken(text: str) -> bool:
    """Return whether it has a NUL or half of a character, and so is no name of a file."""
    return "\0" in text or any("\ud800" <= letter < "\udc80" for letter in text)


def check_seed(seed: int | None) -> None:
    """Raise `UserError` for a number that not all generators take."""
    if seed is not None and not 0 <= seed < 2**64:
        raise UserError(f"--seed {seed}: give a number from 0 to 2^64 - 1")


def one_line(text: str) -> str:
    """Return the text without line ends, with what a terminal would obey spelled out; its middle left out if long."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    text = re.sub("[\n\r\t\u2028\u2029]", " ", text)
    # Controls, directions of writing, halves of characters.
    return "".join(ascii(c)[1:-1] if category(c) in ("Cc", "Cf", "Cs") else c for c in text).strip()


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Give an `OSError` the name of `file` where it has none: a write that fails does not say where."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


@contextmanager
def waiting(what: str, speaks: bool = True) -> Iterator[None]:
    """Say once, on stderr, what takes so long, where something lasts more than `PATIENCE` seconds on the main rank."""
    timer = threading.Timer(PATIENCE, print, (f"{what} ...",), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if speaks and os.environ.get("RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def folded(text: str) -> str:
    """Return a text with lines of at most `WIDTH`: what is longer goes on below, behind the column of labels.

    If it can, with what stands behind the last semicolon or comma.
    """

    def fold(line: str) -> str:
        for mark in ";," if len(line) > WIDTH else "":
            begin, found, end = line.rpartition(f"{mark} ")
            if found and len(begin) < WIDTH and len(INDENT + end) <= WIDTH:
                return f"{begin}{mark}\n{INDENT}{end}"
        return fill(line, WIDTH, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False)

    return "\n".join(map(fold, text.splitlines()))


def tracked(items: Iterable[Item], what: str, total: int, speaks: bool = True) -> Iterator[Item]:
    """Yield the items and show on stderr how many are done: in a bar, in a log file in a line every `QUIET` seconds."""
    if speaks and sys.stderr.isatty():
        from tqdm import tqdm  # which those who only train need not wait for

        items, speaks = tqdm(items, what, total, leave=False, dynamic_ncols=True), False
    spoke = time.monotonic()
    for done, item in enumerate(items):
        if speaks and time.monotonic() - spoke > QUIET:
            spoke = time.monotonic()
            print(how_far(what, done, total), file=sys.stderr, flush=True)
        yield item


def how_far(what: str, done: float, total: int) -> str:
    """Write `validating: 12 of 64, 19%`. done: may have a part of the next one."""
    return f"{what}: {int(done + 1e-6)} of {total}, {done / total:.0%}"


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Import or open torchao, transformers, or what imports them, without remarks on versions and missing kernels.

    Errors still come through. Later remarks of transformers are quieted too, unless TRANSFORMERS_VERBOSITY is set.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # which it reads when it is imported
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def quiet_compiler() -> None:
    """Have torch compile without remarks on parts of this project and of torchao that it compiles well enough."""
    for message in ("Dynamo detected a call to a `functools.lru_cache`", ".*_stable_hash_for_caching"):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)


def with_home(text: str) -> str:
    """Return the text with the home folder for a `~` that begins it, or one of several paths: `a.csv=2,~/b.csv`.

    A shell does so only at the beginning of a word, and not in `--out=~/run` or in a file.
    """
    return re.sub(r"(^|[,=]\s*)~(?=[/,=]|$)", lambda found: found[1] + os.path.expanduser("~"), text)


def command_line(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` or a failing disk ends in one line on stderr and the error's exit code.

    `main` finds the home folder in the place of every `~` that begins a path.
    """
    sys.argv[1:] = map(with_home, sys.argv[1:])
    if isinstance(sys.stdout, TextIOWrapper):  # else a path that is not UTF-8 could not be printed
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # lines arrive in a file at once too
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # whoever read our output has seen enough: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {one_line(f'{place}{error.strerror}')}; {REMEDIES[error.errno]}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in MEMORY):
            raise
        what = ". ".join(str(error).split(". ")[:3]).rstrip(".")
        print(f"error: {one_line(what)}; {MORE_MEMORY}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
