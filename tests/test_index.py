"""A large index: parsed once, then mapped by every process."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from lalic.data.index import ShardIndex


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LALIC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_index(folder: Path, shards: int = 7, samples: int = 5) -> Path:
    folder.mkdir()
    entries = []
    for shard in range(shards):
        rows = [
            {"key": f"train/é{shard}-{i}", "ext": "jpg", "offset": 512 + 1024 * i, "size": 300 + i}
            | {"width": 300 + shard, "height": 200 + i}
            for i in range(samples)
        ]
        entries.append({"name": f"s-{shard:06d}.tar", "bytes": 1 << 20, "sha256": f"{shard:064x}", "samples": rows})
    (folder / "index.json").write_text(json.dumps({"version": 1, "shards": entries}), encoding="utf-8")
    return folder


def same(a: ShardIndex, b: ShardIndex) -> bool:
    names = [field.name for field in fields(ShardIndex) if field.name != "map_file"]
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names) and all(
        a.key(i) == b.key(i) for i in range(len(a))
    )


def test_mapped_equals_parsed(tmp_path, cache):
    folder = write_index(tmp_path / "shards")
    parsed = ShardIndex.load(folder)
    assert parsed.map_file is None and not cache.exists()
    for _ in range(2):
        mapped = ShardIndex.load(folder, mapped_from=0)
        assert mapped.map_file and same(mapped, parsed)
    assert mapped.first.tolist() == list(range(0, 40, 5))
    assert mapped.counts(np.array([0, 1, 7, 34])).tolist() == [2, 1, 0, 0, 0, 0, 1]


def test_another_index_is_another_map(tmp_path, cache):
    folder = write_index(tmp_path / "shards")
    first = ShardIndex.load(folder, mapped_from=0)
    path = folder / "index.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"size": 301', '"size": 302'), encoding="utf-8")
    second = ShardIndex.load(folder, mapped_from=0)
    assert second.map_file != first.map_file and second.size[1] == 302
    assert second.fingerprint != first.fingerprint


@pytest.mark.parametrize("harm", ["cut", "json", "list", "gone"])
def test_a_damaged_map_is_made_again(tmp_path, cache, harm):
    folder = write_index(tmp_path / "shards")
    parsed = ShardIndex.load(folder)
    map_file = ShardIndex.load(folder, mapped_from=0).map_file
    if harm == "cut":
        (map_file / "offset.npy").write_bytes((map_file / "offset.npy").read_bytes()[:-9])
    elif harm == "json":
        (map_file / "about.json").write_text("{")
    elif harm == "list":
        (map_file / "about.json").write_text("[]")
    else:
        (map_file / "size.npy").unlink()
    assert same(ShardIndex.load(folder, mapped_from=0), parsed)


def test_nowhere_to_keep_it(tmp_path, monkeypatch, caplog):
    folder = write_index(tmp_path / "shards")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LALIC_CACHE_DIR", str(tmp_path / "file"))
    index = ShardIndex.load(folder, mapped_from=0)
    assert index.map_file is None and same(index, ShardIndex.load(folder))
    assert "stays in memory" in caplog.text


def _load(folder: Path) -> str:
    return ShardIndex.load(folder, mapped_from=0).fingerprint


def test_many_processes_at_once(tmp_path, cache):
    folder = write_index(tmp_path / "shards", 50, 200)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert set(pool.map(_load, [folder] * 8, chunksize=1)) == {ShardIndex.load(folder).fingerprint}
    assert sorted(path.suffix for path in (cache / "index").iterdir()) == ["", ".lock"]


def test_pickled_by_name(tmp_path, cache):
    folder = write_index(tmp_path / "shards", 50, 200)
    mapped = ShardIndex.load(folder, mapped_from=0)
    data = pickle.dumps(mapped)
    assert len(data) < 1000 and same(pickle.loads(data), mapped)
    parsed = ShardIndex.load(folder)
    assert same(pickle.loads(pickle.dumps(parsed)), parsed)


def test_a_mapped_index_costs_a_process_next_to_nothing(tmp_path, cache):
    """200,000 samples: the arrays have 13 MB. In its own process, whose peak is its own."""
    folder = write_index(tmp_path / "shards", 200, 1000)
    ShardIndex.load(folder, mapped_from=0)
    program = f"""
from lalic.data.index import ShardIndex
from lalic.memory import peak_resident_bytes
before = peak_resident_bytes()
index = ShardIndex.load({str(folder)!r}, mapped_from=0)
assert index.key(123_456) and index.size[99_999]
print((peak_resident_bytes() - before) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 4
