"""The claims of the paper: arms differ in what they name, noise decides what is said, no run is made twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from data_files import entry, write_run

from cli import parse
from errors import UserError
from eval.paper import context, speed, training
from eval.paper.__main__ import repeated
from eval.paper.arms import BASE, merged, read_arms
from eval.paper.bench import Bench
from eval.paper.claims import CLAIMS
from eval.paper.differences import DOES_NOT, HOLDS, UNKNOWN, Difference, centre, reaches, weakest
from eval.paper.page import write
from eval.paper.probes import accuracy, cache_bytes, decoding, domains, drafts
from eval.paper.training import Corpus, Laboratory
from model.costs import count
from pretrain import PretrainSettings
from training.settings import model_config

CORPUS = Corpus("a.csv", "tokenizer", "shards")


@pytest.fixture(scope="module")
def arms():
    return read_arms()


def config_of(arm):
    return model_config(arm.settings["model"])


def test_every_arm_changes_what_it_names_and_a_claim_needs_it(arms):
    base, needed = arms[BASE].settings, {name for claim in CLAIMS for name in claim.arms}
    assert needed == {*arms}
    for name, arm in arms.items():
        changed = {key for key in arm.settings if arm.settings[key] != base.get(key)}
        assert bool(changed) == (name not in (BASE, "base-longer")), name
        assert len(changed) <= 3 and arm.about
    assert merged({"model": {"a": 8, "b": 1}, "c": 2}, {"model": {"a": "/4"}, "c": "*3"}) == {
        "model": {"a": 2, "b": 1},
        "c": 6,
    }
    with pytest.raises(UserError, match="the base names no number"):
        merged({}, {"c": "*3"})


def test_every_arm_is_a_recipe_of_pretrain(arms, tmp_path):
    for name, arm in arms.items():
        (tmp_path / "arm.yaml").write_text(yaml.safe_dump(arm.settings))
        given = ["--config", str(tmp_path / "arm.yaml"), "--data", "d", "--out", "o", "--tokenizer", "t"]
        settings = parse(PretrainSettings, "", given)
        assert model_config(settings.model).max_position_embeddings >= settings.sequence_length, name


def test_arms_that_must_be_alike_are(arms):
    """As many parameters in fine and coarse experts, in all kinds of attention; as many FLOPs a token in the dense."""
    costs = {name: count(config_of(arms[name]), 256) for name in (BASE, "coarse", "unshared", "mha", "gqa", "dense")}
    for name in ("coarse", "unshared"):
        assert costs[name].total == pytest.approx(costs[BASE].total, rel=0.01), name
        assert costs[name].activated == pytest.approx(costs[BASE].activated, rel=0.01), name
    for name in ("mha", "gqa"):
        assert costs[name].total == pytest.approx(costs[BASE].total, rel=0.01)
    assert costs["dense"].activated == pytest.approx(costs[BASE].activated, rel=0.01)
    assert (
        cache_bytes(config_of(arms["mha"])) > cache_bytes(config_of(arms["gqa"])) > cache_bytes(config_of(arms[BASE]))
    )


def test_the_larger_sizes_are_the_presets(arms):
    for size in ("26m", "64m"):
        larger = read_arms(f"configs/paper/sizes/{size}.yaml")
        assert config_of(larger[BASE]).hidden_size == model_config({"preset": size}).hidden_size
        assert {*larger} == {*arms}
        assert count(config_of(larger["coarse"]), 512).total == pytest.approx(
            count(config_of(larger[BASE]), 512).total, rel=0.01
        )


def test_a_difference_within_the_noise_says_nothing():
    """Pairs of one seed are compared: what all arms of a seed share cancels."""
    clear = Difference.of([1.0, 2.0, 3.0], [0.9, 1.9, 2.91])
    assert clear.mean == pytest.approx(-0.0967, abs=1e-4) and clear.noise == pytest.approx(2 * 0.00577, abs=1e-4)
    assert clear.verdict() == HOLDS and clear.verdict(lower=False) == DOES_NOT
    assert Difference.of([1.0, 2.0, 3.0], [0.9, 2.1, 2.9]).verdict() == UNKNOWN
    assert Difference.of([1.0], [0.5]).verdict() == UNKNOWN and Difference.of([1.0], [0.5]).text() == "-0.5000 one seed"
    assert [reaches(values, 0.5) for values in ([0.6, 0.61], [0.4, 0.41], [0.4, 0.6], [0.6])] == [
        HOLDS, DOES_NOT, UNKNOWN, UNKNOWN,
    ]  # fmt: skip
    assert centre([1.0]) == "1.0000" and centre([1.0, 3.0], "{:.1f}") == "2.0 ± 2.8"
    assert (
        weakest([HOLDS, UNKNOWN]) == UNKNOWN and weakest([UNKNOWN, DOES_NOT]) == DOES_NOT and weakest([HOLDS]) == HOLDS
    )


@pytest.fixture
def lab(arms, tmp_path, monkeypatch):
    """Runs that end at once; `lab.started` has the folder and the settings of each."""
    started = []

    def start(script, folder: Path, settings, options):
        started.append((folder, settings))
        seed = int(options[options.index("--seed") + 1])
        bits = 1.9 if settings["model"]["num_nextn_predict_layers"] else 2.0
        bits += 0.1 * (settings["bias_speed"] == 1e-4) + (seed % 2) * 0.1 * (settings["balance_weight"] == 0)
        entries = [
            entry(step, loss=4 - step / 10 + seed, val_bits_per_byte=bits + seed / 100, val_loss=3.0 + seed,
                  max_vio=[0.1, 0.5 if settings["balance"] == "none" else 0.2])
            for step in range(11)
        ]  # fmt: skip
        write_run(folder, *entries)
        (folder / "arm.yaml").write_text(yaml.safe_dump(settings))
        (folder / "final").mkdir()
        (folder / "final" / "config.json").write_text("{}")

    def rates(arms, *_):
        return {name: [50.0 if arm["model"]["num_nextn_predict_layers"] else 100.0] * 3 for name, arm in arms.items()}

    monkeypatch.setattr(training, "start", start)
    monkeypatch.setattr(training, "training_rates", rates)
    made = Laboratory(tmp_path, dict(arms), CORPUS, seeds=(0, 1, 2), jobs=2)
    made.started = started
    return made


def test_what_is_trained_is_not_trained_again_and_other_settings_are_refused(lab):
    lab.train([BASE, "mtp"])
    assert [folder.name for folder, _ in lab.started] == ["seed-0"] * 2 + ["seed-1"] * 2 + ["seed-2"] * 2
    lab.train([BASE, "mtp", "gqa"])
    assert [folder.parent.name for folder, _ in lab.started[6:]] == ["gqa"] * 3
    lab.arms["gqa"].settings["seed"] = 7
    with pytest.raises(UserError, match="other settings than gqa has now; remove it"):
        lab.train(["gqa"])


def test_an_arm_of_equal_time_trains_for_whole_steps_of_it(lab):
    """The base is twice as fast as the arm with MTP."""
    lab.train([BASE, "mtp", "base-longer"])
    longer = [settings["max_tokens"] for folder, settings in lab.started if folder.parent.name == "base-longer"]
    assert longer == [2 * lab.arms[BASE].settings["max_tokens"]] * 3
    measured = len(lab.started)
    assert measured == 9  # speeds are measured without a run
    lab.train(["base-longer"])
    assert len(lab.started) == measured


def test_speeds_are_those_of_the_arms_and_leave_no_run(arms, pretrained, monkeypatch):
    """By turns: what slows the machine down slows all of them."""
    turns, now = [], [0.0]

    def step(trainer):
        turns.append(bool(trainer.model.mtp))
        now[0] += 2.0 if trainer.model.mtp else 1.0
        return trainer_step(trainer)

    trainer_step = speed.TimedTrainer.advance
    monkeypatch.setattr(speed.TimedTrainer, "advance", step)
    monkeypatch.setattr(speed, "perf_counter", lambda: now[0])
    monkeypatch.setattr(speed, "ROUNDS", 2)
    small = {"sequence_length": 16, "batch_tokens": 32, "micro_tokens": 32}
    given = {name: {**arms[name].settings, **small} for name in (BASE, "mtp")}
    found = speed.training_rates(given, str(pretrained / "final"), "cpu", 1)
    assert found == {BASE: [32.0] * 2, "mtp": [16.0] * 2}
    assert turns == [False] * 3 + [True] * 3 + ([False] * 6 + [True] * 6) * 2


def test_claims_that_logs_decide(lab, tmp_path):
    names = ("balance", "fp8", "experts", "dense", "sweeps")
    claims = [claim for claim in CLAIMS if claim.name in names]
    lab.train([*dict.fromkeys(arm for claim in claims for arm in claim.arms)])
    results = [(claim, claim.measure(Bench(lab, [], {}))) for claim in claims]
    found = {claim.name: result for claim, result in results}
    assert found["balance"].verdict == UNKNOWN  # all have the same bits per byte
    assert found["balance"].rows[2] == ["balance-none", "2.0100 ± 0.0200", "+0.0000 ± 0.0000", "0.50 ± 0.00"]
    assert found["fp8"].verdict == HOLDS and found["fp8"].rows[0][1] == "+0.000 ± 0.000"
    # One arm is clearly worse; another is in a single seed; the rest is as the base.
    assert found["sweeps"].verdict == f"bias-slower is worse, +0.1000 ± 0.0000; {UNKNOWN} of the others"
    assert "effects of up to 0.1155 bits per byte would not be seen" in found["sweeps"].note
    page = write(tmp_path, "head", results, "command --only").read_text(encoding="utf8")
    assert all(f"(figures/{name}.png)" in page and f"`command --only {name}`" in page for name in names)
    assert (tmp_path / "figures" / "balance.png").stat().st_size > 5000


def test_the_page_gives_a_command_that_measures_a_claim_again():
    given = {"tokenizer": "my tokenizer", "data": "data/demo/pretrain.csv", "only": "mtp,fp8", "seeds": 2}
    assert repeated(given) == "python -m eval.paper --tokenizer 'my tokenizer' --seeds 2 --only"


def test_the_r1_path_is_shown_by_the_names_of_its_stages(lab, tmp_path):
    claim = next(claim for claim in CLAIMS if claim.name == "r1")
    bench = Bench(lab, {}, {"r1": tmp_path})
    assert "make r1" in claim.measure(bench).note
    shares = {"correct": 0.125, "strict_format": 1.0, "language": 0.5, "tokens": 40.25}
    table = [{"name": f"out/demo/r1/{stage}/final", **shares} for stage in ("zero", "sft")]
    (tmp_path / "table.json").write_text(json.dumps(table))
    result = claim.measure(bench)
    assert result.rows == [[stage, "12.5", "100.0", "50.0", "40.2"] for stage in ("zero", "sft")]
    assert len(result.header) == 5 and bench.figure("r1").stat().st_size > 5000


def test_needles_are_told_apart_by_the_names_of_their_models(lab):
    """In any order. The stage finds 30 points more beyond the trained length, but not most; the base only guesses."""
    far = {"base/seed-0/final, YaRN x 16 untrained": 0.1, "context/seed-0/phase2/final": 0.4, "base/seed-0/final": 0.1,
           "context/seed-0/phase1/final": 0.2}  # fmt: skip
    for seed in lab.seeds:
        out = context.folder(lab, seed)
        out.mkdir(parents=True)
        models = [{"name": name.replace("seed-0", f"seed-{seed}"), "chosen": [[0.1, 0.06], [share, share]]}
                  for name, share in far.items()]  # fmt: skip
        content = {"lengths": [256, 1024], "depths": [0.0, 1.0], "chance": 1 / 12, "models": models}
        (out / "needle.json").write_text(json.dumps(content), encoding="utf8")
    (claim,) = [claim for claim in CLAIMS if claim.name == "context"]
    result = claim.measure(Bench(lab, [], {}))
    assert [row[0] for row in result.rows] == ["YaRN alone", "after phase 2", "before", "after phase 1"]
    assert [row[2][:4] for row in result.rows] == ["10.0", "40.0", "10.0", "20.0"]
    assert result.verdict == DOES_NOT and "+30.0 ± 0.0 points" in result.note and "nothing to carry" in result.note
    assert Path(Bench(lab, [], {}).figure("context")).read_bytes().startswith(b"\x89PNG")
    del content["models"][1]
    (out / "needle.json").write_text(json.dumps(content), encoding="utf8")
    with pytest.raises(UserError, match="has no model after phase 2; remove the file"):
        context.found(lab, lab.seeds[-1])


def test_probes(answerer, arms):
    text = "小猫住在河边，小猫喜欢吃鱼，小猫和小狗是最好的朋友，他们每天一起去公园里玩。" * 2
    with torch.inference_mode():
        ids = torch.tensor([[answerer.tokenizer.eos_id, *answerer.tokenizer.encode(text)]])[:, :256]
        right = (answerer.model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean()
    assert accuracy(answerer, [text]) == pytest.approx(right.item())
    found = drafts(answerer, [text])
    assert 0 <= found.accepted <= 1 and found.plain_rate > 0
    sorted_ = domains([text, "1 + 2 = 3, 4 + 5 = 9", "A small cat."])
    assert {name: len(members) for name, members in sorted_.items()} == {
        "numbers": 1,
        "Chinese": 1,
        "English and others": 1,
    }
    rates = decoding(
        {"mla": config_of(arms[BASE]), "gqa": config_of(arms["gqa"])}, (8, 16), torch.device("cpu"), rounds=1, steps=1
    )
    assert {*rates} == {"mla", "gqa"} and all(len(each) == 2 for each in rates.values())
