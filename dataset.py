"""The data sets that the stage scripts import, and a look at anybody's data.

python dataset.py preview NAME --tokenizer out/tokenizer     three rows as tokens, with what is learnt of them
python dataset.py check NAME --tokenizer out/tokenizer       reads everything: rows, lengths, problems by kind and place

A data set has `len` (samples of an epoch) and `batch(indices)`. An index is the number of a sample counted from the
start of training; which sample that is depends on the seed and the index alone, so nothing about the data need be
saved to resume. A batch is a dict of int64 tensors (samples, sequence_length): `input_ids`; `labels`, where labels[t]
is the token that position t must predict and -100 counts nothing; and with isolation `segment_ids`, whose positions
see only their own segment, and `position_ids`, which begin at 0 in each.
"""

from __future__ import annotations

from text.chat_dataset import ChatDataset
from text.preference_dataset import PreferenceDataset
from text.pretrain_dataset import PretrainDataset
from text.prompt_dataset import PromptDataset

__all__ = ["ChatDataset", "PreferenceDataset", "PretrainDataset", "PromptDataset"]
