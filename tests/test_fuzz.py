"""The fuzzers: a short run of each finds nothing, and they would notice what they are there for."""

from __future__ import annotations

import bisect
import importlib.util
import json
import multiprocessing
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny_codec import tiny_model

from benchmarks import fuzz_codec, fuzz_header, fuzz_mutations
from benchmarks import tables as tables_of_results
from lalic.codec import bitstream
from lalic.codec.pictures import Picture
from lalic.codec.strings import longest_string, overrun
from lalic.errors import LalicError


@pytest.fixture(scope="module")
def target() -> fuzz_codec.Target:
    from lalic.model import exact

    real = exact.TOLERANCE
    try:
        yield fuzz_codec.Target()
    finally:
        exact.TOLERANCE = real


def fuzz(root: Path, files: int, first: int, output: Path) -> dict:
    command = [sys.executable, "benchmarks/fuzz_codec.py", "--files", str(files), "--first", str(first)]
    done = subprocess.run([*command, "--output", str(output)], cwd=root, capture_output=True, text=True, check=False)
    assert output.exists(), done.stderr
    return json.loads(output.read_text())


def check(result: dict, files: int) -> None:
    """Times and memory are left out: they are the machine's, and a busy one needs no excuse here."""
    assert sum(result["outcomes"].values()) == files == result["right"] + result["refused"]
    assert result["wrong"] == result["other exceptions"] == result["crashes"] == result["hangs"] == 0
    assert result["refused"] > 0.8 * files


def test_a_short_run(root: Path, tmp_path: Path) -> None:
    result = fuzz(root, 60, 1_000_000, tmp_path / "fuzz.json")
    check(result, 60)
    assert f"| **all** | **60** | **{result['refused']}** |" in tables_of_results.fuzz_codec(result)


@pytest.mark.slow
def test_a_longer_run(root: Path, tmp_path: Path) -> None:
    result = fuzz(root, 1000, 2_000_000, tmp_path / "fuzz.json")
    check(result, 1000)
    assert set(result["mutations"]) == set(fuzz_mutations.MUTATIONS)
    kinds = {f"{name}{rates}" for name in ("float32", "float64") for rates in ("", ", several rates")}
    assert set(result["arithmetics"]) == kinds


@pytest.mark.slow
def test_the_header_fuzzer(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is an optional tool: pip install atheris")
    command = [sys.executable, "benchmarks/fuzz_header.py", "--runs", "5000", "--crashes", str(tmp_path)]
    done = subprocess.run([*command, "--output", str(tmp_path / "f.json")], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    targets = json.loads((tmp_path / "f.json").read_text())["targets"]
    assert set(targets) == set(fuzz_header.TARGETS)
    assert all(t["runs"] >= 5000 and t["crashed"] == 0 for t in targets.values())
    assert targets["parse"]["edges"] > 80


class TestTheSeeds:
    def test_hold_all_that_can_be_altered(self, target: fuzz_codec.Target) -> None:
        images = [bitstream.parse(data, "x").image for data in target.files]
        assert {image.arithmetic for image in images} == {"float32", "float64"}
        assert {image.colour for image in images} == {"rgb", "gray"}
        assert any(image.alpha for image in images) and any(image.exceptions for image in images)
        several = [image for image in images if image.thousandths]
        assert len(several) == len(images) / 2 and any(image.sections for image in several)

    def test_are_right(self, target: fuzz_codec.Target) -> None:
        for i, data in enumerate(target.files):
            assert fuzz_codec.attempt(target, data, i)[0] == "right"

    def test_fields_are_written_as_they_were(self, target: fuzz_codec.Target) -> None:
        for data in target.files:
            assert fuzz_mutations.take_apart(data).build() == data

    def test_file_n_is_always_the_same(self, target: fuzz_codec.Target) -> None:
        one, other = (fuzz_mutations.mutate(np.random.default_rng([0, 7]), target.files) for _ in range(2))
        assert one == other and one[2] not in target.files


def wasteful_attempt(kept: str) -> tuple[str, float, float]:
    """What the fuzzer says of a decode that takes 40 MiB; the allocator may have that much from before."""

    def wasteful(data: bytes) -> Picture:
        waste = np.ones(40 << 20, np.uint8)
        for _ in range(60):
            waste += 1
        raise LalicError("too late")

    target = fuzz_codec.Target()
    target.decode = wasteful  # type: ignore[method-assign]
    if kept != "nothing":
        # 64 KiB are below the size from which a block is a mapping of its own and goes back at once.
        blocks = [bytes(1 << 16) for _ in range(1025)]
        del blocks[: 1024 if kept == "below a block in use" else None]
    return fuzz_codec.attempt(target, b"", 1)


class TestWhatIsNoticed:
    def test_a_wrong_picture(self, target: fuzz_codec.Target, monkeypatch: pytest.MonkeyPatch) -> None:
        known = target.pictures[1]
        rgb = known.rgb.copy()
        rgb[0, 0, 0] ^= 1
        monkeypatch.setattr(target, "decode", lambda data: Picture(rgb, known.alpha, known.gray))
        assert fuzz_codec.attempt(target, b"", 1)[0] == "WRONG"

    @pytest.mark.parametrize("change", ["alpha", "gray"])
    def test_a_wrong_kind(self, target: fuzz_codec.Target, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
        known = target.pictures[1]
        alpha = np.zeros(known.rgb.shape[:2], np.uint8) if change == "alpha" else None
        monkeypatch.setattr(target, "decode", lambda data: Picture(known.rgb, alpha, change == "gray"))
        assert fuzz_codec.attempt(target, b"", 1)[0] == "WRONG"

    def test_another_exception(self, target: fuzz_codec.Target, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(target, "decode", lambda data: [][1])
        assert fuzz_codec.attempt(target, b"", 1)[0] == "EXCEPTION IndexError"

    @pytest.mark.parametrize("kept", ["nothing", "below a block in use", "at the top"])
    def test_time_and_memory(self, kept: str) -> None:
        """In a process of its own, as the fuzzer does it: in this one other threads and tests have their memory."""
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            outcome, seconds, size = pool.submit(wasteful_attempt, kept).result()
        assert outcome == "too late" and seconds > fuzz_codec.LIMIT and size > fuzz_codec.LIMIT

    def test_a_child_that_dies(self) -> None:
        command = ["sh", "-c", "echo ready 1; kill -9 $$"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert list(fuzz_codec.lines_of(process)) == ["ready 1", "died"]

    def test_a_child_that_stands_still(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fuzz_codec, "STALLED_S", 1)
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert list(fuzz_codec.lines_of(process)) == ["stalled"]

    def test_a_crash_is_skipped_and_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The third of five files kills the child; the next child goes on behind it."""

        class Child:
            started: list[int] = []  # noqa: RUF012

            def __init__(self, command: list[str], **_: object):
                self.first = int(command[command.index("--first") + 1])
                Child.started.append(self.first)

            def __enter__(self) -> Child:
                return self

            def __exit__(self, *_: object) -> None: ...

            def wait(self) -> int:
                return -11

        def lines(child: Child) -> list[str]:
            told = [f"{n}\tstrings\tfloat64\t0.5\t0.1\tright" for n in range(child.first, 5)]
            return ["ready 1", *told[:2], "died"] if child.first == 0 else ["ready 1", *told, "done 1"]

        monkeypatch.setattr(fuzz_codec.subprocess, "Popen", Child)
        monkeypatch.setattr(fuzz_codec, "lines_of", lines)
        result = fuzz_codec.summary(fuzz_codec.run(0, 0, 5, None), 5)
        assert Child.started == [0, 3]
        assert (result["right"], result["crashes"]) == (4, 1)
        assert result["bad"] == [{"file": 2, "outcome": "died", "status": -11}]


class RansReader:
    """CompressAI's rANS decoder in plain Python, with zeros behind the string; it counts the words that it reads."""

    LOW = 1 << 31

    def __init__(self, string: bytes):
        self.words = np.frombuffer(string, "<u4").tolist()
        self.read = 0
        self.state = self.word() | self.word() << 32

    def word(self) -> int:
        self.read += 1
        return self.words[self.read - 1] if self.read <= len(self.words) else 0

    def renormalise(self) -> None:
        if self.state < self.LOW:
            self.state = self.state << 32 | self.word()

    def nibble(self) -> int:
        value = self.state & 15
        self.state >>= 4
        self.renormalise()
        return value

    def symbol(self, cdf: list[int]) -> int:
        """Number of the symbol, or for an escape code None of interest: -1 after its nibbles."""
        low = self.state & 0xFFFF
        s = bisect.bisect_right(cdf, low) - 1
        self.state = (cdf[s + 1] - cdf[s]) * (self.state >> 16) + low - cdf[s]
        self.renormalise()
        if s < len(cdf) - 2:
            return s
        count = value = self.nibble()
        while value == 15:
            value = self.nibble()
            count += value
        for _ in range(count):
            self.nibble()
        return -1


def tables() -> list[tuple[list[list[int]], list[int], list[int]]]:
    """Coding tables: a bottleneck's, in which escapes are common, and the Gaussians', in which they are rare."""
    codec = tiny_model().latent_codec
    models = codec.hyper.entropy_bottleneck, codec.y.latent_codec["y0"].y.gaussian_conditional
    return [tuple(t.tolist() for t in (m.quantized_cdf, m.cdf_length, m.offset)) for m in models]


def hostile(rng: np.random.Generator, symbols: int) -> bytes:
    """A string as long as the decoder admits, or short: of escape codes, of states that hold few bits, or random."""
    words = int(rng.choice([0, 2, 3, 5, 9, 33, longest_string(symbols) // 4]))
    kind = int(rng.integers(0, 5))
    if kind == 0:
        return rng.bytes(4 * words)
    if kind == 1:
        return b"\xff" * (4 * words)
    if kind == 2:
        return np.array([0xF, 0xFFFF, 0xFFFFF, 0xFFFFFFFF, 0], "<u4")[rng.integers(0, 5, words)].tobytes()
    if kind == 3:
        return rng.bytes(8) + b"\xff" * (4 * words)
    return bytes([int(rng.integers(0, 256))]) * (4 * words)


class TestRansBounds:
    """The entropy decoder is CompressAI's C++ and knows no end of its string: what it may read must be ours."""

    def test_the_reader_is_the_decoder(self) -> None:
        from compressai.ans import RansDecoder

        rng = np.random.default_rng(0)
        for cdfs, lengths, offsets in tables():
            for _ in range(60):
                string, indexes = hostile(rng, 50), rng.integers(0, len(lengths), 50).tolist()
                padded = string + bytes(overrun(len(string), 50))
                found = RansDecoder().decode_with_indexes(padded, indexes, cdfs, lengths, offsets)
                reader = RansReader(string)
                for index, value in zip(indexes, found, strict=True):
                    symbol = reader.symbol(cdfs[index][: lengths[index]])
                    assert symbol in (-1, value - offsets[index])

    def test_what_is_read_lies_within_the_padding(self) -> None:
        rng = np.random.default_rng(1)
        most = 0.0
        for cdfs, lengths, _ in tables():
            rows = [row[:length] for row, length in zip(cdfs, lengths, strict=True)]
            for _ in range(300):
                symbols = int(rng.choice([8, 64]))
                string, reader = hostile(rng, symbols), None
                reader = RansReader(string)
                same = int(rng.integers(0, len(rows)))
                for index in rng.integers(0, len(rows), symbols) if rng.random() < 0.3 else [same] * symbols:
                    reader.symbol(rows[index])
                beyond = 4 * reader.read - len(string)
                assert beyond <= overrun(len(string), symbols)
                most = max(most, beyond / (len(string) + 1))
        assert most > 10, "no string came near the bound: they are not hostile"

    @pytest.mark.slow
    @pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind is not installed")
    @pytest.mark.parametrize("padded", [True, False], ids=["padded", "as it is"])
    def test_no_invalid_read_under_valgrind(self, tmp_path: Path, padded: bool) -> None:
        """Without the padding valgrind sees reads beyond the string; with it, none."""
        rng = np.random.default_rng(2)
        strings = [hostile(rng, 64) for _ in range(12)] + [b"\xff" * longest_string(64)]
        cases = [(s + bytes(overrun(len(s), 64) if padded else 0)).hex() for s in strings]
        library = importlib.util.find_spec("compressai.ans").origin
        (tmp_path / "cases.json").write_text(json.dumps({"library": library, "strings": cases, "tables": tables()}))
        program = tmp_path / "decode.py"
        program.write_text(
            "import importlib.util, json\n"
            f"given = json.load(open({str(tmp_path / 'cases.json')!r}))\n"
            "spec = importlib.util.spec_from_file_location('ans', given['library'])\n"
            "ans = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(ans)\n"
            "for tables in given['tables']:\n"
            "    for string in given['strings']:\n"
            "        for index in (0, len(tables[1]) - 1):\n"
            "            ans.RansDecoder().decode_with_indexes(bytes.fromhex(string), [index] * 64, *tables)\n"
            "print('done')\n"
        )
        log = tmp_path / "valgrind.log"
        done = subprocess.run(
            ["valgrind", f"--log-file={log}", sys.executable, str(program)],
            env={"PYTHONMALLOC": "malloc", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == "done\n", done.stderr
        reads = [block for block in log.read_text().split("Invalid read")[1:] if "ans." in block[:600]]
        assert bool(reads) != padded
