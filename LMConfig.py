"""The hyperparameters of a DeepSeek-V3 and its presets: the fields of a Hugging Face `deepseek_v3` config.json.

python LMConfig.py      what each preset costs; see model/cost_table.py
"""

from __future__ import annotations

import difflib
import json
import math
import runpy
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from errors import UserError

# Written into config.json for other programs; of no meaning here.
FIXED = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "moe_layer_freq": 1,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True, "use_cache": True,
    "torch_dtype": "float32",
}  # fmt: skip
# Attention and the model_type in config.json: with another than MLA a model is no DeepSeek-V3, and says so.
MODEL_TYPES = {"mla": "deepseek_v3", "mha": "mini_deepseek_v3_mha", "gqa": "mini_deepseek_v3_gqa"}
# Fields of other programs that change nothing here; model/checkpoint/fp8.py reads quantization_config.
IGNORED = {
    "_name_or_path", "auto_map", "aux_loss_alpha", "chunk_size_feed_forward", "dtype", "ep_size", "head_dim",
    "id2label", "is_encoder_decoder", "label2id", "num_local_experts", "num_mtp_layers", "output_attentions",
    "output_hidden_states", "output_router_logits", "pretraining_tp", "problem_type", "qk_head_dim",
    "quantization_config", "return_dict", "rope_parameters", "rope_scaling", "rope_theta", "seq_aux",
    "transformers_version",
}  # fmt: skip
# Fields on which no weight's shape depends: a trained model may continue with other values.
FREE = {
    "attention_dropout", "hidden_act", "initializer_range", "max_position_embeddings", "n_group", "norm_topk_prob",
    "num_experts_per_tok", "rms_norm_eps", "rope_scaling", "rope_theta", "routed_scaling_factor", "topk_group",
}  # fmt: skip
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
MAY_BE_ZERO = {
    "attention_dropout", "first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers", *TOKENS
}  # fmt: skip
# Far above any network ever trained: a number beyond is a slip or a damaged file, and would fill the memory.
MOST = 2**31 - 1
MOST_OF = {"num_hidden_layers": 1024, "num_nextn_predict_layers": 1024, "n_routed_experts": 2**16}
YARN_FIELDS = {
    "attention_factor", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim",
    "original_max_position_embeddings", "rope_type", "truncate", "type",
}  # fmt: skip


class ConfigError(UserError):
    """A hyperparameter that is misspelled, of the wrong type, or at odds with another."""


@dataclass
class LMConfig:
    """Architecture of DeepSeek-V3 (arXiv 2412.19437, sections 2 and 4.2). Sizes are counts of features or of modules.

    Raises:
        ConfigError: when a field is outside its domain or two fields contradict each other.
    """

    vocab_size: int = 6400
    hidden_size: int = 512
    intermediate_size: int = 1408  # of the dense layers
    moe_intermediate_size: int = 256  # of one routed or shared expert
    num_hidden_layers: int = 8
    num_nextn_predict_layers: int = 1  # D, the depth of multi-token prediction (section 2.2)
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None  # fewer than num_attention_heads in GQA only: MLA expands one for every head
    n_shared_experts: int = 1
    n_routed_experts: int = 16
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    q_lora_rank: int | None = 256
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # YaRN; None unless the context was extended
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02  # DeepSeek-V3 itself: 0.006
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int | None = 3
    attention: str = "mla"  # mha or gqa to compare with (model/variants.py); their heads take the place of MLA's sizes

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if isinstance(self.rope_scaling, dict):
            self.rope_scaling = _with_type(self.rope_scaling)
        for name in (f.name for f in fields(self)):
            self._check_field(name)
        if self.attention in ("mha", "gqa") and self.kv_lora_rank:
            # The sizes are of the MLA to compare with: heads without latents that have as many parameters.
            size = resolve_name("model.costs:equal_head_size")(self)
            self.q_lora_rank, self.kv_lora_rank, self.qk_nope_head_dim = None, 0, 0
            self.qk_rope_head_dim = self.v_head_dim = size
        for holds, field, complaint in self._rules():
            if not holds:
                raise ConfigError(f"{field} = {getattr(self, field)!r}: {complaint}")
        if self.rope_scaling is not None:
            _check_yarn(self.rope_scaling)

    @property
    def qk_head_dim(self) -> int:
        """Size of one query or key head: the part without and the part with RoPE."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """How many numbers attention caches of one position in each layer."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return self.num_key_value_heads * (self.qk_head_dim + self.v_head_dim)

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` routes to experts; the first layers are dense. MTP layers count on from the last."""
        return index >= self.first_k_dense_replace

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LMConfig:
        """Return the preset `name`, with `changes` to single fields."""
        if not isinstance(name, str) or name not in PRESETS:
            known = ", ".join(PRESETS)
            raise ConfigError(f"model.preset: no preset {name!r}{did_you_mean(name, PRESETS)}; one of {known}")
        cls.check_names(changes)
        return replace(cls(**PRESETS[name]), **{"num_key_value_heads": None, **changes})

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Raise `ConfigError` for a name that is not a field."""
        known = {f.name for f in fields(cls)}
        for name in names:
            if name not in known:
                raise ConfigError(f"model.{name}: no such field{did_you_mean(name, known)}; see LMConfig.py")

    def continued(self, choice: dict[str, Any], place: str) -> LMConfig:
        """Return this configuration of trained weights with the `FREE` fields of `choice`, such as rope_theta.

        A preset in it only has to have the same shapes: the checkpoint may have been extended. `place` names it.
        """
        given = dict(choice)
        preset = given.pop("preset", None)
        self.check_names(given)
        remedy = "leave it out, or train a new model without --ckpt"
        kind = {name: given[name] for name in ("attention", "num_key_value_heads") if name in given}
        theirs = None if preset is None else self.preset(preset, **kind)
        aside = {*given, "num_key_value_heads", "vocab_size", *TOKENS}
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self) if f.name not in FREE):
            if given.get(name, value) != value:
                raise ConfigError(f"--model.{name} {given[name]}: is {value} in {place} and cannot change; {remedy}")
            if theirs is not None and name not in aside and getattr(theirs, name) != value:
                other = f"has {name} = {getattr(theirs, name)}, {place} has {value}"
                raise ConfigError(f"--model.preset {preset}: {other}; {remedy}")
        try:
            return replace(self, **{name: value for name, value in given.items() if name in FREE})
        except ConfigError as error:
            raise ConfigError(f"--model.{error}") from None

    @classmethod
    def from_dict(cls, data: dict[str, Any], place: str = "config") -> LMConfig:
        """Read the content of a `deepseek_v3` config.json, of transformers 4 or 5; `place` names it in messages."""
        if not isinstance(data, dict):
            raise ConfigError(f"{place}: not a JSON object; restore the file")
        kind = MODEL_TYPES.get(str(data.get("attention", "mla")), FIXED["model_type"])
        fixed, whose = (
            {**FIXED, "model_type": kind},
            "DeepSeek-V3's" if kind == FIXED["model_type"] else "its attention's",
        )
        for key in ("model_type", "moe_layer_freq", "scoring_func", "topk_method", "rope_interleave"):
            if data.get(key, fixed[key]) != fixed[key]:
                raise ConfigError(f"{place}: {key} is {data[key]!r}; only {whose} {fixed[key]!r} is read")
        rope = [data.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
        if not all(isinstance(part, dict) for part in rope):
            raise ConfigError(f"{place}: rope_scaling and rope_parameters must be JSON objects; restore the file")
        thetas = [part["rope_theta"] for part in (*rope, data) if "rope_theta" in part]
        scalings = [{"type": "default", **_with_type(part)} for part in rope if part]
        for scaling in scalings:
            scaling.pop("rope_theta", None)
            if scaling["type"] not in ("default", "yarn"):
                raise ConfigError(f"{place}: RoPE scaling of type {scaling['type']!r}; only 'yarn' or none is read")
        for name, values in (("rope_theta", thetas), ("RoPE scaling", scalings)):
            if any(value != values[0] for value in values):  # each reader would take another one
                both = f"{name} is {values[0]} in one place, {values[-1]} in another"
                raise ConfigError(f"{place}: {both}; make rope_theta, rope_scaling and rope_parameters agree")
        known = {f.name for f in fields(cls)}
        for key in sorted(data.keys() - known - IGNORED - FIXED.keys()):
            if near := did_you_mean(key, known):
                raise ConfigError(f"{place}: no such field {key!r}{near}; correct the name")
            warnings.warn(f"{place}: {key!r} is not a field of DeepSeek-V3 and is ignored", stacklevel=2)
        # transformers 4 leaves out a pad_token_id that is null.
        values = {"pad_token_id": None} | {key: value for key, value in data.items() if key in known}
        values.update(rope_theta=thetas[0] if thetas else cls.rope_theta, rope_scaling=None)
        if scalings and scalings[0]["type"] == "yarn":
            values["rope_scaling"] = scalings[0]
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LMConfig:
        """Read `folder`/config.json."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ConfigError(f"{path}: not found; give a checkpoint folder (config.json and model.safetensors)")
        try:
            data = json.loads(path.read_text(encoding="utf8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid JSON ({error}); restore the file") from None
        return cls.from_dict(data, str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json, with RoPE where transformers 4 and 5 look for it."""
        data = {**FIXED, **asdict(self)}
        if self.attention == "mla":
            del data["attention"]
        else:  # other programs must not take it for a DeepSeek-V3
            data |= {"model_type": MODEL_TYPES[self.attention], "architectures": ["MiniDeepSeek"]}
        scaling = dict(self.rope_scaling or {"type": "default"})
        data["rope_parameters"] = {"rope_type": scaling.pop("type"), "rope_theta": self.rope_theta, **scaling}
        if self.rope_scaling is None:
            del data["rope_scaling"]
        return data

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder`/config.json."""
        write_json(self.to_dict(), Path(folder) / "config.json")

    def _check_field(self, name: str) -> None:
        """Check a value's type (YAML and JSON bring strings and floats where integers are meant) and its range."""
        value, field = getattr(self, name), self.__dataclass_fields__[name].type
        kind, *optional = str(field).split(" | ")
        if value is None and optional:
            return
        types = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict[str, Any]": dict}
        if not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise ConfigError(f"{name} = {value!r}: of another type; set {field}")
        if kind not in ("int", "float"):
            return
        may_be_zero = name in MAY_BE_ZERO or (self.attention != "mla" and name in ("kv_lora_rank", "qk_nope_head_dim"))
        if value < 0 or (value == 0 and not may_be_zero):
            least = "0 or more" if may_be_zero else "a positive number"
            raise ConfigError(f"{name} = {value}: out of range; set {least}")
        most = MOST_OF.get(name, MOST) if isinstance(value, int) else math.inf
        if not value <= most or value == math.inf:  # the first is so of NaN too
            raise ConfigError(f"{name} = {value}: out of range; set {most} or less")

    def _rules(self) -> list[tuple[bool, str, str]]:
        """Return what the network relies on: whether it holds, the field, what is wrong and what to change."""
        heads, layers, experts = self.num_attention_heads, self.num_hidden_layers, self.n_routed_experts
        groups, chosen, per_group = self.n_group, self.topk_group, self.n_routed_experts // self.n_group
        fewer = self.num_key_value_heads < heads and heads % self.num_key_value_heads == 0
        no_latents = not (self.q_lora_rank or self.kv_lora_rank or self.qk_nope_head_dim)
        rules = [
            (self.attention in MODEL_TYPES, "attention", f"one of {', '.join(MODEL_TYPES)}"),
            (fewer or self.attention != "gqa", "num_key_value_heads",
             f"GQA shares keys and values among heads; set a divisor of num_attention_heads = {heads} below it"),
            (self.num_key_value_heads == heads or self.attention == "gqa", "num_key_value_heads",
             f"{self.attention.upper()} has a key and a value for every head; leave it out or set it to "
             f"num_attention_heads = {heads}"),
            (no_latents or self.attention == "mla", "attention",
             "has no latents; leave the sizes of MLA to what it is compared with, or set q_lora_rank to null, "
             "kv_lora_rank and qk_nope_head_dim to 0"),
            (self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "RoPE turns pairs of features; make it even"),
            (self.first_k_dense_replace <= layers, "first_k_dense_replace",
             f"more dense layers than layers; lower it to num_hidden_layers = {layers} or less"),
            (experts % groups == 0, "n_group",
             f"groups of equal size are needed; choose a divisor of n_routed_experts = {experts}"),
            (per_group >= 2, "n_group", "a group needs at least 2 experts, for its score is the sum of its two best; "
             f"lower n_group or raise n_routed_experts = {experts}"),
            (chosen <= groups, "topk_group", f"there are fewer groups; lower it to n_group = {groups} or less"),
            (self.num_experts_per_tok <= chosen * per_group, "num_experts_per_tok",
             f"the chosen groups hold only {chosen * per_group} experts; lower it or raise topk_group = {chosen}"),
            (self.hidden_act == "silu", "hidden_act", "DeepSeek-V3 has 'silu', nothing else is built; leave it out"),
            (self.attention_dropout == 0, "attention_dropout", "DeepSeek-V3 has none; set it to 0"),
        ]  # fmt: skip
        no_token = f"no such token; lower it or raise vocab_size = {self.vocab_size}"
        return rules + [((getattr(self, name) or 0) < self.vocab_size, name, no_token) for name in TOKENS]


def write_json(data: dict[str, Any], path: Path) -> None:
    """Write a file of a checkpoint folder, complete or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf8")
    partial.replace(path)


def _with_type(scaling: dict[str, Any]) -> dict[str, Any]:
    """`rope_scaling` as DeepSeek writes it: with `type`, which is `rope_type` to transformers."""
    kind = scaling.get("rope_type", scaling.get("type"))
    others = {key: value for key, value in scaling.items() if key not in ("type", "rope_type")}
    return others if kind is None else {"type": kind, **others}


def _check_yarn(yarn: dict[str, Any]) -> None:
    """Check rope_scaling, where a misspelled key would silently change the attention."""
    for key in yarn:
        if key == "rope_theta":
            raise ConfigError("rope_scaling.rope_theta: is a separate field; set rope_theta beside rope_scaling")
        if key not in YARN_FIELDS:
            near = did_you_mean(key, YARN_FIELDS)
            raise ConfigError(f"rope_scaling.{key}: YaRN has no such field{near}; correct it or leave it out")
    if yarn.get("type") != "yarn":
        raise ConfigError(f"rope_scaling.type = {yarn.get('type')!r}: only 'yarn' is built; set it or leave it out")
    if yarn.get("truncate", True) is not True:
        raise ConfigError(f"rope_scaling.truncate = {yarn['truncate']!r}: ranges are whole pairs here; leave it out")
    for key in ("factor", "original_max_position_embeddings"):
        if not (isinstance(yarn.get(key), (int, float)) and yarn[key] > 0):
            raise ConfigError(f"rope_scaling.{key} = {yarn.get(key)!r}: YaRN needs it; set a positive number")


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return the end of an error message: the nearest known word, or nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(
        hidden_size=256, intermediate_size=768, moe_intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, q_lora_rank=128, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, max_position_embeddings=1024,
        # A few hundred steps must do: large first weights and one matrix for embedding and head learn in fewer of them.
        initializer_range=0.05, tie_word_embeddings=True,
    ),
    "26m": dict(
        hidden_size=384, intermediate_size=1024, moe_intermediate_size=192, num_hidden_layers=8, num_attention_heads=6,
        n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, q_lora_rank=192, kv_lora_rank=96,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, max_position_embeddings=4096,
    ),
    "64m": dict(),
    "145m-moe": dict(
        hidden_size=640, intermediate_size=1728, moe_intermediate_size=320, num_hidden_layers=12,
        num_attention_heads=10, q_lora_rank=320, kv_lora_rank=128,
    ),
    "1b-moe": dict(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, moe_intermediate_size=512, num_hidden_layers=16,
        num_attention_heads=16, n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2, q_lora_rank=512,
        kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128,
    ),
    "v2-lite": dict(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_nextn_predict_layers=0, num_attention_heads=16, n_shared_experts=2, n_routed_experts=64,
        num_experts_per_tok=6, n_group=1, topk_group=1, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, bos_token_id=100000, eos_token_id=100001, pad_token_id=None,
    ),
    "deepseek-v3": dict(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
        num_attention_heads=128, n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4,
        first_k_dense_replace=3, routed_scaling_factor=2.5, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=163840, initializer_range=0.006,
        rope_scaling={"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                      "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
        bos_token_id=0, eos_token_id=1, pad_token_id=None,
    ),
}  # fmt: skip


if __name__ == "__main__":
    runpy.run_module("model.cost_table", run_name="__main__")
