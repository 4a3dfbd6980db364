"""The mean of the weights is that of a loop; training does not see it; it goes with the run."""

from __future__ import annotations

import pytest
import torch
from forked import on_ranks
from safetensors.torch import load_file
from torch import nn
from toy_stage import files

from errors import UserError
from model import MiniDeepSeek
from training.optim.build import OptimSettings
from training.optim.ema import ExponentialMovingAverage
from training.parallel.dist_settings import ShardSettings
from training.parallel.ranks import Ranks
from training.run.log import read_metrics
from training.settings import StageSettings

# The same in every step, and with a large epsilon no rounding of a tiny gradient becomes a whole step.
STEADY = OptimSettings(eps=1e-2, warmup=0.0, decay_from=1.0)


def test_it_is_the_mean_of_a_loop():
    layer = nn.Linear(3, 2)
    ema, expected = ExponentialMovingAverage(layer, 0.9), [w.detach().clone() for w in layer.parameters()]
    for step in range(20):
        with torch.no_grad():
            for w in layer.parameters():
                w += torch.randn(w.shape, generator=torch.Generator().manual_seed(step))
        ema.update()
        expected = [0.9 * m + 0.1 * w.detach() for m, w in zip(expected, layer.parameters(), strict=True)]
    for mean, one in zip(ema.means.values(), expected, strict=True):
        torch.testing.assert_close(mean, one)
    before = [w.detach().clone() for w in layer.parameters()]
    with ema.in_place():
        assert all(torch.equal(w, m) for w, m in zip(layer.parameters(), ema.means.values(), strict=True))
    assert all(torch.equal(w, b) for w, b in zip(layer.parameters(), before, strict=True))


def weights(out) -> dict[str, torch.Tensor]:
    return MiniDeepSeek.from_pretrained(out).state_dict()


def test_training_does_not_see_it_and_it_goes_with_the_run(make, tmp_path, capsys):
    options = {"val_every": 2, "save_every": 2, "max_steps": 4, "optim": STEADY}
    make("plain", **options).run()
    make("whole", **options, ema_decay=0.5).run()
    for steps in (2, 4):
        make("resumed", **options | {"max_steps": steps}, ema_decay=0.5, resume=True).run()
    plain, whole, resumed = (files(tmp_path / out / "final") for out in ("plain", "whole", "resumed"))
    assert plain["model.safetensors"] == whole["model.safetensors"]
    assert whole == resumed and files(tmp_path / "whole" / "final-ema") == files(tmp_path / "resumed" / "final-ema")
    entry = read_metrics(tmp_path / "whole" / "metrics.jsonl")[-1]
    assert entry["ema_val_loss"] != entry["val_loss"] and "  ema  " in capsys.readouterr().out
    assert read_metrics(tmp_path / "plain" / "metrics.jsonl")[-1]["val_loss"] == entry["val_loss"]

    mean, state = (
        weights(tmp_path / "whole" / "final-ema"),
        load_file(tmp_path / "whole/final/training/state.safetensors"),
    )
    last = weights(tmp_path / "whole" / "final")
    for name in last:
        if f"data|ema|{name}" in state:
            assert torch.equal(mean[name], state[f"data|ema|{name}"]) and not torch.equal(mean[name], last[name]), name
        else:
            assert torch.equal(mean[name], last[name]), name  # the routers' biases
    assert not (tmp_path / "whole" / "final-ema" / "training").exists()


def test_of_shards_it_is_the_same(make, tmp_path):
    options = {"optim": STEADY, "max_steps": 2, "val_every": 2, "save_every": 0, "ema_decay": 0.5, "micro_tokens": 64}
    make("one", **options).run()
    for steps in (1, 2):  # resumed between
        given = {**options, "dist": ShardSettings(pp=2), "max_steps": steps, "resume": True}
        ranks = on_ranks(2, lambda _: make("cut", ranks=Ranks.start("cpu", timeout=30), **given).run(), tmp_path)  # noqa: B023
        assert [rank.code for rank in ranks] == [0, 0], ranks[0].output()
    one, other = (weights(tmp_path / out / "final-ema") for out in ("one", "cut"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_decay_is_below_one():
    with pytest.raises(UserError, match=r"--ema_decay 1: from 0 to below 1"):
        StageSettings(out="run", ema_decay=1.0)
