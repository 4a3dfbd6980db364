"""What the stages of one run folder achieved: a table, sample answers and curves; or one page of any runs.

python eval/report.py --out out/demo --questions data/demo/heldout_questions.jsonl \\
    --favours data/demo/heldout_favours.jsonl --sums arithmetic:1-2
python eval/report.py --html out/a out/b --out out/report        report.html of what these runs logged; measures nothing
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cli import call
from dataset import PretrainDataset, PromptDataset
from errors import UserError, command_line
from eval.answering import Answerer
from eval.held_out import open_corpus, pretraining_settings
from eval.page import PageTable, write_page
from eval.questions import Result, accuracy, ask, read_questions
from eval.score_files import table as markdown_table
from eval.style import read_polite_requests, score_style
from model import MiniDeepSeek
from text.sources.registry import find_sources
from training.alignment.accuracy import Accuracy
from training.alignment.sampler import Sampler
from training.losses import Batch
from training.parallel.ranks import Ranks
from training.run.plots import draw_run, drawn
from training.validation import evaluate, held_out_batches

STAGES = ("pretrain", "sft", "dpo", "grpo")
SUMS = 256  # held-out problems
SUM_TOKENS = 40


def report(
    out: str,
    questions: str = "",
    favours: str = "",
    sums: str = "",
    val_fraction: float = 0.02,
    samples: int = 6,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Measure untrained weights and every stage of a run folder on the same held-out text and questions.

    Args:
        out: folder that holds the stages' runs: pretrain, sft, dpo, grpo
        questions: JSONL with question, answer and kind; empty: no questions
        favours: JSONL with question, answer, opening and closing of the preferred style; empty: no such row
        sums: problems with held-out ones, as for grpo_train.py, such as arithmetic:1-2; empty: no such rows
        val_fraction: share of the problems of a file in sums that training held out
        samples: conversations to show
        device: auto, cpu or cuda
        dtype: auto, bf16 or fp32
    """
    runs = [Path(out) / stage for stage in STAGES if (Path(out) / stage / "final").is_dir()]
    if not runs or runs[0].name != "pretrain":
        raise UserError(f"{out}: no finished pretraining in it (pretrain/final); run make demo first")
    answerers = {run.name: Answerer.open(str(run / "final"), device, dtype) for run in runs}
    first = answerers[runs[0].name]
    torch.manual_seed(0)
    untrained = MiniDeepSeek(first.model.config).to(first.device, first.model.lm_head.weight.dtype).eval()
    answerers = {"untrained": Answerer(untrained, first.tokenizer), **answerers}

    batches = _held_out(runs[0], first)
    asked = read_questions(Path(questions)) if questions else []
    styled = read_polite_requests(Path(favours)) if favours else []
    ranks = Ranks(0, 1, first.device)
    columns, results = {}, []
    for name, answerer in answerers.items():
        bits = evaluate(answerer.model, batches, first.tokenizer.token_bytes, torch.float32, ranks)["val_bits_per_byte"]
        cells = columns[name] = {"bits per byte": f"{bits:.3f}"}
        if asked:
            results = ask(answerer, asked)
            shares = accuracy(results)
            cells["exact answers"] = f"{shares.pop('all'):.0%}"
            cells |= {f"  {kind}": f"{share:.0%}" for kind, share in shares.items()}
        if styled:
            cells["preferred style"] = f"{score_style(answerer, styled)['preferred']:.0%}"
        if sums:
            found = _solved(answerer, sums, val_fraction)
            cells |= {"held-out sums": f"{found['val_accuracy']:.0%}", "  sampled": f"{found['val_pass_1']:.0%}"}
    header = ["held out: never seen in training", *columns]
    lines = [[label, *(cells[label] for cells in columns.values())] for label in columns["untrained"]]

    folder = Path(out) / "report"
    folder.mkdir(exist_ok=True)
    for run in runs:
        if picture := drawn(run) or draw_run(run):
            shutil.copyfile(picture, folder / f"{run.name}.png")
    shown = random.Random(0).sample(results, min(samples, len(results)))
    (folder / "report.md").write_text(_markdown(header, lines, shown, runs), encoding="utf8")
    _print(header, lines, shown)
    curves = ", ".join(str(folder / f"{run.name}.png") for run in runs)
    Console().print(f"report: {folder / 'report.md'}, curves: {curves}")
    answers = [vars(result.question) | {"reply": result.reply, "correct": result.correct} for result in shown]
    page = Path(out) / "report.html"
    write_page([str(run) for run in runs], page, [PageTable(header, lines)], answers)
    print(f"all on one page: {page}")


def _solved(answerer: Answerer, sums: str, val_fraction: float) -> dict[str, float]:
    """Return the shares of held-out problems that are solved by greedy and by sampled answers."""
    longest = answerer.model.config.max_position_embeddings - SUM_TOKENS
    prompts = PromptDataset(
        find_sources(sums, kind="prompt"), answerer.tokenizer, longest, val_fraction=val_fraction, val_problems=SUMS
    )
    if not prompts.validation:
        raise UserError(f"--sums {sums}: nothing is held out; raise --val_fraction")
    sampler = Sampler(answerer.model, torch.float32)  # in the type it was opened in
    accuracy_of = Accuracy(prompts, sampler, SUM_TOKENS, temperature=1.0, rows=SUMS)
    return accuracy_of(answerer.model, torch.float32, Ranks(0, 1, answerer.device))


def _held_out(run: Path, answerer: Answerer) -> list[Batch]:
    """Return the documents that pretraining held out, as it cut them."""
    settings = pretraining_settings(run)
    sources, isolate = open_corpus(settings, answerer.tokenizer), settings.get("isolate", False)
    held_out = PretrainDataset(sources, settings["sequence_length"], split="val", isolate=isolate)
    return held_out_batches(held_out, settings["val_tokens"], settings["micro_tokens"])


def _print(header: list[str], lines: list[list[str]], shown: list[Result]) -> None:
    table, console = Table(header[0]), Console()
    for name in header[1:]:
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for result in shown:
        mark = "right" if result.correct else f"expected: {result.question.answer}"
        console.print(f"> {result.question.question}\n{result.reply}    ({mark})", markup=False, highlight=False)


def _markdown(header: list[str], lines: list[list[str]], shown: list[Result], runs: list[Path]) -> str:
    talk = [f"> {result.question.question}\n>\n> **{result.reply}** ({result.question.answer})\n" for result in shown]
    pictures = [f"## {run.name}\n\n![{run.name}]({run.name}.png)\n" for run in runs]
    title = "## Held-out questions (and the right answers)"
    return "\n".join(["# Report", "", *markdown_table(lines, header), "", title, "", *talk, *pictures])


def main() -> None:
    """Write the page of the runs that `--html` names, or report on the stages of one folder."""
    if not any(word.partition("=")[0] == "--html" for word in sys.argv[1:]):
        return call(report, __doc__ or "")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html", nargs="+", required=True, metavar="RUN", help="run folders, or checkpoints in them")
    parser.add_argument("--out", default="out/report", help="folder for report.html (out/report)")
    given = parser.parse_args()
    page = Path(given.out) / "report.html"
    write_page(given.html, page)
    print(f"written: {page}")


if __name__ == "__main__":
    command_line(main)
