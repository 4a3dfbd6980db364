"""lm-evaluation-harness on a checkpoint: the same log-likelihoods, accuracies and bits per byte as eval/run.py.

python tests/check_lm_eval.py --ckpt out/demo/grpo/final [--questions data/demo/heldout_questions.jsonl]

Needs lm-eval: `make check-lm-eval` installs it. Nothing is fetched: questions and texts are made here. Ends with code 1
where anything differs.
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
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import yaml

from cli import call
from errors import UserError, command_line
from eval.opened_model import OpenedModel, open_model
from eval.suites.choice_rows import ChoiceItem
from eval.suites.measuring import measure
from eval.suites.multiple_choice import MultipleChoice
from eval.suites.suite import Score, Suite
from eval.suites.text_likelihood import TextLikelihood
from text.chats.arithmetic import arithmetic_problem

DIGITS = 4  # that lm-eval prints
RELATIVE = 1e-5  # of a log-likelihood: what the order of float32 sums may change
INTRO = "The following are multiple choice questions (with answers) about {subject}.\n\n"
LETTERS = "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
SHOTS = 5
WINDOW = 1024  # tokens that texts are scored in


def check(ckpt: str, questions: str = "", count: int = 100) -> None:
    """Compare a checkpoint's scores with lm-eval's, each from its own reading of the same files.

    Args:
        ckpt: checkpoint folder, of this project or any that transformers opens.
        questions: JSONL with question, answer and kind; wrong choices are other answers of the kind.
        count: questions of a subject.
    """
    if find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed; run make check-lm-eval")
    model = open_model(ckpt, "cpu", "fp32")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subjects = {"whole_numbers": sums(count + SHOTS)}
        if questions:
            subjects["a small world"] = from_questions(Path(questions), count + SHOTS)
        suites: dict[str, Suite] = {}
        for subject, items in subjects.items():
            suites |= write_choices(folder, subject, items)
        suites["texts"] = write_texts(folder, subjects)
        theirs = run_lm_eval(ckpt, min(WINDOW, model.context), folder, list(suites))
        failed = False
        for task, suite in suites.items():
            failed |= differs(task, suite, model, folder, theirs[task])
    print("differs" if failed else "lm-eval and this project agree")
    sys.exit(failed)


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
    rng, items = random.Random(0), []
    for row in rng.sample(rows, len(rows)):
        same = {
            other["answer"]
            for other in rows
            if (other["kind"], other.get("language")) == (row["kind"], row.get("language"))
        }
        wrong = sorted(same - {row["answer"]})
        if len(wrong) >= 3:
            choices = [row["answer"], *rng.sample(wrong, 3)]
            rng.shuffle(choices)
            items.append(ChoiceItem("a small world", row["question"], tuple(choices), choices.index(row["answer"])))
    return items[:count]


def write_choices(folder: Path, subject: str, items: Sequence[ChoiceItem]) -> dict[str, Suite]:
    """The questions in MMLU's layout for us and as JSON lines for lm-eval, with a task file for each way to ask."""
    parts = {"dev": items[:SHOTS], "test": items[SHOTS:]}
    place = folder / subject.replace(" ", "_")
    for split, part in parts.items():
        (place / split).mkdir(parents=True)
        with open(place / split / f"{subject.replace(' ', '_')}_{split}.csv", "w", encoding="utf8", newline="") as file:
            csv.writer(file).writerows([item.question, *item.choices, "ABCD"[item.answer]] for item in part)
        rows = [{"question": item.question, "choices": item.choices, "answer": item.answer} for item in part]
        write_lines(place / f"{split}.jsonl", rows)
    suites: dict[str, Suite] = {}
    for form, shots in (("letters", 0), ("letters", SHOTS), ("text", 0)):
        name = f"{place.name}_{form}_{shots}"
        suites[name] = MultipleChoice(data=str(place), shots=shots, form=form, intro=INTRO)
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {split: str(place / f"{split}.jsonl") for split in parts}},
            "test_split": "test",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": shots,
            "output_type": "multiple_choice",
            "description": INTRO.replace("{subject}", place.name.replace("_", " ")),
            "doc_to_text": LETTERS if form == "letters" else "{{question.strip()}}\nAnswer:",
            "doc_to_choice": ["A", "B", "C", "D"] if form == "letters" else "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, allow_unicode=True), encoding="utf8")
    return suites


def write_texts(folder: Path, subjects: dict[str, list[ChoiceItem]]) -> Suite:
    """Documents of several lengths, the last one longer than a window."""
    lines = [f"{item.question} {item.choices[item.answer]}" for items in subjects.values() for item in items]
    texts = [*lines[:20], "\n".join(lines[20:60]), "\n".join(lines * 3)]
    write_lines(folder / "texts.jsonl", [{"text": text} for text in texts if text])
    task = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (folder / "texts.yaml").write_text(yaml.safe_dump(task), encoding="utf8")
    # lm-eval lets a text follow <s>, and scores windows that share one token.
    return TextLikelihood(data=str(folder / "texts.jsonl"), window=WINDOW, stride=WINDOW, start="bos")


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf8")


def run_lm_eval(ckpt: str, context: int, folder: Path, tasks: Sequence[str]) -> dict[str, dict]:
    """Its metrics by task, and under `nats` the log-likelihoods of each item."""
    out = folder / "lm-eval"
    arguments = f"pretrained={Path(ckpt).absolute()},dtype=float32,max_length={context}"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--tasks", ",".join(tasks)]
    command += ["--include_path", str(folder), "--device", "cpu", "--batch_size", "8", "--log_samples"]
    command += ["--output_path", str(out)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"lm-eval ended with code {done.returncode}: {done.stderr[-2000:]}")
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("|")))
    (results,) = out.rglob("results_*.json")
    found = json.loads(results.read_text(encoding="utf8"))["results"]
    for task in tasks:
        (samples,) = out.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text(encoding="utf8").splitlines()]
        rows.sort(key=lambda row: row["doc_id"])
        found[task]["nats"] = [[_nats(answer) for answer in row["filtered_resps"]] for row in rows]
    return found


def _nats(answer: float | Sequence) -> float:
    return float(answer[0] if isinstance(answer, list) else answer)


def differs(task: str, suite: Suite, model: OpenedModel, folder: Path, theirs: dict) -> bool:
    """Whether a metric differs in a digit that lm-eval prints, or a log-likelihood by more than rounding."""
    measured = measure(task, suite, suite.items(0), model, {}, folder / "ours")
    ours = {score.metric: score for score in measured.scores if score.group == "all"}
    rows = [json.loads(line) for line in (folder / "ours" / f"{task}.jsonl").read_text().splitlines()[1:]]
    nats = [row["nats"] if isinstance(row["nats"], list) else [-row["nats"]] for row in rows]
    pairs = [(a, b) for own, given in zip(nats, theirs["nats"], strict=True) for a, b in zip(own, given, strict=True)]
    most = max(abs(a - b) for a, b in pairs)
    relative = max(abs(a - b) / max(abs(b), 1) for a, b in pairs)
    failed, shown = relative > RELATIVE, []
    equal: Callable[[Score, float], bool] = lambda score, value: round(score.value, DIGITS) == round(value, DIGITS)  # noqa: E731
    for metric in ("acc", "acc_norm", "bits_per_byte"):
        if f"{metric},none" in theirs:
            value = theirs[f"{metric},none"]
            failed |= not equal(ours[metric], value)
            shown.append(f"{metric} {ours[metric].value:.{DIGITS}f} (lm-eval {value:.{DIGITS}f})")
    print(f"{task}: {', '.join(shown)}; {len(pairs)} log-likelihoods differ by at most {most:.2g} nats")
    return failed


if __name__ == "__main__":
    command_line(lambda: call(check, __doc__ or ""))
