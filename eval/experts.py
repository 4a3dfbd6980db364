"""Which experts work on which texts (DeepSeek-V3, Figure 9): a heat map for each MoE layer.

python eval/experts.py --ckpt out/pretrain/final --file chinese.txt,english.txt,code.txt
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cli import call
from errors import UserError, check_least, command_line, naming
from eval.answering import Answerer
from eval.likelihood import AT_ONCE, padded
from eval.score_files import out_folder, table
from eval.tasks.texts import Text
from text.files import json_text
from training.metrics import max_violation
from training.run.plots import load_pyplot, plain

WINDOW = 512


@torch.inference_mode()
def loads(answerer: Answerer, texts: Sequence[str], most_tokens: int) -> Tensor:
    """Count the choices of each expert by the first `most_tokens` tokens: (MoE layers, experts) float64."""
    model, tokenizer = answerer.model, answerer.tokenizer
    moe_layers = sum(layer.is_moe for layer in model.model.layers)
    if not moe_layers:
        raise UserError("eval/experts.py: this checkpoint has no experts; its layers are all dense")
    line: list[int] = []
    for text in texts:
        line += [tokenizer.eos_id, *tokenizer.encode(text)]  # a document follows the end of another
        if len(line) >= most_tokens:
            break
    line, window = line[:most_tokens], min(WINDOW, model.config.max_position_embeddings)
    windows = [line[start : start + window] for start in range(0, len(line), window)]
    total, rows = torch.zeros(moe_layers, model.config.n_routed_experts, dtype=torch.float64), max(AT_ONCE // window, 1)
    for start in tqdm(range(0, len(windows), rows), disable=None, desc="reading", leave=False):
        part = windows[start : start + rows]
        width = max(map(len, part))
        ids = padded(part, width, tokenizer.pad_id).to(answerer.device)
        # A negative segment is padding, which is counted in no expert's load.
        segments = padded([[0] * len(row) for row in part], width, -1).to(answerer.device)
        total += model(ids, segment_ids=segments).counts.double().cpu()
    return total


def relative(counts: Tensor) -> Tensor:
    """Return loads over the mean load of their layer: 1 is even, as the paper's relative expert load."""
    return counts / counts.mean(-1, keepdim=True).clamp(min=1e-9)


def specialisation(counts: Sequence[Tensor]) -> list[float]:
    """Return how far the domains' loads are apart in each layer: the mean total variation distance of all pairs."""
    apart = [(a - b).abs().sum(-1) / 2 for a, b in combinations(map(_shares, counts), 2)]
    return (sum(apart) / len(apart)).tolist() if apart else [0.0] * len(counts[0])


def markdown(name: str, domains: dict[str, Tensor]) -> str:
    """Return MaxVio of each layer and domain, and how far the domains are apart."""
    counts = list(domains.values())
    together = sum(map(_shares, counts))  # each domain of the same weight
    rows = [
        [title, total, *(f"{value:.2f}" for value in max_violation(loads))]
        for title, total, loads in [
            *((domain, str(int(loads[0].sum())), loads) for domain, loads in domains.items()),
            ("all together", "", together),
        ]
    ]
    rows.append(["distance of the domains", "", *(f"{value:.3f}" for value in specialisation(counts))])
    header = ["MaxVio", "choices a layer", *(f"MoE layer {layer + 1}" for layer in range(len(together)))]
    return "\n".join([f"# Experts of {name}", "", *table(rows, header), ""])


def draw(name: str, domains: dict[str, Tensor], path: Path) -> None:
    """Draw a heat map of domains and experts for each layer."""
    pyplot = load_pyplot()
    shown = torch.stack([relative(counts) for counts in domains.values()])  # (domains, layers, experts)
    layers, experts = shown.shape[1:]
    columns = min(layers, 3)
    rows = -(-layers // columns)
    figure = pyplot.figure(figsize=(5.2 * columns, rows * (1.2 + 0.45 * len(domains))), layout="constrained")
    maps = []
    for layer in range(layers):
        axis = figure.add_subplot(rows, columns, layer + 1)
        shades = {"cmap": "viridis", "vmin": 0, "vmax": max(2.0, float(shown.max()))}
        image = axis.imshow(shown[:, layer].numpy(), aspect="auto", **shades)
        axis.set(title=f"MoE layer {layer + 1}", xlabel="expert", xticks=range(0, experts, max(experts // 8, 1)))
        axis.set_yticks(range(len(domains)), list(map(plain, domains)) if layer % columns == 0 else [""] * len(domains))
        maps.append(axis)
    figure.colorbar(image, ax=maps, label="load / mean load")
    figure.suptitle(plain(name))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _shares(counts: Tensor) -> Tensor:
    """Return the loads of each layer over their sum."""
    return counts / counts.sum(-1, keepdim=True).clamp(min=1e-9)


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
    names = [Path(source).stem for source in texts]
    titles = [name if names.count(name) == 1 else source for name, source in zip(names, texts, strict=True)]
    answerer = Answerer.open(ckpt, device, dtype)
    domains = {title: loads(answerer, own, tokens) for title, own in zip(titles, texts.values(), strict=True)}
    folder, page = Path(out) if out else out_folder(ckpt), markdown(ckpt, domains)
    content = {
        "domains": {
            domain: {"counts": counts.tolist(), "relative": relative(counts).tolist(), "max_vio": max_violation(counts)}
            for domain, counts in domains.items()
        },
        "distance": specialisation(list(domains.values())),
    }
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "experts.json").write_text(json_text(content) + "\n", encoding="utf8")
        (folder / "experts.md").write_text(page, encoding="utf8")
    draw(ckpt, domains, folder / "experts.png")
    print(page)
    print(f"written: {folder / 'experts.json'}, {folder / 'experts.md'}, {folder / 'experts.png'}")


if __name__ == "__main__":
    command_line(lambda: call(experts, __doc__ or ""))
