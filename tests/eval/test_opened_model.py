"""A model's likelihoods are those of plain passes, whoever opens it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from likelihoods import nats_by_hand

from eval.opened_model import OpenedModel, open_model
from eval.own_model import OwnModel
from eval.peer_model import PeerModel
from eval.suites.choice_rows import ChoiceItem
from eval.suites.multiple_choice import Asked, MultipleChoice, encode_pairs
from text.chats.chat_template import Message
from text.tokenizer import SPECIAL_TOKENS, Tokenizer


@pytest.fixture(params=["own", "peer"])
def model(request) -> OpenedModel:
    return request.getfixturevalue(request.param)


def test_each_folder_is_opened_by_its_own_kind(own, peer):
    assert isinstance(own, OwnModel) and own.chats and own.context == 1024
    assert isinstance(peer, PeerModel) and not peer.chats and peer.context == 256


def test_continuations_have_the_likelihood_of_one_pass_over_the_whole_row(model):
    """Contexts of many lengths, and continuations of one token and of several, some of the same beginning."""
    rng = random.Random(0)
    line = lambda length: [rng.randrange(13, 600) for _ in range(length)]  # noqa: E731
    items = [(line(length), [line(1), line(5), line(1), line(20)]) for length in (1, 40, 7, 33, 90)]
    items.append((line(5), [line(1), line(1)]))
    begun = line(4)
    items += [(begun, [[20, 21, 22]]), ([*begun, 20], [[21, 23], [24]])]  # rows that are the beginnings of others
    for (context, choices), nats in zip(items, model.continuation_nats(items), strict=True):
        for choice, value in zip(choices, nats, strict=True):
            assert value == pytest.approx(nats_by_hand(model, context + choice, len(context)), rel=1e-4)


def test_windows_have_the_likelihood_of_one_pass(model):
    rng = random.Random(1)
    windows = [
        ([rng.randrange(13, 600) for _ in range(length)], scored) for length, scored in [(60, 1), (9, 4), (2, 1)]
    ]
    for (ids, scored), value in zip(windows, model.window_nats(windows), strict=True):
        assert value == pytest.approx(nats_by_hand(model, ids, scored), rel=1e-4)


def test_a_context_is_read_once_for_all_its_choices(own, monkeypatch):
    read = []
    forward = type(own.answerer.model).forward
    monkeypatch.setattr(
        type(own.answerer.model),
        "forward",
        lambda self, ids, **rest: read.append(ids.shape) or forward(self, ids, **rest),
    )
    own.continuation_nats([([20] * 64, [[21, 22], [23, 24], [25, 26], [27, 28]])])
    assert [tuple(shape) for shape in read] == [(1, 64), (4, 16)]
    read.clear()
    own.continuation_nats([([20] * 64, [[21], [22], [23], [24]])])  # letters need nothing but the context
    assert [tuple(shape) for shape in read] == [(1, 64)]


def test_what_contexts_have_in_common_is_read_once(own, monkeypatch):
    """Questions after the same worked ones, in two subjects: the likelihoods of whole rows, from fewer tokens."""
    rng = random.Random(2)
    line = lambda length: [rng.randrange(13, 600) for _ in range(length)]  # noqa: E731
    subjects, letters = [line(200), line(90), line(10)], [[20], [21], [22], [23]]
    items = [(subjects[number % 3] + line(5 + number), letters) for number in range(9)] + [(subjects[0], letters)]
    want = [[nats_by_hand(own, context + choice, len(context)) for choice in letters] for context, _ in items]
    read, forward = [], type(own.answerer.model).forward
    monkeypatch.setattr(
        type(own.answerer.model),
        "forward",
        lambda self, ids, **rest: read.append(ids.numel()) or forward(self, ids, **rest),
    )
    for found, expected in zip(own.continuation_nats(items), want, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert sum(read) < 199 + 90 + 16 * 4 + 16 * 3 + 32 * 3 + 1 < sum(len(context) for context, _ in items)


def test_this_projects_folder_through_transformers_gives_the_same(own, pretrained):
    other = PeerModel.open(pretrained / "final", "", torch.device("cpu"), torch.float32)
    chat: list[Message] = [{"role": "user", "content": "月牙镇在哪里？"}]
    assert other.encode_chat(chat) == own.encode_chat(chat) and other.encode("a b，c") == own.encode("a b，c")
    items = [(own.encode("月牙镇"), [own.encode("很美丽"), own.encode("在山下。")]), (own.encode("2+3"), [[20]])]
    for ours, theirs in zip(own.continuation_nats(items), other.continuation_nats(items), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for prompts in ([chat, chat], ["月牙镇", "the"]):
        assert own.reply(prompts, 8, 0.0, 0) == other.reply(prompts, 8, 0.0, 0)


def test_a_pair_is_encoded_as_one_text_and_cut_where_the_context_ends(own):
    context, (first, second) = encode_pairs(own, "Question: x\nAnswer: ", ["yes", "no"])
    assert context == own.encode("Question: x\nAnswer:")
    assert (first, second) == (own.encode(" yes"), own.encode(" no"))
    assert encode_pairs(own, "", ["yes"]) == ([own.bos], [own.encode("yes")])


def test_an_endless_context_loses_its_beginning_and_is_counted(own, monkeypatch):
    item = ChoiceItem("s", "月" * 3000, ("a", "b"), 0)
    suite, seen = MultipleChoice(data="x"), []
    monkeypatch.setattr(OwnModel, "continuation_nats", lambda self, items: seen.extend(items) or [[0.0, -1.0]])
    (row,) = suite.measure(own, [Asked(item, ())], 0)
    (context, choices), whole = seen[0], own.encode(suite._asked(item))
    assert row["cut"] and len(context) + len(choices[0]) == own.context + 1 and context == whole[-len(context) :]


# GGUF


def write_gguf(path: Path, tokenizer: Tokenizer, hidden: int = 32, inner: int = 64) -> None:
    """A Llama of one layer with random weights and this tokenizer, as llama.cpp's converter writes it."""
    content = json.loads(tokenizer.raw.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number < len(SPECIAL_TOKENS) else 1 for number in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"attn_q": (hidden, hidden), "attn_k": (hidden, hidden), "attn_v": (hidden, hidden)}
    shapes |= {"attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    shapes |= {"ffn_down": (hidden, inner), "attn_norm": (hidden,), "ffn_norm": (hidden,)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (len(tokens), hidden), "output.weight": (len(tokens), hidden)}
    rng = np.random.default_rng(0)
    for name, shape in {**tensors, "output_norm.weight": (hidden,)}.items():
        writer.add_tensor(name, (rng.normal(size=shape) / 6).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_measured_by_its_name_or_its_folder(tokenizer, tmp_path):
    write_gguf(tmp_path / "small.gguf", tokenizer)
    for path in (tmp_path / "small.gguf", tmp_path):
        found = open_model(str(path), "cpu", "fp32")
        assert isinstance(found, PeerModel) and found.name == str(tmp_path / "small.gguf")
        assert (found.context, found.dtype, found.chats, found.eos) == (128, "fp32", False, 2)
        assert found.encode("月牙镇 the town") == tokenizer.encode("月牙镇 the town")
        ids, choice = found.encode("月牙镇"), [20, 30, 40]
        ((nats,),) = found.continuation_nats([(ids, [choice])])
        assert nats == pytest.approx(nats_by_hand(found, ids + choice, len(ids)), rel=1e-4)
        assert len(found.reply(["the"], 4, 0.0, 0)) == 1
