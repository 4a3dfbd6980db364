"""A needle in a haystack (DeepSeek-V3, Figure 8): what a model finds again of a long context, as a heat map.

python -m world.chronicle --out data/demo/long
python eval/needle.py --ckpt out/demo/pretrain/final,out/extended/phase2/final --yarn 16

A fact is planted at a depth in filler of a length, and asked for at the end. A small model cannot be asked to talk
about it, so the measure is a choice: is the planted answer the most likely of those that the fact could have? Guessing
finds one in so many. Beside it: how often the model writes the answer by itself (greedy).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from cli import call
from errors import UserError, check_least, command_line, naming, require, tracked
from eval.answering import Answerer
from eval.likelihood import CacheScorer, Pair, Scored
from eval.perplexity import read_blocks
from eval.questions import read_lines
from eval.score_files import out_folder, table
from eval.scores import wilson
from LMConfig import LMConfig
from text.files import json_text
from text.tokenizer import Tokenizer
from training.machine import choose_dtype
from training.parallel.ranks import Ranks
from training.phases import trained_length, yarn
from training.run.plots import load_pyplot, plain
from training.startup import open_checkpoint


@dataclass(frozen=True)
class Needle:
    """A fact, the question up to where its answer begins, and the answers that the fact could have had."""

    fact: str
    question: str
    answer: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Planted:
    """A row of tokens: its context, the choices' tokens after it, which is planted, and where the fact begins."""

    context: list[int]
    choices: list[list[int]]
    answer: int
    place: int


@dataclass(frozen=True)
class Found:
    """Of one model: shares of trials, (lengths, depths): the planted answer is the likeliest choice; it is written."""

    name: str
    chosen: list[list[float]]
    greedy: list[list[float]]


def read_needles(path: Path) -> list[Needle]:
    """Read JSON lines with fact, question, answer and choices. Raises `UserError` for another row."""

    def make(row: Any) -> Needle:
        needle = Needle(str(row["fact"]), str(row["question"]), str(row["answer"]), tuple(map(str, row["choices"])))
        require(needle.answer in needle.choices, f"{path}: the answer {needle.answer!r} is not among the choices")
        require(needle.answer in needle.fact, f"{path}: the fact {needle.fact!r} does not hold {needle.answer!r}")
        require(len(set(needle.choices)) > 1, f"{path}: {needle.fact!r} needs two choices or more")
        return needle

    return read_lines(path, make, "fact, question, answer and choices")


class Haystack:
    """Filler of any length: documents in a random order, each on lines of its own, again and again if need be."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self._documents = [ids for ids in tokenizer.encode_batch([f"{text}\n" for text in texts]) if ids]

    def filler(self, rng: random.Random, tokens: int) -> list[int]:
        """Return so many tokens that end where a document ends; the first document lacks its beginning."""
        chosen: list[list[int]] = []
        missing = tokens
        while missing > 0:
            for ids in rng.sample(self._documents, len(self._documents)):
                chosen.append(ids)
                missing -= len(ids)
                if missing <= 0:
                    break
        line = [token for ids in reversed(chosen) for token in ids]
        return line[len(line) - tokens :]

    def plant(self, needle: Needle, length: int, depth: float, rng: random.Random) -> Planted:
        """Return a row of `length` tokens, the longest choice with it, whose fact stands at a depth from 0 to 1.

        The question is cut where the choices part, for tokens may reach over the place where an answer begins. Raises
        `UserError` for a row that is too short.
        """
        fact = self.tokenizer.encode(f"{needle.fact}\n")
        asked = self.tokenizer.encode_batch([needle.question + choice for choice in needle.choices])
        same = next(n for n, column in enumerate(zip(*asked, strict=False)) if len(set(column)) > 1)
        choices = [ids[same:] for ids in asked]
        # A document follows the end of another, as in pretraining.
        room = length - 1 - len(fact) - same - max(map(len, choices))
        if room < 0:
            raise UserError(f"--lengths {length}: a fact and its question alone have {length - room} tokens; raise it")
        before = round(depth * room)
        line = [self.tokenizer.eos_id, *self.filler(rng, before), *fact, *self.filler(rng, room - before)]
        return Planted([*line, *asked[0][:same]], choices, needle.choices.index(needle.answer), 1 + before)


def search(
    score_pairs: Callable[[Sequence[Pair]], Iterable[tuple[int, Scored]]], rows: Sequence[Planted]
) -> tuple[float, float]:
    """Return the shares of rows whose planted answer is the likeliest choice, and the greedy continuation."""
    pairs = [(row.context, choice) for row in rows for choice in row.choices]
    scores = [scored for _, scored in sorted(score_pairs(pairs))]
    chosen = greedy = 0
    for row in rows:
        own, scores = scores[: len(row.choices)], scores[len(row.choices) :]
        nats = [value for value, _ in own]
        chosen += nats.index(max(nats)) == row.answer
        greedy += own[row.answer][1]
    return chosen / len(rows), greedy / len(rows)


def look(
    answerer: Answerer, name: str, needles: Sequence[Needle], texts: Sequence[str], lengths: Sequence[int],
    depths: Sequence[float], trials: int, seed: int,
) -> Found:  # fmt: skip
    """Search every cell with facts of its own, the same for every model."""
    scorer, haystack = CacheScorer(answerer), Haystack(answerer.tokenizer, texts)
    cells = [(length, depth) for length in lengths for depth in depths]
    found = []
    for length, depth in tracked(cells, f"{name}, cells", len(cells)):
        rng = random.Random(f"{seed}/{length}/{depth}")
        drawn = [rng.choice(needles) for _ in range(trials)]
        rows = [haystack.plant(needle, length, depth, rng) for needle in drawn]
        found.append(search(scorer.score_pairs, rows))
    by_length = [found[start : start + len(depths)] for start in range(0, len(found), len(depths))]
    chosen, greedy = ([[cell[kind] for cell in row] for row in by_length] for kind in (0, 1))
    return Found(name, chosen, greedy)


def markdown(models: Sequence[Found], lengths: Sequence[int], cell: int, depths: int, chance: float) -> str:
    """Return the means over the depths, with their 95% intervals."""
    rows = []
    for model in models:
        for kind, shares in (("chosen", model.chosen), ("written", model.greedy)):
            means = [sum(row) / len(row) for row in shares]
            ends = [wilson(mean, cell * depths) for mean in means]
            cells = [f"{mean:.0%} ({low:.0%} - {high:.0%})" for mean, (low, high) in zip(means, ends, strict=True)]
            rows.append([model.name, kind, *cells])
    header = ["model", "planted answer", *(f"{length:,} tokens" for length in lengths)]
    note = f"Mean over {depths} depths, {cell} facts each; in brackets the 95% interval. By guessing: {chance:.0%}."
    return "\n".join(["# Needle in a haystack", "", *table(rows, header), "", note, ""])


def draw(models: Sequence[Found], lengths: Sequence[int], depths: Sequence[float], chance: float, path: Path) -> None:
    """Draw a heat map for each model: depth over length."""
    pyplot = load_pyplot()
    width = max(0.7 * len(lengths), 2.5)  # inches of a map
    size = (1.6 + width * len(models), max(1.9 + 0.45 * len(depths), 3.9))  # room for the labels
    figure, axes = pyplot.subplots(1, len(models), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, model in zip(axes.flat, models, strict=True):
        shares = [[100 * share for share in row] for row in zip(*model.chosen, strict=True)]  # (depths, lengths)
        image = axis.imshow(shares, aspect="auto", cmap="RdYlGn", vmin=0, vmax=100)
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                axis.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=8)
        axis.set_title(fill(plain(model.name), round(11 * width)), fontsize=9)
        axis.set(xlabel="context (tokens)", xticks=range(len(lengths)))
        axis.set_xticklabels([f"{length:,}" for length in lengths], rotation=45)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.flat[0].set_ylabel("depth of the fact (from the beginning)")
    figure.colorbar(image, ax=axes, label=f"planted answer chosen (%), {100 * chance:.0f} by guessing")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def models_of(ckpt: str, factor: float) -> list[tuple[str, str, dict[str, Any]]]:
    """Return name, folder and changed fields of each model: a checkpoint; and, without training, under YaRN."""
    models = []
    for folder in ckpt.split(","):
        config = LMConfig.from_pretrained(folder)
        models.append((folder, folder, {}))
        if factor and not config.rope_scaling:
            scaling = yarn(trained_length(folder, config), factor)
            models.append((f"{folder}, YaRN x {factor:g} untrained", folder, {"rope_scaling": scaling}))
    return models


def needle(
    ckpt: str,
    needles: str = "data/demo/long/needles.jsonl",
    data: str = "data/demo/heldout.txt",
    lengths: str = "",
    depths: str = "0,25,50,75,100",
    trials: int = 20,
    yarn: float = 0.0,
    out: str = "",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Write needle.json, needle.md and needle.png.

    Args:
        ckpt: checkpoint folders of this project, separated by commas
        needles: JSON lines with fact, question (up to where the answer begins), answer, choices
        data: text to fill up with; documents are separated by empty lines
        lengths: of the context, in tokens, separated by commas; left out: up to the longest that a checkpoint reads
        depths: of the fact, in per cent from the beginning
        trials: facts for each length and depth
        yarn: factor of a further look at each checkpoint that was not extended: YaRN switched on, without training
        out: folder for the results; left out: eval/ beside the first checkpoint
        seed: of facts and filler
        device: auto, cpu or cuda
        dtype: auto, bf16 or fp32
    """
    check_least(1, trials=trials)
    require(yarn == 0 or yarn > 1, f"--yarn {yarn:g}: a factor above 1, such as 16")
    models = models_of(ckpt, yarn)
    longest = max(LMConfig.from_pretrained(folder).max_position_embeddings for _, folder, _ in models)
    tokens = numbers("--lengths", lengths) if lengths else [longest >> shift for shift in (4, 3, 2, 1, 0)]
    shares = [depth / 100 for depth in numbers("--depths", depths, 100)]
    facts, texts = read_needles(Path(needles)), read_texts(Path(data))
    place, found = Ranks.start(device).device, []
    for name, folder, choice in models:
        wide = max(*tokens, LMConfig.from_pretrained(folder).max_position_embeddings)
        model, tokenizer = open_checkpoint(folder, {**choice, "max_position_embeddings": wide})
        answerer = Answerer(model.to(place, choose_dtype(dtype, place)).eval(), tokenizer)
        found.append(look(answerer, name, facts, texts, tokens, shares, trials, seed))
    chance = sum(1 / len(fact.choices) for fact in facts) / len(facts)
    target, page = Path(out) if out else out_folder(models[0][1]), markdown(found, tokens, trials, len(shares), chance)
    facts_of = {"lengths": tokens, "depths": shares, "trials": trials, "chance": chance, "seed": seed}
    content = {**facts_of, "models": [asdict(one) for one in found]}
    with naming(target):
        target.mkdir(parents=True, exist_ok=True)
        (target / "needle.json").write_text(json_text(content) + "\n", encoding="utf8")
        (target / "needle.md").write_text(page, encoding="utf8")
    draw(found, tokens, shares, chance, target / "needle.png")
    print(page)
    print(f"written: {target / 'needle.json'}, {target / 'needle.md'}, {target / 'needle.png'}")


def read_texts(path: Path) -> list[str]:
    """Return the documents of a file of text. Raises `UserError` for one without any."""
    require(path.is_file(), f"{path}: no such file; give text with --data")
    texts = [text.strip() for text in "".join(read_blocks(path)).split("\n\n")]
    texts = [text for text in texts if text]
    require(bool(texts), f"{path}: empty; give a file with text")
    return texts


def numbers(option: str, given: str, most: int = 2**24) -> list[int]:
    """Read whole numbers, separated by commas, in their order. Raises `UserError` for others."""
    try:
        found = sorted({int(part) for part in given.split(",")})
    except ValueError:
        found = []
    if not found or not 0 <= found[0] <= found[-1] <= most:
        raise UserError(f"{option} {given}: give whole numbers separated by commas, {most:,} at most")
    return found


if __name__ == "__main__":
    command_line(lambda: call(needle, __doc__ or ""))
