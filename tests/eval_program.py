"""`lalic eval` as its launchers start it, with faults that happen at a chosen picture: the program of test_eval_ranks.

LALIC_FAULT=ACTION:RANK:N makes process RANK do ACTION when it is about to measure its picture number N (from 0):
`kill` ends it as the kernel's OOM killer would, `error` raises a LalicError.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from lalic.errors import LalicError, run_main
from lalic.eval import main
from lalic.evaluation.ranks import place
from lalic.measure import Session

action, rank, number = os.environ.get("LALIC_FAULT", "none:0:0").split(":")
measure, count = Session.measure, 0


def faulty(self: Session, rgb: Any) -> Any:
    """Session.measure, but for the chosen picture."""
    global count
    if place(os.environ).rank == int(rank) and count == int(number):
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "error":
            raise LalicError("the fault of the test")
    count += 1
    return measure(self, rgb)


if __name__ == "__main__":
    if action != "none":
        Session.measure = faulty  # type: ignore[method-assign]
    run_main(main)
