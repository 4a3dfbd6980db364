"""A longer context, phase by phase (DeepSeek-V3 section 4.3): each phase is a run of the one loop."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import parse
from errors import UserError
from LMConfig import LMConfig
from text.files import read_yaml
from text.tokenizer import Tokenizer
from training.parallel.ranks import Ranks
from training.run.lock import restarted
from training.run.log import read_metrics
from training.run.progress import PROGRESS_FILE, newest, read_progress
from training.run.resume import check_unused

if TYPE_CHECKING:
    from pretrain import PretrainSettings

# Of the whole: YaRN's factor and the length are those of the last phase in all of them.
SET_BY_PHASES = ("sequence_length", "model.rope_scaling", "model.max_position_embeddings")


def run_phases(
    settings: PretrainSettings,
    train: Callable[[PretrainSettings], Ranks],
    open_data: Callable[[PretrainSettings, Tokenizer, Ranks], object],
) -> Ranks:
    """Train each phase in OUT/phase1, OUT/phase2, ...; each begins from `final` of the one before it.

    With `--resume` a phase after which another has begun stays as it is. open_data: what fails for data that will not
    do, which is found before the first phase trains.
    """
    ranks = Ranks.start(settings.device, settings.dist.timeout)
    runs = ranks.on_main(lambda: phase_settings(settings))
    for run in runs:
        ranks.say(f"{Path(run.out).name}     {described(run)}")
    tokenizer = Tokenizer.from_folder(settings.ckpt)
    for run in runs:
        open_data(run, tokenizer, ranks)
    begun = ranks.on_main(lambda: [number for number, run in enumerate(runs) if newest(Path(run.out))])
    for number, run in enumerate(runs):
        out = Path(run.out)
        if number < max(begun, default=0):
            ranks.say(f"{out}: complete, {runs[number + 1].out} begins from it")
            continue
        ranks = train(run)
        if not ranks.on_main(lambda out=out: newest(out) == out / "final"):
            ranks.say(f"{out}: not at its end; --resume continues it" + ", then the next phase" * (run is not runs[-1]))
            break
    return ranks


def phase_settings(settings: PretrainSettings) -> list[PretrainSettings]:
    """Return the settings of each phase: those of the command line with more options at its end.

    What follows from the run of --ckpt is the original length, the learning rate at its end, and whether documents of
    a row were isolated. Raises `UserError` for phases that cannot be, before any has begun.
    """
    if not settings.ckpt:
        raise UserError("--phases: a trained model's context is extended; give --ckpt DIR")
    by_hand = settings.by_hand or set()
    for name in SET_BY_PHASES:
        if name in by_hand or name.removeprefix("model.") in settings.model:
            raise UserError(f"--{name}: follows from 'times' of the phases; leave it out")
    config = LMConfig.from_pretrained(settings.ckpt)
    if config.rope_scaling:
        factor = config.rope_scaling["factor"]
        raise UserError(f"{settings.ckpt}: extended already, by {factor:g}; name a checkpoint that was not")
    times = [_times(phase, number) for number, phase in enumerate(settings.phases)]
    if times != sorted(set(times)):
        raise UserError(f"phases: times {', '.join(f'{n:g}' for n in times)}; each must be above the one before")
    original = trained_length(settings.ckpt, config)
    common = {
        "phases": [],
        "model.rope_scaling": yarn(original, times[-1]),
        "model.max_position_embeddings": round(times[-1] * original),
    }
    if "optim.lr" not in by_hand and settings.optim.lr == type(settings.optim).lr:
        common["optim.lr"] = last_learning_rate(settings.ckpt)
    if "isolate" not in by_hand and _run_of(settings.ckpt).get("isolate"):
        common["isolate"] = True
    runs: list[PretrainSettings] = []
    for number, phase in enumerate(settings.phases):
        length = round(times[number] * original)
        # A document that is long enough has at least a character for each token of a row, which is some share of it.
        long = {"min_chars": length} if settings.min_chars == 1 else {}
        own = {name: value for name, value in phase.items() if name != "times"}
        chosen = {name: value for name, value in {**long, **own}.items() if name not in by_hand}
        place = {"sequence_length": length, "out": str(Path(settings.out) / f"phase{number + 1}")}
        place |= {"ckpt": str(Path(runs[-1].out) / "final")} if runs else {}
        if wrong := own.keys() & {*common, *place} - {"optim.lr", "isolate"}:
            raise UserError(f"phases[{number}].{min(wrong)}: is not a phase's to set; leave it out")
        try:
            runs.append(parse(type(settings), "", [*sys.argv[1:], *_options({**common, **chosen, **place})]))
        except UserError as error:
            raise UserError(f"phases[{number}]: {error}") from None
    for run in runs:
        # As begin() does for the run that torchrun has started again.
        check_unused(Path(run.out), settings.resume or any(restarted(Path(other.out)) for other in runs))
    return runs


def described(run: PretrainSettings) -> str:
    """Return in a line what is special about a phase."""
    scaling = run.model["rope_scaling"]
    kept = f"documents of {run.min_chars:,} characters and more" if run.min_chars > 1 else "documents of any length"
    return (
        f"rows of {run.sequence_length:,} tokens, {kept}, lr {run.optim.lr:.1e}; YaRN by {scaling['factor']:g} from "
        f"{scaling['original_max_position_embeddings']:,} tokens; from {run.ckpt}"
    )


def yarn(original: int, factor: float) -> dict[str, Any]:
    """Return rope_scaling with the paper's values (alpha 1, beta 32, sqrt(t) = 0.1 ln s + 1) for a factor s."""
    ramp = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    return {"type": "yarn", "factor": float(factor), "original_max_position_embeddings": original, **ramp}


def trained_length(ckpt: str, config: LMConfig) -> int:
    """Return the tokens of a row in the run of a checkpoint; what its config.json allows where no run tells."""
    length = None
    if (Path(ckpt) / PROGRESS_FILE).is_file():
        length = read_progress(Path(ckpt)).run.get("sequence_length")
    return min(length, config.max_position_embeddings) if type(length) is int else config.max_position_embeddings


def last_learning_rate(ckpt: str) -> float:
    """Return the last one in the log of a checkpoint's run. Raises `UserError` where there is none."""
    rates = [entry.get("lr") for entry in read_metrics(Path(ckpt).absolute().parent / "metrics.jsonl")]
    if last := [rate for rate in rates if isinstance(rate, float) and rate > 0][-1:]:
        return last[0]
    raise UserError(f"{ckpt}: no metrics.jsonl of its run beside it tells its last learning rate; give --optim.lr")


def _run_of(ckpt: str) -> dict[str, Any]:
    config = Path(ckpt).absolute().parent / "config.yaml"
    content = read_yaml(config) if config.is_file() else {}
    return content if isinstance(content, dict) else {}


def _times(phase: Any, number: int) -> float:
    times = phase.get("times") if isinstance(phase, dict) else None
    if isinstance(times, bool) or not isinstance(times, int | float) or not 1 < times < 1e6:
        raise UserError(f"phases[{number}]: {phase!r} says not how many times the length it has; give 'times', above 1")
    return times


def _options(given: dict[str, Any]) -> list[str]:
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in given.items()
    }
    return [f"--{name}={text}" for name, text in texts.items()]
