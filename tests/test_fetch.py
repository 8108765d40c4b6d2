"""Weights by name and by URL: the right bytes or one line, whatever the server does, and nothing asked for twice."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from bucket_server import KINDS, Bucket, Fault, serve
from PIL import Image
from test_export import tiny_model, weights_of

from lalic import fetch, fetch_cache, fetch_stream, load
from lalic.codec import cli
from lalic.codec.weights import weights_for
from lalic.errors import LalicError
from lalic.files import cache_folder, sha256_of
from lalic.model import fingerprint
from lalic.release import open_weights, write_bundle
from lalic.remote import Patience
from lalic.training.inputs import new_model

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


PLACES = ["release/lalic-mse-q3", "release/lalic-mse-q3/lalic-mse-q3.pth"]


class TestRefused:
    """What ends in one line, at once, for a bundle (its SHA256SUMS) and for a file."""

    @staticmethod
    def refusal(bucket: Bucket, place: str) -> str:
        with pytest.raises(LalicError) as caught:
            open_weights(f"{bucket.url}/{place}")
        assert "\n" not in str(caught.value)
        assert not [f for f in in_cache() if "SHA256SUMS" not in f]
        return str(caught.value)

    @pytest.fixture(params=PLACES)
    def place(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @staticmethod
    def first(place: str) -> str:
        return place if place.endswith(".pth") else f"{place}/SHA256SUMS"

    def test_missing(self, bucket: Bucket, place: str) -> None:
        bucket.files.pop(self.first(place))
        assert "there is no such file" in self.refusal(bucket, place)
        assert len(asked(bucket)) == 1

    def test_web_page(self, bucket: Bucket, place: str) -> None:
        bucket.types[self.first(place)] = "text/html; charset=utf-8"
        assert "answers with a web page" in self.refusal(bucket, place)
        assert len(asked(bucket)) == 1

    def test_web_page_that_says_it_is_a_file(self, bucket: Bucket, place: str) -> None:
        bucket.files[self.first(place)] = b"\n<!DOCTYPE html><html>"
        text = self.refusal(bucket, place)
        assert "web page" in text

    def test_redirect_loop(self, bucket: Bucket, place: str) -> None:
        bucket.redirect = self.first(place)
        assert "from one address to the next without end" in self.refusal(bucket, place)

    def test_endless(self, bucket: Bucket, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fetch_cache, "MOST_WEIGHTS", 100_000)
        monkeypatch.setattr(fetch_cache, "MOST_CONFIG", 100_000)
        bucket.endless = self.first(place)
        assert "too large" in self.refusal(bucket, place)

    def test_says_itself_that_it_is_too_large(
        self, bucket: Bucket, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fetch_cache, "MOST_WEIGHTS", 50)
        monkeypatch.setattr(fetch_cache, "MOST_CONFIG", 50)
        assert "too large" in self.refusal(bucket, place)

    @pytest.mark.parametrize("kind", ["500", "cut", "drop", "short"])
    def test_never_gets_well(self, bucket: Bucket, place: str, kind: str) -> None:
        bucket.faults = [Fault(kind, "lalic", times=99)]
        self.refusal(bucket, place)
        # A connection that is closed without an answer is tried twice by aiohttp itself.
        assert len(asked(bucket)) <= HASTE.attempts * 2

    def test_nobody_there(self, down: str) -> None:
        with pytest.raises(LalicError, match="3 attempts; see whether the server and the network are up"):
            open_weights(down)

    @pytest.mark.parametrize("place", ["https://", "hf://owner", "ftx://host/lalic", "hf://a/b@/c"])
    def test_no_address(self, bucket: Bucket, place: str) -> None:
        with pytest.raises(LalicError):
            open_weights(place)


class TestNames:
    def test_in_the_order_of_the_places(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        with pytest.raises(LalicError, match=r"no weights called lalic-mse-q3: .*set LALIC_WEIGHTS or LALIC_HUB_URL"):
            open_weights(NAME)
        monkeypatch.setenv("LALIC_HUB_URL", f"{bucket.url}/release/")
        assert open_weights(NAME).fingerprint == fingerprint(tiny_model())
        monkeypatch.delenv("LALIC_HUB_URL")
        asked(bucket)
        assert open_weights(NAME).fingerprint == fingerprint(tiny_model()), "the cache has it"
        assert asked(bucket) == []
        write_bundle(weights_of(tiny_model(1)), Path("release"))
        assert open_weights(NAME).fingerprint == fingerprint(tiny_model(1))
        write_bundle(weights_of(tiny_model(2)), tmp_path / "mine")
        monkeypatch.setenv("LALIC_WEIGHTS", str(tmp_path / "mine"))
        assert open_weights(NAME).fingerprint == fingerprint(tiny_model(2))
        Path(NAME).mkdir()
        with pytest.raises(LalicError, match="neither a release bundle nor"):
            open_weights(NAME)  # a path that is there is meant

    def test_of_a_file(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        path = tmp_path / f"{NAME}.pth"
        path.write_bytes(bucket.files[f"release/{NAME}/{NAME}.pth"])
        monkeypatch.setenv("LALIC_WEIGHTS", str(path))
        assert open_weights(NAME).source == str(path)

    def test_several_in_the_cache(self, bucket: Bucket, url: str, tmp_path: Path) -> None:
        open_weights(url)
        new = write_bundle(weights_of(tiny_model(1)), tmp_path / "new")
        bucket.files |= {f"release/{NAME}/{f.name}": f.read_bytes() for f in new.iterdir()}
        open_weights(url)
        with pytest.raises(LalicError, match="several weights called lalic-mse-q3 are in the cache"):
            open_weights(NAME)

    def test_hub_that_is_none(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LALIC_HUB_URL", "/mnt/release")
        with pytest.raises(LalicError, match="LALIC_HUB_URL must be a URL"):
            open_weights(NAME)

    @pytest.mark.parametrize(
        ("place", "url"),
        [
            ("hf://me/codec", "https://huggingface.co/me/codec/resolve/main"),
            ("hf://me/codec/lalic-mse-q3/", "https://huggingface.co/me/codec/resolve/main/lalic-mse-q3"),
            ("hf://me/codec@v1/q3.pth", "https://huggingface.co/me/codec/resolve/v1/q3.pth"),
            (Path("https://host/release/x"), "https://host/release/x"),
            (Path("hf://me/codec"), "https://huggingface.co/me/codec/resolve/main"),
        ],
        ids=str,
    )
    def test_addresses(self, place: str | Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_ENDPOINT", raising=False)
        assert fetch.address_of(place) == (url, None)

    def test_a_hub_that_sends_elsewhere(self, bucket: Bucket, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        bucket.moved = {path.replace("release", "me/codec/resolve/main"): path for path in bucket.files}
        monkeypatch.setenv("HF_ENDPOINT", bucket.url)
        assert open_weights(f"hf://me/codec/{NAME}").name == NAME

    def test_what_is_not_http(self, bucket: Bucket, _files: dict[str, bytes]) -> None:
        memory = fsspec.filesystem("memory")
        for path, data in _files.items():
            memory.pipe_file(f"/{path}", data)
        assert open_weights(f"memory://release/{NAME}").fingerprint == fingerprint(tiny_model())
        assert open_weights(f"memory://release/{NAME}/{NAME}.pth").fingerprint == fingerprint(tiny_model())

    def test_in_the_codec(self, bucket: Bucket, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`lalic compress --weights URL`; the decoder finds the weights by the file's fingerprint."""
        Image.new("RGB", (40, 30), (10, 120, 200)).save(tmp_path / "a.png")
        assert cli.main(["compress", str(tmp_path / "a.png"), str(tmp_path / "a.lalic"), "--weights", url]) == 0
        monkeypatch.setenv("LALIC_OFFLINE", "1")
        assert cli.main(["decompress", str(tmp_path / "a.lalic"), str(tmp_path / "b.png")]) == 0
        assert Image.open(tmp_path / "b.png").size == (40, 30)
        monkeypatch.delenv("LALIC_OFFLINE")
        bucket.types[f"release/{NAME}/SHA256SUMS"] = "text/html"
        for place in (f"{bucket.url}/nothing", f"{bucket.url}/x.pth", "lalic-mse-q5"):
            with pytest.raises(LalicError):
                cli.main(["compress", str(tmp_path / "a.png"), str(tmp_path / "c.lalic"), "--weights", place])
            assert not (tmp_path / "c.lalic").exists()

    def test_a_run_starts_from_them(self, url: str) -> None:
        model = tiny_model()
        config = SimpleNamespace(
            train=SimpleNamespace(init_from=url), model=SimpleNamespace(arguments=lambda: model.config)
        )
        assert fingerprint(new_model(config)) == fingerprint(model)  # type: ignore[arg-type]

    def test_lalic_load(self, url: str) -> None:
        model = load(url)
        assert not model.training and fingerprint(model) == fingerprint(tiny_model())
        assert model.compress is not None and model.latent_codec.hyper.entropy_bottleneck._quantized_cdf.numel()


class TestDecoding:
    """Which weights decode a file, when none are named."""

    @staticmethod
    def coded(digest: str, name: str = NAME) -> Any:
        return SimpleNamespace(fingerprint=bytes.fromhex(digest)[:8], model_name=f"{name} (fingerprint {digest[:16]})")

    def test_from_the_hub(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        file = self.coded(fingerprint(tiny_model()))
        with pytest.raises(LalicError, match=r"no \./release"):
            weights_for(file, "x.lalic", None)
        monkeypatch.setenv("LALIC_HUB_URL", f"{bucket.url}/release")
        assert weights_for(file, "x.lalic", None).name == NAME
        monkeypatch.delenv("LALIC_HUB_URL")
        assert weights_for(file, "x.lalic", None).name == NAME, "the cache has it"

    def test_weights_of_another_model_are_not_fetched(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LALIC_HUB_URL", f"{bucket.url}/release")
        with pytest.raises(LalicError, match=f"not found in {bucket.url}/release"):
            weights_for(self.coded("77" * 32), "x.lalic", None)
        assert bucket.count("config.json") == 1 and bucket.count("model.safetensors") == 0

    def test_given_by_url(self, url: str) -> None:
        assert weights_for(self.coded(fingerprint(tiny_model())), "x.lalic", url).name == NAME
        with pytest.raises(LalicError, match="is another model"):
            weights_for(self.coded("77" * 32), "x.lalic", url)
