"""What asks a run to stop is heard when it is asked for, and one request is never taken for two."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from lalic.training.stop import StopNow, StopRequest


def test_the_file_is_seen_at_the_next_question(tmp_path: Path) -> None:
    """Not at the next but one: a run that was asked within a step stops behind it."""
    with StopRequest(tmp_path / "STOP") as stop:
        assert stop.reason is None
        (tmp_path / "STOP").touch()
        assert stop.reason == f"{tmp_path / 'STOP'} exists"


def test_the_file_ends_a_wait(tmp_path: Path) -> None:
    with StopRequest(tmp_path / "STOP") as stop, pytest.raises(StopNow), stop.at_once():
        (tmp_path / "STOP").touch()
        threading.Event().wait(60)


def test_a_signal_tells_the_other_ranks(tmp_path: Path) -> None:
    with StopRequest(tmp_path / "STOP", spread=True) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"
        assert (tmp_path / "STOP").read_text() == "SIGTERM\n"


def test_ctrl_c_behind_another_rank_s_is_not_the_second(tmp_path: Path) -> None:
    """Ctrl-C reaches all ranks; the file of the first that hears it may be quicker than the signal."""
    with StopRequest(tmp_path / "STOP", spread=True) as stop:
        (tmp_path / "STOP").write_text("SIGINT\n")
        assert stop.reason is not None
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
