"""Checkpoints behind the back of the loop: snapshots, the writing thread, what stays, what happens when it fails."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lalic.errors import LalicError
from lalic.training import checkpoint, summed, writer
from lalic.training.snapshot import HostCopy
from lalic.training.writer import CheckpointWriter


def keep_all(run: Path, written: int) -> None:
    pass


def start(writing: CheckpointWriter, step: int, value: float = 0.0, must: bool = False) -> None:
    tensors = {"model.pt": {"w": torch.full((1000,), value)}}
    writing.start(
        step, tensors=tensors, texts={"config.yaml": "x: 1\n"}, meta={"step": step}, prune=keep_all, must=must
    )


def save(run: Path, step: int) -> Path:
    return checkpoint.save(run, step, tensors={"model.pt": {"w": torch.ones(9)}}, texts={}, meta={"step": step})


class Gate:
    """Holds the writing thread in the sync of its first file until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.reached, self.opened = threading.Event(), threading.Event()
        sync = checkpoint._sync

        def held(descriptor: int) -> None:
            self.reached.set()
            assert self.opened.wait(60)
            sync(descriptor)

        monkeypatch.setattr(checkpoint, "_sync", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


class TestSnapshot:
    def test_nothing_is_shared_with_live_tensors(self) -> None:
        """Every tensor of a model and of its Adam is overwritten afterwards, in place; the copy does not move."""
        model = nn.Sequential(nn.Linear(5, 3), nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        rng = {"torch": torch.get_rng_state(), "numpy": ("MT", torch.arange(5), 3, 0.5)}
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng}
        expected = nested_bytes(state)
        copy = HostCopy().take(state)
        assert nested_bytes(copy) == expected
        for tensor in tensors_in(state):
            tensor.copy_(torch.zeros_like(tensor) + 7)
        assert nested_bytes(state) != expected
        assert nested_bytes(copy) == expected

    def test_views_come_without_what_they_are_views_of(self, tmp_path: Path) -> None:
        whole = torch.arange(1_000_000.0)
        copy = HostCopy().take({"view": whole[10:20], "slanted": whole.view(1000, 1000).t()[3:5, 2:4]})
        assert copy["view"].tolist() == list(range(10, 20))
        assert copy["slanted"].tolist() == [[2003, 3003], [2004, 3004]]
        torch.save(copy, tmp_path / "x.pt")
        assert (tmp_path / "x.pt").stat().st_size < 5000

    def test_one_tensor_under_two_names_stays_one(self, tmp_path: Path) -> None:
        shared = torch.rand(100_000)
        copies = HostCopy()
        copy = copies.take({"a": shared, "b": {"c": shared}, "head": shared[:10]})
        assert copy["a"] is copy["b"]["c"] and copy["head"] is not copy["a"]
        torch.save(copy, tmp_path / "x.pt")
        assert (tmp_path / "x.pt").stat().st_size < 410_000
        assert copies.nbytes == 400_040

    def test_memory_serves_again(self) -> None:
        copies = HostCopy()
        first = copies.take({"a": torch.ones(3), "gone": torch.ones(2)})
        second = copies.take({"a": torch.zeros(3), "new": torch.ones(4, dtype=torch.int64)})
        assert first["a"] is second["a"] and second["a"].tolist() == [0, 0, 0]
        assert copies.nbytes == 12 + 32
        third = copies.take({"a": torch.ones(5), "new": torch.ones(4)})
        assert third["a"].shape == (5,) and third["new"].dtype == torch.float32

    @pytest.mark.gpu
    def test_cuda_state_comes_in_page_locked_memory(self) -> None:
        """Weights that are overwritten on the device right after the copy was taken; twice, into the same memory."""
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        copies = HostCopy()
        tensors = {str(i): torch.full((1 << 20,), float(i), device="cuda") for i in range(50)}
        for round_ in range(2):
            copy = copies.take({**tensors, "on the CPU": torch.ones(3)})
            for tensor in tensors.values():
                tensor.add_(100)
            assert all(copy[name].is_pinned() for name in tensors) and not copy["on the CPU"].is_pinned()
            for name in tensors:
                assert copy[name].unique().tolist() == [float(name) + 100 * round_]
        first = copies.take(tensors)
        assert all(copies.take(tensors)[name] is first[name] for name in tensors)

    def test_plain_values_and_empty_tensors(self) -> None:
        state = {"list": [1, "two", (3.0, None)], 4: torch.empty(0), "scalar": torch.tensor(2.5), "flag": True}
        copy = HostCopy().take(state)
        assert copy["list"] == [1, "two", (3.0, None)] and copy["flag"] is True
        assert copy[4].shape == (0,) and copy["scalar"].item() == 2.5  # type: ignore[index]


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def nested_bytes(value: Any) -> Any:
    """The nest with every tensor as its bytes."""
    if isinstance(value, Tensor):
        return value.detach().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: nested_bytes(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nested_bytes(item) for item in value]
    return value


class TestWriter:
    def test_the_step_goes_on_while_the_file_is_written(self, tmp_path: Path, gate: Gate) -> None:
        """`start` returns with nothing on the disk, and what happens to the weights afterwards is not saved."""
        writing, weights = CheckpointWriter(tmp_path), torch.ones(1000)
        writing.start(3, tensors={"model.pt": {"w": weights}}, texts={}, meta={"step": 3}, prune=keep_all, began=None)
        assert gate.reached.wait(60)
        assert checkpoint.steps_on_disk(tmp_path) == []
        assert writing.last is not None and (writing.last.step, writing.last.seconds) == (3, None)
        weights.fill_(5.0)
        gate.opened.set()
        written = writing.wait()
        assert written is not None and written.good and written.bytes > 4000 and written.seconds is not None
        path = checkpoint.find_checkpoint(tmp_path)
        assert checkpoint.load_tensors(path, "model.pt")["w"].unique().tolist() == [1.0]

    def test_a_second_save_waits_for_the_first(
        self, tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        writing = CheckpointWriter(tmp_path)
        start(writing, 1, 1.0)
        assert gate.reached.wait(60)
        # Opened only when the second one has said that it waits.
        opener = threading.Thread(target=lambda: (said(caplog, "step 2 waits until that of step 1"), gate.opened.set()))
        opener.start()
        start(writing, 2, 2.0)
        opener.join()
        writing.wait()
        for step in (1, 2):
            tensors = checkpoint.load_tensors(checkpoint.folder_of(tmp_path, step), "model.pt")
            assert tensors["w"].unique().tolist() == [float(step)]
            assert checkpoint.problem(checkpoint.folder_of(tmp_path, step)) is None
        lines = [m for m in caplog.messages if m.startswith("checkpoint ")]
        assert len(lines) == 2 and "the step stood still for" in lines[0] and lines[0].endswith("MB")

    def test_a_failure_is_told_once_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        writing = CheckpointWriter(tmp_path)
        start(writing, 1)
        writing.wait()
        monkeypatch.setattr(checkpoint, "_sync", failing(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))))
        start(writing, 2)
        assert writing.failed(2) and not writing.failed(1)
        (line,) = caplog.messages
        assert f"step 2 could not be written to {tmp_path}: Disk quota exceeded; the run goes on" in line
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
        start(writing, 3, must=True)
        with pytest.raises(LalicError, match=r"step 3 could not .*Disk quota exceeded; older checkpoints are intact"):
            writing.must_be_written(3)
        assert len(caplog.messages) == 1
        monkeypatch.undo()
        start(writing, 4, must=True)
        writing.must_be_written(4)
        assert checkpoint.steps_on_disk(tmp_path) == [4, 1]

    def test_what_nobody_has_foreseen_does_not_end_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(checkpoint, "_sync", failing(ZeroDivisionError("a bug")))
        writing = CheckpointWriter(tmp_path)
        start(writing, 1)
        assert writing.failed(1)
        assert "step 1 could not be written" in caplog.text and "ZeroDivisionError: a bug" in caplog.text

    def test_no_memory_for_a_copy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        message = "[enforce fail at alloc_cpu.cpp:113] DefaultCPUAllocator: can't allocate memory"
        monkeypatch.setattr(HostCopy, "take", failing(RuntimeError(message)))
        writing = CheckpointWriter(tmp_path)
        start(writing, 1)
        assert "no host memory for a copy of the state; the run goes on" in caplog.text
        with pytest.raises(LalicError, match="no host memory"):
            writing.must_be_written(1)

    def test_old_ones_that_cannot_be_deleted_are_no_failure(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        writing = CheckpointWriter(tmp_path)
        prune = failing(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        writing.start(1, tensors={"model.pt": {}}, texts={}, meta={"step": 1}, prune=prune)
        writing.must_be_written(1)
        assert "old checkpoints could not be deleted: Permission denied" in caplog.text

    def test_close_waits_for_the_write(self, tmp_path: Path, gate: Gate) -> None:
        writing = CheckpointWriter(tmp_path)
        start(writing, 1)
        assert gate.reached.wait(60)
        threading.Timer(0.2, gate.opened.set).start()
        writing.close()
        assert checkpoint.steps_on_disk(tmp_path) == [1]

    @pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
    def test_close_after_an_error_does_not_wait_for_ever(
        self, kind: type[BaseException], tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that hangs: the error is not held up; when the disk comes back, the write is given up."""
        monkeypatch.setattr(writer, "PATIENCE", 0.01)
        monkeypatch.setattr(writer, "_LAST_MOMENT", 0.01)
        writing = CheckpointWriter(tmp_path)
        start(writing, 1)
        assert gate.reached.wait(60)
        thread = writing._thread
        writing.close(kind)
        gate.opened.set()
        assert thread is not None
        thread.join(60)
        assert writing.last is not None and not writing.last.good
        assert list((tmp_path / "checkpoints").iterdir()) == []

    def test_the_thread_does_not_keep_a_process_alive(self, tmp_path: Path) -> None:
        """The process ends with its error while the disk hangs, in the middle of torch's writer."""
        program = f"""
import threading, torch
from pathlib import Path
from lalic.training import summed, writer
reached = threading.Event()
class Hanging(summed.SummedFile):
    def write(self, data):
        reached.set()
        threading.Event().wait()
writer.checkpoint.SummedFile = Hanging
writing = writer.CheckpointWriter(Path({str(tmp_path)!r}))
writing.start(1, tensors={{"model.pt": torch.ones(9)}}, texts={{}}, meta={{"step": 1}}, prune=print)
assert reached.wait(60)
raise SystemExit(3)
"""
        done = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True, text=True)
        assert done.returncode == 3, done.stderr


def said(caplog: pytest.LogCaptureFixture, words: str) -> None:
    """Wait until the log has these words."""
    while words not in caplog.text:
        threading.Event().wait(0.01)


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: Any, **more: Any) -> Any:
        raise error

    return fail


class TestWhatIsOnTheDisk:
    def test_sums_are_those_of_what_was_written(self, tmp_path: Path) -> None:
        import hashlib
        import json

        path = save(tmp_path, 1)
        files = json.loads((path / "MANIFEST.json").read_text())["files"]
        assert set(files) == {"model.pt", "meta.json"}
        for name, entry in files.items():
            data = (path / name).read_bytes()
            assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def test_a_bit_that_flips_on_its_way_to_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is found before the checkpoint has its name, so nothing older is deleted for it."""
        save(tmp_path, 1)
        sync = checkpoint._sync

        def flip(descriptor: int) -> None:
            sync(descriptor)
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if path.endswith("model.pt"):
                with open(path, "r+b") as file:
                    file.seek(300)
                    byte = file.read(1)[0]
                    file.seek(300)
                    file.write(bytes([byte ^ 4]))

        monkeypatch.setattr(checkpoint, "_sync", flip)
        writing = CheckpointWriter(tmp_path)
        writing.start(2, tensors={"model.pt": {"w": torch.ones(9)}}, texts={}, meta={"step": 2}, prune=keep_newest)
        with pytest.raises(LalicError, match=r"step 2 could not be written .*does not read back"):
            writing.must_be_written(2)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]

    def test_errors_of_a_full_disk_come_as_they_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        with pytest.raises(OSError) as caught, summed.SummedFile(Path("/dev/full")) as file:
            summed.save_tensors({"w": torch.ones(10_000_000)}, file)
        assert caught.value.errno == errno.ENOSPC

    def test_a_checkpoint_that_was_being_replaced_comes_back(self, tmp_path: Path) -> None:
        """Killed between the two renames: the old one of that step is not a leftover."""
        path = save(tmp_path, 4)
        path.rename(path.with_name(".replaced-step-00000004"))
        path.with_name(".replaced-step-00000003").mkdir()
        save(tmp_path, 3)
        checkpoint.remove_leftovers(tmp_path)
        assert sorted(p.name for p in path.parent.iterdir()) == ["step-00000003", "step-00000004"]
        assert checkpoint.problem(path) is None

    def test_weights_are_averaged_ones_where_there_are_any(self, tmp_path: Path) -> None:
        from test_train import TINY

        from lalic.model import LALIC

        torch.manual_seed(0)
        raw, averaged = LALIC(**TINY), LALIC(**TINY)
        meta = {"step": 1, "model": raw.config}
        path = checkpoint.save(tmp_path, 1, tensors={"model.pt": raw.state_dict()}, texts={}, meta=meta)
        assert equal(checkpoint.load_model(path), raw)
        with pytest.raises(LalicError, match="no averaged weights"):
            checkpoint.load_model(path, "ema")
        tensors = {"model.pt": raw.state_dict(), "ema.pt": averaged.state_dict()}
        path = checkpoint.save(tmp_path, 2, tensors=tensors, texts={}, meta=meta)
        assert equal(checkpoint.load_model(path), averaged)
        assert equal(checkpoint.load_model(path, "ema"), averaged)
        assert equal(checkpoint.load_model(path, "raw"), raw)


def keep_newest(run: Path, written: int) -> None:
    checkpoint.prune(run, written, keep=1)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class TestRetention:
    def test_the_best_that_is_there(self, tmp_path: Path) -> None:
        losses = {1: 5.0, 2: 3.0, 3: float("nan"), 4: 1.0, 5: 3.0}
        for step, loss in losses.items():
            meta = {"step": step, "metrics": {"step": step, "loss": loss}}
            checkpoint.save(tmp_path, step, tensors={}, texts={}, meta=meta)
        carried = {"step": 6, "metrics": {"step": 4, "loss": 1.0}}  # not measured on its own weights
        checkpoint.save(tmp_path, 6, tensors={}, texts={}, meta=carried)
        save(tmp_path, 7)
        assert checkpoint.best_on_disk(tmp_path) == 4
        (checkpoint.folder_of(tmp_path, 4) / "MANIFEST.json").unlink()
        assert checkpoint.best_on_disk(tmp_path) == 2
        assert checkpoint.best_on_disk(tmp_path / "nothing") is None

    @pytest.mark.parametrize(
        ("rule", "stay"),
        [
            ({"keep": 2}, {9, 10}),
            ({"keep": 20}, set(range(1, 11))),
            ({"keep": 1, "keep_every": 4}, {4, 8, 10}),
            ({"keep": 1, "protected": [3, 99]}, {3, 10}),
            ({"keep": 2, "keep_every": 5, "protected": [1]}, {1, 5, 9, 10}),
        ],
    )
    def test_what_stays(self, rule: dict[str, Any], stay: set[int], tmp_path: Path) -> None:
        for step in range(1, 11):
            save(tmp_path, step)
        checkpoint.prune(tmp_path, 10, **rule)
        assert set(checkpoint.steps_on_disk(tmp_path)) == stay
        assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {f"step-{s:08d}" for s in stay}

    def test_the_one_just_written_stays_beside_damaged_newer_ones(self, tmp_path: Path) -> None:
        """After a resume from 4, because 6 has a flipped bit: its size is right, and yet it does not count."""
        for step in (2, 4, 6):
            save(tmp_path, step)
        damaged = checkpoint.folder_of(tmp_path, 6) / "model.pt"
        content = bytearray(damaged.read_bytes())
        content[400] ^= 1
        damaged.write_bytes(content)
        save(tmp_path, 5)
        checkpoint.prune(tmp_path, 5, keep=1)
        assert checkpoint.steps_on_disk(tmp_path) == [6, 5]
        assert checkpoint.find_checkpoint(tmp_path) == checkpoint.folder_of(tmp_path, 5)

    def test_damaged_ones_are_none_of_the_kept(self, tmp_path: Path) -> None:
        for step in range(1, 7):
            save(tmp_path, step)
        for step in (2, 4, 5):
            (checkpoint.folder_of(tmp_path, step) / "model.pt").unlink()
        checkpoint.prune(tmp_path, 6, keep=2, keep_every=2)
        # 6 and 3 are the two newest; 2 is damaged, so it need not stay for ever; 4 and 5 may tell what happened.
        assert checkpoint.steps_on_disk(tmp_path) == [6, 5, 4, 3]

    def test_too_few_complete_ones(self, tmp_path: Path) -> None:
        for step in range(1, 5):
            save(tmp_path, step)
        for step in (3, 4):
            (checkpoint.folder_of(tmp_path, step) / "MANIFEST.json").unlink()
        checkpoint.prune(tmp_path, 4, keep=3)
        assert checkpoint.steps_on_disk(tmp_path) == [4, 3, 2, 1]

    def test_the_newest_complete_one_survives_any_rule(self, tmp_path: Path) -> None:
        """Random folders, some of them damaged, and random rules."""
        generator = np.random.default_rng(0)
        for trial in range(40):
            run = tmp_path / str(trial)
            steps = sorted(int(s) for s in generator.choice(30, 6, replace=False))
            for step in steps:
                path = save(run, step)
                if generator.random() < 0.4:
                    (path / "model.pt").unlink()
            complete = [s for s in steps if checkpoint.problem(checkpoint.folder_of(run, s)) is None]
            keep, keep_every = int(generator.integers(1, 4)), int(generator.integers(1, 9))
            checkpoint.prune(run, steps[-1], keep=keep, keep_every=keep_every)
            left = set(checkpoint.steps_on_disk(run))
            assert set(complete[-keep:]) <= left
            assert {s for s in complete if s % keep_every == 0} <= left
