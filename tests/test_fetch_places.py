"""Which weights a name, a URL or a file to decode means, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from bucket_server import Bucket, Fault
from PIL import Image
from test_export import tiny_model, weights_of
from test_fetch import HASTE, NAME, _files, asked, bucket, down, in_cache, url  # noqa: F401 -- fixtures among them

from lalic import fetch, fetch_cache, load, release_builtin
from lalic.codec import cli
from lalic.codec.weights import weights_for
from lalic.config import LossSection
from lalic.errors import LalicError
from lalic.model import fingerprint
from lalic.release import open_weights, write_bundle
from lalic.training.inputs import new_model

# ruff: noqa: F811 -- fixtures are arguments of the same name


@pytest.fixture(autouse=True)
def _none_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes with the package would be found last; tests/test_builtin.py has it."""
    monkeypatch.setattr(release_builtin, "builtin_folder", lambda: None)


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
            train=SimpleNamespace(init_from=url),
            model=SimpleNamespace(arguments=lambda: model.config),
            loss=LossSection(quality=3),
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
