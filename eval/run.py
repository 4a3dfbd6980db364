"""What a checkpoint knows: lm-evaluation-harness's tasks and this project's own, measured on any model.

python eval/run.py --ckpt out/demo/sft/final --tasks demo-questions,demo-text
python eval/run.py --ckpt out/demo/sft/final --tasks ceval=data/ceval,mmlu-5-shot=data/mmlu,arc_easy
python eval/run.py --ckpt SmolLM2-135M-Instruct.Q4_1.gguf --tasks my.yaml --limit 100

This project's tasks are the files of eval/tasks; docs/evaluation.md describes them. A run that was stopped resumes.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from cli import call
from errors import UserError, command_line
from eval.model_path import ModelPath
from eval.score_files import cells, is_of_run, out_folder, table, weights_of, write_scores
from eval.tasks.docs import Docs
from eval.tasks.opened import open_tasks
from model.checkpoint.card import renew_card
from model.checkpoint.folder import CARD
from training.machine import choose_dtype
from training.parallel.ranks import Ranks

INSTALL = "pip install lm-eval==0.4.13"


def run(
    ckpt: str,
    tasks: str = "",
    suite: str = "",
    out: str = "",
    limit: int = 0,
    shots: int | None = None,
    chat: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Measure a checkpoint on tasks, and write scores.json, scores.md and scores.png.

    Args:
        ckpt: checkpoint folder, of this project or any that transformers opens, or a .gguf file
        tasks: names or .yaml files separated by commas; NAME=DATA measures on other data
        suite: the same; a name that lm-eval has too, such as mmlu, is that of this project on the data in its file
        out: folder for the results; left out: eval/ beside the checkpoint, or out/eval/NAME
        limit: most items of each task, evenly spaced; of lm-eval's own tasks the first; 0: all
        shots: worked questions before each of lm-eval's own tasks; left out: as many as the task has
        chat: ask lm-eval's own tasks in the model's chat template
        device: auto, cpu or cuda
        dtype: auto, bf16 or fp32
    """
    if limit < 0:
        raise UserError(f"--limit {limit}: give 0 for all items, or a number of them")
    found = [*(open_tasks(suite, theirs_first=False) if suite else []), *(open_tasks(tasks) if tasks else [])]
    if not found:
        raise UserError("--tasks: names nothing; give a name or a .yaml file")
    docs = [task.settings.docs(limit) if task.settings else Docs() for task in found]
    for task, own in zip(found, docs, strict=True):
        if task.settings and not own:
            raise UserError(f"--tasks {task.name}: {task.settings.data} has nothing to measure in it; give other data")
    place, model_path = Ranks.start(device).device, ModelPath.find(ckpt)
    if find_spec("lm_eval") is None:
        raise UserError(f"eval/run.py: lm-evaluation-harness is not installed; {INSTALL}")
    from eval.harness import measure, name_of, open_lm  # needs lm-eval

    number_type = choose_dtype(dtype, place)
    lm = open_lm(model_path, place, number_type)
    folder, weights = Path(out) if out else out_folder(ckpt), weights_of(ckpt, name_of(number_type))
    measured, written = [], []
    for task, own in zip(found, docs, strict=True):
        measured.append(measure(task, own, lm, weights, folder, limit, shots, chat))
        written = write_scores(folder, ckpt, weights, measured)
    if is_of_run(Path(ckpt)) or (Path(ckpt) / CARD).is_file():
        renew_card(Path(ckpt))
    print("\n".join(table([cells(one.name, score) for one in measured for score in one.scores])))
    print(f"scores: {', '.join(map(str, written))}")


if __name__ == "__main__":
    command_line(lambda: call(run, __doc__ or ""))
