"""The documents that a pretraining run held out, as a file that any model can be measured on.

python eval/held_out.py --run out/pretrain --out out/held_out.jsonl
python eval/run.py --ckpt DIR --suite text=out/held_out.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from errors import UserError, command_line, naming
from text.registry import REGISTRY, find_sources
from text.sources import open_sources
from text.tokenizer import Tokenizer
from training.settings import call


def held_out_documents(run: Path) -> Iterator[str]:
    """The documents in order. Raises `UserError` for a folder that is no pretraining run, or one that held out none."""
    config = run / "config.yaml"
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf8"))
        names = ("column", "encoding", "min_chars", "val_fraction", "on_error")
        options = {name: settings[name] for name in names}
        data, folder, shards = settings["data"], settings["tokenizer"], settings["shards"]
    except OSError as error:
        raise UserError(f"{config}: {error.strerror}; name the run folder of a pretraining") from None
    except (yaml.YAMLError, KeyError, TypeError):
        raise UserError(f"{config}: not the settings of a pretraining; name the run folder of one") from None
    tokenizer = Tokenizer.from_folder(folder)
    sources = find_sources(data, settings.get("datasets", REGISTRY), "text")
    for shard_set, _ in open_sources(sources, tokenizer, shards, main=True, **options):
        stream = shard_set.split("val")
        for number in range(stream.documents):
            start, stop, _ = stream.document(number)
            yield tokenizer.decode(stream.read(start, stop - 1).tolist())  # without the </s> that ends it


def held_out(run: str, out: str) -> None:
    """Write the held-out documents of a pretraining run as JSON lines with the column text.

    Args:
        run: the run folder, with its config.yaml; its data and tokenised shards must be where they were
        out: file to write
    """
    path = Path(out)
    texts = list(held_out_documents(Path(run)))
    if not texts:
        raise UserError(f"{run}: nothing was held out (val_fraction)")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf8"
        )
    print(f"{path}: {len(texts):,} documents, {sum(len(text.encode()) for text in texts):,} bytes")


if __name__ == "__main__":
    command_line(lambda: call(held_out, __doc__ or ""))
