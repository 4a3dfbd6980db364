"""The data sets that the stage scripts import, and a look at anybody's data.

python dataset.py preview NAME --tokenizer out/tokenizer     three rows as tokens, with what is trained on
python dataset.py check NAME --tokenizer out/tokenizer       reads everything: rows, lengths, problems by kind and line
python dataset.py judge FILE                                 rows of answer and reply: the verdict, what was taken

A data set has `len` (samples of an epoch) and `batch(indices)`. An index is the number of a sample counted from the
start of training; which sample that is depends on the seed and the index alone, so nothing about the data need be
saved to resume. A batch is a dict of int64 tensors (samples, sequence_length): `input_ids`; `labels`, where labels[t]
is the token that position t must predict and -100 counts nothing; and with isolation `segment_ids`, whose positions
see only their own segment, and `position_ids`, which begin at 0 in each.
"""

from __future__ import annotations

import sys

from rich.console import Console

from cli import call_one_of
from errors import UserError, check_least, command_line
from LMConfig import LMConfig
from text.chats.packed_dataset import ChatDataset, PreferenceDataset
from text.chats.prompt_dataset import PromptDataset
from text.corpus.pretrain_dataset import PretrainDataset
from text.inspection import Limits, check_source
from text.judging.judged_rows import judged_rows
from text.order import ANSWER_TOKENS
from text.preview import show_rows
from text.sources.registry import REGISTRY, find_sources
from text.tokenizer import Tokenizer

__all__ = ["ChatDataset", "PreferenceDataset", "PretrainDataset", "PromptDataset"]


def preview(
    data: str,
    tokenizer: str = "",
    ckpt: str = "",
    datasets: str = REGISTRY,
    rows: int = 3,
    sequence_length: int | None = None,
    max_new_tokens: int = ANSWER_TOKENS,
) -> None:
    """Show how rows become tokens and which of these are trained on.

    Args:
        data: names in --datasets, files, folders or Hub ids, separated by commas.
        tokenizer: folder that train_tokenizer.py wrote.
        ckpt: checkpoint folder, whose tokenizer is taken.
        datasets: YAML file that gives data sets names.
        rows: how many rows of each.
        sequence_length: tokens a row of training, to say what it would cut; as the stage that reads the data has where
            it is left out: 512, for pairs 1024 or the context of --ckpt.
        max_new_tokens: of these, tokens for the answer to a prompt.
    """
    check_least(1, rows=rows)
    limits = _limits(sequence_length, max_new_tokens, ckpt)
    reader, console = _tokenizer(tokenizer, ckpt), Console(highlight=False)
    for source in find_sources(data, datasets, kind=None):
        show_rows(console, source, reader, rows, limits)


def check(
    data: str,
    tokenizer: str = "",
    ckpt: str = "",
    datasets: str = REGISTRY,
    sequence_length: int | None = None,
    max_new_tokens: int = ANSWER_TOKENS,
) -> None:
    """Read everything and report on it; the exit code is 2 for a source without a usable row or that breaks off.

    Args:
        data: names in --datasets, files, folders or Hub ids, separated by commas.
        tokenizer: folder that train_tokenizer.py wrote.
        ckpt: checkpoint folder, whose tokenizer is taken.
        datasets: YAML file that gives data sets names.
        sequence_length: tokens a row of training, to say what it would cut; as the stage that reads the data has where
            it is left out: 512, for pairs 1024 or the context of --ckpt.
        max_new_tokens: of these, tokens for the answer to a prompt.
    """
    limits = _limits(sequence_length, max_new_tokens, ckpt)
    reader, troubles = _tokenizer(tokenizer, ckpt), []
    for source in find_sources(data, datasets, kind=None):
        found = check_source(source, reader, limits)
        place = f" ({source.path})" if source.name else ""
        print("\n  ".join([f"{source}{place}: {found.kind}", *found.lines(limits)]))
        troubles += [found.trouble] if found.trouble else []
    if troubles:
        raise UserError("; ".join(troubles))


def judge(file: str, json: bool = False) -> None:
    """Judge replies as the reward `correct` and the evaluations do, and show what was taken as the answer of each.

    The exit code is 2 for a row without answer or reply. Where rows say what is `right`, the last line of stderr counts
    the agreement.

    Args:
        file: file of rows with `answer` and `reply`, in any format that can be read.
        json: print one object a row, {"right": bool, "taken": text or null}, instead of lines for people.
    """
    agreed = expected = 0
    for row, verdict in judged_rows(file):
        print(verdict.as_json() if json else row.line(verdict))
        expected += row.right is not None
        agreed += row.right is not None and row.right == verdict.right
    if expected:
        print(f"{agreed} of {expected} agree", file=sys.stderr)


def _tokenizer(tokenizer: str, ckpt: str) -> Tokenizer:
    if not tokenizer and not ckpt:
        raise UserError("dataset.py: give --tokenizer DIR (made by train_tokenizer.py) or --ckpt DIR")
    return Tokenizer.from_folder(tokenizer or ckpt)


def _limits(sequence_length: int | None, max_new_tokens: int, ckpt: str) -> Limits:
    if sequence_length is not None:
        check_least(1, sequence_length=sequence_length)
    check_least(1, max_new_tokens=max_new_tokens)
    context = LMConfig.from_pretrained(ckpt).max_position_embeddings if ckpt and sequence_length is None else None
    return Limits(sequence_length, max_new_tokens, context)


def main() -> None:
    call_one_of([preview, check, judge], __doc__ or "")


if __name__ == "__main__":
    command_line(main)
