"""lm-evaluation-harness on a checkpoint: the same log-likelihoods, accuracies and bits per byte as eval/run.py.

python tests/checks/check_lm_eval.py --ckpt out/demo/grpo/final [--questions FILE.jsonl] [--server URL]

lm-eval's own command reads the same questions from JSON lines with templates written here, and the checkpoint through
transformers or from a server of this project (`make check-server`). Needs lm-eval: `make check-lm-eval` installs it.
Nothing is fetched. Ends with code 1 if anything differs.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import eval.harness
from cli import call
from errors import UserError, command_line
from eval.harness import measure, open_lm
from eval.model_path import ModelPath
from eval.tasks.choices import ChoiceItem
from eval.tasks.opened import open_task
from text.chats.arithmetic import arithmetic_problem
from text.tokenizer import SPECIAL_TOKENS

DIGITS = 4  # that lm-eval prints
RELATIVE = 1e-5  # of a log-likelihood: what the order of float32 sums may change
INTRO = "The following are multiple choice questions (with answers) about {subject}.\n\n"
LETTERS = "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
SHOTS = 5
WINDOW = 1024  # tokens that texts are scored in


def check(ckpt: str, questions: str = "", count: int = 100, server: str = "") -> None:
    """Compare a checkpoint's scores with those of lm-eval's own model, each from its own reading of the same files.

    Args:
        ckpt: checkpoint folder, of this project or any that transformers opens.
        questions: JSONL with question, answer and kind; wrong choices are other answers of the kind.
        count: questions of a subject.
        server: URL/NAME of eval/serve.py with this checkpoint as the model NAME, in float32; empty: transformers.
    """
    lm = open_lm(ModelPath.find(ckpt), torch.device("cpu"), torch.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subjects = {"whole_numbers": sums(count + SHOTS)}
        if questions:
            subjects["a small world"] = from_questions(Path(questions), count + SHOTS)
        names = [task for subject, items in subjects.items() for task in write_choices(folder, subject, items)]
        window = min(WINDOW, lm.max_length) - (2 if server else 0)  # requests ask for a token more than they score
        names += [write_texts(folder, subjects, window)]
        if server:
            url, _, model = server.rpartition("/")
            options = f"base_url={url}/v1/completions,model={model},tokenizer_backend=remote,num_concurrent=8"
            options += f",max_length={window + 2},custom_prefix_token_id={SPECIAL_TOKENS.index('<s>')}"
            theirs = run_lm_eval("local-completions", options, folder, names)
        else:
            options = f"pretrained={Path(ckpt).absolute()},dtype=float32,max_length={window}"
            theirs = run_lm_eval("hf", options, folder, names)
        failed, found = False, []
        evaluate = eval.harness.simple_evaluate
        eval.harness.simple_evaluate = lambda *given, **more: found.append(evaluate(*given, **more)) or found[0]
        for task in (open_task(str(folder / "ours" / f"{name}.yaml")) for name in names):
            ours = measure(task, task.settings.docs(), lm, {}, folder / "answers" / task.name)
            samples = found.pop()["samples"][task.name]
            nats = [_nats(answer) for sample in samples for answer in sample["filtered_resps"]]
            values = {score.metric: score.value for score in ours.scores if score.group == "all"}
            failed |= differs(task.name, values, nats, theirs[task.name])
    print("differs" if failed else "lm-eval and this project agree")
    sys.exit(int(failed))


def sums(count: int) -> list[ChoiceItem]:
    """Sums with wrong numbers of several lengths, so that accuracies differ when lengths are taken out."""
    items = []
    for number in range(count):
        rng = random.Random(number)
        question, answer = arithmetic_problem(rng, 1 + number % 3, held_out=True)
        value = int(re.findall(r"-?\d+", str(answer))[-1])
        wrong = rng.sample([v for v in (value + 1, value + 10, value - 1, value * 11, value + 100) if v != value], 3)
        choices = [str(choice) for choice in (value, *wrong)]
        rng.shuffle(choices)
        items.append(ChoiceItem("whole_numbers", question, tuple(choices), choices.index(str(value))))
    return items


def from_questions(path: Path, count: int) -> list[ChoiceItem]:
    """Questions of the demo world, the wrong choices being right answers to others of their kind."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
    kind = lambda row: (row["kind"], row.get("language"))  # noqa: E731
    rng, items = random.Random(0), []
    for row in rng.sample(rows, len(rows)):
        wrong = sorted({other["answer"] for other in rows if kind(other) == kind(row)} - {row["answer"]})
        if len(wrong) >= 3:
            choices = [row["answer"], *rng.sample(wrong, 3)]
            rng.shuffle(choices)
            items.append(ChoiceItem("a small world", row["question"], tuple(choices), choices.index(row["answer"])))
    return items[:count]


def write_choices(folder: Path, subject: str, items: Sequence[ChoiceItem]) -> list[str]:
    """The questions in MMLU's layout for us and as JSON lines for lm-eval, with a task file for each way to ask."""
    parts, name = {"dev": items[:SHOTS], "test": items[SHOTS:]}, subject.replace(" ", "_")
    for split, part in parts.items():
        (folder / name / split).mkdir(parents=True)
        with open(folder / name / split / f"{name}_{split}.csv", "w", encoding="utf8", newline="") as file:
            csv.writer(file).writerows([item.question, *item.choices, "ABCD"[item.answer]] for item in part)
        write_lines(folder / f"{name}-{split}.jsonl", [item._asdict() for item in part])
    names = []
    for form, shots in (("letters", 0), ("letters", SHOTS), ("text", 0)):
        names.append(f"{name}_{form}_{shots}")
        settings = {"data": str(folder / name), "shots": shots, "form": form, "intro": INTRO}
        task = {
            "dataset_kwargs": {"data_files": {split: str(folder / f"{name}-{split}.jsonl") for split in parts}},
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": shots,
            "output_type": "multiple_choice",
            "description": INTRO.replace("{subject}", name.replace("_", " ")),
            "doc_to_text": LETTERS if form == "letters" else "{{question.strip()}}\nAnswer:",
            "doc_to_choice": ["A", "B", "C", "D"] if form == "letters" else "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        write_task(folder, names[-1], {"multiple_choice": settings}, task)
    return names


def write_texts(folder: Path, subjects: dict[str, list[ChoiceItem]], window: int) -> str:
    """Documents of several lengths, the last one longer than a window."""
    lines = [f"{item.question} {item.choices[item.answer]}" for items in subjects.values() for item in items]
    texts = [*lines[:20], "\n".join(lines[20:60]), "\n".join(lines * 3)]
    write_lines(folder / "texts.jsonl", [{"text": text} for text in texts if text])
    task = {
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}},
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    # lm-eval lets a text follow <s>, and scores windows that share one token.
    settings = {"data": str(folder / "texts.jsonl"), "window": window, "stride": window, "start": "bos"}
    write_task(folder, "texts", {"text": settings}, task)
    return "texts"


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")


def write_task(folder: Path, name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    theirs = {"task": name, "dataset_path": "json", "test_split": "test", **theirs}
    for maker, content in (("ours", ours), ("theirs", theirs)):
        (folder / maker).mkdir(exist_ok=True)
        (folder / maker / f"{name}.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf8")


def run_lm_eval(model: str, options: str, folder: Path, tasks: Sequence[str]) -> dict[str, dict]:
    """Its metrics of one of its kinds of model, by task, and under `nats` the log-likelihoods of all items."""
    out = folder / "lm-eval"
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", options, "--tasks", ",".join(tasks)]
    command += ["--include_path", str(folder / "theirs"), "--device", "cpu", "--batch_size", "8", "--log_samples"]
    command += ["--output_path", str(out)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"lm-eval ended with code {done.returncode}: {done.stderr[-2000:]}")
    (results,) = out.rglob("results_*.json")
    found = json.loads(results.read_text(encoding="utf8"))["results"]
    for task in tasks:
        (samples,) = out.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text(encoding="utf8").splitlines()]
        rows.sort(key=lambda row: row["doc_id"])
        found[task]["nats"] = [_nats(answer) for row in rows for answer in row["filtered_resps"]]
    return found


def _nats(answer: float | Sequence) -> float:
    return float(answer[0] if isinstance(answer, list | tuple) else answer)


def differs(task: str, ours: dict[str, float], nats: list[float], theirs: dict) -> bool:
    """Whether a metric differs in a digit that lm-eval prints, or a log-likelihood by more than rounding."""
    pairs = list(zip(nats, theirs["nats"], strict=True))
    most = max(abs(a - b) for a, b in pairs)
    failed, shown = max(abs(a - b) / max(abs(b), 1) for a, b in pairs) > RELATIVE, []
    for metric in ("acc", "acc_norm", "bits_per_byte"):
        if f"{metric},none" in theirs:
            value = theirs[f"{metric},none"]
            failed |= round(ours[metric], DIGITS) != round(value, DIGITS)
            shown.append(f"{metric} {ours[metric]:.{DIGITS}f} (lm-eval {value:.{DIGITS}f})")
    print(f"{task}: {', '.join(shown)}; {len(pairs)} log-likelihoods differ by at most {most:.2g} nats")
    return failed


if __name__ == "__main__":
    command_line(lambda: call(check, __doc__ or ""))
