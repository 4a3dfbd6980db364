"""What a run's loss depends on: its settings, tokenizer, data and budget; and in which of them two runs differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from errors import DamagedCheckpoint, UserError, require
from eval.compared_run import ComparedRun
from text.files import read_yaml
from training.run.progress import newest, read_progress

# Settings on which no loss depends, or which follow from the machine.
OF_NO_MATTER = {
    "background_save", "column", "compile", "data", "datasets", "device", "dist", "ema_decay", "encoding", "epochs",
    "gradient_checkpointing", "keep", "keep_best", "log_every", "log_to", "max_minutes", "max_skipped", "max_steps",
    "max_tokens", "micro_tokens", "on_error", "out", "patience", "phases", "resume", "sample_every", "sample_prompts",
    "save_every", "seed", "shards", "threads", "tokenizer", "val_every", "val_tokens", "wandb", "workers",
}  # fmt: skip


def settings_of(run: ComparedRun) -> dict[str, Any]:
    """Return seed, tokenizer, tokens (None before its end), held-out text, and the other settings, flat."""
    file = run.folder / "config.yaml"
    content = read_yaml(file) if file.is_file() else None
    require(isinstance(content, dict), f"{file}: no settings of a run; name a run folder")
    progress, final = {}, newest(run.folder)
    if final is not None:
        try:
            progress = read_progress(final).run
        except DamagedCheckpoint as error:
            raise UserError(f"{error}; restore the file") from None
    last = run.entries[-1] if run.entries else {}
    own = dict(_flat({key: value for key, value in content.items() if key not in OF_NO_MATTER}))
    held_out = next((one["held_out"]["text"] for one in run.entries if "text" in one.get("held_out", {})), "")
    whole = final is not None and final.name == "final"
    more = {"tokens": last.get("tokens", 0) if whole else None, "held_out": held_out}
    return {"seed": content.get("seed", 0), "tokenizer": progress.get("tokenizer", ""), **more, "settings": own}


def differences(own: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """Return in which ways one run is not set up as another, in words. What one of them does not say is not known."""
    changes = []
    if own["tokenizer"] and reference["tokenizer"] and own["tokenizer"] != reference["tokenizer"]:
        changes.append("another tokenizer: a token is worth another number of nats")
    if own["tokens"] and reference["tokens"] and abs(own["tokens"] / reference["tokens"] - 1) > 0.02:
        changes.append(
            f"the budget is {own['tokens']:,} tokens, not {reference['tokens']:,}: the learning rate, which follows "
            "it, is another at the same tokens"
        )
    if own["held_out"] != reference["held_out"]:
        changes.append("other held-out text: other data")
    mine, theirs = own["settings"], reference["settings"]
    for key in sorted(mine.keys() | theirs.keys()):
        if key in mine and key in theirs and mine[key] != theirs[key]:
            changes.append(f"{key} is {mine[key]}, not {theirs[key]}")
    # A preset's own fields are not in the settings, so a further field of one side is a change.
    for key in sorted({key for key in mine.keys() ^ theirs.keys() if key.startswith("model.")}):
        changes.append(f"{key} is {mine[key]}, not the preset's" if key in mine else f"{key} is not {theirs[key]}")
    return changes


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return settings as `optim.lr`; schedules, whose keys are shares of the run, stay whole."""
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        if isinstance(value, Mapping) and key in ("model", "optim"):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
