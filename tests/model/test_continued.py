"""`--model` beside `--ckpt`: what keeps the shapes of trained weights is taken, all else is refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

import pretrain
from errors import UserError
from LMConfig import FREE, TOKENS, LMConfig
from model import MiniDeepSeek

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
# Another value of each field that a configuration of one dense and two MoE layers may have.
OTHER = dict(
    hidden_size=40, intermediate_size=56, moe_intermediate_size=24, num_hidden_layers=4, num_nextn_predict_layers=2,
    num_attention_heads=2, n_shared_experts=2, n_routed_experts=12, num_experts_per_tok=2, n_group=2, topk_group=3,
    first_k_dense_replace=2, norm_topk_prob=False, routed_scaling_factor=2.5, q_lora_rank=None, kv_lora_rank=20,
    qk_nope_head_dim=16, qk_rope_head_dim=10, v_head_dim=12, max_position_embeddings=4096, rope_theta=5e5,
    rope_scaling=YARN, rms_norm_eps=1e-5, initializer_range=0.1, attention_bias=True, tie_word_embeddings=True,
    attention="mha",
)  # fmt: skip


def shapes(config: LMConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = MiniDeepSeek(config)
    return {"tied": model.lm_head.weight is model.model.embed_tokens.weight} | {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("name", OTHER)
def test_free_fields_are_those_that_leave_the_shapes_as_they_are(tiny_config, name):
    config = tiny_config()
    heads = {"num_key_value_heads": None} if name == "num_attention_heads" else {}
    same = shapes(config) == shapes(replace(config, **{name: OTHER[name]}, **heads))
    assert same == (name in FREE)
    if same:
        assert getattr(config.continued({name: OTHER[name]}, "DIR"), name) == OTHER[name]
    else:
        with pytest.raises(UserError, match=rf"--model.{name} .* in DIR and cannot change"):
            config.continued({name: OTHER[name]}, "DIR")


def test_every_field_is_free_or_fixed():
    one_value = {"hidden_act", "attention_dropout"}  # nothing else is built
    assert set(asdict(LMConfig())) == {*OTHER, *one_value, *TOKENS, "vocab_size", "num_key_value_heads"}
    assert one_value <= FREE


def test_a_preset_is_refused_only_where_its_shapes_differ(tiny_config):
    config = replace(LMConfig.preset("26m"), vocab_size=600, rope_theta=5e5)
    assert config.continued({"preset": "26m"}, "DIR") == config
    assert config.continued({"preset": "26m", "max_position_embeddings": 8192}, "DIR").max_position_embeddings == 8192
    with pytest.raises(UserError, match=r"--model.preset 64m: has hidden_size = 512, DIR has 384; leave it out"):
        config.continued({"preset": "64m"}, "DIR")
    recipe = {"num_hidden_layers": 4, "num_attention_heads": 4}
    smaller = replace(config, **recipe, num_key_value_heads=None)
    assert smaller.continued({"preset": "26m", **recipe}, "DIR") == smaller


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"rope_teta": 1e6}, "model.rope_teta: no such field, did you mean 'rope_theta'?"),
        ({"rope_scaling": {"factor": 4}}, "--model.rope_scaling.type"),
        ({"num_experts_per_tok": 99}, "--model.num_experts_per_tok = 99: the chosen groups hold only"),
        ({"vocab_size": 1000}, "--model.vocab_size 1000: is 61 in DIR and cannot change"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(tiny_config, choice, message):
    with pytest.raises(UserError) as caught:
        tiny_config().continued(choice, "DIR")
    assert str(caught.value).startswith(message)


def extended(pretrain_arguments: list[str], recipe: Path) -> list[str]:
    """The arguments of a continued run: those of the first without its model and tokenizer."""
    content = yaml.safe_load(Path(pretrain_arguments[1]).read_text(encoding="utf8"))
    recipe.write_text(yaml.safe_dump({**content, "model": {}}), encoding="utf8")
    rest = dict(zip(pretrain_arguments[2::2], pretrain_arguments[3::2], strict=True))
    del rest["--tokenizer"]
    return ["--config", str(recipe), *(part for pair in rest.items() for part in pair)]


def test_an_extended_context_reaches_the_new_run_and_its_resume(run, pretrained, pretrain_arguments, tmp_path):
    given = [*extended(pretrain_arguments, tmp_path / "r.yaml"), "--ckpt", pretrained / "final"]
    given += ["--out", tmp_path / "o"]
    yarn = [f"--model.rope_scaling={json.dumps(YARN)}", "--model.max_position_embeddings", 4096]
    first = run(pretrain.main, *given, *yarn, "--max_steps", 1)
    assert first.code == 0, first.err
    lines = [line for line in first.out.splitlines() if "continues with" in line]
    assert len(lines) == 1 and "max_position_embeddings = 4096 (was 1024)" in lines[0] and "rope_scaling" in lines[0]
    saved = LMConfig.from_pretrained(tmp_path / "o" / "final")
    assert saved.max_position_embeddings == 4096 and saved.rope_scaling == YARN
    again = run(pretrain.main, *given, *yarn, "--max_steps", 2, "--resume")
    assert again.code == 0 and "resuming from" in again.out, again.err
    other = run(pretrain.main, *given, "--max_steps", 3, "--resume")
    assert other.code == 2 and "was trained with model.max_position_embeddings = 4096, not 1024" in other.err


def test_a_default_is_not_given_and_a_preset_of_other_shapes_is_refused(run, pretrained, pretrain_arguments, tmp_path):
    given = [*extended(pretrain_arguments, tmp_path / "r.yaml"), "--ckpt", pretrained / "final"]
    given += ["--out", tmp_path / "o"]
    refused = run(pretrain.main, *given, "--max_steps", 1, "--model.preset", "64m")
    assert refused.code == 2 and "--model.preset 64m: has hidden_size = 512" in refused.err
    assert run(pretrain.main, *given, "--max_steps", 1).code == 0
    # The config.yaml of older runs names the default preset, whatever their checkpoint was.
    resumed = run(pretrain.main, *given, "--max_steps", 2, "--resume", "--model.preset", "64m")
    assert resumed.code == 0, resumed.err


def test_without_a_checkpoint_the_preset_is_64m_whatever_else_is_given():
    settings = pretrain.PretrainSettings(out="o", data="d", model={"num_hidden_layers": 3})
    assert settings.model == {"preset": "64m", "num_hidden_layers": 3}


def test_a_preset_is_taken_with_the_attention_beside_it():
    kind = {"attention": "gqa", "num_key_value_heads": 2}
    config = LMConfig.preset("demo", **kind)
    assert config.continued({"preset": "demo", **kind}, "DIR") == config
    with pytest.raises(UserError, match=r"--model.preset demo: has .* leave it out"):
        config.continued({"preset": "demo"}, "DIR")
