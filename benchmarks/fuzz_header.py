"""Coverage-guided fuzzing (atheris, that is libFuzzer) of all that reads bytes before the model runs.

python benchmarks/fuzz_header.py --runs 1000000 --output benchmarks/results/fuzz_header.json

Three targets, each in a process of its own: the format's parser, the alpha section, the list of exceptions. CRCs are
replaced by zero on both sides, since no fuzzer guesses them. Anything but a LalicError is a crash, and so is a value
that breaks what docs/bitstream.md promises: what was accepted must be written again as the same bytes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TARGETS = ("parse", "alpha", "exceptions")
MAX_PIXELS = 1 << 20
WIDTH, HEIGHT = 7, 5
"""Of the alpha channel and of y in the targets that are told a size."""


def make_parse() -> tuple[Callable[[bytes], None], list[bytes]]:
    """The target, and files to begin with."""
    from lalic.codec import bitstream
    from lalic.errors import LalicError

    bitstream.zlib = SimpleNamespace(crc32=lambda data: 0)

    def parse(data: bytes) -> None:
        try:
            parsed = bitstream.parse(data, "the file", MAX_PIXELS)
        except LalicError:
            return
        image = parsed.image
        typed = sum(len(section.data) for section in image.sections)
        assert 1 <= image.width * image.height <= MAX_PIXELS and image.num_bytes + len(image.alpha) + typed < len(data)
        assert (image.thousandths >= bitstream.SCALE) == (data[4] == bitstream.VERSION_OF_RATES)
        exact = image.arithmetic == bitstream.FLOAT64
        assert image.checks and len(image.strings) == (1 if exact else len(image.checks)) and parsed.model_name
        assert bitstream.pack(image, parsed.fingerprint.hex(), parsed.label, parsed.threads) == data

    words = tuple(bytes([i]) * 4 * i for i in range(1, 11))
    seeds = []
    for arithmetic, exceptions in ((bitstream.FLOAT32, b""), (bitstream.FLOAT64, b"\1\2"), (bitstream.FLOAT64, b"")):
        strings = words if arithmetic == bitstream.FLOAT32 else (b"".join(words),)
        for colour, alpha in ((bitstream.RGB, b""), (bitstream.GRAY, b"alpha")):
            image = bitstream.CodedImage(300, 7, strings, bytes(10), 5, arithmetic, exceptions, colour, alpha)
            seeds.append(bitstream.pack(image, "ab" * 8, 3, 1))
            sections = (bitstream.Section(130, b"profile"), bitstream.Section(200, b"")) if alpha else ()
            seeds.append(bitstream.pack(replace(image, thousandths=4300, sections=sections), "ab" * 8, 7, 1))
    return parse, seeds


def make_alpha() -> tuple[Callable[[bytes], None], list[bytes]]:
    """The same for the alpha section."""
    import zlib

    import numpy as np

    from lalic.codec import alpha
    from lalic.errors import LalicError

    def decode(data: bytes) -> None:
        # The second time with zlib put around it, whose checksum no fuzzer guesses.
        for section in (data, data[:1] + zlib.compress(data[1:], 0)):
            try:
                found = alpha.decode(section, WIDTH, HEIGHT)
            except LalicError:
                continue
            assert found.shape == (HEIGHT, WIDTH) and found.dtype == np.uint8
            assert np.array_equal(alpha.decode(alpha.encode(found), WIDTH, HEIGHT), found)

    ramp = np.arange(WIDTH * HEIGHT, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    return decode, [alpha.encode(ramp), alpha.encode(ramp % 2), *(bytes([i]) + ramp.tobytes() for i in range(4))]


def make_exceptions() -> tuple[Callable[[bytes], None], list[bytes]]:
    """The same for the list of exceptions."""
    import numpy as np

    from lalic.errors import LalicError
    from lalic.model.choices import Near, Recorder, Replay

    elements = WIDTH * HEIGHT

    def replay(data: bytes) -> None:
        try:
            Replay(data, elements).finish()
            known: list[tuple[int, int]] = []
        except LalicError:
            known = plain(data, elements)
        # Every listed event offered as one that lies on a border: the list must then be taken as it is.
        recorder = Recorder()
        try:
            taken = Replay(data, elements)
            for number, choice in known:
                near = Near(*(np.array([x]) for x in (number // 2, 0.0, 1 - choice)))
                assert taken.settle(0, number % 2, near) == [choice]
                recorder.settle(0, number % 2, near._replace(choices=np.array([choice])))
            taken.finish()
        except LalicError:
            assert not known
            return
        assert recorder.listed() == data

    return replay, [b"", b"\0", b"\3\5\1", b"\x81\1", b"\0\0\0\0", b"\x0a\x0b\x20"]


def plain(data: bytes, elements: int) -> list[tuple[int, int]]:
    """Numbers and choices of a list, read byte by byte as lalic/model/choices.py describes it; [] if it is invalid."""
    found, number, value, shift = [], -1, 0, 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte >= 0x80:
            continue
        if shift > 42 or (byte == 0 and shift > 7):
            return []
        number += (value >> 1) + 1
        if number >= 2 * elements:
            return []
        found.append((number, value & 1))
        value, shift = 0, 0
    return [] if shift else found


def fuzz(name: str, arguments: Sequence[str]) -> None:
    """Fuzz one target in this process; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["lalic.codec", "lalic.model.choices"]):
        target, seeds = {"parse": make_parse, "alpha": make_alpha, "exceptions": make_exceptions}[name]()
    with tempfile.TemporaryDirectory() as folder:
        for i, seed in enumerate(seeds):
            (Path(folder) / str(i)).write_bytes(seed)
        atheris.Setup([sys.argv[0], *arguments, folder], target)
        atheris.Fuzz()


def measure(name: str, runs: int, seed: int, crashes: Path) -> dict[str, Any]:
    """Figures of one target's run."""
    command = [sys.executable, __file__, "--target", name, f"-runs={runs}", f"-seed={seed}", "-max_len=400"]
    # atheris keeps 2 KB of every run that raises, so the process grows; what one run allocates is limited apart.
    limits = ["-timeout=10", "-malloc_limit_mb=256", "-rss_limit_mb=8192"]
    start = time.monotonic()
    done = subprocess.run(
        [*command, *limits, f"-artifact_prefix={crashes}/{name}-"],
        capture_output=True,
        text=True,
        check=False,
    )
    states = re.findall(r"#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)", done.stderr)
    if not states:
        raise SystemExit(f"error: the fuzzer did not start:\n{done.stderr[-2000:]}")
    count, edges, features, corpus = map(int, states[-1])
    figures = {"runs": count, "edges": edges, "features": features, "corpus": corpus}
    figures |= {"crashed": int(done.returncode != 0), "seconds": round(time.monotonic() - start, 1)}
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures, write them where asked; 1 when a target crashed."""
    parser = argparse.ArgumentParser(prog="benchmarks/fuzz_header.py", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100_000, help="of each target (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--crashes", type=Path, default=Path(tempfile.gettempdir()), help="folder for crashing inputs")
    parser.add_argument("--target", choices=TARGETS, help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.target:
        fuzz(arguments.target, rest)
        return 0
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    from benchmarks.machine import describe

    targets = {name: measure(name, arguments.runs, arguments.seed, arguments.crashes) for name in TARGETS}
    result = {
        "command": " ".join(["python benchmarks/fuzz_header.py", *(sys.argv[1:] if argv is None else argv)]),
        "environment": describe(1),
        "atheris": version("atheris"),
        "targets": targets,
    }
    for name, figures in targets.items():
        print(f"{name:12}" + "  ".join(f"{key} {value}" for key, value in figures.items()))
    if arguments.output:
        from lalic.files import write_json

        write_json(arguments.output, result)
    return int(any(figures["crashed"] for figures in targets.values()))


if __name__ == "__main__":
    raise SystemExit(main())
