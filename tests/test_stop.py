"""Asked to stop: what a rank leaves for the others, and for the job script."""

from __future__ import annotations

import os
import signal

import pytest

from lalic.training.stop import StopRequest


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_rank_names_itself_in_the_file(name: str, tmp_path) -> None:
    """By that launch/train.slurm tells a stop that the scheduler wants from one by hand (an empty file)."""
    with StopRequest(tmp_path / "STOP", spread=True) as stop:
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.reason == name
    assert (tmp_path / "STOP").read_text() == f"{name}\n"


def test_one_rank_alone_makes_no_file(tmp_path) -> None:
    with StopRequest(tmp_path / "STOP") as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.reason == "SIGUSR1"
    assert not (tmp_path / "STOP").exists()
