"""Faults in real training runs: does the same command go on, how much is done twice, and are the bits the same?

    python benchmarks/faults.py PHOTOGRAPHS [--setups ddp2 one zero1 zero2 slurm] [--kinds KIND ...] [--quick]
                                [--seed 0] [--output FILE.json]

A small model of LALIC's structure, with validation and averaged weights, trains on photographs that
data_prep/shard.py has packed. One run of every setup is never disturbed and keeps the checkpoint of every step. Others
are hit again and again at random moments, and started again with the same command. After each fault the checkpoint
that the run goes on from and the next one that it writes are compared with those of the undisturbed run: model,
optimisers, averaged weights, random numbers, position, best so far, all bits. At the end so are the numbers in
log.jsonl and the curves of TensorBoard.

`--quick`: eight faults on two ranks. Setups that are not run keep their records in FILE.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import fault_bits, fault_slurm  # noqa: E402 -- found from the checkout
from benchmarks.fault_kinds import SmallDisk, fill_disk  # noqa: E402
from benchmarks.fault_plan import KINDS, QUICK, SETUPS, Kind  # noqa: E402
from benchmarks.fault_runs import Material, Run, Stuck, prepare  # noqa: E402
from lalic.training import checkpoint  # noqa: E402

STEPS, EVERY = 60, 3


class Chain:
    """One run that is hit again and again, as far as its steps go."""

    def __init__(self, run: Run, reference: Path, generator: random.Random, disk: SmallDisk | None = None):
        self.run, self.reference, self.generator, self.disk = run, reference, generator, disk
        self._compared = 0
        self._different: list[str] = []

    def strike(self, kind: Kind) -> dict[str, Any] | None:
        """One fault, and what became of it; None when too few steps are left for it."""
        run, every = self.run, self.run.material.every
        goal = self._compared + self.generator.randint(1, every)
        goal = max(goal, kind.checkpoints * every + 1)
        if goal + 4 * every > run.material.steps:
            return None
        first = len(run.attempts) - 1
        run.wait_for_step(goal)
        run.wait(lambda: len(run.saved()) >= kind.checkpoints, f"{kind.checkpoints} checkpoints")
        fault = fill_disk(self.disk, kind.disk) if self.disk and kind.disk else kind.fault
        done = fault(run, self.generator)
        self._different = []
        if not done.restarts:
            seconds, beyond, lost = None, run.attempt.step, 0
        else:
            run.come_back(lambda step: self._compare(step) if step else None)
            seconds = time.monotonic() - done.began
            beyond = run.attempt.resumed_from or 0
            lost = max(attempt.step for attempt in run.attempts[first:-1]) - beyond
        self._compared = run.wait(lambda: self._compare_next(beyond), f"a checkpoint after step {beyond}")
        run.wait(lambda: not run.strays(), "the end of all processes of the attempt before")
        return {
            "step": done.step,
            "phase": done.phase,
            "detail": done.detail,
            "resumed": done.expected,
            "from_step": beyond,
            "lost_steps": lost,
            "seconds_until_training": seconds,
            "starts": len(run.attempts) - 1 - first,
            "compared_step": self._compared,
            "bits_equal": not self._different,
            "differences": self._different[:10],
        }

    def _compare(self, step: int) -> None:
        with fault_bits.held(self.run.folder, step) as folder:
            found = fault_bits.differences(folder, self.reference, step)
        self._different += [f"step {step}: {text}" for text in found]

    def _compare_next(self, beyond: int) -> int:
        """Compare the first checkpoint after step `beyond` that is still there; its step, 0 when there is none yet."""
        for step in self.run.attempt.checkpoints:
            if step > beyond:
                with suppress(FileNotFoundError):
                    self._compare(step)
                    return step
        return 0

    def finish(self) -> dict[str, Any]:
        """Let the run come to its end, and compare all that it leaves."""
        run = self.run
        status = run.wait_for_end()
        finished = status == 0 and (run.folder / "DONE").exists()
        self._different = [] if finished else [f"status {status}\n{run.attempt.last_words()}"]
        if finished:
            self._compare(run.material.steps)
        different = self._different
        swallowed = self.disk is not None and self.disk.mounted
        for compare in (fault_bits.log_differences, fault_bits.board_differences):
            different += compare(run.folder, self.reference, may_miss=swallowed)
        return {
            "finished": finished,
            "starts": len(run.attempts),
            "bits_equal": not different,
            "differences": different[:10],
        }


def run_setup(
    name: str, plan: Sequence[str], material: Material, generator: random.Random, tell: Callable[[str], None]
) -> dict[str, Any]:
    """All faults of a setup, on as many runs as they take."""
    setup, began = SETUPS[name], time.monotonic()
    work = material.folder / name
    work.mkdir()
    plain = Run(work / "reference", material, setup.accelerate_config, setup.processes)
    reference = undisturbed(plain)
    tell(f"{setup.label}: the undisturbed run took {time.monotonic() - began:.0f} s")
    with ExitStack() as stack:
        if name == "slurm":
            cluster = fault_slurm.cluster_in(work / "cluster")
            stack.callback(cluster.stop)
            same = (plain.folder, material, setup.accelerate_config, setup.processes)
            plain = fault_slurm.SlurmRun(*same, cluster=cluster)
        found = _chains(plain, reference, plan, generator, lambda line: tell(f"{setup.label}: {line}"))
    return {
        "label": setup.label,
        "command": " ".join(_public(word, material) for word in plain.command),
        "seconds": round(time.monotonic() - began),
        **found,
    }


def undisturbed(plain: Run) -> Path:
    """A run to its end, with a checkpoint of every step; its folder."""
    run = replace(plain, settings=("checkpoint.every=1", "checkpoint.keep=100000"))
    with ExitStack() as stack:
        stack.callback(run.kill_everyone)
        run.start()
        if status := run.wait_for_end():
            raise SystemExit(f"error: the undisturbed run ended with {status}\n{run.attempt.last_words()}")
    return run.folder


def _chains(
    plain: Run, reference: Path, plan: Sequence[str], generator: random.Random, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The faults of `plan` on as many runs as they take."""
    records: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    disks: set[str] = set()
    for on_disk in (False, True):
        left = [key for key in plan if bool(KINDS[key].disk) == on_disk]
        while left:
            folder = plain.folder.with_name(f"run{len(ends)}")
            with ExitStack() as stack:
                disk = SmallDisk(folder) if on_disk else None
                if disk:
                    stack.callback(disk.close)
                    disks.add(disk.name)
                run = replace(plain, folder=folder, attempts=[], mark=f"{plain.mark}-{len(ends)}")
                stack.callback(run.kill_everyone)
                ends.append(_chain(Chain(run, reference, generator, disk), left, records, tell))
    return {"disks": sorted(disks), "records": records, "ends": ends}


def _public(word: str, material: Material) -> str:
    return word.replace(sys.executable, "python").replace(f"{material.folder}/", "")


def _chain(chain: Chain, left: list[str], records: list[dict[str, Any]], tell: Callable[[str], None]) -> dict[str, Any]:
    """Take faults from `left` and strike one run with them; what its end was like."""
    chain.run.start()
    while left:
        kind = KINDS[left[0]]
        try:
            record = chain.strike(kind)
        except (Stuck, OSError, checkpoint.LalicError) as error:
            left.pop(0)
            records.append({"kind": kind.label, "resumed": False, "bits_equal": False, "differences": [str(error)]})
            tell(f"{kind.label}: NOT RESUMED: {error}")
            return {"finished": False, "starts": len(chain.run.attempts), "bits_equal": False, "differences": []}
        if record is None:
            break
        left.pop(0)
        records.append({"kind": kind.label, **record})
        tell(f"{kind.label}: {told(record)}")
    try:
        end = chain.finish()
    except (Stuck, OSError, ValueError, checkpoint.LalicError) as error:
        end = {"finished": False, "starts": len(chain.run.attempts), "bits_equal": False, "differences": [str(error)]}
    tell(f"end of a run after {end['starts']} starts: {end}")
    return end


def told(record: dict[str, Any]) -> str:
    """One line on a fault."""
    seconds = record["seconds_until_training"]
    again = "without a restart" if seconds is None else f"training again after {seconds:.1f} s"
    bits = "bits equal" if record["bits_equal"] else f"BITS DIFFER: {record['differences']}"
    return (
        f"at step {record['step']} ({record['phase']}{', ' if record['detail'] else ''}{record['detail']}), from "
        f"{record['from_step']}, {record['lost_steps']} steps lost, {again}, {bits} at {record['compared_step']}"
    )


def summarise(setups: dict[str, Any]) -> list[dict[str, Any]]:
    """Per setup and kind: how many, resumed, steps lost, seconds, bits."""
    rows = []
    for setup in setups.values():
        for label in dict.fromkeys(kind.label for kind in KINDS.values()):
            chosen = [record for record in setup["records"] if record["kind"] == label]
            if not chosen:
                continue
            lost = [record["lost_steps"] for record in chosen if "lost_steps" in record]
            seconds = [s for record in chosen if (s := record.get("seconds_until_training")) is not None]
            rows.append(
                {
                    "setup": setup["label"],
                    "kind": label,
                    "faults": len(chosen),
                    "resumed": sum(record["resumed"] for record in chosen),
                    "lost_mean": statistics.mean(lost) if lost else None,
                    "lost_worst": max(lost, default=None),
                    "seconds_median": statistics.median(seconds) if seconds else None,
                    "bits_equal": sum(record["bits_equal"] for record in chosen),
                }
            )
    return rows


def planned(name: str, quick: bool, wanted: Sequence[str] | None, generator: random.Random) -> list[str]:
    """The faults of a setup in a random order."""
    counts = QUICK if quick else SETUPS[name].plan
    chosen = [key for key, count in counts.items() for _ in range(count)]
    if wanted is not None:
        chosen = [key for key in chosen if key in wanted or key.split("-")[0] in wanted]
    generator.shuffle(chosen)
    return chosen


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/faults.py", description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, metavar="PHOTOGRAPHS", help="folder of images, e.g. BSDS500")
    parser.add_argument("--setups", nargs="+", choices=list(SETUPS), metavar="SETUP", help=", ".join(SETUPS))
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="only these: " + ", ".join(KINDS))
    parser.add_argument("--quick", action="store_true", help="eight faults on two ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs go (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="write the records to this JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for every fault and a table, write them where asked; 1 when a run did not come back as it was."""
    arguments = arguments_of(argv)
    names = arguments.setups or (["ddp2"] if arguments.quick else list(SETUPS))
    command = " ".join(["python benchmarks/faults.py", *(sys.argv[1:] if argv is None else argv)])
    print(f"seed {arguments.seed}", flush=True)
    good, result = True, {}
    for name in names:
        generator = random.Random(f"{arguments.seed}/{name}")
        plan = planned(name, arguments.quick, arguments.kinds, generator)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            material = prepare(Path(temporary) / "m", arguments.photos, steps=STEPS, every=EVERY, seed=arguments.seed)
            found = run_setup(name, plan, material, generator, lambda line: print(line, flush=True))
        found |= {"seed": arguments.seed, "by": command}
        good &= all(each["bits_equal"] for each in (*found["records"], *found["ends"]))
        good &= all(record["resumed"] for record in found["records"])
        result = _with_others(arguments.output, name, found, command)
    for row in result["summary"]:
        print(json.dumps(row))
    return 0 if good else 1


def _with_others(output: Path | None, name: str, found: dict[str, Any], command: str) -> dict[str, Any]:
    """Put a setup's records beside those of the others in `output`; everything that stands there."""
    from benchmarks.machine import describe
    from lalic.files import write_json
    from lalic.training.environment import versions

    before = json.loads(output.read_text())["setups"] if output and output.exists() else {}
    setups = {**before, name: found}
    result = {
        "command": command,
        "environment": describe(1),
        "versions": {**versions(), **_more_versions()},
        "checkpoint_every": EVERY,
        "setups": {key: setups[key] for key in SETUPS if key in setups},
    }
    result["summary"] = summarise(result["setups"])
    if output:
        write_json(output, result)
    return result


def _more_versions() -> dict[str, str]:
    """Of DeepSpeed and SLURM, where they are installed."""
    found = {"deepspeed": version("deepspeed")} if find_spec("deepspeed") else {}
    if shutil.which("slurmctld"):
        found["slurm"] = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout.strip()
    return found


if __name__ == "__main__":
    sys.exit(main())
