"""What a checkpoint knows: suites of questions and texts, measured on any model.

python eval/run.py --ckpt out/demo/sft/final --suite demo-questions,demo-text
python eval/run.py --ckpt out/demo/sft/final --suite ceval=data/ceval,mmlu-5-shot=data/mmlu
python eval/run.py --ckpt SmolLM2-135M-Instruct.Q4_1.gguf --suite my.yaml --limit 100

Built-in suites are the files of configs/eval; docs/evaluation.md tells of them. A run that was stopped goes on.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from cli import call
from errors import UserError, command_line
from eval.opened_model import open_model
from eval.score_files import out_folder, weights_of, write_scores
from eval.suites.kinds import KINDS
from eval.suites.measuring import measure
from eval.suites.score_table import HEADER, cells
from eval.suites.suite import open_suites


def run(ckpt: str, suite: str, out: str = "", limit: int = 0, device: str = "auto", dtype: str = "auto") -> None:
    """Measure a checkpoint on suites, and write scores.json, scores.md and scores.png.

    Args:
        ckpt: checkpoint folder, of this project or any that transformers opens, or a .gguf file
        suite: names or .yaml files separated by commas; NAME=DATA measures on other data
        out: folder for the results; left out: eval/ beside the checkpoint, or out/eval/NAME
        limit: most items of each suite, evenly spread; 0: all
        device: auto, cpu or cuda
        dtype: auto, bf16 or fp32
    """
    if limit < 0:
        raise UserError(f"--limit {limit}: give 0 for all items, or a number of them")
    suites = open_suites(suite, KINDS)
    items = {name: one.items(limit) for name, one in suites.items()}
    for name, found in items.items():
        if not found:
            raise UserError(f"--suite {name}: {suites[name].data} has nothing to measure in it; give other data")
    model = open_model(ckpt, device, dtype)
    folder, weights = Path(out) if out else out_folder(ckpt), weights_of(ckpt, model.dtype)
    measured = [measure(name, one, items[name], model, weights, folder) for name, one in suites.items()]
    written = write_scores(folder, ckpt, weights, measured)
    table = Table(*HEADER, title=ckpt)
    for one in measured:
        for score in one.scores:
            table.add_row(*cells(one.name, score))
    console = Console()
    # Without a terminal 80 columns are assumed, in which every cell would be cut.
    console.width = max(console.width, 120)
    console.print(table)
    print(f"scores: {', '.join(map(str, written))}")


if __name__ == "__main__":
    command_line(lambda: call(run, __doc__ or ""))
