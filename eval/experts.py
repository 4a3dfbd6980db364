"""Which experts work on which texts: a heat map for each MoE layer, and MaxVio over the run.

python eval/experts.py --ckpt out/pretrain/final --file chinese.txt,english.txt,code.txt
"""

from __future__ import annotations

import json
from pathlib import Path

from cli import call
from errors import check_least, command_line, naming
from eval.answering import Answerer
from eval.expert_loads import draw, loads, markdown, relative, specialisation
from eval.score_files import out_folder
from eval.tasks.texts import Text
from training.metrics import max_violation
from training.run.log import read_metrics


def experts(
    ckpt: str,
    file: str,
    out: str = "",
    tokens: int = 100_000,
    column: str = "text",
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Write experts.json, experts.md and experts.png.

    Args:
        ckpt: checkpoint folder of this project
        file: texts, one file a domain, separated by commas: .txt, or rows as .csv, .jsonl, .parquet
        out: folder for the results; left out: eval/ beside the checkpoint
        tokens: most tokens of each domain
        column: of files with rows
        device: auto, cpu or cuda
        dtype: auto, bf16 or fp32
    """
    check_least(1, tokens=tokens)
    texts: dict[str, list[str]] = {}
    for document in Text(data=file, column=column).docs():
        texts.setdefault(document["group"], []).append(document["text"])
    names = {source: Path(source).stem for source in texts}
    answerer = Answerer.open(ckpt, device, dtype)
    domains = {
        source if list(names.values()).count(names[source]) > 1 else names[source]: loads(answerer, own, tokens)
        for source, own in texts.items()
    }
    folder, entries = (
        Path(out) if out else out_folder(ckpt),
        read_metrics(Path(ckpt).absolute().parent / "metrics.jsonl"),
    )
    content = {
        "domains": {
            domain: {"counts": counts.tolist(), "relative": relative(counts).tolist(), "max_vio": max_violation(counts)}
            for domain, counts in domains.items()
        },
        "distance": specialisation(list(domains.values())),
    }
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "experts.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf8")
        (folder / "experts.md").write_text(markdown(ckpt, domains), encoding="utf8")
    draw(ckpt, domains, entries, folder / "experts.png")
    print(markdown(ckpt, domains))
    print(f"written: {', '.join(str(folder / f'experts.{kind}') for kind in ('json', 'md', 'png'))}")


if __name__ == "__main__":
    command_line(lambda: call(experts, __doc__ or ""))
