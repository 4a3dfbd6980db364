"""Where YAML and the command line meet: the options of every script, `--config FILE`, `--help`, `--print_config`."""

from __future__ import annotations

import difflib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from errors import UserError, is_broken, with_home
from text.files import read_yaml


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print no traceback for Ctrl-C while a script still imports; later `errors.command_line` sees to it."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _excepthook
Settings = TypeVar("Settings")
OPTION = re.compile(r"--?[A-Za-z][\w.-]*")  # what the parser takes for an option, and not for a text that begins so
BOOLEANS = ("true", "false", "yes", "no")
# What options are called elsewhere, or what is there in their place. The last part of a name here, such as lr of
# optim.lr, need not be listed.
ELSEWHERE = {
    "ckpt": "model model_name model_path model_name_or_path base_model pretrained checkpoint load_from init_from",
    "data": "dataset dataset_name dataset_path data_path data_dir train_file train_data input corpus",
    "file": "data dataset input input_file test_file",
    "suite": "tasks task benchmark data",
    "out": "output_dir output out_dir output_path save_dir save_path overwrite_output_dir",
    "tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_dir",
    "column": "text_column text_field dataset_text_field",
    "epochs": "epoch num_train_epochs num_epochs max_epochs",
    "max_steps": "steps num_steps train_steps max_iters total_steps",
    "sequence_length": "max_length max_seq_len max_seq_length seq_len cutoff_len block_size context_length",
    "max_new_tokens": "max_completion_length max_output_tokens max_tokens",
    "group": "num_generations group_size n_samples batch_size",
    "batch_tokens": "batch_size train_batch_size global_batch_size gradient_accumulation_steps accumulation_steps",
    "micro_tokens": "per_device_train_batch_size per_device_eval_batch_size micro_batch_size device_batch_size",
    "optim.lr": "learning_rate peak_lr max_lr",
    "optim.warmup": "warmup_steps warmup_ratio warmup_iters",
    "optim.decay_from": "lr_scheduler_type lr_scheduler scheduler lr_decay_style",
    "optim.final_lr_ratio": "min_lr min_lr_ratio min_learning_rate",
    "optim.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optim.clip": "max_grad_norm grad_clip gradient_clipping",
    "optim.kind": "optimizer optimizer_type",
    "save_every": "save_steps save_interval save_strategy",
    "val_every": "eval_steps eval_every eval_interval eval_strategy evaluation_strategy",
    "log_every": "logging_steps log_interval",
    "keep": "save_total_limit keep_last",
    "resume": "resume_from_checkpoint resume_from continue",
    "val_fraction": "val_size val_split validation_split test_size",
    "workers": "num_workers num_proc",
    "threads": "num_threads",
    "device": "cpu cuda gpu use_cpu no_cuda",
    "dtype": "bf16 fp16 fp32 precision mixed_precision torch_dtype",
    "dist.zero": "zero zero_stage fsdp deepspeed sharding",
    "dist.ep": "ep expert_parallel expert_parallel_size",
    "dist": "local_rank nproc_per_node ddp deepspeed fsdp zero",
    "gradient_checkpointing": "activation_checkpointing recompute",
    "packing": "pack sample_packing",
    "log_to": "report_to logger",
    "wandb": "use_wandb wandb_project",
    "lora.r": "lora_r lora_rank rank",
    "lora.alpha": "lora_alpha",
    "lora.targets": "lora_target target_modules",
    "base": "load_in_4bit load_in_8bit quantization_bit",
    "preference.beta": "dpo_beta pref_beta",
    "preference.loss": "loss_type",
    "beta": "kl_coef kl_beta",
    "rewards": "reward_funcs reward_functions reward",
    "system": "system_prompt",
    "once": "prompt question",
    "model.num_hidden_layers": "num_hidden_layers n_layers num_layers n_layer",
    "model.hidden_size": "hidden_size d_model n_embd dim",
    "model.n_routed_experts": "n_routed_experts num_experts",
}

# A step of GRPO is as large as its rollout.
ELSEWHERE_IN_RL = {"prompts": "gradient_accumulation_steps accumulation_steps", **ELSEWHERE}


def parse(kind: type[Settings], description: str, arguments: Sequence[str] | None = None) -> Settings:
    """Read `--config FILE` and the command line over it into the dataclass `kind`.

    An attribute `by_hand` of the settings is given the names of the options that were on the command line, and `epilog`
    of the class makes what `--help` ends with. Raises `UserError`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(description)
    parser.epilog = kind.epilog() if hasattr(kind, "epilog") else None
    parser.add_class_arguments(kind)
    settings = kind(**_parse(parser, kind, words))
    if hasattr(settings, "by_hand"):
        settings.by_hand = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    return settings


def call(function: Callable[..., None], description: str, arguments: Sequence[str] | None = None) -> None:
    """Call a function with its parameters from `--config FILE` and the command line over it."""
    parser = _parser(description)
    parser.add_function_arguments(function)
    function(**_parse(parser, function, list(sys.argv[1:] if arguments is None else arguments)))


def call_one_of(functions: Sequence[Callable[..., None]], description: str, arguments: list[str] | None = None) -> None:
    """Call the function that the first argument names; its required parameters are positional."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    script = Path(sys.argv[0]).name
    named = {function.__name__: function for function in functions}
    if not arguments or arguments[0] not in named:
        listed = "\n".join(f"  {name:<10}{(inspect.getdoc(named[name]) or '').partition(chr(10))[0]}" for name in named)
        if arguments and arguments[0] in ("-h", "--help"):
            print(f"usage: {script} COMMAND ..., and {script} COMMAND --help\n\n{description}\n{listed}")
            return
        what = f"there is no {arguments[0]} here" if arguments else "a command is missing"
        raise UserError(f"{script}: {what}; give one of {', '.join(named)}")
    function = named[arguments[0]]
    parser = _parser(inspect.getdoc(function) or "", f"{script} {arguments[0]}")
    parser.add_function_arguments(function, as_positional=True)
    function(**_parse(parser, function, arguments[1:]))


class RawFormatter(DefaultHelpFormatter):
    """Keeps the line breaks of a script's docstring in --help."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text


def _parser(description: str, program: str | None = None) -> ArgumentParser:
    parser = ArgumentParser(
        prog=program, description=description, exit_on_error=False, allow_abbrev=False, formatter_class=RawFormatter
    )
    parser.add_argument("--config", action="config", help="YAML file of these settings; the command line wins over it")
    return parser


def _parse(parser: ArgumentParser, kind: Callable[..., Any], words: list[str]) -> dict[str, Any]:
    script, flags = Path(sys.argv[0]).name, _flags(kind)
    for index, word in enumerate(words):
        # `--resume` alone means `--resume true`.
        if word in flags and "".join(words[index + 1 : index + 2]).lower() not in flags[word]:
            words[index] = f"{word}=true"
    if wrong := unknown_options(words, {option.lstrip("-") for option in parser._option_string_actions}):
        raise UserError(f"{script}: {'; '.join(wrong)}")
    try:
        parsed = parser.parse_args(words)
        for name, value in list(parsed.items()):
            if isinstance(value, str):  # those of the recipe, which the parser has read by itself
                parsed[name] = with_home(value)
        given = vars(parser.instantiate(parsed))
    # The parser lets exceptions through of values that its types cannot hold, such as 10**400 as a float.
    except (ArgumentError, ArithmeticError, ValueError, TypeError, RecursionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{script}: {' '.join(lines)}; see --help") from None
    given.pop("config", None)
    check_values(kind, given)
    return given


def check_values(kind: Callable[..., Any], given: Mapping[str, Any], prefix: str = "--") -> None:
    """Refuse what the parser lets through: nothing where a value is needed, floats that are not finite, broken text."""
    for name, hint in get_type_hints(kind).items():
        value = given.get(name, 0)
        if value is None and type(None) not in get_args(hint):
            raise UserError(f"{prefix}{name}: is empty; give a value or leave it out")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{prefix}{name} {value}: must be a finite number")
        if isinstance(value, str) and is_broken(value):
            raise UserError(f"{prefix}{name}: has a NUL or half of a character; leave it out")
        if is_dataclass(hint) and is_dataclass(value):
            check_values(hint, vars(value), f"{prefix}{name}.")


def _flags(kind: Callable[..., Any], prefix: str = "--") -> dict[str, tuple[str, ...]]:
    """Return the options that may be true or false, and all their values; those of groups too: `--lora.dora`."""
    flags = {}
    for name, hint in get_type_hints(kind).items():
        if hint is bool or bool in get_args(hint):
            nothing = ("null",) * (type(None) in get_args(hint))
            words = (word for part in get_args(hint) for word in get_args(part))
            flags[prefix + name] = (*BOOLEANS, *nothing, *words)
        elif is_dataclass(hint):
            flags |= _flags(hint, f"{prefix}{name}.")
    return flags


def unknown_options(words: Sequence[str], known: set[str]) -> list[str]:
    """Return a message for each word, and each key of a recipe among them, that is not an option.

    known: the options, without dashes. Raises `UserError` for a recipe that cannot be read.
    """
    names = [word.partition("=")[0] for word in words]
    wrong = [_suggestion(name, known) for name in dict.fromkeys(filter(OPTION.fullmatch, names))]
    for index, word in enumerate(words):
        name, given, value = word.partition("=")
        value = value if given else "".join(words[index + 1 : index + 2])
        if name == "--config" and value:
            keys = dict.fromkeys(_keys(read_yaml(Path(value)), known))
            wrong += [f"{value}: {what}" for key in keys if (what := _suggestion(key, known))]
        elif name.startswith("--") and not value.lstrip().startswith("{") and not Path(value).is_file():
            members = _members(name.lstrip("-"), known)
            wrong += [f"{name} {value}: {name} is a group of options: --{', --'.join(members)}"] if members else []
    return [what for what in wrong if what]


def _suggestion(name: str, known: set[str]) -> str:
    """Return what to say of a name that is not an option: what it is called here, or what is nearest to it."""
    if _is_known(name.lstrip("-"), known):
        return ""
    plain = name.lstrip("-").replace("-", "_").lower()
    end = plain.rpartition(".")[2]
    by_end = {option.rpartition(".")[2]: option for option in sorted(known, reverse=True)} | {one: one for one in known}
    others = ELSEWHERE_IN_RL if "group" in known else ELSEWHERE
    found = [plain, by_end.get(end), *(here for here, elsewhere in others.items() if end in elsewhere.split())]
    found += [by_end[near] for near in sorted(by_end, key=len) if near.startswith(plain)]
    found += [by_end[near] for near in difflib.get_close_matches(plain, by_end)]
    here = next((option for option in found if option and _is_known(option, known)), "")
    dashes = "--" if name.startswith("-") else ""
    return f"there is no {name} here; " + (f"did you mean {dashes}{here}?" if here else "see --help")


def _keys(content: Any, known: set[str], prefix: str = "") -> Iterator[str]:
    """Yield the names of the settings in a recipe, those in groups as `optim.lr`."""
    for key, value in content.items() if isinstance(content, Mapping) else ():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and _members(name, known):
            yield from _keys(value, known, f"{name}.")
        else:
            yield name


def _is_known(name: str, known: set[str]) -> bool:
    """Return whether it is an option, or a field of one that takes any, such as `model.num_hidden_layers`."""
    parts = name.split(".")
    outer = (".".join(parts[:count]) for count in range(1, len(parts)))
    return name in known or any(option in known and not _members(option, known) for option in outer)


def _members(option: str, known: set[str]) -> list[str]:
    return sorted(name for name in known if name.startswith(f"{option}."))
