"""The step of GRPO that is measured is one of the real trainer."""

from __future__ import annotations

import argparse
import shutil

import grpo
import harness


def test_our_side_takes_steps_of_the_trainer(pretrained, tmp_path, monkeypatch):
    found, folder = [], shutil.copytree(pretrained / "final", tmp_path / "final")
    sizes = argparse.Namespace(prompts=2, group=2, new=4, longest=120, data="arithmetic:1-2")
    options = argparse.Namespace(folder=str(folder), dtype="fp32", device="cpu", **vars(sizes))
    monkeypatch.setattr(harness, "serve", lambda measure, _: found.extend(measure() for _ in range(2)))
    grpo.ours(options)
    assert len(found) == 2 and all(one[grpo.SPEED] > 0 for one in found)
