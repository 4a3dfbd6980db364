"""What every training script takes from its YAML file and its command line."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, Literal

import torch
import yaml

from errors import UserError, check_least, check_seed, naming
from LMConfig import LMConfig
from text.order import ROW_TOKENS
from text.sources.registry import REGISTRY
from training.optim.build import OptimSettings
from training.parallel.dist_settings import DistSettings
from training.run.lines import legend
from training.schedule import Budget, Schedule


@dataclass(kw_only=True)
class StageSettings:
    """Settings of any stage.

    Args:
        out: run folder: checkpoints, metrics.jsonl, resolved config.
        resume: continue the run in `out` from its newest checkpoint; last-good: from the newest that is not damaged.
        carry_optimizer: begin with the optimiser's moments of --ckpt, which are beside its weights; step and schedule
            begin at 0.
        seed: of weights and data order.
        device: auto, cpu or cuda.
        dtype: auto, bf16 or fp32: the type of the products (weights stay fp32).
        threads: CPU threads; 0 leaves it to torch: one a core, or OMP_NUM_THREADS, which torchrun sets to 1.
        max_steps: end after so many optimiser steps.
        max_tokens: end after so many tokens; in grpo_train.py of completions that were trained on, without the groups
            that have no variance.
        max_minutes: end after so many minutes of training.
        epochs: end after so many passes over the data; the default, one pass (two over conversations), holds only
            where no limit at all is given. Of several limits the first ends the run.
        sequence_length: tokens a row.
        batch_tokens: tokens an optimiser step, over all ranks. That of the command line holds; that of a recipe, or the
            default, is the most: data too small for 100 such steps get smaller ones. Or {share of the run: tokens from
            there on}, such as {"0": 8192, "0.3": 32768}, which holds: shares of --max_steps, --max_tokens or --epochs,
            not of --max_minutes.
            grpo_train.py has --prompts and --group instead.
        micro_tokens: tokens a forward pass on one rank; the rest is accumulated. The default is raised on CUDA to what
            half of its memory holds.
        optim: optimiser and learning rate.
        ema_decay: of the mean of the weights that is kept on the host, 0.999 for about the last thousand steps; it is
            validated beside them and written to OUT/final-ema. 0: none.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        compile: torch.compile each layer; null: on CUDA, but not under adapters, not in GRPO and not with --fp8.
        log_every: steps between log lines.
        val_every: steps between validations; 0: only before the first and after the last step.
        val_tokens: most held-out tokens to validate on.
        keep_best: keep the checkpoint of the best validation as OUT/best, beside OUT/final.
        patience: end after so many validations in a row without a better one; 0: never.
        save_every: steps between checkpoints; 0: only at the end.
        keep: step checkpoints kept.
        background_save: write checkpoints while training continues, from a copy of weights and optimiser state.
        max_skipped: steps in a row without a finite loss and gradient, each left out, that end the run.
        dist: how ranks work together.
        log_to: where curves and samples go beside metrics.jsonl: tensorboard, wandb, swanlab, separated by commas.
        wandb: name of a wandb project, which implies --log_to wandb.
        on_error: skip or stop, for a row of data that cannot be read.
        datasets: YAML file that gives data sets names; LLaMA-Factory's dataset_info.json will do.
    """

    out: str
    resume: bool | Literal["last-good"] = False
    carry_optimizer: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    max_steps: int | None = None
    max_tokens: int | None = None
    max_minutes: float | None = None
    epochs: float | None = None
    sequence_length: int = ROW_TOKENS
    batch_tokens: int | dict[str, int] = 32768
    micro_tokens: int = 8192
    optim: OptimSettings = field(default_factory=OptimSettings)
    ema_decay: float = 0.0
    gradient_checkpointing: bool = False
    compile: bool | None = None
    log_every: int = 10
    val_every: int = 0
    val_tokens: int = 262144
    keep_best: bool = False
    patience: int = 0
    save_every: int = 500
    keep: int = 2
    background_save: bool = True
    max_skipped: int = 10
    dist: DistSettings = field(default_factory=DistSettings)
    log_to: str = ""
    wandb: str = ""
    on_error: str = "skip"
    datasets: str = REGISTRY

    DEFAULT_EPOCHS: ClassVar[float] = 1.0
    COMPILES: ClassVar[bool] = True  # on CUDA, where nothing is said
    fp8, balance_scope = False, "sequence"  # settings of some stages; annotations here would hide theirs
    epilog: ClassVar[Callable[[], str]] = staticmethod(legend)

    def __post_init__(self) -> None:
        # The options of the command line; None where the settings are not read from one, and all of them hold.
        self.by_hand: set[str] | None = None
        for name in ("sequence_length", "micro_tokens", "log_every", "keep", "max_skipped"):
            check_least(1, **{name: getattr(self, name)})
        if isinstance(self.batch_tokens, dict) and not self.uneven:
            resolve_name("training.batch_schedule:check")(self)
        check_least(0, threads=self.threads, val_every=self.val_every, save_every=self.save_every)
        check_least(0, patience=self.patience)
        check_seed(self.seed)
        # Where curves and samples go beside metrics.jsonl.
        self.trackers: list[str] = []
        if self.log_to or self.wandb:
            self.trackers = resolve_name("training.run.trackers:tracker_names")(self.log_to, self.wandb)
        for name in ("max_steps", "max_tokens", "max_minutes", "epochs"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name} {value}: must be positive")
        check_least(1, batch_tokens=min(self.batch_sizes))
        if min(self.batch_sizes) < self.sequence_length and not self.uneven:
            raise UserError(f"--batch_tokens {self.batch_tokens}: less than one row of {self.sequence_length} tokens")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema_decay {self.ema_decay:g}: from 0 to below 1, such as 0.999")
        if self.on_error not in ("skip", "stop"):
            raise UserError(f"--on_error {self.on_error}: one of skip, stop")
        if (self.keep_best or self.patience) and not self.val_every:
            raise UserError("--keep_best and --patience compare validations along the run; give --val_every N")

    def holds(self, name: str) -> bool:
        """Return whether a person chose this value for this run, rather than a recipe or the default."""
        return self.by_hand is None or name in self.by_hand

    def compiles(self, device: torch.device) -> bool:
        """Return whether layers are compiled."""
        chosen = self.COMPILES and not self.fp8 and device.type == "cuda"
        return chosen if self.compile is None else self.compile

    @property
    def uneven(self) -> bool:
        """Return whether lengths of samples vary: nobody knows in how many steps --max_tokens are spent."""
        return False

    @property
    def row_tokens(self) -> int:
        """Return the most positions that a sample of the data set has."""
        return self.sequence_length

    @property
    def rows(self) -> int:
        """Return samples an optimiser step, over all ranks; those of the largest where sizes differ."""
        return max(max(self.batch_sizes) // self.row_tokens, 1)

    @property
    def batch_sizes(self) -> list[int]:
        """Return the tokens that an optimiser step may have."""
        return list(self.batch_tokens.values()) if isinstance(self.batch_tokens, dict) else [self.batch_tokens]

    @property
    def rows_of_steps(self) -> list[int]:
        """Return the sizes that steps have, in samples."""
        return [*self.rows_by_share.values()] or [self.rows]

    @property
    def rows_by_share(self) -> dict[float, int]:
        """Return samples an optimiser step from a share of the run on, in order; empty where all steps have as many."""
        given = self.batch_tokens if isinstance(self.batch_tokens, dict) and not self.uneven else {}
        return {share: tokens // self.row_tokens or 1 for share, tokens in sorted((float(s), given[s]) for s in given)}

    @property
    def micro_rows(self) -> int:
        """Return samples a forward pass on one rank."""
        return max(self.micro_tokens // self.row_tokens, 1)

    def lighten(self, device: str) -> str:
        """Say what to do where a step takes too long on a kind of device."""
        return f"lower --batch_tokens, now {self.rows * self.row_tokens:,}, or take a smaller model"

    def budget(self, samples: int, rows: int | None = None) -> Budget:
        """Return all limits that were given; the stage's default number of passes over so many samples when none was.

        rows: a step, `self.rows` where not said.
        """
        rows, steps = rows or self.rows, {}
        if self.max_steps is not None:
            steps[f"--max_steps {self.max_steps}"] = self.max_steps
        if self.max_tokens is not None and not self.uneven:
            steps[f"--max_tokens {self.max_tokens}"] = math.ceil(self.max_tokens / (rows * self.row_tokens))
        given = (self.max_steps, self.max_tokens, self.max_minutes, self.epochs)
        epochs = self.DEFAULT_EPOCHS if all(limit is None for limit in given) else self.epochs
        if self.rows_by_share:
            batches = resolve_name("training.batch_schedule:schedule_of")(self, samples, epochs)
            return Budget(batches.steps, None, None, batches.ends_by, batches)
        if epochs is not None:
            steps[f"--epochs {epochs:g}"] = max(math.ceil(epochs * samples / rows), 1)
        first = min(steps, key=steps.__getitem__, default="")
        return Budget(steps.get(first), self.max_minutes, self.max_tokens if self.uneven else None, first)

    def check_fit(self, world: int, longest: int) -> None:
        """Raise `UserError` where a step cannot be shared by `world` ranks, or rows are too long for the model."""
        if bad := [rows for rows in self.rows_of_steps if rows % world]:
            raise UserError(
                f"--batch_tokens {self.batch_tokens}: {bad[0]} rows do not divide among {world} "
                f"ranks; choose a multiple of {world * self.row_tokens}"
            )
        if self.sequence_length > longest:
            raise UserError(
                f"--sequence_length {self.sequence_length}: the model reads {longest} tokens; "
                "lower it, or pretrain with a larger --model.max_position_embeddings, from --ckpt if you like"
            )

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Return what changes along the run beside the learning rate: attributes of the loss (`Loss.schedules`)."""
        return {}


@dataclass(kw_only=True)
class SampleSettings(StageSettings):
    """Settings of a stage that shows the model's own text while it is trained.

    Args:
        sample_every: steps between samples of the model's text, also kept in OUT/samples.jsonl, besides those before
            the first step and after the last; 0: at each validation.
        sample_prompts: file of prompts for them, one a line; empty: texts or questions of what is held out.
    """

    sample_every: int = 0
    sample_prompts: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(0, sample_every=self.sample_every)


@dataclass(kw_only=True)
class NextTokenSettings(StageSettings):
    """Settings of the stages that predict the next token of given text.

    Args:
        mtp_weight: weight of the multi-token-prediction loss; a number or {share of the run: value}.
        mtp_steps: steps of the last MTP layer, all but the first on its own state, as when it drafts several tokens.
        balance: what keeps the experts' loads even: bias, the routers' biases and beside them a little of the balance
            loss; aux, that loss alone, whose weight then wants to be larger (0.001 to 0.01); none, neither of them.
            Biases that a checkpoint has stay where they are under aux and none.
        balance_scope: what the loads of the balance loss are counted over: sequence, each row for itself, or batch, all
            rows of a micro-batch on a rank (of --micro_tokens), of which each may then prefer some experts.
        balance_weight: weight of the balance loss; a number or {share of the run: value}.
        bias_speed: speed of the router's balancing bias; a number or {share of the run: value}.
        fp8: true: products of linear layers and experts in FP8 (DeepSeek-V3, section 3.3), with either --dtype; by
            cuBLAS on Hopper, emulated elsewhere, which is slower. ue8m0: likewise, with scales that are powers of 2.
    """

    mtp_weight: float | dict[str, float] = 0.3
    balance: Literal["bias", "aux", "none"] = "bias"
    balance_scope: Literal["sequence", "batch"] = "sequence"
    balance_weight: float | dict[str, float] = 1e-4
    bias_speed: float | dict[str, float] = 1e-3
    mtp_steps: int = 1
    fp8: bool | Literal["ue8m0"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fp8 and self.compile:
            raise UserError("--fp8: does not go with --compile true; leave one of them out")
        check_least(1, mtp_steps=self.mtp_steps)

    @property
    def schedules(self) -> dict[str, Schedule]:
        without = {"bias": (), "aux": ("bias_speed",), "none": ("bias_speed", "balance_weight")}[self.balance]
        names = ("mtp_weight", "balance_weight", "bias_speed")
        return {name: 0.0 if name in without else getattr(self, name) for name in names}


def model_config(choice: dict[str, Any]) -> LMConfig:
    """Make `{preset: 64m, num_hidden_layers: 4}` a configuration."""
    changes = dict(choice)
    return LMConfig.preset(changes.pop("preset", "demo"), **changes)


def save_resolved(settings: StageSettings, path: Path) -> None:
    """Keep what the run really used beside its results, ready for `--config`, under the command line as a comment."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    command = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in command)  # YAML refuses others, in comments too
    text = f"# python {command}\n" + yaml.safe_dump(asdict(settings), allow_unicode=True, sort_keys=False)
    with naming(path):
        path.write_text(text, encoding="utf8")
