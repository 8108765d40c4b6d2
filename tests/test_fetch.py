"""Weights by name and by URL: the right bytes or one line, whatever the server does, and nothing asked for twice."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bucket_server import KINDS, Bucket, Fault, serve
from test_export import tiny_model, weights_of

from lalic import fetch, fetch_cache, fetch_stream
from lalic.errors import LalicError
from lalic.files import cache_folder, sha256_of
from lalic.model import fingerprint
from lalic.release import open_weights, write_bundle
from lalic.remote import Patience

NAME = "lalic-mse-q3"
HASTE = Patience(attempts=3, first_delay=0.01, most_delay=0.02, silence=10.0)


@pytest.fixture(scope="module")
def _files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_bundle(weights_of(tiny_model()), tmp_path_factory.mktemp("hub"))
    return {f"release/{NAME}/{f.name}": f.read_bytes() for f in folder.iterdir()}


@pytest.fixture
def bucket(_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    monkeypatch.setattr(fetch_stream, "PATIENCE", HASTE)
    monkeypatch.setattr(fetch_cache, "PATIENCE", HASTE)
    monkeypatch.setattr(fetch_cache, "_BRIEF", HASTE)
    monkeypatch.setenv("LALIC_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("LALIC_WEIGHTS", "LALIC_HUB_URL", "LALIC_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with serve(Bucket(dict(_files))) as bucket:
        yield bucket


@pytest.fixture
def url(bucket: Bucket) -> str:
    return f"{bucket.url}/release/{NAME}"


@pytest.fixture
def down(bucket: Bucket) -> str:
    """A URL of the bundle at a port where nobody listens."""
    with serve(Bucket()) as other:
        pass
    return f"{other.url}/release/{NAME}"


def asked(bucket: Bucket) -> list[tuple[str, str]]:
    """(method, file) of all requests since the last call."""
    with bucket.lock:
        found = [(method, path.rpartition("/")[2]) for method, path, _ in bucket.requests]
        bucket.requests.clear()
    return found


def in_cache() -> list[str]:
    root = cache_folder() / "weights"
    return sorted(str(f.relative_to(root)) for f in root.rglob("*") if f.is_file() and ".asked" not in f.parts)


class TestBundle:
    def test_what_loading_needs_and_no_more(self, bucket: Bucket, url: str) -> None:
        weights = open_weights(url)
        assert weights.fingerprint == fingerprint(tiny_model()) and weights.name == NAME and weights.step == 1000
        assert asked(bucket) == [("GET", f) for f in ("SHA256SUMS", "config.json", "model.safetensors")]
        assert [f.rpartition("/")[2] for f in in_cache()] == ["SHA256SUMS", "config.json", "model.safetensors"]
        open_weights(url)
        assert asked(bucket) == [("GET", "SHA256SUMS")]

    def test_whole(self, bucket: Bucket, url: str) -> None:
        folder = fetch.resolve(url, whole=True)
        assert {f.name: f.read_bytes() for f in folder.iterdir()} == {
            path.rpartition("/")[2]: data for path, data in bucket.files.items()
        }

    def test_a_sum_in_the_address(self, bucket: Bucket, url: str) -> None:
        pinned = f"{url}#sha256={sha256_of(fetch.resolve(url) / 'SHA256SUMS')}"
        asked(bucket)
        assert open_weights(pinned).name == NAME
        assert asked(bucket) == []
        with pytest.raises(LalicError, match=r"SHA256SUMS has SHA-256 .*, not 0000"):
            open_weights(f"{url}#sha256={'0' * 64}")
        with pytest.raises(LalicError, match="64 hexadecimal digits"):
            open_weights(f"{url}#md5=1")

    def test_without_the_server(
        self, bucket: Bucket, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(LalicError, match="attempts"):
            bucket.faults = [Fault("500", "SHA256SUMS", times=3)]
            open_weights(url)
        open_weights(url)
        bucket.faults = [Fault("drop", times=99)]
        with caplog.at_level(logging.WARNING):
            assert open_weights(url).name == NAME
        assert "taking what was fetched before" in caplog.text
        asked(bucket)
        monkeypatch.setenv("LALIC_OFFLINE", "1")
        assert open_weights(url).name == NAME
        with pytest.raises(LalicError, match="is not in the cache, and LALIC_OFFLINE is set"):
            open_weights(url + "x")
        assert asked(bucket) == []

    def test_a_new_release_stands_beside_the_old_one(self, bucket: Bucket, url: str, tmp_path: Path) -> None:
        old = open_weights(url)
        new = write_bundle(weights_of(tiny_model(1)), tmp_path / "new")
        bucket.files |= {f"release/{NAME}/{f.name}": f.read_bytes() for f in new.iterdir()}
        assert open_weights(url).fingerprint == fingerprint(tiny_model(1))
        assert open_weights(old.source).fingerprint == old.fingerprint

    def test_what_was_damaged_in_the_cache_is_fetched_again(self, bucket: Bucket, url: str) -> None:
        file = fetch.resolve(url) / "model.safetensors"
        file.write_bytes(b"harmed")
        assert open_weights(url).name == NAME
        assert asked(bucket)[-1] == ("GET", "model.safetensors")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("file", ["SHA256SUMS", "model.safetensors"])
    def test_a_server_that_stumbles(self, bucket: Bucket, url: str, kind: str, file: str) -> None:
        if (kind, file) == ("short", "SHA256SUMS"):
            pytest.skip("half a list that ends within a line is refused: test_half_a_list")
        bucket.faults = [Fault(kind, file)]
        assert open_weights(url).fingerprint == fingerprint(tiny_model())
        assert not bucket.faults[0].times

    def test_half_a_list(self, bucket: Bucket, url: str) -> None:
        bucket.faults = [Fault("short", "SHA256SUMS")]
        with pytest.raises(LalicError, match=r"SHA256SUMS (is damaged|does not list)"):
            open_weights(url)
        assert open_weights(url).name == NAME

    def test_goes_on_where_a_former_call_broke(self, bucket: Bucket, url: str) -> None:
        file = f"release/{NAME}/model.safetensors"
        bucket.faults = [Fault("cut", file, times=1), Fault("500", file, times=2)]
        with pytest.raises(LalicError, match="3 attempts"):
            open_weights(url)
        assert not [f for f in in_cache() if f.endswith("/model.safetensors")]
        open_weights(url)
        size = len(bucket.files[file])
        assert bucket.sent[file] == size, "half of it came twice"
        assert [r for _, path, r in bucket.requests if path == file][-1] == f"bytes={size // 2}-"

    def test_a_server_without_ranges(self, bucket: Bucket, url: str) -> None:
        bucket.ranges = False
        bucket.faults = [Fault("cut", "model.safetensors")]
        assert open_weights(url).fingerprint == fingerprint(tiny_model())

    def test_other_bytes_than_the_list_says(self, bucket: Bucket, url: str) -> None:
        data = bytearray(bucket.files[f"release/{NAME}/model.safetensors"])
        data[-1] ^= 1
        bucket.files[f"release/{NAME}/model.safetensors"] = bytes(data)
        with pytest.raises(LalicError, match=r"model\.safetensors: has not the SHA-256 that is expected"):
            open_weights(url)
        assert not [f for f in in_cache() if "model.safetensors" in f]

    @pytest.mark.parametrize("lines", ["", f"{'0' * 64}  a\n", f"{'0' * 64}  ../../.bashrc\n", "\xff"])
    def test_a_list_that_is_none(self, bucket: Bucket, url: str, lines: str) -> None:
        bucket.files[f"release/{NAME}/SHA256SUMS"] = lines.encode("latin-1")
        with pytest.raises(LalicError, match="SHA256SUMS"):
            open_weights(url)
        assert in_cache() == []

    def test_two_processes_fetch_once(self, bucket: Bucket, url: str) -> None:
        bucket.delay = 0.1
        program = f"from lalic.fetch import resolve; print(resolve({url!r}))"
        both = [
            subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ)
            for _ in range(2)
        ]
        found = [process.communicate()[0] for process in both]
        assert found[0] == found[1] and [process.returncode for process in both] == [0, 0]
        assert bucket.count("model.safetensors") == 1 and bucket.count("config.json") == 1

    def test_a_waiting_process_takes_what_the_other_fetched(self, bucket: Bucket, url: str) -> None:
        """The second one certainly comes while the first one holds the lock: its first file does not end before."""
        go, come = threading.Event(), fetch_cache.download

        def slow(*arguments: Any, **more: Any) -> Any:
            go.wait()
            return come(*arguments, **more)

        fetch_cache.download, folders = slow, []
        try:
            threads = [threading.Thread(target=lambda: folders.append(fetch.resolve(url))) for _ in range(2)]
            for thread in threads:
                thread.start()
            while bucket.count("SHA256SUMS") < 2:
                threads[0].join(0.01)
            go.set()
            for thread in threads:
                thread.join()
        finally:
            fetch_cache.download = come
        assert len(set(folders)) == 1 and len(folders) == 2 and bucket.count("model.safetensors") == 1


class TestFile:
    @pytest.mark.parametrize("file", [f"{NAME}.pth", "model.safetensors"])
    def test_is_asked_for_once(self, bucket: Bucket, url: str, file: str) -> None:
        weights = open_weights(f"{url}/{file}")
        assert weights.fingerprint == fingerprint(tiny_model())
        assert weights.name == file.rpartition(".")[0]
        assert asked(bucket) == [("GET", file)]
        open_weights(f"{url}/{file}")
        assert asked(bucket) == [("HEAD", file)]
        open_weights(f"{url}/{file}#sha256={sha256_of(weights.source)}")
        assert asked(bucket) == []

    def test_name_tells_the_loss(self, url: str) -> None:
        assert open_weights(f"{url}/{NAME}.pth?download=true").loss == {"metric": "mse", "lambda": 0.0067}

    def test_another_file_under_the_old_name(self, bucket: Bucket, url: str, tmp_path: Path) -> None:
        open_weights(f"{url}/{NAME}.pth")
        new = write_bundle(weights_of(tiny_model(1)), tmp_path / "new")
        bucket.files[f"release/{NAME}/{NAME}.pth"] = (new / f"{NAME}.pth").read_bytes()
        assert open_weights(f"{url}/{NAME}.pth").fingerprint == fingerprint(tiny_model(1))

    def test_without_the_server(self, bucket: Bucket, url: str) -> None:
        open_weights(f"{url}/{NAME}.pth")
        bucket.faults = [Fault("drop", times=99)]
        assert open_weights(f"{url}/{NAME}.pth").name == NAME

    @pytest.mark.parametrize("etags", [True, False])
    @pytest.mark.parametrize("kind", ["cut", "drop", "long", "503"])
    def test_a_server_that_stumbles(self, bucket: Bucket, url: str, kind: str, etags: bool) -> None:
        bucket.etags = etags
        bucket.faults = [Fault(kind, f"{NAME}.pth")]
        assert open_weights(f"{url}/{NAME}.pth").fingerprint == fingerprint(tiny_model())

    def test_two_halves_of_different_files_are_not_joined(self, bucket: Bucket, url: str) -> None:
        """Without a sum or an ETag nobody knows whether the second half belongs to the first."""
        bucket.etags = False
        bucket.faults = [Fault("cut", f"{NAME}.pth")]
        open_weights(f"{url}/{NAME}.pth")
        assert [part for _, _, part in bucket.requests] == ["", ""]

    @pytest.mark.parametrize("data", [b"", b"<html>no</html>", b"\x80\x04\x95junk", b"PK\x03\x04cut off"])
    def test_what_is_no_weights_file_is_not_kept(self, bucket: Bucket, url: str, data: bytes) -> None:
        bucket.files["x.pth"] = data
        with pytest.raises(LalicError, match=r"/x\.pth: .*x\.pth is ") as caught:
            open_weights(f"{bucket.url}/x.pth")
        assert "\n" not in str(caught.value)
        assert in_cache() == []

    def test_wrong_sum(self, bucket: Bucket, url: str) -> None:
        with pytest.raises(LalicError, match="has not the SHA-256 that is expected"):
            open_weights(f"{url}/{NAME}.pth#sha256={'1' * 64}")
        assert in_cache() == []
