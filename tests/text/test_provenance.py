"""Every data set can say where a sample comes from, for who looks into a step that went wrong."""

from __future__ import annotations

import re

import pytest
import torch
from data_files import write

from dataset import ChatDataset, PreferenceDataset, PretrainDataset, PromptDataset
from text.corpus.shards import prepare_shards
from training.alignment.batches import Experience
from training.alignment.rewards import Rewards
from training.alignment.rollouts import Rollouts, RolloutSettings
from training.alignment.sampler import Sampler
from training.parallel.ranks import Ranks
from training.step import NamingDataset


def test_windows_name_their_shards_and_documents(tokenizer, tmp_path):
    text = write(tmp_path / "text.jsonl", [{"text": f"小城第{number}号的故事。"} for number in range(60)])
    shards = prepare_shards(text, tokenizer, tmp_path / "shards", workers=1, val_fraction=0.1, shard_tokens=200)
    data, stream = PretrainDataset([(shards, 1.0)], 16), shards.split("train")
    assert isinstance(data, NamingDataset)
    for index in range(len(data)):
        folder, first, last = re.fullmatch(r"(.*) documents (\d+) to (\d+)", data.describe(index)).groups()
        assert folder == str(tmp_path / "shards")
        ids = [stream.read(*stream.document(number)[:2]).tolist() for number in range(int(first), int(last) + 1)]
        batch = data.batch([index])
        window = [*batch["input_ids"][0].tolist(), batch["labels"][0, -1].item()]
        joined = [token for document in ids for token in document]
        at = next(place for place in range(len(joined)) if joined[place : place + 17] == window)
        assert at < len(ids[0]) and at + 17 > len(joined) - len(ids[-1])  # no document too many
    with pytest.raises(IndexError):
        stream.document_at(stream.tokens)


def test_rows_name_their_files_and_conversations_or_pairs(tokenizer, tmp_path):
    chats = [
        write(tmp_path / name, [{"instruction": f"{name} {row}?", "output": f"answer {row} of {name}"} for row in rows])
        for name, rows in (("one.jsonl", range(1, 8)), ("two.jsonl", range(1, 5)))
    ]
    rows = [{"prompt": f"ask {n}", "chosen": f"answer {n} of pairs.jsonl", "rejected": "bad"} for n in range(1, 9)]
    pairs = PreferenceDataset([write(tmp_path / "pairs.jsonl", rows)], tokenizer, 64)
    for data in (ChatDataset(chats, tokenizer, 128, progress=False), pairs):
        assert isinstance(data, NamingDataset)
        for index in range(2 * len(data)):
            shown = tokenizer.decode(data.batch([index])["input_ids"][0].tolist())
            places = re.findall(r"(\w+\.jsonl) #(\d+)", data.describe(index))
            assert len(places) == len(data.members(index)) == shown.count("answer ") >= 1
            assert all(f"answer {number} of {name}" in shown for name, number in places)


def test_completions_name_their_prompt(tokenizer, tiny_model):
    model, cpu = tiny_model(vocab_size=600, num_nextn_predict_layers=0), torch.device("cpu")
    prompts = PromptDataset(["arithmetic:1"], tokenizer, 40)
    settings = RolloutSettings(prompts=4, group=2, max_new_tokens=4)
    sampler, ranks = Sampler(model, torch.float32), Ranks(0, 1, cpu)
    data = Experience(Rollouts(prompts, Rewards.of({"correct": 1.0}), sampler, settings, ranks), 48, 8, torch.float32)
    data.prepare(0, model)
    asked = {problem.question for problem in map(data.prompts.problem, range(4), [0] * 4)}
    assert isinstance(data, NamingDataset)
    for index in range(8):
        said = data.describe(index)
        assert any(question in said for question in asked) and "completion '" in said
