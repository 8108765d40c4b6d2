"""An evaluation that was interrupted goes on where it stood, and measures again whatever may have changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lalic.eval import main
from lalic.evaluation.journal import Journal
from lalic.measure import Session
from lalic.model import LALIC, published_state_dict

TINY = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 1, 1, 1), "groups": (4, 4, 8, 16)}
IMAGES = 4


class Evaluation:
    """One checkpoint over four images; `run` interrupts it before a picture, and counts those that were measured."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        torch.manual_seed(0)
        torch.save(published_state_dict(LALIC(**TINY)), folder / "q1.pth")
        self.images = folder / "images"
        self.images.mkdir()
        rng = np.random.default_rng(0)
        for i in range(IMAGES):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(self.images / f"{i}.png")
        self.result = folder / "result.json"
        self.progress = folder / "result.json.progress"

    def run(self, *flags: str, stop_at: int | None = None, weights: str = "q1.pth") -> int:
        count, measure = 0, Session.measure

        def counted(session: Session, rgb: Any) -> Any:
            nonlocal count
            if count == stop_at:
                raise KeyboardInterrupt
            count += 1
            return measure(session, rgb)

        arguments = ["-p", str(self.folder / weights), "-i", str(self.images), "--result", str(self.result)]
        with self.monkeypatch.context() as patch:
            patch.setattr(Session, "measure", counted)
            if stop_at is None:
                assert main([*arguments, *flags]) == 0
            else:
                with pytest.raises(KeyboardInterrupt):
                    main([*arguments, *flags])
        return count

    @property
    def records(self) -> list[dict[str, Any]]:
        return [
            {key: r[key] for key in ("file", "quality", "bpp", "psnr", "psnr-unrounded")}
            for r in json.loads(self.result.read_text())["records"]
        ]


@pytest.fixture
def evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluation:
    return Evaluation(tmp_path, monkeypatch)


def test_goes_on(evaluation: Evaluation) -> None:
    assert evaluation.run() == IMAGES
    whole = evaluation.records
    assert not evaluation.progress.exists()
    assert evaluation.run(stop_at=3) == 3
    assert evaluation.run() == 1
    assert evaluation.records == whole
    assert not evaluation.progress.exists()
    assert evaluation.run() == IMAGES, "a complete evaluation is done anew"


def test_fresh(evaluation: Evaluation) -> None:
    evaluation.run(stop_at=3)
    assert evaluation.run("--fresh") == IMAGES


def test_half_a_line(evaluation: Evaluation) -> None:
    evaluation.run(stop_at=3)
    (file,) = evaluation.progress.iterdir()
    lines = file.read_text().rstrip("\n")
    file.write_text(lines[:-20])
    assert evaluation.run(stop_at=1) == 1  # the third again; its line must not be glued to the half one
    assert evaluation.run() == 1


@pytest.mark.parametrize("line", ["null", "[]", '{"key": 1}', '{"key": "a", "record": []}', "x", '{"record": {}}'])
def test_lines_that_are_no_records(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.json.progress").mkdir()
    (tmp_path / "r.json.progress" / "process0.jsonl").write_text(line)
    assert Journal(tmp_path / "r.json", 0).entries() == {}


def test_another_mode_is_measured(evaluation: Evaluation) -> None:
    evaluation.run(stop_at=3)
    assert evaluation.run("--real", stop_at=1) == 1
    assert evaluation.run("--half", stop_at=1) == 1
    assert evaluation.run() == 1


def test_another_picture_of_the_same_name_is_measured(evaluation: Evaluation) -> None:
    evaluation.run(stop_at=3)
    Image.new("RGB", (32, 32), "red").save(evaluation.images / "1.png")
    assert evaluation.run() == 2
    assert evaluation.records[1]["psnr"] != evaluation.records[0]["psnr"]


def test_other_weights_of_the_same_name_are_measured(evaluation: Evaluation) -> None:
    evaluation.run(stop_at=3)
    torch.manual_seed(1)
    torch.save(published_state_dict(LALIC(**TINY)), evaluation.folder / "q1.pth")
    assert evaluation.run() == IMAGES


def test_names_do_not_matter(evaluation: Evaluation) -> None:
    evaluation.run(stop_at=3)
    (evaluation.images / "0.png").rename(evaluation.images / "9.png")
    (evaluation.folder / "q1.pth").rename(evaluation.folder / "other.pth")
    assert evaluation.run("-q", "label", weights="other.pth") == 1
    assert [r["file"] for r in evaluation.records] == [str(evaluation.images / f"{i}.png") for i in (1, 2, 3, 9)]
    assert {r["quality"] for r in evaluation.records} == {"label"}


def test_reconstructions_must_be_there(evaluation: Evaluation, tmp_path: Path) -> None:
    recon = tmp_path / "recon"
    evaluation.run(stop_at=2)
    assert evaluation.run("-o", str(recon), stop_at=3) == 3, "they were not written"
    (recon / "q1" / "0.png").unlink()
    Image.new("RGB", (32, 32)).save(recon / "q1" / "1.png")
    assert evaluation.run("-o", str(recon)) == 3
    assert len(list((recon / "q1").iterdir())) == IMAGES


def test_nothing_is_kept_without_a_result(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(evaluation.folder)
    before = sorted(evaluation.folder.iterdir())
    assert main(["-p", "q1.pth", "-i", "images"]) == 0
    assert sorted(evaluation.folder.iterdir()) == before
