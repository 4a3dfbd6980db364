"""Checkpoint folders of every stage in transformers: the same tokens, masks, answers, through its own front doors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eval.answering import Answerer
from model import MiniDeepSeek
from text.chats.chat_template import encode_chat, render
from text.tokenizer import Tokenizer

CHATS = [
    [{"role": "user", "content": "你好"}],
    [{"role": "system", "content": "请简短回答。"}, {"role": "user", "content": "What is 3 + 4?"}],
    [
        {"role": "user", "content": "请给我讲一个关于小猫的故事，好吗？"},
        {"role": "assistant", "content": "<think>一只猫</think>从前有一只小猫。"},
        {"role": "user", "content": "然后呢？\n\n  def f(x): return x**2"},
    ],
]
STAGES = ["pretrain", "sft", "dpo", "grpo"]


@pytest.fixture(scope="module")
def stages(demo_path: Path) -> Callable[[str], Path]:
    """`stages(name)`: the final folder of a stage."""
    return lambda name: demo_path / name / "final"


@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_the_auto_classes_open_every_stage(stage, stages, transformers):
    folder = stages(stage)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, transformers.DeepseekV3ForCausalLM)
    ours = Tokenizer.from_folder(folder)
    text = "你好，world！ It's 2024年，def f(x):\n\treturn x  "
    assert tokenizer(text)["input_ids"] == ours.encode(text)
    assert tokenizer.decode(ours.encode(text)) == text
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert special == (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id)
    ids = torch.tensor([ours.encode(text)])
    torch.testing.assert_close(
        model(ids).logits, MiniDeepSeek.from_pretrained(folder)(ids).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("stage", STAGES)
def test_their_greedy_generation_gives_our_tokens(stage, stages, transformers):
    folder = stages(stage)
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(folder), MiniDeepSeek.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for chat in CHATS:
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        expected = ours.generate(prompt, max_new_tokens=24, temperature=0.0, eos_token_id=tokenizer.eos_token_id)
        # No option: generation_config.json says greedy, and where to stop.
        assert torch.equal(theirs.generate(prompt, max_new_tokens=24), expected)


@pytest.mark.parametrize("chat", CHATS, ids=["user", "system", "several turns"])
def test_the_chat_template_gives_our_tokens_and_our_mask(chat, stages, transformers):
    folder = stages("sft")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    prompt = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert prompt == encode_chat(ours, chat, add_generation_prompt=True)[0]
    assert theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == render(chat, True)
    whole = [*chat, {"role": "assistant", "content": "<think>想一想</think>好的，好的。"}]
    encoded = theirs.apply_chat_template(whole, return_assistant_tokens_mask=True, return_dict=True)
    assert (encoded["input_ids"], encoded["assistant_masks"]) == encode_chat(ours, whole)
    assert 0 < sum(encoded["assistant_masks"]) < len(encoded["input_ids"])


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_a_pipeline_answers_as_we_do(stage, stages, transformers):
    folder = stages(stage)
    answer = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    expected = list(Answerer.open(str(folder), device="cpu", dtype="fp32").replies(CHATS, max_new_tokens=24))
    together = answer(CHATS, max_new_tokens=24, batch_size=len(CHATS))  # of different lengths: padded
    assert [reply[0]["generated_text"][-1] for reply in together] == [
        {"role": "assistant", "content": text} for text in expected
    ]
    assert len(set(expected)) > 1  # answers to what was asked, not one text for all


def test_what_transformers_saves_again_is_ours_again(stages, tmp_path, transformers):
    folder = stages("grpo")
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    before, after = MiniDeepSeek.from_pretrained(folder), MiniDeepSeek.from_pretrained(tmp_path)
    state = before.state_dict()
    assert json.loads((tmp_path / "config.json").read_text())["transformers_version"]
    assert all(torch.equal(state[name], tensor) for name, tensor in after.state_dict().items())
    assert {name for name in state if not name.startswith("mtp.")} == after.state_dict().keys()  # it drops MTP layers
    assert Tokenizer.from_folder(tmp_path).fingerprint == Tokenizer.from_folder(folder).fingerprint


def test_a_checkpoint_with_another_attention_is_not_opened(transformers, tiny_model, tmp_path):
    tiny_model(attention="mha").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mini_deepseek_v3_mha"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
