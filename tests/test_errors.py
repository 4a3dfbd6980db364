"""What a person reads when something is wrong: one line that a terminal shows, and a row of docs/errors.md."""

from __future__ import annotations

import re

import pytest
from error_texts import DIFFERS, ROOT, raised_in, sources

from errors import LONGEST, UserError, command_line, one_line

PAGE = ROOT / "docs" / "errors.md"


def documented() -> dict[str, tuple[str, str, str]]:
    """Message -> (message, cause, remedy) of each row; the remedy as it is printed, without what is in italics."""
    rows = [line for line in PAGE.read_text(encoding="utf8").splitlines() if line.startswith("| `")]
    found = {}
    for row in rows:
        message, cause, remedy = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1])
        printed = re.sub(r"\*[^*]+\*$", "", remedy).strip()
        found["; ".join(part for part in (message.strip("`"), printed) if part)] = (message, cause, remedy)
    return found


def test_every_message_is_explained() -> None:
    """A new message needs a row `| message | cause | remedy |` in the group of its entry point."""
    texts = {text for path in sources() for text in raised_in(path.read_text(encoding="utf8"))}
    assert len(texts) > 300
    missing, stale = sorted(texts - documented().keys()), sorted(documented().keys() - texts)
    shown = ["| `" + "` |  | ".join((*text.partition("; ")[::2],)) + " |" for text in missing]
    assert not missing and not stale, "\n".join(["missing rows:", *shown, "rows of no message:", *stale])


def test_every_row_has_a_cause_and_a_remedy() -> None:
    for message, cause, remedy in documented().values():
        assert cause.strip(DIFFERS) and remedy.strip(f"{DIFFERS}* "), message


def test_texts_are_found_however_they_are_written() -> None:
    source = (
        'def f(x):\n    reason = f"{x}: no"\n    raise UserError(f"{x}: a {x!r}{x}; b") from None\n'
        '    raise DamagedCheckpoint("c" "d")\n    raise ConfigError(reason)\n    raise UserError(other or f"{x} e")\n'
        '    raise UserError(str(x))\n    raise ValueError("f")\n    ranks.fail(f"{x} g")\n    sys.exit(0)\n'
        '    raise SystemExit(f"error: {x} h")\n'
    )
    assert raised_in(source) == ["…: a …; b", "cd", "…: no", "… e", "… g", "… h"]


def test_each_of_several_texts_is_found() -> None:
    """Where the source chooses between them, in place or under a name of the same function."""
    source = (
        'def f(x):\n    why = "too few" if x else "too many"\n    raise UserError(f"{x}: {why} rows; mend it")\n'
        'def g(x, why):\n    raise UserError(f"{x}: {why} lines; " + (f"add {x} or so" if x else "drop some"))\n'
    )
    assert raised_in(source) == [
        "…: too few rows; mend it", "…: too many rows; mend it", "…: … lines; add … or so", "…: … lines; drop some",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\nb", "\x1b[2Jx", "a\u2028b", "\ud800", "a\u202eb", "x\0y", "好\n" * 5000]
)
def test_a_message_is_one_line_that_a_terminal_only_shows(text: str, capsys: pytest.CaptureFixture) -> None:
    def fail() -> None:
        raise UserError(f"{text}; mend it")

    with pytest.raises(SystemExit) as end:
        command_line(fail)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1 and len(printed) < LONGEST + 50
    assert printed.startswith("error: ") and printed.endswith("; mend it\n")
    assert printed.rstrip("\n").isprintable() and printed.encode("utf-8")


def test_a_plain_message_stays_as_it_is() -> None:
    for text in ("数据.jsonl:3: 'a  b' is not text; mend it", "é ü 🙂 — …"):
        assert one_line(text) == text == str(UserError(text))
