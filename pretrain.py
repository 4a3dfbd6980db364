"""Pretrain a Mini DeepSeek-V3 on raw text (DeepSeek-V3 sections 2 and 4.2).

python pretrain.py --config configs/64m.yaml --data seq_monkey.csv --tokenizer out/tokenizer --out out/pretrain
torchrun --nproc_per_node 8 pretrain.py ...        the same options
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from cli import parse
from errors import UserError, check_least, command_line
from text.corpus.pretrain_dataset import PretrainDataset
from text.corpus.shards import open_sources, sources_ready
from text.sources.registry import Source, find_sources
from text.tokenizer import Tokenizer
from training.losses import NextTokenLoss
from training.parallel.dist_settings import ShardSettings
from training.parallel.ranks import Ranks
from training.settings import NextTokenSettings, SampleSettings
from training.startup import begin, continue_checkpoint, new_model
from training.trainer import Trainer
from training.validation import BitsPerByte, held_out_batches, labels_name


@dataclass(kw_only=True)
class PretrainSettings(NextTokenSettings, SampleSettings):
    """Settings of pretraining.

    Args:
        data: text: names in --datasets, files, folders or Hub ids, separated by commas; NAME=WEIGHT sets a source's
            share of the mixture.
        tokenizer: folder that train_tokenizer.py wrote; may be left out with --ckpt.
        ckpt: checkpoint folder to start from instead of random weights.
        model: preset (64m when left out) and changes to single fields of LMConfig, such as {preset: 64m,
            num_hidden_layers: 4}; with --ckpt changes that leave the shapes of the weights, such as rope_scaling.
        shards: folder for the tokenised corpus, made once and used again.
        column: name of the text column or field, if it is not `text`.
        encoding: of text files, for example gb18030.
        min_chars: shorter documents are left out.
        workers: threads that tokenise; 0 means one a core.
        val_fraction: share of the documents held out.
        fim_rate: share of the documents to train on whose middle is moved to their end, to be filled in (0.1 in
            DeepSeek-V3, section 4.1).
        phases: runs one after another that extend the context of --ckpt, each in OUT/phaseN with settings of its own
            and `times` the length that --ckpt was trained on (configs/extend.yaml).
        isolate: keep documents of one row from attending to each other (DeepSeek-V3 does not).
    """

    data: str
    tokenizer: str = ""
    ckpt: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    shards: str = "data/shards"
    column: str | None = None
    encoding: str = "utf-8"
    min_chars: int = 1
    workers: int = 0
    val_fraction: float = 0.005
    fim_rate: float = 0.0
    isolate: bool = False
    phases: list[dict[str, Any]] = field(default_factory=list)
    dist: ShardSettings = field(default_factory=ShardSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(0, workers=self.workers)
        if not self.ckpt:
            self.model = {"preset": "64m", **self.model}

    def lighten(self, device: str) -> str:
        if device == "cpu" and not self.ckpt and self.model.get("preset") != "demo":
            return "the recipe for CPUs is --config configs/minutes.yaml"
        return super().lighten(device)


def main() -> None:
    settings = parse(PretrainSettings, __doc__ or "")
    if settings.phases:
        ranks = resolve_name("training.phases:run_phases")(settings, train, open_data)
    else:
        ranks = train(settings)
    ranks.stop()


def train(settings: PretrainSettings) -> Ranks:
    """Do one run, from the data to the last checkpoint."""
    ranks = begin(settings)
    if settings.ckpt:
        model, tokenizer = continue_checkpoint(settings, settings.ckpt, settings.model, ranks)
        if settings.tokenizer and Tokenizer.from_folder(settings.tokenizer).fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{settings.tokenizer}: not the tokenizer that {settings.ckpt} was trained with; leave --tokenizer out"
            )
    elif settings.tokenizer:
        model, tokenizer = new_model(settings.model, settings.tokenizer, settings.dist.cuts(ranks.world))
    else:
        raise UserError("pretrain.py: give --tokenizer DIR (made by train_tokenizer.py), or --ckpt DIR to start from")

    data, dataset, held_out = open_data(settings, tokenizer, ranks)
    validation = None
    if held_out:
        batches = held_out_batches(held_out, settings.val_tokens, settings.micro_tokens)
        validation = BitsPerByte(batches, tokenizer.token_bytes, {"text": labels_name(data, batches, tokenizer)})
    show = resolve_name("training.run.samples:text_samples")
    samples = show(settings, tokenizer, ranks, held_out or dataset, validation is not None)
    loss = NextTokenLoss(mtp=bool(model.mtp), mtp_steps=settings.mtp_steps)
    Trainer(settings, ranks, model, tokenizer, dataset, loss, validation, samples=samples).run()
    return ranks


def open_data(
    settings: PretrainSettings, tokenizer: Tokenizer, ranks: Ranks
) -> tuple[list[Source], PretrainDataset, PretrainDataset | None]:
    """Return the sources, their rows to train on, and those held out; tokenised first where they have not been yet."""
    options = ("column", "encoding", "min_chars", "workers", "val_fraction", "on_error", "fim_rate")
    data = find_sources(settings.data, settings.datasets, "text")
    corpus = (data, tokenizer, settings.shards)
    given = {name: getattr(settings, name) for name in options} | {"fim_seed": settings.seed * (settings.fim_rate > 0)}
    if ranks.world > 1:
        ranks.on_main(lambda: sources_ready(*corpus, **given))  # so that data which are not there are reported once
        if not all(ranks.gather(sources_ready(*corpus, **given))):
            ranks.check_writes_shared(Path(settings.shards))  # or the others would wait in vain for what rank 0 makes
    with ranks.led() as check:
        sources = open_sources(*corpus, main=ranks.main, check=check, **given)
    dataset = PretrainDataset(sources, settings.sequence_length, settings.seed, isolate=settings.isolate)
    held_out = None
    if settings.val_fraction:
        held_out = PretrainDataset(sources, settings.sequence_length, split="val", isolate=settings.isolate)
    return data, dataset, held_out


if __name__ == "__main__":
    command_line(main)
