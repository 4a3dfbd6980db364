"""Options under names that people know from elsewhere, or misspelt: refused, with the name that they have here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from text.files import read_yaml

# What the parser takes for an option, and not for a text that begins so.
OPTION = re.compile(r"--?[A-Za-z][\w.-]*")
# What options here are called elsewhere. The last part of a name here, such as lr of optim.lr, need not be listed.
CALLED = {
    "ckpt": "model_name_or_path model model_name model_path base_model pretrained checkpoint checkpoint_path "
    "load_from init_from pretrained_model_name_or_path model_id",
    "data": "dataset dataset_name dataset_path dataset_dir data_path data_dir train_file train_data train_dataset "
    "input input_file corpus train_files data_files",
    "file": "data dataset input input_file eval_file test_file",
    "suite": "tasks task eval_tasks benchmark data",
    "out": "output_dir output out_dir output_path output_folder save_dir save_path run_dir logging_dir project_dir",
    "tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_dir",
    "teacher": "teacher_model_name_or_path teacher_path teacher_ckpt",
    "reference": "ref_model ref_model_name_or_path reference_model",
    "column": "text_column text_field dataset_text_field content_column",
    "epochs": "epoch num_train_epochs num_epochs n_epochs max_epochs train_epochs total_epochs",
    "max_steps": "steps num_steps train_steps max_train_steps max_iters iters total_steps num_training_steps",
    "sequence_length": "max_length max_seq_len max_seq_length seq_len seq_length cutoff_len block_size "
    "context_length max_context_length model_max_length max_prompt_length",
    "window": "max_length max_seq_len max_seq_length stride",
    "max_new_tokens": "max_completion_length max_gen_len max_output_tokens max_response_length max_tokens",
    "optim.lr": "learning_rate peak_lr max_lr base_lr actor_lr",
    "optim.final_lr_ratio": "min_lr_ratio",
    "optim.clip": "max_grad_norm grad_clip clip_grad gradient_clipping grad_norm_clip clip_grad_norm",
    "optim.kind": "optimizer optimizer_type optim_type",
    "optim.eps": "adam_epsilon adam_eps",
    "optim.weight_decay": "wd",
    "save_every": "save_steps save_interval checkpoint_every ckpt_interval save_freq",
    "val_every": "eval_steps eval_every eval_interval val_interval evaluation_steps eval_freq val_steps",
    "log_every": "logging_steps log_interval logging_interval log_steps print_every log_freq",
    "keep": "save_total_limit keep_last keep_last_n max_checkpoints",
    "resume": "resume_from_checkpoint resume_from continue from_resume load_checkpoint auto_resume",
    "val_fraction": "val_size validation_split val_split eval_ratio val_ratio test_size validation_fraction",
    "workers": "num_workers num_proc preprocessing_num_workers dataloader_num_workers n_workers",
    "threads": "num_threads n_threads",
    "device": "accelerator device_type",
    "dtype": "precision mixed_precision torch_dtype compute_dtype data_type",
    "compile": "torch_compile use_compile",
    "gradient_checkpointing": "activation_checkpointing recompute use_gradient_checkpointing enable_checkpointing",
    "packing": "pack use_packing sample_packing neat_packing",
    "wandb": "report_to use_wandb wandb_project project swanlab use_swanlab",
    "seed": "random_seed data_seed",
    "dist.timeout": "ddp_timeout",
    "lora.r": "lora_r lora_rank rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "lora_target lora_target_modules target_modules lora_modules",
    "lora.dora": "use_dora",
    "lora.rslora": "use_rslora",
    "lora.plus_ratio": "loraplus_lr_ratio lora_plus_ratio",
    "base": "quantization_bit load_in_4bit load_in_8bit quantization quant_bits qlora",
    "preference.beta": "dpo_beta pref_beta",
    "preference.loss": "pref_loss loss_type dpo_loss",
    "preference.nll_weight": "rpo_alpha pref_ftx",
    "preference.gamma": "simpo_gamma",
    "preference.label_smoothing": "dpo_label_smoothing",
    "beta": "kl_coef kl_beta kl_loss_coef",
    "loss": "loss_type",
    "group": "num_generations group_size n_samples rollout_n num_return_sequences",
    "mu": "num_iterations ppo_epochs",
    "clip_low": "epsilon cliprange clip_range clip_ratio clip_eps",
    "clip_high": "epsilon_high clip_ratio_high",
    "rewards": "reward_funcs reward_functions reward reward_weights",
    "system": "system_prompt system_message default_system",
    "once": "prompt question query",
    "vocab_size": "vocabulary_size num_tokens n_vocab",
    "model.num_hidden_layers": "num_hidden_layers num_layers n_layers n_layer depth layers",
    "model.hidden_size": "hidden_size dim d_model n_embd hidden_dim",
    "model.num_attention_heads": "num_attention_heads n_heads num_heads n_head",
    "model.n_routed_experts": "n_routed_experts num_experts n_experts num_local_experts",
    "model.num_experts_per_tok": "num_experts_per_tok top_k_experts moe_top_k",
    "model.max_position_embeddings": "max_position_embeddings",
}  # fmt: skip
# Options of which there is none here, and what takes their place where the script has the options that are named.
INSTEAD = {
    "batch_size train_batch_size global_batch_size total_batch_size n_batch": (
        ("group", "a step has --prompts times --group completions; --rollout_rows and --micro_tokens bound memory"),
        ("batch_tokens", "batches are counted in tokens: --batch_tokens a step on all ranks, --micro_tokens at a time"),
    ),
    "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size micro_batch device_batch_size mbs": (
        ("micro_tokens", "batches are counted in tokens: --micro_tokens at a time on a rank, --batch_tokens a step"),
    ),
    "per_device_eval_batch_size eval_batch_size": (
        ("micro_tokens", "validation takes --micro_tokens at a time, and --val_tokens in all"),
    ),
    "gradient_accumulation_steps accumulation_steps grad_accum grad_accum_steps gradient_accumulation accum_iter "
    "accumulate_grad_batches": (
        ("micro_tokens", "follows from --batch_tokens a step and --micro_tokens at a time on each rank"),
    ),
    "warmup_steps warmup_iters warmup_ratio num_warmup_steps lr_warmup_steps warmup_epochs": (
        ("optim.warmup", "--optim.warmup is a share of the run, 0.02 for its first 2 %"),
    ),
    "lr_scheduler_type lr_scheduler scheduler lr_schedule lr_decay_style decay_lr lr_decay_iters": (
        ("optim.decay_from", "the rate falls along a cosine from --optim.decay_from, a share of the run, to "
                             "--optim.final_lr_ratio"),
    ),
    "min_lr min_learning_rate final_lr": (
        ("optim.final_lr_ratio", "--optim.final_lr_ratio is the last rate over --optim.lr"),
    ),
    "adam_beta1 adam_beta2 beta1 beta2": (("optim.betas", "--optim.betas '[0.9, 0.95]' has both"),),
    "bf16 use_bf16": (("dtype", "--dtype bf16 (auto takes it where it is fast)"),),
    "fp16 use_fp16 amp use_amp half": (("dtype", "float16 is not supported; --dtype bf16"),),
    "fp32 no_amp": (("dtype", "--dtype fp32"),),
    "cpu use_cpu no_cuda": (("device", "--device cpu"),),
    "gpu cuda gpus": (("device", "--device cuda, and torchrun --nproc_per_node N for several GPUs"),),
    "ddp distributed local_rank nproc_per_node num_gpus n_gpu nnodes deepspeed fsdp zero zero_stage ddp_backend": (
        ("dist", "start the script with torchrun --nproc_per_node N"),
    ),
    "eval_strategy evaluation_strategy do_eval": (("val_every", "--val_every is the steps between validations"),),
    "save_strategy": (("save_every", "--save_every is the steps between checkpoints"),),
    "logging_strategy": (("log_every", "--log_every is the steps between log lines"),),
    "overwrite_output_dir overwrite": (("resume", "choose another --out, or --resume the run that is there"),),
    "do_train stage finetuning_type train_type": (("out", "each stage is a script: full_sft.py, lora_sft.py, ..."),),
    "template chat_template": (("ckpt", "the tokenizer of --ckpt has the template"),),
    "flash_attn attn_implementation use_flash_attn use_flash_attention_2 enable_liger_kernel": (
        ("dtype", "the fastest kernels are chosen by themselves"),
    ),
}  # fmt: skip
# Whose an option is that other scripts are asked for.
OWNERS = {
    "lora": "lora_sft.py", "base": "lora_sft.py", "preference": "dpo_train.py", "group": "grpo_train.py",
    "mu": "grpo_train.py", "teacher": "distill.py", "model": "pretrain.py", "vocab_size": "train_tokenizer.py",
}  # fmt: skip


def unknown_options(arguments: Sequence[str], known: set[str]) -> list[str]:
    """What to say of the arguments, and of the keys of the recipes among them, that are no options; nothing of others.

    known: the options, without dashes. Raises `UserError` for a recipe that cannot be read.
    """
    names = [argument.partition("=")[0] for argument in arguments]
    wrong = _misnamed(filter(OPTION.fullmatch, names), known)
    for index, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        value = value if given else "".join(arguments[index + 1 : index + 2])
        if name == "--config" and value:
            recipe = read_yaml(Path(value))  # here, since the parser would make of it what it stands for
            wrong += [f"{value}: {what}" for what in _misnamed(_keys(recipe, known), known)]
        elif name.startswith("--") and (what := _not_a_group(name, value, known)):
            wrong.append(what)
    return wrong


def _misnamed(given: Iterable[str], known: set[str]) -> list[str]:
    """given: names with their dashes, or keys of a recipe without."""
    return [explained(name, known) for name in dict.fromkeys(given) if not _is_known(name.lstrip("-"), known)]


def _not_a_group(name: str, value: str, known: set[str]) -> str:
    """What to say of one value for an option that stands for several, such as `--optim adamw`; else nothing."""
    members = sorted(f"--{member}" for member in _members(name.lstrip("-"), known))
    if not members or value.lstrip().startswith("{") or Path(value).is_file():
        return ""
    return f"{name} {value}: {name} is a group of options: {', '.join(members)}"


def _keys(content: Any, known: set[str], prefix: str = "") -> Iterator[str]:
    """The names of the settings in a recipe, those in groups as `optim.lr`."""
    for key, value in content.items() if isinstance(content, Mapping) else ():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and _members(name, known):
            yield from _keys(value, known, f"{name}.")
        else:
            yield name


def explained(name: str, known: set[str]) -> str:
    """What a name that is no option is called here, what takes its place, or what is nearest to it."""
    dashes = "--" if name.startswith("-") else ""
    plain = name.lstrip("-").replace("-", "_").lower()
    end = plain.rpartition(".")[2]
    leaves = [option for option in sorted(known) if option.rpartition(".")[2] == end]
    names_here = [option for option, elsewhere in CALLED.items() if end in elsewhere.split()]
    candidates = [option for option in (plain, *leaves, *names_here) if _is_known(option, known)]
    if candidates:
        return f"{name} is called {dashes}{candidates[0]} here"
    for names, places in INSTEAD.items():
        if plain in names.split():
            for option, text in places:
                if option in known:
                    return f"there is no {name} here: {text}"
    for option in names_here:
        if owner := OWNERS.get(option.partition(".")[0]):
            return f"there is no {name} here: {owner} has {dashes}{option}"
    ends = {option.rpartition(".")[2]: option for option in sorted(known, reverse=True)} | {
        name: name for name in known
    }
    near = sorted((end for end in ends if end.startswith(plain)), key=len) or difflib.get_close_matches(plain, ends)
    if near:
        return f"there is no {name} here; did you mean {dashes}{ends[near[0]]}?"
    return f"there is no {name} here; see --help"


def _is_known(name: str, known: set[str]) -> bool:
    """An option, or a field of one that takes any, such as `model.num_hidden_layers`."""
    if name in known:
        return True
    parts = name.split(".")
    outer = (".".join(parts[:count]) for count in range(1, len(parts)))
    return any(option in known and not _members(option, known) for option in outer)


def _members(option: str, known: set[str]) -> list[str]:
    return [name for name in known if name.startswith(f"{option}.")]
