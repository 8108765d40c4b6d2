"""benchmarks/decode_matrix.py on the demo model and a tiny picture: files, outcomes and the tables made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import decode_matrix, decode_worker, tables

NAMES = ["photo.float32.lalic", "photo.float64.lalic"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def folder(photo: Path, tmp_path: Path) -> Path:
    """One model with its files, encoded in this process."""
    (folder,) = decode_matrix.make_models(["demo"], photo, tmp_path / "models")
    (folder / "files.json").write_text(json.dumps(decode_worker.encode(folder, [str(photo)], "cpu")))
    return folder


def test_outcomes(folder: Path) -> None:
    made = json.loads((folder / "files.json").read_text())
    assert sorted(made) == NAMES
    assert all(f["bytes"] == (folder / name).stat().st_size > f["strings"] > 0 for name, f in made.items())
    found = decode_worker.decode(folder, "cpu")
    assert found == {name: {"outcome": "equal", "largest_difference": 0.0} for name in NAMES}
    made[NAMES[1]]["sha256"] = "0" * 64
    (folder / "files.json").write_text(json.dumps(made))
    assert decode_worker.decode(folder, "cpu")[NAMES[1]]["outcome"] == "other latents"


def test_several_rates(photo: Path, tmp_path: Path) -> None:
    """Files of version 3, of which each of three qualities has other latents."""
    (folder,) = decode_matrix.make_models(["demo+rates"], photo, tmp_path / "models")
    made = decode_worker.encode(folder, [str(photo)], "cpu")
    (folder / "files.json").write_text(json.dumps(made))
    assert sorted(made) == [f"photo.q{q}.{a}.lalic" for q in ("1", "4.3", "6") for a in ("float32", "float64")]
    assert all((folder / name).read_bytes()[4] == 3 for name in made)
    assert len({f["sha256"] for name, f in made.items() if "float64" in name}) == 3
    assert {f["outcome"] for f in decode_worker.decode(folder, "cpu").values()} == {"equal"}
    assert decode_matrix.rates(folder)["images"] == 3
    assert decode_worker.cost(folder, str(photo), "cpu", "float64", 1)["decode_ms_median"] > 0


def test_a_refused_file(folder: Path) -> None:
    """Another model's weights stand for another machine."""
    other = decode_matrix.make_models(["stress"], folder.parent.parent / "photo.png", folder.parent)[0]
    for name in NAMES:
        (other / name).write_bytes((folder / name).read_bytes())
    (other / "files.json").write_bytes((folder / "files.json").read_bytes())
    found = decode_worker.decode(other, "cpu")
    assert {f["outcome"] for f in found.values()} == {"refused"}


def test_matrix_and_tables(
    folder: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One fresh process with one thread; the whole grid is the benchmark's own."""
    assert len(decode_matrix.configurations("cpu")) == 18
    assert len(decode_matrix.configurations("cpu", few=True)) == 7
    one = {**decode_matrix.BASE, "threads": 1, "backend": "torch"}
    monkeypatch.setattr(decode_matrix, "configurations", lambda *_: [one])
    output = tmp_path / "matrix.json"
    assert decode_matrix.main(["--read", str(folder.parent), "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    (row,) = result["matrix"]
    assert row["models"]["demo"]["float64"] == {"equal": 1}
    assert 0 <= row["models"]["demo"]["largest_difference"]["float64"] < result["tolerance"] / 100
    assert result["rates"]["demo"]["more_percent"] < 0.5
    text = tables.decode_matrix(result)
    assert "| as it is | 1 | on | torch | highest | 1 | 0 | 0 |" in text
    costs = {a: decode_worker.cost(folder, str(photo), "cpu", a, 1) for a in decode_worker.ARITHMETICS}
    made = tables.decode_costs({**result, "images": ["photo.png"], "costs": {"demo": costs}})
    assert "| demo | float64 / float32 |" in made
