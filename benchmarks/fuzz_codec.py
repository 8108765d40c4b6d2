"""Mutated `.lalic` files through the whole decoder: no crash, hang or waste of memory, no wrong picture as right.

python benchmarks/fuzz_codec.py --files 100000 --output benchmarks/results/fuzz_codec.json

Valid files of two small models, of one rate and of several (format versions 2 and 3, both arithmetics, RGB and gray,
with and without alpha and typed sections, several sizes) are altered by benchmarks/fuzz_mutations.py, and each result
is decoded in a child process as `lalic decompress` does. The child has a limit on its address space; its parent
notices when it dies or stands still, and goes on behind that file. For each file the CPU time and the peak of resident
memory are set beside those of a normal decode: of the valid file that was altered, or where that is exceeded, of a
valid file of the size that the header claims.

File n of a seed is always the same file: `--first N --files 1 --keep FOLDER` makes it again.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import selectors
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import fuzz_mutations
from benchmarks.machine import begin_peak, describe, memory_bytes
from lalic.codec import bitstream, pictures
from lalic.codec.pictures import Picture
from lalic.errors import LalicError, run_main

LIMIT = 2.0
"""Times a normal decode: CPU time and memory."""
SLACK_BYTES = 8 << 20
"""Memory that the allocator may take in one piece, whatever the file."""
STALLED_S = 180
TOLERANCE = 2.0**-19
"""In place of lalic.model.exact.TOLERANCE."""
MAX_PIXELS = 1 << 18
"""The decoder's --max-pixels here."""
TINY = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 1, 1, 1), "groups": (4, 4, 8, 16)}
SECTIONS = (bitstream.Section(200, bytes(range(100))), bitstream.Section(230, b""))
KINDS = [(1, 1, "rgb"), (40, 70, "rgb"), (64, 64, "gray"), (33, 100, "rgb alpha"), (70, 50, "gray alpha")]


class Target:
    """Two models, of one rate and of several, valid files of them and the pictures that they hold."""

    def __init__(self) -> None:
        import torch

        from lalic.ladder import MSE
        from lalic.model import LALIC, exact, fingerprint

        # With the real one, files this small have no exceptions that could be altered.
        exact.TOLERANCE = TOLERANCE
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.one_rate, self.several_rates = LALIC(**TINY).eval(), LALIC(**TINY, rungs=tuple(MSE)).eval()
        assert self.several_rates.rates is not None
        self.several_rates.rates.initialise(list(MSE.values()))
        self.fingerprints = {}
        for model in (self.one_rate, self.several_rates):
            with torch.no_grad():
                # A random model's latents are nearly all zero; these are spread out and some need escape codes.
                model.g_a[-1].weight.mul_(40)
                model.h_a[-1].weight.mul_(20)
            model.update()
            self.fingerprints[fingerprint(model)] = model
        ways = [(a, several) for several in (False, True) for a in (bitstream.FLOAT32, bitstream.FLOAT64)]
        self.files = [self.file(*kind, *way) for way in ways for kind in KINDS]
        self.kinds = [a + (", several rates" if several else "") for a, several in ways for _ in KINDS]
        self.pictures = [self.decode(data) for data in self.files]
        self.normal = [self.measure_normal(data) for data in self.files]
        self._of_size: dict[tuple[int, int, str, bool], tuple[float, int]] = {}

    def file(self, height: int, width: int, kind: str, arithmetic: str, several: bool) -> bytes:
        """A valid file of a picture with that many rows and columns: noise on a ramp."""
        rng = np.random.default_rng([height, width])
        rgb = rng.integers(0, 120, (height, width, 3)) + np.linspace(0, 135, width).astype(int)[:, None]
        if "gray" in kind:
            rgb = np.repeat(rgb[..., :1], 3, axis=2)
        alpha = rng.choice([0, 128, 255], (height, width), p=[0.1, 0.1, 0.8]).astype(np.uint8)
        picture = Picture(rgb.astype(np.uint8), alpha if "alpha" in kind else None, "gray" in kind)
        model = self.several_rates if several else self.one_rate
        known = next(fingerprint for fingerprint, other in self.fingerprints.items() if other is model)
        label = bitstream.label_of({"metric": "mse", "lambda": 0.0067}, several)
        way = (
            {"quality": 1.3 + (height + width) % 5, "sections": SECTIONS if "alpha" in kind else ()} if several else {}
        )
        return bitstream.pack(pictures.encode_picture(model, picture, arithmetic, **way), known, label, 1)

    def decode(self, data: bytes) -> Picture:
        """What `lalic decompress` does with a file's bytes, but for the number of threads, which stays one."""
        parsed = bitstream.parse(data, "the file", MAX_PIXELS)
        fitting = [model for known, model in self.fingerprints.items() if known.startswith(parsed.fingerprint.hex())]
        if not fitting:
            raise LalicError("the file was written with another model (its fingerprint differs)")
        return pictures.decode_picture(fitting[0], parsed.image)

    def measure_normal(self, data: bytes) -> tuple[float, int]:
        """CPU seconds and bytes of a normal decode."""
        runs = [watched(lambda: self.decode(data))[1:] for _ in range(5)]
        return statistics.median(seconds for seconds, _ in runs), max(size for _, size in runs)

    def normal_of(self, data: bytes, i: int) -> tuple[float, int]:
        """The same for a valid file of the size that `data` claims, if it claims one, else of file `i`."""
        try:
            image = bitstream.parse(data, "the file", MAX_PIXELS).image
        except LalicError:
            return self.normal[i]
        key = (-(-image.height // 64) * 64, -(-image.width // 64) * 64, image.arithmetic, bool(image.thousandths))
        if key not in self._of_size:
            self._of_size[key] = self.measure_normal(self.file(key[0], key[1], "rgb alpha", *key[2:]))
        return self._of_size[key]


def watched(call: Callable[[], Any]) -> tuple[Any, float, int]:
    """Result of `call`, its CPU seconds, and by how many bytes resident memory grew at its peak."""
    before, start = begin_peak(), time.process_time()
    result = call()
    return result, time.process_time() - start, max(0, memory_bytes("VmHWM") - before)


def kind_of(error: BaseException) -> str:
    """The error without what differs from file to file."""
    if not isinstance(error, LalicError):
        return f"EXCEPTION {type(error).__name__}"
    text = re.split(r"; get it|: float64 |: decode it|: raise it|: update it|\. The file| \(its finger", str(error))[0]
    return re.sub(r"string N of N|the latents", "...", re.sub(r"\b\d+(\.\d+)?", "N", text))


def attempt(target: Target, data: bytes, i: int) -> tuple[str, float, float]:
    """What decoding `data`, made from file `i`, ends with; its time and memory as multiples of a normal decode's."""

    def decode() -> str:
        try:
            picture = target.decode(data)
        except Exception as error:
            return kind_of(error)
        return "right" if any(same(picture, known) for known in target.pictures) else "WRONG"

    outcome, seconds, size = watched(decode)
    ratios = _ratios(seconds, size, target.normal[i])
    if max(ratios) > LIMIT:
        # Either the machine was busy, or the file claims a larger picture.
        repeated = [watched(decode)[1:] for _ in range(3)]
        seconds, size = (min(values) for values in zip((seconds, size), *repeated, strict=True))
        ratios = _ratios(seconds, size, target.normal_of(data, i))
    return outcome, *ratios


def _ratios(seconds: float, size: int, normal: tuple[float, int]) -> tuple[float, float]:
    return seconds / normal[0], size / max(normal[1], SLACK_BYTES)


def same(a: Picture, b: Picture) -> bool:
    """Whether both are the same picture in every respect."""
    if a.gray != b.gray or (a.alpha is None) != (b.alpha is None) or not np.array_equal(a.rgb, b.rgb):
        return False
    return a.alpha is None or b.alpha is None or np.array_equal(a.alpha, b.alpha)


def child(seed: int, first: int, files: int, keep: Path | None) -> None:
    """Decode files `first` to `first + files - 1` and print a line for each."""
    target = Target()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = memory_bytes("VmSize") + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("ready", memory_bytes("VmRSS"), flush=True)
    for n in range(first, first + files):
        name, i, data = fuzz_mutations.mutate(np.random.default_rng([seed, n]), target.files)
        if keep:
            (keep / f"{n}.lalic").write_bytes(data)
        outcome, seconds, size = attempt(target, data, i)
        print(n, name, target.kinds[i], f"{seconds:.3f}", f"{size:.3f}", outcome, sep="\t", flush=True)
    print("done", memory_bytes("VmRSS"), flush=True)


def lines_of(process: subprocess.Popen[str]) -> Any:
    """The child's lines; the last is "died" or "stalled" when it did not come to its end."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            # The first line takes as long as importing torch takes on a busy machine; a file takes milliseconds.
            if not selector.select(timeout=STALLED_S):
                process.kill()
                yield "stalled"
                return
            line = process.stdout.readline()
            yield line.rstrip("\n") or "died"
            if not line or line.startswith("done"):
                return


def run(seed: int, first: int, files: int, keep: Path | None) -> dict[str, Any]:
    """The figures of all files; children that end are replaced."""
    counts: Counter[tuple[str, str, str]] = Counter()
    bad: list[dict[str, Any]] = []
    worst = {"time": 0.0, "memory": 0.0}
    slower = {"time": 0, "memory": 0}
    resident: list[int] = []
    done, failures = first, 0
    while done < first + files:
        command = [sys.executable, __file__, "--child", "--seed", str(seed), "--first", str(done)]
        command += ["--files", str(first + files - done), *(["--keep", str(keep)] if keep else [])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            ready = False
            for line in lines_of(process):
                if line.startswith(("ready", "done")):
                    ready = True
                    resident.append(int(line.split()[1]))
                    continue
                if line in ("died", "stalled"):
                    if not ready:
                        raise LalicError(f"the child {line} before its first file")
                    bad.append({"file": done, "outcome": line, "status": process.wait()})
                    counts["?", "?", line] += 1
                    done, failures = done + 1, failures + 1
                    break
                n, name, arithmetic, seconds, size, outcome = line.split("\t")
                for key, value in (("time", float(seconds)), ("memory", float(size))):
                    worst[key] = max(worst[key], value)
                    slower[key] += value > LIMIT
                    if value > LIMIT:
                        bad.append({"file": int(n), "outcome": f"{key} {value:.2f}x"})
                if outcome == "WRONG" or outcome.startswith("EXCEPTION"):
                    bad.append({"file": int(n), "outcome": outcome, "mutation": name})
                counts[name, arithmetic, outcome] += 1
                done = int(n) + 1
    return {"counts": counts, "bad": bad, "worst": worst, "above_limit": slower, "resident": resident}


def summary(found: dict[str, Any], files: int) -> dict[str, Any]:
    """The figures as they are kept."""
    counts: Counter[tuple[str, str, str]] = found["counts"]
    outcomes: Counter[str] = Counter()
    mutations: dict[str, Counter[str]] = {}
    arithmetics: Counter[str] = Counter()
    for (name, arithmetic, outcome), n in counts.items():
        outcomes[outcome] += n
        arithmetics[arithmetic] += n
        known = outcome in ("right", "WRONG", "died", "stalled") or outcome.startswith("EXCEPTION")
        mutations.setdefault(name, Counter())[outcome if known else "refused"] += n
    return {
        "files": files,
        "right": outcomes["right"],
        "refused": sum(c["refused"] for c in mutations.values()),
        "wrong": outcomes["WRONG"],
        "other exceptions": sum(n for text, n in outcomes.items() if text.startswith("EXCEPTION")),
        "crashes": outcomes["died"],
        "hangs": outcomes["stalled"],
        "limit": LIMIT,
        "slack_mib": SLACK_BYTES >> 20,
        "worst": found["worst"],
        "above_limit": found["above_limit"],
        "resident_mib": [size >> 20 for size in found["resident"]],
        "arithmetics": dict(arithmetics),
        "mutations": {name: dict(mutations[name]) for name in sorted(mutations)},
        "outcomes": dict(outcomes.most_common()),
        "bad": found["bad"][:50],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures, write them where asked; 1 when a file did what no file may do."""
    parser = argparse.ArgumentParser(prog="benchmarks/fuzz_codec.py", description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the files there")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    if arguments.child:
        child(arguments.seed, arguments.first, arguments.files, arguments.keep)
        return 0
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    start = time.monotonic()
    found = run(arguments.seed, arguments.first, arguments.files, arguments.keep)
    result = {
        "command": " ".join(["python benchmarks/fuzz_codec.py", *(sys.argv[1:] if argv is None else argv)]),
        "environment": describe(1),
        "seconds": round(time.monotonic() - start, 1),
        **summary(found, arguments.files),
    }
    for key, value in result.items():
        if key not in ("environment", "mutations", "outcomes"):
            print(f"{key}: {value}")
    for outcome, n in result["outcomes"].items():
        print(f"{n:8}  {outcome}")
    if arguments.output:
        from lalic.files import write_json

        write_json(arguments.output, result)
    return 1 if result["bad"] else 0


if __name__ == "__main__":
    run_main(main)
