"""How programs end: one line for what a user can mend, a traceback for what nobody foresaw."""

from __future__ import annotations

import pytest
import torch

from lalic.errors import LalicError, run_main


def ending(capsys: pytest.CaptureFixture[str], problem: Exception) -> tuple[int, str]:
    """(status, stderr) of a program that meets `problem`."""

    def main() -> int | None:
        raise problem

    with pytest.raises(SystemExit) as end:
        run_main(main)
    return int(end.value.code or 0), capsys.readouterr().err


def allocation_failure() -> RuntimeError:
    """The real one, of the CPU: more than any machine has."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    return caught.value


def test_problem_of_the_user_is_one_line(capsys) -> None:
    assert ending(capsys, LalicError("no shards here:\nmake some")) == (2, "error: no shards here: make some\n")


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_no_memory_is_one_line(kind: str, capsys) -> None:
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has 1 GiB.")
    status, text = ending(capsys, allocation_failure() if kind == "cpu" else gpu)
    assert status == 2
    assert text.startswith("error: not enough memory: ") and text.count("\n") == 1


def test_other_errors_keep_their_traceback() -> None:
    def main() -> int | None:
        raise RuntimeError("nobody foresaw this")

    with pytest.raises(RuntimeError, match="nobody foresaw"):
        run_main(main)


def test_the_message_is_left_for_a_job_script(tmp_path, monkeypatch, capsys) -> None:
    """Launchers hide the status of their ranks: launch/train.slurm looks into the file."""
    path = tmp_path / "error.txt"
    monkeypatch.setenv("LALIC_ERROR_FILE", str(path))
    ending(capsys, LalicError("no shards here:\nmake some"))
    ending(capsys, LalicError("rank 1 finds none either"))
    assert path.read_text() == "error: no shards here: make some\nerror: rank 1 finds none either\n"


def test_no_message_is_left_where_that_cannot_be(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("LALIC_ERROR_FILE", str(tmp_path / "absent" / "error.txt"))
    assert ending(capsys, LalicError("no shards")) == (2, "error: no shards\n")
