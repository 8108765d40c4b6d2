"""`lalic curves`: what a run folder tells, numbers that are read off by hand, pictures with the same bytes each time.

The history of real runs, killed, stopped and failed, is in test_events.py.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lalic.curves import interruptions, labels_of, main, summary
from lalic.curves_picture import PANELS, plot_runs, running_mean, thinned
from lalic.errors import LalicError, for_terminal
from lalic.run_history import read_history

pytest.importorskip("matplotlib")

BEGIN = 1_000_000.0
HOUR = 3600.0


def trained(step: int, time: float, **values: Any) -> dict[str, Any]:
    record = {"kind": "train", "step": step, "time": time, "stage": 1, "loss": 2.0, "bpp": 0.5, "psnr": 30.0}
    return {**record, "step_seconds": 36.0, **values}


def validated(step: int, time: float, **values: Any) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "time": time, "loss": 1.5, "bpp": 0.4, "psnr": 31.0, **values}


def event(kind: str, step: int, time: float, **facts: Any) -> dict[str, Any]:
    return {"time": time, "kind": kind, "step": step, "host": "h", "rank": 0, "world_size": 1, **facts}


def write(folder: Path, log: list[dict[str, Any]], events: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("log.jsonl", log), ("events.jsonl", events)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


LOG = [
    *(trained(step, BEGIN + 36 * step, loss=3.0 - step / 200) for step in (50, 100)),
    validated(100, BEGIN + HOUR),
    trained(150, BEGIN + 11 * HOUR, step_seconds=18.0),
    trained(200, BEGIN + 11.5 * HOUR, stage=2, step_seconds=18.0),
    trained(250, BEGIN + 21.5 * HOUR, stage=2, loss=None),
    validated(250, BEGIN + 21.5 * HOUR, psnr=32.0),
]
EVENTS = [
    event("started", 0, BEGIN, total_steps=300),
    event("checkpoint", 100, BEGIN + HOUR),
    event("stopped", 100, BEGIN + HOUR, reason="STOP exists\non rank 0"),
    # Ten hours later, for an hour; the last half of it is lost.
    event("resumed", 100, BEGIN + 10.5 * HOUR, total_steps=300),
    event("checkpoint", 200, BEGIN + 11.5 * HOUR),
    event("resumed", 200, BEGIN + 21 * HOUR, total_steps=300),
    event("failed", 250, BEGIN + 21.5 * HOUR, error="a | b"),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Alive for 1, 1 and half an hour; stopped, then killed, then failed."""
    return write(tmp_path / "run", LOG, EVENTS)


class TestHistory:
    def test_hours_are_those_of_its_life(self, run: Path) -> None:
        history = read_history(run)
        assert history.train.steps == [50, 100, 150, 200, 250]
        assert history.train.hours == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5])
        assert history.validation.hours == pytest.approx([1.0, 2.5])
        assert (history.hours, history.step, history.starts) == (pytest.approx(2.5), 250, 3)
        assert history.stages == [(200, pytest.approx(2.0), 2)]

    @pytest.mark.parametrize(("over", "end"), [("steps", 200), ("hours", 2.2)])
    def test_as_it_was_earlier(self, over: str, end: float, run: Path) -> None:
        history = read_history(run).until(over, end)
        assert history.train.steps == [50, 100, 150, 200] == [50 * (i + 1) for i in range(len(history.train.hours))]
        assert history.validation.steps == [100] and history.step == 200
        assert [i.kind for i in history.interruptions] == ["stopped", "killed"]
        assert history.hours == pytest.approx(2.0 if over == "steps" else 2.2)
        assert all(len(values) == 4 for values in history.train.values.values())
        assert not len(history.until("steps", 49).train) and history.until("steps", 49).stages == []

    def test_values(self, run: Path) -> None:
        values = read_history(run).train.values
        assert values["steps_per_second"][:3] == pytest.approx([1 / 36, 1 / 36, 1 / 18])
        assert values["loss"][:2] == [2.75, 2.5] and math.isnan(values["loss"][-1])

    def test_interruptions(self, run: Path) -> None:
        found = read_history(run).interruptions
        assert [(i.kind, i.step, i.resumed_step) for i in found] == [
            ("stopped", 100, 100),
            ("killed", 200, 200),
            ("failed", 250, None),
        ]
        assert [i.away for i in found] == [pytest.approx(9.5 * HOUR), pytest.approx(9.5 * HOUR), None]
        assert [i.hours for i in found] == pytest.approx([1.0, 2.0, 2.5])
        assert found[0].detail == "STOP exists on rank 0"

    def test_a_run_that_finished_and_was_given_more_steps_was_not_interrupted(self, tmp_path: Path) -> None:
        events = [event("started", 0, BEGIN), event("finished", 50, BEGIN + 10), event("resumed", 50, BEGIN + 99)]
        history = read_history(write(tmp_path / "r", [trained(50, BEGIN + 9)], events))
        assert history.interruptions == [] and history.starts == 2

    def test_of_several_ranks_that_fail_the_first_counts(self, tmp_path: Path) -> None:
        events = [
            event("started", 0, BEGIN),
            event("stalled", 7, BEGIN + 9, message="rank 3"),
            event("failed", 7, BEGIN + 10),
        ]
        (one,) = read_history(write(tmp_path / "r", [trained(5, BEGIN + 9)], events)).interruptions
        assert (one.kind, one.detail) == ("failed", "rank 3")

    def test_killed_before_its_first_checkpoint(self, tmp_path: Path) -> None:
        events = [event("started", 0, BEGIN), event("started", 0, BEGIN + 99)]
        (one,) = read_history(write(tmp_path / "r", [trained(5, BEGIN + 120)], events)).interruptions
        assert (one.kind, one.step, one.resumed_step) == ("killed", 0, 0)

    def test_without_events_the_first_line_begins_with_its_first_step(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "r", [trained(50, BEGIN), trained(100, BEGIN + HOUR)], [])
        (folder / "events.jsonl").unlink()
        history = read_history(folder)
        assert history.train.hours == pytest.approx([0.5, 1.5]) and history.interruptions == []

    def test_a_clock_that_was_set_back(self, tmp_path: Path) -> None:
        log = [trained(50, BEGIN + HOUR), trained(100, BEGIN - 9 * HOUR), trained(150, BEGIN + 2 * HOUR)]
        history = read_history(write(tmp_path / "r", log, [event("started", 0, BEGIN)]))
        assert history.train.hours == sorted(history.train.hours) and history.hours >= history.train.hours[-1]

    def test_a_step_that_was_done_again_stands_there_once(self, tmp_path: Path) -> None:
        log = [trained(50, BEGIN, loss=9.0), trained(100, BEGIN), trained(50, BEGIN + 9, loss=1.0)]
        history = read_history(write(tmp_path / "r", log, []))
        assert history.train.steps == [50, 100] and history.train.values["loss"][0] == 1.0

    @pytest.mark.parametrize(
        "junk",
        [b'{"kind": "tra', b"\xff\xfe\x00", b"[1]", b"[" * 100_000, b'{"kind": "train", "step": "7"}', b"17", b"",
         b'{"kind": "train", "step": 60, "loss": "x", "time": "y", "step_seconds": 0}',
         b'{"kind": "train", "step": 60, "loss": 1e999, "bpp": NaN, "time": 1e300, "step_seconds": -1}'],
    )  # fmt: skip
    def test_lines_that_no_run_writes(self, junk: bytes, run: Path) -> None:
        for name in ("log.jsonl", "events.jsonl"):
            lines = (run / name).read_bytes().splitlines()
            (run / name).write_bytes(b"\n".join([lines[0], junk, *lines[1:], junk]))
        history = read_history(run)
        assert set(history.train.steps) - {60} == {50, 100, 150, 200, 250}
        assert len(history.interruptions) == 3
        assert all(math.isfinite(h) for h in history.train.hours)

    def test_whatever_is_cut_or_overwritten(self, run: Path, tmp_path: Path) -> None:
        """Any part of the files may be missing or garbage: there is a picture, or one line that says why not."""
        chance = random.Random(7)
        told = 0
        for i in range(60):
            copy = tmp_path / "copy"
            shutil.copytree(run, copy)
            for name in ("log.jsonl", "events.jsonl"):
                data = bytearray((copy / name).read_bytes())
                for _ in range(chance.randrange(6)):
                    at = chance.randrange(len(data))
                    data[at : at + chance.randrange(30)] = chance.randbytes(chance.randrange(30))
                (copy / name).write_bytes(data[: chance.randrange(1, len(data))])
            history = read_history(copy)
            assert interruptions([history], ["x"]).count("\n") == len(history.interruptions) + 1
            told += len(history.train) > 0
            assert not len(history.train) or f"| {history.step} |" in summary([history], ["x"])
            if i % 10 == 0 and len(history.train):
                main([str(copy), "-o", str(tmp_path / "x.svg"), "--over", chance.choice(["steps", "hours"]), "--list"])
            shutil.rmtree(copy)
        assert 20 < told < 60

    @pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
    def test_no_run_folder(self, make: Any, tmp_path: Path) -> None:
        make(tmp_path / "x")
        with pytest.raises(LalicError, match=r"no run folder|no such run folder"):
            read_history(tmp_path / "x")


class TestLines:
    def test_running_mean_against_numpy(self) -> None:
        values = list(np.random.default_rng(0).normal(size=50))
        expected = np.convolve(values, np.ones(5) / 5, "valid")
        assert running_mean(values, 5)[2:-2] == pytest.approx(list(expected))
        assert running_mean(values, 1) == values

    def test_what_is_no_number_is_left_out(self) -> None:
        assert running_mean([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
        assert all(map(math.isnan, running_mean([math.nan] * 3, 3)))

    def test_thinned(self) -> None:
        assert thinned([1, 2, 3, 4, 5], [1.0, 3.0, math.nan, 7.0, 9.0], 3) == ([2, 4, 5], [2.0, 7.0, 9.0])
        x, y = thinned(range(12345), [1.0] * 12345, 1000)
        assert len(x) <= 1000 and x[-1] == 12344 and set(y) == {1.0}
        assert thinned([], [], 3) == ([], [])


class TestPicture:
    @pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
    def test_same_files_same_bytes(self, run: Path, tmp_path: Path, suffix: str) -> None:
        pictures = [tmp_path / name / f"curves{suffix}" for name in "ab"]
        for path in pictures:
            assert main([str(run), "-o", str(path), "--title", "a run"]) == 0
        first, second = (path.read_bytes() for path in pictures)
        assert first == second and len(first) > 5000

    @pytest.mark.parametrize(("over", "at"), [("steps", (100, 200, 250)), ("hours", (1.0, 2.0, 2.5))])
    def test_points_and_stops_are_where_they_belong(self, run: Path, tmp_path: Path, over: str, at: Any) -> None:
        """In the SVG, in the coordinates of the curve itself."""
        plot_runs([read_history(run)], tmp_path / "c.svg", over=over)
        text = (tmp_path / "c.svg").read_text()
        paths = re.findall(r'<path d="([^"]*)" clip-path[^>]*stroke: #d55e00', text, re.I)
        lines = [np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", d), float) for d in paths]
        psnr = next(line for line in lines if len(line) == 5 and np.ptp(line[:, 1]) < 1e-6)
        steps = (np.array([50, 100, 150, 200, 250]), np.array([0.5, 1.0, 1.5, 2.0, 2.5]))[over == "hours"]
        scale = np.polyfit(psnr[:, 0], steps, 1)
        assert np.polyval(scale, psnr[:, 0]) == pytest.approx(list(steps), abs=1e-3)
        # The light lines through the panel of a single run: where it was interrupted.
        stops = re.findall(r'<path d="M ([\d.]+) [\d.]+\s+L \1 [\d.]+\s*" [^>]*stroke: #999999', text)
        found = sorted({round(float(np.polyval(scale, float(x))), 2) for x in stops})
        assert found == pytest.approx(sorted(at), abs=0.02)

    def test_runs_without_validation_and_without_interruptions(self, tmp_path: Path) -> None:
        plain = write(tmp_path / "a", [trained(s, BEGIN + s) for s in range(10, 100, 10)], [event("started", 0, BEGIN)])
        plot_runs([read_history(plain)], tmp_path / "a.png")
        stopped = [event("started", 0, BEGIN), event("stopped", 90, BEGIN + 99)]
        other = write(tmp_path / "b", [trained(s, BEGIN + s) for s in range(10, 100, 10)], stopped)
        plot_runs([read_history(other)], tmp_path / "b.png")
        first, second = (Image.open(tmp_path / f"{name}.png") for name in "ab")
        assert first.width == second.width and first.height < second.height  # the lane of the stops

    def test_many_runs(self, run: Path, tmp_path: Path) -> None:
        copies = [shutil.copytree(run, tmp_path / "many" / f"q{i}") for i in range(9)]
        main([*map(str, copies), "-o", str(tmp_path / "many.png")])
        assert np.asarray(Image.open(tmp_path / "many.png")).std() > 1

    def test_one_step_is_a_picture_too(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "r", [trained(1, BEGIN, loss=0.0, psnr=-3.0, step_seconds=None)], [])
        plot_runs([read_history(folder)], tmp_path / "x.png")

    @pytest.mark.parametrize("name", ["_q3", "$\\frac$", "a\nb", "\udcff", "q3 & <q4>"])
    def test_names_are_no_markup(self, name: str, run: Path, tmp_path: Path) -> None:
        """The legend has the run, the name is there as it is written, and it takes one line."""
        plot_runs([read_history(run)], tmp_path / "x.svg", labels=[name], title=name)
        comments = re.findall(r"<!-- (.*?) -->", (tmp_path / "x.svg").read_text())
        shown = for_terminal(name).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert comments.count(shown) == 2

    def test_title_is_in_the_picture(self, run: Path, tmp_path: Path) -> None:
        heights = []
        for title in ("", "Six rates"):
            plot_runs([read_history(run)], tmp_path / "x.png", title=title)
            heights.append(Image.open(tmp_path / "x.png").height)
        assert heights[1] > heights[0]


class TestCommand:
    def test_tables(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        main([str(run), "-o", str(tmp_path / "x.svg"), "--labels", "q3", "--list"])
        out = capsys.readouterr().out
        assert (
            "| q3 | 250 | 2.50 | 0.0278 | 3 | 1 | 1 | 1 | 0 | -, 0.5000, 30.00 | 1.5000, 0.4000, 32.00 at step 250 |"
            in out
        )
        assert "| q3 | 1970-01-12 14:46:40 | 100 | stopped as asked | 100 | 9:30:00 | STOP exists on rank 0 |" in out
        assert "| q3 | 1970-01-13 11:16:40 | 250 | failed | - | - | a \\| b |" in out

    def test_tables_have_equal_rows(self, run: Path) -> None:
        history = read_history(run)
        for text in (summary([history], ["a"]), interruptions([history], ["a"])):
            assert len({line.replace("\\|", "").count("|") for line in text.splitlines()}) == 1

    def test_a_run_that_has_not_begun_does_not_hide_the_others(
        self, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "config.yaml").write_text("run: {}\n")
        with caplog.at_level("WARNING"):
            main([str(tmp_path / "new"), str(run), "-o", str(tmp_path / "x.svg")])
        assert "new has logged no step yet" in caplog.text and "| run | 250 |" in capsys.readouterr().out
        with pytest.raises(LalicError, match="no run has logged a step"):
            main([str(tmp_path / "new"), "-o", str(tmp_path / "y.svg")])
        assert not (tmp_path / "y.svg").exists()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["RUN", "-o", "x.jpg"], r"\.svg"),
            (["RUN", "RUN/nothing", "-o", "x.svg"], "no such run folder"),
            (["RUN", "-o", "x.svg", "--labels", "a", "b"], "1 runs but 2 labels"),
            (["RUN", "-o", "x.svg", "--until", "20"], "no run has logged a step"),
        ],
    )
    def test_errors(self, words: list[str], message: str, run: Path, tmp_path: Path) -> None:
        words = [w.replace("RUN", str(run)).replace("x.", f"{tmp_path}/x.") for w in words]
        with pytest.raises(LalicError, match=message):
            main(words)
        assert not list(tmp_path.glob("x.*"))

    def test_nothing_in_the_folder_changes(self, run: Path, tmp_path: Path) -> None:
        before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.rglob("*")}
        main([str(run), "-o", str(tmp_path / "x.svg")])
        assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.rglob("*")} == before

    def test_labels_tell_runs_apart(self, tmp_path: Path) -> None:
        runs = [read_history(write(tmp_path / a / b, LOG, EVENTS)) for a, b in (("a", "q3"), ("b", "q3"), ("b", "q4"))]
        assert labels_of(runs) == ["a/q3", "b/q3", "b/q4"]
        assert labels_of(runs[1:]) == ["q3", "q4"]
        assert labels_of([runs[0], runs[0]]) == ["q3", "q3"]

    def test_every_quantity_has_a_panel(self, run: Path) -> None:
        assert set(PANELS) == set(read_history(run).train.values)
