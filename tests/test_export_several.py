"""Several runs in one export, and the SHA256SUMS over a folder of bundles: true at every moment."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import tiny_model, weights_of

from lalic import release
from lalic.errors import LalicError
from lalic.export import main
from lalic.ladder import MSE
from lalic.release import write_bundle
from lalic.release_files import verify_bundle
from lalic.release_folder import kept_sums
from lalic.training.checkpoint import save

FILES_OF_A_BUNDLE = 7


def write_run(run: Path, quality: int, seed: int = 0, step: int = 10) -> Path:
    model = tiny_model(seed)
    meta = {"step": step, "model": model.config, "loss": {"metric": "mse", "lambda": MSE[quality]}, "best": None}
    save(run, step, tensors={"model.pt": model.state_dict()}, texts={"config.yaml": "{}"}, meta=meta)
    (run / "DONE").write_text("{}")
    return run


@pytest.fixture(scope="module")
def _runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ladder")
    for quality in (1, 2, 4):
        write_run(folder / f"tiny-q{quality}", quality, seed=quality)
    return folder


@pytest.fixture
def runs(_runs: Path, tmp_path: Path) -> Path:
    """Three runs to do harm to."""
    return Path(shutil.copytree(_runs, tmp_path / "runs"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "release"


def check(folder: Path) -> list[str]:
    """What `sha256sum -c` says: the files that it found as they should be; it must not find others."""
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.removesuffix(": OK") for line in done.stdout.splitlines()]


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.glob("lalic-*/*"))


def test_every_run_of_a_ladder(runs: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--sweep", str(runs / "tiny"), "--output", str(output)]) == 0
    names = [f"lalic-mse-q{quality}" for quality in (1, 2, 4)]
    assert capsys.readouterr().out.split() == [str(output / name) for name in names]
    assert sorted(p.name for p in output.iterdir()) == ["SHA256SUMS", *names]
    assert check(output) == files_of(output)
    assert len(files_of(output)) == 3 * FILES_OF_A_BUNDLE
    for name in names:
        verify_bundle(output / name)


def test_again_leaves_everything_alone(runs: Path, output: Path) -> None:
    arguments = ["--run", *map(str, sorted(runs.iterdir())), "--output", str(output)]
    main(arguments)
    sums = (output / "SHA256SUMS").read_text()
    before = {p: p.stat().st_mtime_ns for p in output.glob("lalic-*/*")}
    assert main(arguments) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before} and (output / "SHA256SUMS").read_text() == sums


def test_one_by_one_is_the_same(runs: Path, output: Path, tmp_path: Path) -> None:
    """The second bundle makes the list; of one alone there is none, and no order changes it."""
    main(["--sweep", str(runs / "tiny"), "--output", str(tmp_path / "together")])
    for i, quality in enumerate((4, 1, 2)):
        main(["--run", str(runs / f"tiny-q{quality}"), "--output", str(output)])
        assert (output / "SHA256SUMS").exists() is (i > 0)
    assert (output / "SHA256SUMS").read_bytes() == (tmp_path / "together" / "SHA256SUMS").read_bytes()


@pytest.mark.parametrize("harm", ["damaged", "empty", "missing", "differs"])
def test_a_failing_run_keeps_none_of_the_others(
    harm: str, runs: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = runs / "tiny-q2"
    if harm == "damaged":
        next(second.rglob("model.pt")).write_bytes(b"damaged")
    elif harm == "empty":
        shutil.rmtree(second / "checkpoints")
    elif harm == "missing":
        shutil.rmtree(second)
    else:
        write_bundle(weights_of(tiny_model(7), loss={"metric": "mse", "lambda": MSE[2]}), output)
    status = main(["--run", *(str(runs / f"tiny-q{q}") for q in (1, 2, 4)), "--output", str(output)])
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(err) == 1 and f"{second} is not exported" in err[0]
    assert ("--force" in err[0]) is (harm == "differs")
    assert check(output) == files_of(output)
    assert (output / "lalic-mse-q2").exists() is (harm == "differs")


def test_two_runs_of_one_rung_are_refused(runs: Path, output: Path) -> None:
    write_run(runs / "other", 2, seed=9)
    with pytest.raises(LalicError, match=r"tiny-q2 and .*other are both lalic-mse-q2"):
        main(["--run", *map(str, (runs / "tiny-q1", runs / "tiny-q2", runs / "other")), "--output", str(output)])
    assert not output.exists()
    with pytest.raises(LalicError, match="are both lalic-mse-q1"):
        main(["--run", str(runs / "tiny-q1"), str(runs / "tiny-q1"), "--output", str(output)])


def test_force_replaces(runs: Path, output: Path) -> None:
    main(["--sweep", str(runs / "tiny"), "--output", str(output)])
    shutil.rmtree(runs / "tiny-q2")
    write_run(runs / "tiny-q2", 2, seed=9)
    assert main(["--sweep", str(runs / "tiny"), "--output", str(output)]) == 1
    assert check(output) == files_of(output)
    old = (output / "SHA256SUMS").read_text()
    assert main(["--sweep", str(runs / "tiny"), "--output", str(output), "--force"]) == 0
    assert check(output) == files_of(output) and (output / "SHA256SUMS").read_text() != old


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_killed_while_a_bundle_is_replaced(moment: str, runs: Path, output: Path) -> None:
    """Whenever it happens, what the list names is there as it says, and the next export completes it."""
    main(["--sweep", str(runs / "tiny"), "--output", str(output)])
    shutil.rmtree(runs / "tiny-q2")
    write_run(runs / "tiny-q2", 2, seed=9)
    arguments = ["--run", str(runs / "tiny-q2"), "--output", str(output), "--force"]
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        moved, rename = release._move_into_place, os.rename

        def killed(*arguments: Any) -> None:
            if moment == "between":
                os.rename = lambda *paths: (rename(*paths), os._exit(9))
            if moment != "before":
                moved(*arguments)
            os._exit(9)

        release._move_into_place = killed
        main(arguments)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert {name.split("/")[0] for name in check(output)} == {"lalic-mse-q1", "lalic-mse-q4"}
    main(arguments)
    assert check(output) == files_of(output) and len(files_of(output)) == 3 * FILES_OF_A_BUNDLE


def test_damage_is_found_and_not_vouched_for(runs: Path, output: Path) -> None:
    """A bundle that was harmed since is not listed with its new sums when another one is exported."""
    main(["--run", str(runs / "tiny-q1"), str(runs / "tiny-q2"), "--output", str(output)])
    (output / "lalic-mse-q1" / "model.safetensors").write_bytes(b"harmed")
    (output / "lalic-mse-q2" / "SHA256SUMS").write_bytes(b"\0")
    main(["--run", str(runs / "tiny-q4"), "--output", str(output)])
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=output, capture_output=True, text=True)
    failed = [line.split(":")[0] for line in done.stdout.splitlines() if line.endswith("FAILED")]
    assert failed == ["lalic-mse-q1/model.safetensors", "lalic-mse-q2/SHA256SUMS"]


def test_a_bundle_that_was_taken_away_leaves_the_list(runs: Path, output: Path) -> None:
    main(["--run", str(runs / "tiny-q1"), str(runs / "tiny-q2"), "--output", str(output)])
    shutil.rmtree(output / "lalic-mse-q1")
    main(["--run", str(runs / "tiny-q4"), "--output", str(output)])
    assert check(output) == files_of(output)


@pytest.mark.parametrize("text", [f"{'0' * 64}  photo.png\n", "words\n", f"{'0' * 64}  photos/a.png\n"])
def test_sums_of_other_things_are_not_lost(text: str, runs: Path, output: Path) -> None:
    output.mkdir()
    (output / "SHA256SUMS").write_text(text)
    with pytest.raises(LalicError, match="take another --output"):
        main(["--run", str(runs / "tiny-q1"), "--output", str(output)])
    assert [p.name for p in output.iterdir()] == ["SHA256SUMS"] and (output / "SHA256SUMS").read_text() == text


def test_several_at_the_same_time(output: Path) -> None:
    """Six exports that run at once, as jobs of an array may: none of them forgets another's bundle."""
    children = []
    for quality in MSE:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            weights = weights_of(tiny_model(), loss={"metric": "mse", "lambda": MSE[quality]})
            with kept_sums(output, f"lalic-mse-q{quality}"):
                write_bundle(weights, output)
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    assert check(output) == files_of(output) and len(files_of(output)) == 6 * FILES_OF_A_BUNDLE


def test_a_folder_without_locks(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for quality in (1, 2):
        with kept_sums(output, f"lalic-mse-q{quality}"):
            write_bundle(weights_of(tiny_model(), loss={"metric": "mse", "lambda": MSE[quality]}), output)
    assert check(output) == files_of(output)


def test_a_ladder_that_is_not_there(tmp_path: Path, runs: Path) -> None:
    with pytest.raises(LalicError, match="--sweep takes runs/NAME"):
        main(["--sweep", str(tmp_path / "runs" / "nothing")])
    with pytest.raises(LalicError, match="for one run"):
        main(["--sweep", str(runs / "tiny"), "--quality", "3"])
