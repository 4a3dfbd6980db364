"""What may come of a case: success, or one line and the exit code of an error. Never a traceback, a hang, or memory."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unicodedata import category

from hypothesis import settings

from errors import command_line

SECONDS = 5.0  # of the processor
MEMORY = 1 << 30  # bytes that a case may add
LONGEST_LINE = 4000  # characters; of them, escapes of what cannot be shown


class Hang(BaseException):
    """Not an `Exception`, so that no handler of the code takes it for its own."""


@dataclass(frozen=True)
class Outcome:
    """Attributes: value: what the action returned, None when it was refused; code: exit code; err, out: printed."""

    value: Any
    code: int
    err: str
    out: str


class Thrower:
    """`throw(action, *arguments)` calls it as a script's command line does, under limits, and looks at how it ends.

    Raises `AssertionError` for an end that no case may have. An exception that nobody caught comes through.

    Attributes: cases: how many were thrown; refused: how many ended in an error message.
    """

    def __init__(self) -> None:
        self.cases = self.refused = 0

    def __call__(self, action: Callable[..., Any], *arguments: Any, **named: Any) -> Outcome:
        self.cases += 1
        values: list[Any] = []
        # As strict as a terminal: half a surrogate pair cannot be printed.
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        err, code = io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limits():
            try:
                command_line(lambda: values.append(action(*arguments, **named)))
            except SystemExit as end:
                code = end.code
        out.flush()
        printed = Outcome(values[0] if values else None, code, err.getvalue(), out.buffer.getvalue().decode())
        if code:
            self.refused += 1
            check_refusal(printed)
        return printed


def check_refusal(outcome: Outcome) -> None:
    """One line that a terminal shows as it is, and the exit code of a user's error or a damaged checkpoint."""
    assert outcome.code in (2, 3), outcome
    line = outcome.err.splitlines()[-1]
    assert line.startswith("error: ") and len(line) <= LONGEST_LINE, outcome
    assert outcome.err.count("error: ") == line.count("error: "), outcome
    assert not any(category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in line), outcome


@contextlib.contextmanager
def limits(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """`Hang` after so many seconds of the processor, `MemoryError` and its kin above so many bytes more than now."""

    def expired(*_: object) -> None:
        raise Hang(f"{seconds} seconds of the processor were not enough")

    before = signal.signal(signal.SIGPROF, expired)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    # What never comes back to Python cannot be interrupted: then the whole run ends, with the place in the code.
    faulthandler.dump_traceback_later(20 * seconds, exit=True, file=sys.__stderr__)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, hard))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)
        faulthandler.cancel_dump_traceback_later()


def thrown(share: float = 1.0) -> settings:
    """The settings of a test: of `make fuzz` where its profile is asked for, else of `make test`.

    share: of the cases of the profile, for actions that are slow.
    """
    name = "long" if settings.get_current_profile_name() == "long" else "short"
    profile = settings.get_profile(name)
    return settings(profile, max_examples=max(round(profile.max_examples * share), 1))
