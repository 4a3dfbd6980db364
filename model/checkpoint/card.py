"""README.md of a checkpoint folder: its model card, made only of files of the folder and of its run.

A card is renewed as long as nobody has edited it: a comment in it has the hash of all the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from errors import UserError, naming
from LMConfig import LMConfig
from model.checkpoint.folder import CARD
from model.checkpoint.public import public, public_settings, public_words
from model.checkpoint.weight_files import WEIGHTS
from model.costs import count, human

MARK = re.compile(r"<!-- generated, ([0-9a-f]{16}): .*? -->\n")
# What files raise that are missing, damaged, or somebody else's.
FACTS = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, yaml.YAMLError)
STAGES = {
    "pretrain.py": "pretraining on text",
    "full_sft.py": "supervised fine-tuning on conversations",
    "lora_sft.py": "fine-tuning of a low-rank adapter on conversations",
    "dpo_train.py": "preference learning",
    "grpo_train.py": "reinforcement learning from verifiable rewards",
    "distill.py": "distillation from a teacher",
}
DATA = {
    "data": "Data", "mix": "Mixed with", "val_text": "Text measured on", "teacher": "Teacher", "reference": "Reference",
    "ckpt": "Began with",
}  # fmt: skip
MEASURES = {
    "val_bits_per_byte": "bits per byte of text (less is better)",
    "val_loss": "loss in nats of a token, or of a pair (less is better)",
    "val_preferred": "pairs whose chosen answer is preferred",
    "val_margin": "reward margin of the pairs",
    "val_accuracy": "problems solved, greedy",
    "val_pass_1": "problems solved, sampled",
}
SHARES = ("val_preferred", "val_accuracy", "val_pass_1")
# Bytes of Chinese characters, and letters, as a byte-level vocabulary spells them.
LANGUAGES = {"zh": re.compile("[\u00e4-\u00e9][\u00a1-\u00bf\u0122-\u0143]{2}"), "en": re.compile("[A-Za-z]{3}")}
HELLO = {"zh": ("你好，请介绍一下自己。", "从前"), "en": ("Hello, who are you?", "Once upon a time")}

# FOLDER stands for where a reader has put it.
USE = """## Use

FOLDER is where this file lies, or the name of the repository. {transformers}With Mini DeepSeek-V3, from a folder:

```bash
{command}
```
"""
USE_TRANSFORMERS = """With transformers:

```python
from transformers import pipeline

model = pipeline("text-generation", model="FOLDER")
print(model({words}, max_new_tokens=64)[0]["generated_text"]{answer})
```

"""
USE_ADAPTER = """## Use

With the model it was trained on, in Mini DeepSeek-V3:

```bash
python eval/chat.py --ckpt {base} --lora FOLDER
```
"""


def write_card(folder: Path) -> bool:
    """Write or renew the card of a checkpoint folder. An edited one stays as it is; returns whether it was written.

    Raises:
        UserError, OSError: not a checkpoint folder, or one that cannot be written to.
    """
    path = folder / CARD
    if path.exists() and not is_generated(path.read_text(encoding="utf8", errors="replace")):
        return False
    partial, text = path.with_name(f".{CARD}.partial"), card(folder)
    with naming(path):
        partial.write_text(text, encoding="utf8", errors="replace")
        os.replace(partial, path)
    return True


def renew_card(folder: Path) -> None:
    """Write the card at the end of other work on the folder, to which a disk that refuses is only a notice."""
    try:
        write_card(folder)
    except (UserError, *FACTS) as error:
        print(f"notice: {folder / CARD}: not written ({error})", file=sys.stderr)


def is_generated(text: str) -> bool:
    """Return whether a card is as `card` made it."""
    found = MARK.search(text)
    return found is not None and found[1] == _digest(text[: found.start()] + text[found.end() :])


def card(folder: Path) -> str:
    """Return the card: front matter for the hub, training, scores, size, use. Names no place of this machine."""
    folder = folder.absolute()
    is_adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    config = None if is_adapter else LMConfig.from_pretrained(folder)
    is_variant = config is not None and config.attention != "mla"
    trained = _trained(folder)
    run = folder.parent if trained else None
    command, settings = _settings(run) if run else ([], {})
    languages = _languages(folder)
    head = {
        "license": "unknown", "language": languages,
        "library_name": "peft" if is_adapter else "" if is_variant else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lora"] * is_adapter + ["deepseek_v3"] * (not is_variant) + ["mini-deepseek-v3"],
    }  # fmt: skip
    stage = command[0] if command else ""
    name = folder.parent.name if trained else folder.name
    kind = "An adapter of a Mini DeepSeek-V3" if is_adapter else "A Mini DeepSeek-V3"
    kind += f" with {config.attention.upper()} in place of MLA, for comparison" if is_variant else ""
    lines = ["", f"# {name}", "", f"{kind}: {STAGES.get(stage, 'a small language model')}.", ""]
    if run and trained:
        lines += [*_training(run, trained, command, settings), *_held_out(run, trained), *_scores(run, folder)]
    if config is not None:
        lines += _size(config)
    if is_adapter:
        lines += [USE_ADAPTER.format(base=shlex.quote(public(str(settings.get("ckpt") or "BASE"))))]
    else:
        lines += _use(stage != "pretrain.py" and _chats(folder), HELLO[(languages or ["en"])[0]], not is_variant)
    front = f"---\n{yaml.safe_dump({k: v for k, v in head.items() if v}, sort_keys=False)}---\n"
    front = front.replace("unknown\n", "unknown # yours to say; the licences of the data count\n", 1)
    body = "\n".join(lines)
    remark = "an edited card is never overwritten; delete it for a new one"
    return f"{front}<!-- generated, {_digest(front + body)}: {remark} -->\n{body}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf8", "replace")).hexdigest()[:16]


def _trained(folder: Path) -> Path | None:
    """Return the checkpoint of a run whose training made the folder: itself, or what lora_sft.py has merged."""
    choices = [folder, *((folder.with_name("best"), folder.with_name("final")) if folder.name == "merged" else ())]
    found = [path for path in choices if (path / "training" / "progress.json").is_file()]
    if len(found) > 1 and not _settings(folder.parent)[1].get("keep_best"):
        found = found[1:]
    return found[0] if found and (folder.parent / "metrics.jsonl").is_file() else None


def _settings(run: Path) -> tuple[list[str], dict[str, Any]]:
    """Return the command line that config.yaml begins with (none in older runs), from the script on, and the rest."""
    command: list[str] = []
    with suppress(*FACTS):
        text = (run / "config.yaml").read_text(encoding="utf8")
        if text.startswith("# python "):
            command = shlex.split(text.partition("\n")[0].removeprefix("# python "))
        settings = yaml.safe_load(text)
        if isinstance(settings, dict):
            return command, settings
    return command, {}


def _training(run: Path, trained: Path, command: list[str], settings: dict[str, Any]) -> Iterator[str]:
    """Yield what the weights were trained on, for how long, the settings and the command line."""
    yield from ("## Training", "")
    for name, label in DATA.items():
        if isinstance(settings.get(name), str) and settings[name]:
            yield f"- {label}: {_code(public(settings[name]))}"
    with suppress(*FACTS):
        progress = json.loads((trained / "training" / "progress.json").read_text(encoding="utf8"))
        minutes = f"{progress['seconds'] / 60:,.1f} minutes"
        yield f"- Length: {progress['step']:,} optimiser steps, {progress['tokens']:,} tokens, {minutes} of training"
    if shown := public_settings({name: value for name, value in settings.items() if name not in DATA}):
        yield from ("", "Settings:", "", "```yaml")
        yield yaml.safe_dump(shown, allow_unicode=True, sort_keys=False).replace("```", "").rstrip()
        yield "```"
    if command and command[0] in STAGES:
        yield from ("", "Command line:", "", "```bash", f"python {shlex.join(public_words(command))}", "```")
    yield ""


def _held_out(run: Path, trained: Path) -> Iterator[str]:
    """Yield the measures of the last validation until this checkpoint, beside those before training."""
    entries: list[dict[str, Any]] = []
    with suppress(*FACTS):
        until = json.loads((trained / "training" / "progress.json").read_text(encoding="utf8"))["step"]
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            with suppress(*FACTS):  # a line that was cut short
                entry = json.loads(line)
                if entry["step"] <= until and any(isinstance(entry.get(name), int | float) for name in MEASURES):
                    entries.append(entry)
    if not entries:
        return
    first, last = (_measures(entry) for entry in (entries[0], entries[-1]))
    yield from ("## Held-out data", "")
    with suppress(*FACTS):
        names = ", ".join(f"{kind} of {_code(public(name))}" for kind, name in entries[-1]["held_out"].items())
        yield from (f"Measured on {names} (files, and a hash of the content).", "")
    yield from ("| | before | after |", "|---|---|---|")
    for name, value in last.items():
        yield f"| {MEASURES[name]} | {first.get(name, '') if entries[0]['step'] == 0 else ''} | {value} |"
    yield ""


def _measures(entry: dict[str, Any]) -> dict[str, str]:
    """Return the measures of a validation. In metrics.jsonl `val_accuracy` of pairs is the share that is preferred."""
    if "val_margin" in entry and "val_accuracy" in entry:
        entry = {**entry, "val_preferred": entry["val_accuracy"], "val_accuracy": None}
    numbers = {name: entry[name] for name in MEASURES if isinstance(entry.get(name), int | float)}
    return {name: f"{value:.1%}" if name in SHARES else f"{value:.4f}" for name, value in numbers.items()}


def _scores(run: Path, folder: Path) -> list[str]:
    """Return what eval/run.py has measured of these weights, each suite as a whole."""
    rows = []
    with suppress(*FACTS):
        found = json.loads((run / "eval" / folder.name / "scores.json").read_text(encoding="utf8"))
        stat = (folder / WEIGHTS).stat()
        if [WEIGHTS, stat.st_size, stat.st_mtime_ns] in found["weights"]["files"]:
            for suite, measured in found["suites"].items():
                for score in measured["scores"]:
                    if score["group"] in ("all", "mean of subjects"):
                        form = "{:.1%}" if score["share"] else "{:.4f}"
                        ends = [form.format(score[end]) for end in ("low", "high") if score[end] is not None]
                        chance = "" if score["chance"] is None else form.format(score["chance"])
                        cells = (public(suite), score["metric"], form.format(score["value"]), " to ".join(ends), chance)
                        rows.append(f"| {' | '.join(cell.replace('|', ' ') for cell in cells)} | {score['items']} |")
    head = ["## Scores", "", "| suite | metric | value | 95% interval | chance | items |", "|---|---|---|---|---|---|"]
    return [*head, *rows, ""] if rows else []


def _size(config: LMConfig) -> list[str]:
    costs, layers = count(config), config.num_hidden_layers
    sparse = layers - config.first_k_dense_replace
    mtp = f", and {human(costs.mtp)} of multi-token prediction" if costs.mtp else ""
    routed = f"{config.num_experts_per_tok} of {config.n_routed_experts} routed"
    return [
        "## Size",
        "",
        f"- {human(costs.total)} parameters, {human(costs.activated)} of which a token activates{mtp}",
        f"- {layers} layers of width {config.hidden_size}; in {sparse} of them a token uses {routed} experts "
        f"and {config.n_shared_experts} shared",
        f"- vocabulary of {config.vocab_size:,}, context of {config.max_position_embeddings:,} tokens",
        f"- cache of a token in bfloat16: {human(costs.cache_bytes, 'B')} "
        f"(multi-head attention with these heads: {human(costs.mha_cache_bytes, 'B')})",
        f"- training FLOPs of a token at a length of 512: {human(costs.flops)}",
        "",
    ]


def _chats(folder: Path) -> bool:
    with suppress(*FACTS):
        return "chat_template" in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf8"))
    return False


def _use(chats: bool, hello: tuple[str, str], in_transformers: bool) -> list[str]:
    """Return the lines that run a model that chats, or one that continues a text."""
    if chats:
        words, answer = json.dumps([{"role": "user", "content": hello[0]}], ensure_ascii=False), '[-1]["content"]'
        command = f'python eval/chat.py --ckpt FOLDER --once "{hello[0]}"'
    else:
        words, answer = f'"{hello[1]}"', ""
        command = "python full_sft.py --ckpt FOLDER --data chats.jsonl --out out/sft"
    elsewhere = USE_TRANSFORMERS.format(words=words, answer=answer) if in_transformers else ""
    return [USE.format(transformers=elsewhere, command=command)]


def _languages(folder: Path) -> list[str]:
    """Return the languages of a twentieth and more of the vocabulary's words: it was made of the training text."""
    with suppress(*FACTS):
        words = json.loads((folder / "tokenizer.json").read_text(encoding="utf8"))["model"]["vocab"]
        found = {name: sum(1 for word in words if sign.search(word)) for name, sign in LANGUAGES.items()}
        return [name for name, number in found.items() if 20 * number >= sum(found.values()) > 0]
    return []


def _code(text: str) -> str:
    return f"`{text.replace('`', ' ')}`"
