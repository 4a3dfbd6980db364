"""What of a run's settings and command line may be published: no place of this machine, no secret."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

PRIVATE = r"wandb|\w*(project|api_key|token|secret|password)"
# Private settings, and those of the machine or the sitting, which make no other model.
LEFT_OUT = re.compile(
    rf"{PRIVATE}|out|resume|device|threads|workers|shards|datasets|tokenizer|dist|background_save|keep|(log|save)_\w+"
    "|sample_(every|prompts)"
)
PRIVATE_OPTION = re.compile(rf"--([\w.]*\.)?({PRIVATE})")
CHECKPOINT = re.compile(r"final|best|merged|step-\d+")  # whose run has the name that tells


def public_settings(value: Any) -> Any:
    """Return settings, or one of them, without what is private or not set."""
    if isinstance(value, dict):
        kept = {name: one for name, one in value.items() if one is not None and not LEFT_OUT.fullmatch(str(name))}
        return {public_settings(name): public_settings(one) for name, one in kept.items()}
    if isinstance(value, list | tuple):
        return [public_settings(one) for one in value]
    return public(value) if isinstance(value, str) else value


def public_words(words: list[str]) -> list[str]:
    """Return a command line with `...` for the values of private options."""
    out, hidden = [], False
    for word in words:
        option, given, _ = word.partition("=")
        is_private = bool(PRIVATE_OPTION.fullmatch(option))
        if hidden and not word.startswith("--"):
            out.append("...")
        else:
            out.append(f"{option}=..." if is_private and given else public(word))
        hidden = is_private and not given
    return out


def public(text: str) -> str:
    """Return a text with the last names of paths outside the working folder, and `URL` for each URL."""
    parts = re.split(r"([,=]|[\"'{}\[\]]+|: )", text)
    text, home = "".join("URL" if "://" in part else _short(part) for part in parts), os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text


def _short(path: str) -> str:
    place = Path(os.path.abspath(os.path.expanduser(path.strip())))
    if not path.strip().startswith(("/", "~")) and ".." not in Path(path).parts:
        return path
    here = Path.cwd()
    if place.is_relative_to(here) and here != Path(here.anchor):
        return str(place.relative_to(here))
    return "/".join(place.parts[1:][-2 if CHECKPOINT.fullmatch(place.name) else -1 :])
