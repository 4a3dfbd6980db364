"""LMConfig: its rules and their messages, both dialects of config.json, the presets and what they cost."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from errors import UserError
from LMConfig import PRESETS, LMConfig
from model import MiniDeepSeek, cost_table
from model.cost_table import main, table
from model.costs import count, human

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "mscale": 1.0, "mscale_all_dim": 1.0}

# Each rule of the configuration: what breaks it, the field that must be named, the remedy that must be given.
RULES = [
    ({"hidden_size": 0}, "hidden_size = 0", "set a positive number"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps = -1e-06", "set a positive number"),
    ({"n_shared_experts": -1}, "n_shared_experts = -1", "set 0 or more"),
    ({"num_attention_heads": "8"}, "num_attention_heads = '8'", "set int"),
    ({"hidden_size": 512.0}, "hidden_size = 512.0", "set int"),
    ({"hidden_size": True}, "hidden_size = True", "set int"),
    ({"norm_topk_prob": 1}, "norm_topk_prob = 1", "set bool"),
    ({"rope_theta": "1e4"}, "rope_theta = '1e4'", "set float"),
    ({"rope_scaling": 40}, "rope_scaling = 40", "set dict"),
    ({"vocab_size": None}, "vocab_size = None", "set int"),
    ({"num_key_value_heads": 2}, "num_key_value_heads = 2", "leave it out or set it to num_attention_heads = 8"),
    ({"attention": "mla2"}, "attention = 'mla2'", "one of mla, mha, gqa"),
    ({"attention": "mha", "num_key_value_heads": 2}, "num_key_value_heads = 2", "MHA has a key and a value for every"),
    ({"attention": "gqa"}, "num_key_value_heads = 8", "set a divisor of num_attention_heads = 8 below it"),
    ({"attention": "gqa", "num_key_value_heads": 3}, "num_key_value_heads = 3", "set a divisor"),
    ({"attention": "mha", "kv_lora_rank": 0}, "attention = 'mha'", "set q_lora_rank to null"),
    ({"kv_lora_rank": 0}, "kv_lora_rank = 0", "set a positive number"),
    ({"qk_rope_head_dim": 31}, "qk_rope_head_dim = 31", "make it even"),
    ({"first_k_dense_replace": 9}, "first_k_dense_replace = 9", "lower it to num_hidden_layers = 8"),
    ({"n_group": 3}, "n_group = 3", "choose a divisor of n_routed_experts = 16"),
    ({"n_group": 16}, "n_group = 16", "lower n_group or raise n_routed_experts = 16"),
    ({"topk_group": 5}, "topk_group = 5", "lower it to n_group = 4"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9", "lower it or raise topk_group = 2"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'", "leave it out"),
    ({"attention_dropout": 0.1}, "attention_dropout = 0.1", "set it to 0"),
    ({"eos_token_id": 6400}, "eos_token_id = 6400", "lower it or raise vocab_size = 6400"),
    ({"pad_token_id": 7000}, "pad_token_id = 7000", "lower it or raise vocab_size = 6400"),
    ({"rope_scaling": {**YARN, "type": "linear"}}, "rope_scaling.type = 'linear'", "only 'yarn'"),
    ({"rope_scaling": {**YARN, "factor": 0}}, "rope_scaling.factor = 0", "set a positive number"),
    ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling.original_max_position_embeddings = None", "set a"),
    ({"rope_scaling": {**YARN, "mscale_all": 1.0}}, "rope_scaling.mscale_all", "did you mean 'mscale_all_dim'"),
    ({"rope_scaling": {**YARN, "rope_theta": 5e5}}, "rope_scaling.rope_theta", "set rope_theta beside rope_scaling"),
    ({"rope_scaling": {**YARN, "truncate": False}}, "rope_scaling.truncate = False", "leave it out"),
]


@pytest.mark.parametrize(("changes", "field", "remedy"), RULES)
def test_every_rule_names_the_field_and_the_remedy(changes, field, remedy):
    with pytest.raises(UserError) as caught:
        LMConfig(**changes)
    message = str(caught.value)
    assert message.startswith(field) and remedy in message and "\n" not in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"n_shared_experts": 0, "num_nextn_predict_layers": 0, "first_k_dense_replace": 8},
        {"n_group": 8, "topk_group": 2, "num_experts_per_tok": 4},
        {"q_lora_rank": None, "pad_token_id": None, "rope_theta": 10000, "bos_token_id": 0},
        {"rope_scaling": YARN},
    ],
)
def test_what_breaks_no_rule_is_accepted(changes):
    config = LMConfig(**changes)
    assert {name: getattr(config, name) for name in changes} == changes


def test_an_unknown_preset_suggests_the_close_one():
    with pytest.raises(UserError, match=r"no preset '64mb', did you mean '64m'\?; one of demo, 26m, 64m"):
        LMConfig.preset("64mb")


def test_an_unknown_field_suggests_the_close_one(tmp_path):
    with pytest.raises(UserError, match=r"model\.hidden_sise: no such field, did you mean 'hidden_size'\?"):
        LMConfig.preset("64m", hidden_sise=64)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LMConfig().to_dict(), "num_expert_per_tok": 2}))
    with pytest.raises(UserError) as caught:
        LMConfig.from_pretrained(tmp_path)
    expected = f"{path}: no such field 'num_expert_per_tok', did you mean 'num_experts_per_tok'?; correct the name"
    assert str(caught.value) == expected


def test_a_field_of_another_program_is_ignored_with_a_warning():
    with pytest.warns(UserWarning, match="'wibble' is not a field of DeepSeek-V3 and is ignored"):
        assert LMConfig.from_dict({**LMConfig().to_dict(), "wibble": 3}) == LMConfig()


def test_preset_changes_single_fields():
    config = LMConfig.preset("demo", num_attention_heads=8, num_key_value_heads=8)
    assert (config.num_attention_heads, config.num_key_value_heads, config.hidden_size) == (8, 8, 256)
    assert LMConfig.preset("demo", num_attention_heads=2).num_key_value_heads == 2


def test_preset_64m_has_the_published_numbers():
    config = LMConfig.preset("64m")
    expected = dict(
        vocab_size=6400, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, q_lora_rank=256,
        kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=1408,
        n_routed_experts=16, moe_intermediate_size=256, num_experts_per_tok=4, topk_group=2, n_group=4,
        n_shared_experts=1, first_k_dense_replace=1, num_nextn_predict_layers=1,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_preset_deepseek_v3_has_the_published_costs():
    found = count(LMConfig.preset("deepseek-v3"))
    assert round(found.total / 1e9) == 671 and int(found.activated / 1e9) == 37
    assert 11.5e9 < found.mtp < 11.7e9  # the released MTP module has 11.5 B parameters of its own
    assert found.cache_bytes == 61 * (512 + 64) * 2  # 70 KB a token, as the paper on DeepSeek-V3's hardware says
    assert found.mha_cache_bytes == 61 * 128 * (192 + 128) * 2


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("v2-lite", "deepseek-v3")])
def test_presets_have_about_the_size_they_are_named_after(name):
    total = count(LMConfig.preset(name)).total
    named = {"demo": 5.6e6, "26m": 26e6, "64m": 64e6, "145m-moe": 145e6, "1b-moe": 1e9}[name]
    assert total == pytest.approx(named, rel=0.15)


SHAPES = [
    {},
    {"num_nextn_predict_layers": 2, "n_shared_experts": 2, "attention_bias": True},
    {"q_lora_rank": None, "attention_bias": True, "num_nextn_predict_layers": 0, "n_shared_experts": 0},
    {"tie_word_embeddings": True, "first_k_dense_replace": 2, "num_hidden_layers": 2},
]


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_formula_counts_the_parameters_of_the_real_model(preset, changes):
    config = LMConfig.preset(preset, **changes)
    with torch.device("meta"):
        model = MiniDeepSeek(config)
    found = count(config)
    mtp = sum(parameter.numel() for parameter in model.mtp.parameters())
    assert found.mtp == mtp and found.total + mtp == sum(parameter.numel() for parameter in model.parameters())
    one_expert, unused = 3 * config.hidden_size * config.moe_intermediate_size, config.n_routed_experts
    unused = (unused - config.num_experts_per_tok) * (config.num_hidden_layers - config.first_k_dense_replace)
    assert found.activated == found.total - unused * one_expert


def test_training_flops_are_six_a_weight_and_token(tiny_config):
    config = tiny_config(num_nextn_predict_layers=0)
    found = count(config, time=100)
    attention = 3 * 4 * 100 * (20 + 10) * 6 / 2  # layers, heads, positions, q k and weights v, causal half
    assert found.flops == 6 * (found.activated - 61 * 32) + attention


def test_the_command_prints_a_line_for_each_preset(monkeypatch, run):
    monkeypatch.setattr(cost_table, "PRESETS", {name: PRESETS[name] for name in ("demo", "64m")})
    lines = run(main).out.splitlines()
    assert [line.split()[0] for line in lines] == ["preset", "demo", "64m"]
    assert "activated" in lines[0] and "cache/token" in lines[0] and "FLOPs" in lines[0]
    assert "62 M" in lines[2] and "28.97 M" in lines[2]
    assert len({len(line) for line in lines}) == 1 and table({"64m": LMConfig()}).count("\n") == 1


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999 B"), (1234567, "1.235 MB"), (671.03e9, "671 GB"), (2e12, "2 TB"), (2560, "2.56 kB")]
)
def test_large_numbers_are_written_for_people(number, text):
    assert human(number, "B") == text


def test_a_pad_token_that_is_left_out_is_none(tiny_config):
    data = tiny_config().to_dict()
    del data["pad_token_id"]
    assert LMConfig.from_dict(data).pad_token_id is None


@pytest.mark.parametrize("name", PRESETS)
def test_our_config_json_means_the_same_to_transformers_and_comes_back(name, tmp_path, transformers):
    config = LMConfig.preset(name)
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert LMConfig.from_pretrained(tmp_path) == config
    assert theirs.model_type == "deepseek_v3" and theirs.architectures == ["DeepseekV3ForCausalLM"]
    rope = dict(theirs.rope_parameters)
    assert rope.pop("rope_theta") == config.rope_theta
    kind = rope.pop("rope_type")
    assert (kind, rope) == (("yarn", config.rope_scaling) if config.rope_scaling else ("default", {}))
    ours = {key: value for key, value in vars(config).items() if key != "attention" and not key.startswith("rope_")}
    assert {key: getattr(theirs, key) for key in ours} == ours
    theirs.save_pretrained(tmp_path)
    assert LMConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("yarn", [None, YARN, {**YARN, "rope_type": YARN["type"]}])
def test_config_json_holds_the_rope_fields_of_transformers_4_and_of_5(yarn, tiny_config):
    config = tiny_config(rope_theta=5e5, rope_scaling=yarn)
    data = config.to_dict()
    assert (data["rope_theta"], data.get("rope_scaling")) == (5e5, YARN if yarn else None)
    default, scaled = {"rope_type": "default"}, {**{k: v for k, v in YARN.items() if k != "type"}, "rope_type": "yarn"}
    assert data["rope_parameters"] == {**(scaled if yarn else default), "rope_theta": 5e5}
    for absent in (["rope_parameters"], ["rope_theta", "rope_scaling"]):  # either is enough
        assert LMConfig.from_dict({key: value for key, value in data.items() if key not in absent}) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only DeepSeek-V3's 'deepseek_v3' is read"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; only DeepSeek-V3's 'sigmoid' is read"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'; only DeepSeek-V3's 'noaux_tc' is read"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2; only DeepSeek-V3's 1 is read"),
        ({"rope_interleave": False}, "rope_interleave is False; only DeepSeek-V3's True is read"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "RoPE scaling of type 'linear'; only 'yarn' or none is read",
        ),
        ({"rope_parameters": "yarn"}, "rope_scaling and rope_parameters must be JSON objects; restore the file"),
        ({"rope_theta": "big", "rope_parameters": None}, "rope_theta = 'big': of another type; set float"),
        (
            {"rope_theta": 5e5},
            "rope_theta is 10000.0 in one place, 500000.0 in another; make rope_theta, rope_scaling and "
            "rope_parameters agree",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4}},
            "RoPE scaling is {'type': 'yarn', 'factor': 4} in one place, {'type': 'default'} in another; make "
            "rope_theta, rope_scaling and rope_parameters agree",
        ),
        ({"n_group": 3}, "n_group = 3: groups of equal size are needed; choose a divisor of n_routed_experts = 16"),
    ],
)
def test_a_config_json_that_is_not_deepseek_v3s_names_file_and_field(change, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LMConfig().to_dict(), **change}))
    with pytest.raises(UserError) as caught:
        LMConfig.from_pretrained(tmp_path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not found; give a checkpoint folder"), ("{", "not valid JSON"), ("[1]", "not a JSON object; restore")],
)
def test_a_broken_config_json_names_the_file(content, message, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        LMConfig.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)


def test_the_command_prints_a_changed_preset_beside_the_preset(run):
    shown = run(main, "--preset", "26m", "--num_hidden_layers", 6, "--n_routed_experts=16")
    changed = LMConfig.preset("26m", num_hidden_layers=6, n_routed_experts=16)
    rows = {"26m": LMConfig.preset("26m"), "num_hidden_layers 6, n_routed_experts 16": changed}
    assert (shown.code, shown.out) == (0, table(rows) + "\n")
    assert run(main, "--q_lora_rank", "null").out.splitlines()[2].split()[:2] == ["q_lora_rank", "None"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_hiden_layers", "3"], "--num_hiden_layers: no such option, did you mean '--num_hidden_layers'?"),
        (["--prest=26m"], "--prest=26m: no such option, did you mean '--preset'?"),
        (["--preset", "27m"], "no preset '27m', did you mean '26m'?"),
        (["--hidden_size", "wide"], "--hidden_size wide: not a value of this field; give int"),
        (["--hidden_size"], "argument --hidden_size: expected one argument"),
        (["--n_group", "3"], "n_group = 3: groups of equal size are needed"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(run, arguments, message):
    refused = run(main, *arguments)
    assert refused.code == 2 and message in refused.err and refused.err.count("\n") == 1


def test_the_command_has_help(run):
    shown = run(main, "--help")
    assert shown.code == 0 and "--n_routed_experts" in shown.out and "--preset 26m --num_hidden_layers 6" in shown.out
