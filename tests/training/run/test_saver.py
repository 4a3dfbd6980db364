"""A save in the background leaves training as quick as it was."""

from __future__ import annotations

import psutil
import pytest
import torch

from training.run.saver import Saver


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_a_save_starts_no_team_of_threads_of_its_own(two_threads):
    big = torch.ones(2000, 2000)
    _ = big * 2  # training's own team is there
    before, seen = {each.id for each in psutil.Process().threads()}, []

    def write(tensors: dict[str, torch.Tensor]) -> None:
        seen.append((tensors["big"] * 2).bfloat16().float().sum().item())  # enough work to be shared out

    saver = Saver(background=True, device=torch.device("cpu"))
    saver.save({"big": big}, write)
    saver.wait()
    assert seen == [2 * big.numel()]
    new = {each.id for each in psutil.Process().threads()} - before
    assert len(new) == 1, "more than the thread of the saver"
    assert torch.get_num_threads() == 2
    saver.close()
