"""`lalic verify`: a good bundle passes, and every way of harming one is told by the check it belongs to."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bucket_server import Bucket, serve
from PIL import Image
from safetensors.torch import load_file, save_file
from test_export import tiny_model, weights_of

from lalic import reference_picture
from lalic.errors import LalicError
from lalic.files import sha256_of
from lalic.ladder import LADDERS
from lalic.release import open_weights, write_bundle
from lalic.release_folder import kept_sums
from lalic.verify import main
from lalic.verify_bundle import Check, check_bundle

NAME = "lalic-mse-q3"
CHECKS = ["files", "sums", "config", "weights", "published", "reference"]


@pytest.fixture(scope="module")
def _bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(weights_of(tiny_model()), tmp_path_factory.mktemp("release"))


@pytest.fixture
def bundle(_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to do harm to."""
    return Path(shutil.copytree(_bundle, tmp_path / "release" / _bundle.name))


def sum_again(bundle: Path) -> None:
    """What somebody does who wants the harm to pass."""
    files = sorted(f for f in bundle.iterdir() if f.name != "SHA256SUMS")
    (bundle / "SHA256SUMS").write_text("".join(f"{sha256_of(f)}  {f.name}\n" for f in files))


def failure(bundle: Path) -> tuple[str, str]:
    """Name and text of the one check that fails; those behind it must not have been done."""
    checks = list(check_bundle(bundle))
    failed = [c for c in checks if c.passed is False]
    assert len(failed) == 1, checks
    assert all("\n" not in c.text for c in checks)
    return failed[0].name, failed[0].text


def edit_config(bundle: Path, **changes: Any) -> None:
    config = json.loads((bundle / "config.json").read_text()) | changes
    (bundle / "config.json").write_text(json.dumps(config))


def edit_tensors(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = load_file(bundle / "model.safetensors")
    change(state)
    save_file(state, bundle / "model.safetensors")


def edit_pth(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = torch.load(bundle / f"{NAME}.pth", weights_only=True)
    change(state)
    torch.save(state, bundle / f"{NAME}.pth")


class TestGood:
    def test_every_check_passes(self, bundle: Path) -> None:
        checks = list(check_bundle(bundle))
        assert [(c.name, c.passed) for c in checks] == [(name, True) for name in CHECKS]

    @pytest.mark.parametrize("name", [".gitattributes", ".git", ".cache"])
    def test_what_a_hub_puts_beside_it(self, bundle: Path, name: str) -> None:
        (bundle / name).mkdir()
        assert all(c.passed for c in check_bundle(bundle))

    def test_one_of_your_images(self, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((200, 170), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "photo.png")
        assert main([str(bundle), "--image", str(tmp_path / "photo.png")]) == 0
        out = capsys.readouterr().out
        assert "photo.png, 200 x 170: " in out and "dB MS-SSIM" in out and out.endswith(f"{bundle}: good\n")
        (tmp_path / "photo.png").write_bytes(b"<html>")
        assert main([str(bundle), "--image", str(tmp_path / "photo.png")]) == 1
        assert "FAILED  image" in capsys.readouterr().out
        with pytest.raises(LalicError, match="no such image"):
            main([str(bundle), "--image", str(tmp_path / "nothing.png")])

    def test_a_bundle_without_reference(self, bundle: Path) -> None:
        (bundle / "reference.lalic").unlink()
        config = json.loads((bundle / "config.json").read_text())
        config.pop("reference")
        (bundle / "config.json").write_text(json.dumps(config))
        sum_again(bundle)
        last = list(check_bundle(bundle))[-1]
        assert (last.name, last.passed) == ("reference", None) and "not checked" in last.text


class TestFilesAndSums:
    @pytest.mark.parametrize(
        "name", ["config.json", "model.safetensors", f"{NAME}.pth", "README.md", "reference.lalic"]
    )
    def test_flipped_byte(self, bundle: Path, name: str) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / name).write_bytes(data)
        assert failure(bundle) == ("sums", f"{name} has not the SHA-256 of SHA256SUMS: it was changed or copied badly")

    @pytest.mark.parametrize("name", ["model.safetensors", f"{NAME}.pth"])
    def test_half_copied(self, bundle: Path, name: str) -> None:
        os.truncate(bundle / name, (bundle / name).stat().st_size // 2)
        assert failure(bundle)[0] == "sums"
        sum_again(bundle)
        assert failure(bundle)[0] == {"m": "weights", "l": "published"}[name[0]]

    def test_missing(self, bundle: Path) -> None:
        (bundle / "metrics.json").unlink()
        names = [c.name for c in check_bundle(bundle) if c.passed is False]
        assert names == ["files", "sums"]

    @pytest.mark.parametrize("name", ["extra.pth", "notes.txt", ".hidden", "__init__.py"])
    def test_extra_file(self, bundle: Path, name: str) -> None:
        (bundle / name).write_text("import os")
        assert failure(bundle) == ("files", f"{name} is not listed in SHA256SUMS")

    def test_extra_file_that_is_listed(self, bundle: Path) -> None:
        (bundle / "setup.py").write_text("import os")
        sum_again(bundle)
        assert failure(bundle) == ("files", "SHA256SUMS lists setup.py, which belongs to no bundle")

    def test_folder_and_pipe(self, bundle: Path) -> None:
        (bundle / "README.md").unlink()
        os.mkfifo(bundle / "README.md")
        assert [c.name for c in check_bundle(bundle) if c.passed is False] == ["files", "sums"]
        (bundle / "README.md").unlink()
        (bundle / "README.md").mkdir()
        assert [c.name for c in check_bundle(bundle) if c.passed is False] == ["files", "sums"]

    def test_link(self, bundle: Path, tmp_path: Path) -> None:
        shutil.move(bundle / "model.safetensors", tmp_path / "elsewhere")
        (bundle / "model.safetensors").symlink_to(tmp_path / "elsewhere")
        assert failure(bundle)[0] == "files"
        assert "is a link" in failure(bundle)[1]

    def test_link_to_nowhere(self, bundle: Path) -> None:
        (bundle / "extra").symlink_to("/nowhere")
        assert failure(bundle)[0] == "files"

    @pytest.mark.parametrize("text", ["", "nonsense\n", f"{'0' * 64}  ../../etc/passwd\n"])
    def test_sums_that_are_none(self, bundle: Path, text: str) -> None:
        (bundle / "SHA256SUMS").write_text(text)
        assert failure(bundle)[0] == "files"

    def test_a_file_that_is_listed_twice(self, bundle: Path) -> None:
        with open(bundle / "SHA256SUMS", "a") as file:
            file.write(f"{'0' * 64}  model.safetensors\n")
        assert "second line" in failure(bundle)[1]


class TestConfig:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"name": "lalic-mse-q4"}, "mse, lambda 0.0067 is lalic-mse-q3"),
            ({"quality": 4}, "quality is 4, but 3 by model and loss"),
            ({"loss": {"metric": "mse", "lambda": 0.013}}, "quality is 3, but 4 by model and loss"),
            ({"loss": {"metric": "psnr", "lambda": 0.0067}}, "no metric 'psnr'"),
            ({"loss": None}, "does not say model and loss"),
            ({"model": {"N": 8}}, "does not say model and loss"),
            ({"format": 7}, "bundle format 7"),
            ({"fingerprint": None}, "not the configuration of a release bundle"),
        ],
        ids=str,
    )
    def test_contradicts_itself(self, bundle: Path, changes: dict[str, Any], words: str) -> None:
        edit_config(bundle, **changes)
        sum_again(bundle)
        assert failure(bundle)[0] == "config" and words in failure(bundle)[1]

    @pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "\xff", '{"a": NaN', "[]"])
    def test_no_json(self, bundle: Path, text: str) -> None:
        (bundle / "config.json").write_bytes(text.encode("latin-1"))
        sum_again(bundle)
        assert failure(bundle)[0] == "config"

    def test_from_before_the_rates_were_told(self, bundle: Path) -> None:
        model = json.loads((bundle / "config.json").read_text())["model"]
        assert (model.pop("context_rate"), model.pop("aggregation_rate")) == (8, 2)
        edit_config(bundle, model=model)
        sum_again(bundle)
        assert all(check.passed for check in check_bundle(bundle))
        assert open_weights(bundle).model.config["context_rate"] == 8

    @pytest.mark.parametrize("key", ["depths", "dims", "groups", "context_rate", "aggregation_rate"])
    def test_of_another_architecture(self, bundle: Path, key: str) -> None:
        model = json.loads((bundle / "config.json").read_text())["model"]
        sizes = {"depths": [1, 1, 1, 2], "dims": [8, 12, 16, 32, 20, 8], "groups": [8, 8, 8, 8]}
        other = {**sizes, "context_rate": 4, "aggregation_rate": 1}[key]
        edit_config(bundle, model=model | {key: other})
        sum_again(bundle)
        assert failure(bundle)[0] == "weights" and f"config.json says {other}" in failure(bundle)[1]

    def test_of_widths_that_the_weights_have_not(self, bundle: Path) -> None:
        model = json.loads((bundle / "config.json").read_text())["model"]
        edit_config(bundle, model=model | {"N": 40})
        sum_again(bundle)
        assert failure(bundle)[0] == "weights"


class TestWeights:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda s: s["g_a.0.bias"].add_(1e-3), "have fingerprint"),
            (lambda s: s["g_a.0.bias"].fill_(float("nan")), "not finite, in g_a.0.bias"),
            (lambda s: s.update({"g_a.0.bias": s["g_a.0.bias"].double()}), "is torch.float64, not float32"),
            (lambda s: s.pop("g_s.0.bias"), "does not fit"),
            (lambda s: s.update({"g_a.0.surprise": torch.zeros(2)}), "does not fit"),
            (lambda s: s.update({"g_a.0.bias": torch.zeros(9)}), "does not fit"),
            (lambda s: s.clear() or s.update({"a": torch.zeros(1)}), "does not fit"),
        ],
        ids=["changed", "nan", "double", "missing", "more", "shape", "other"],
    )
    def test_safetensors(self, bundle: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
        edit_tensors(bundle, change)
        sum_again(bundle)
        assert failure(bundle)[0] == "weights" and words in failure(bundle)[1]

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda s: s["g_a.0.bias"].add_(1e-3), "g_a.0.bias holds other numbers"),
            (lambda s: s["latent_codec.hyper.h_a.0.bias"].add_(1e-3), "h_a.0.bias holds other numbers"),
            (lambda s: s["g_a.1.att.omni_shift.conv5x5_reparam.weight"].add_(1), "holds other numbers"),
            (lambda s: s.pop("h_a.0.bias"), "has other tensors than the published layout: h_a.0.bias"),
            (lambda s: s.update({"x": torch.zeros(1)}), "has other tensors than the published layout: x"),
            (lambda s: s.update({"g_a.0.bias": torch.zeros(9)}), "another shape or type"),
            (lambda s: s.update({"g_a.0.bias": 3}), "another shape or type"),
        ],
        ids=["changed", "changed in one of two places", "stale kernel", "missing", "more", "shape", "no tensor"],
    )
    def test_pth(self, bundle: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
        edit_pth(bundle, change)
        sum_again(bundle)
        assert failure(bundle)[0] == "published" and words in failure(bundle)[1]

    def test_pth_that_would_run_code(self, bundle: Path, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> Any:
                return (os.system, (f"touch {tmp_path / 'exploded'}",))

        torch.save({"a": Bomb()}, bundle / f"{NAME}.pth")
        sum_again(bundle)
        assert failure(bundle)[0] == "published" and "can be read safely" in failure(bundle)[1]
        (bundle / f"{NAME}.pth").write_bytes(pickle.dumps(Bomb()))
        sum_again(bundle)
        assert failure(bundle)[0] == "published" and "not a file that torch.save writes" in failure(bundle)[1]
        assert not (tmp_path / "exploded").exists()

    def test_pth_that_unpacks_to_more_than_it_is(self, bundle: Path) -> None:
        path = bundle / f"{NAME}.pth"
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
            archive.writestr("more", bytes(10_000_000))
        sum_again(bundle)
        assert failure(bundle) == ("published", f"{NAME}.pth is packed, which torch.save does not do")

    def test_of_another_model_that_is_consistent(self, bundle: Path, tmp_path: Path) -> None:
        """Both weights files exchanged for those of another model, all sums right: the fingerprint tells."""
        other = write_bundle(weights_of(tiny_model(1)), tmp_path)
        for name in ("model.safetensors", f"{NAME}.pth"):
            shutil.copy(other / name, bundle / name)
        sum_again(bundle)
        assert failure(bundle)[0] == "weights" and "have fingerprint" in failure(bundle)[1]


class TestReference:
    def test_picture_is_what_it_was(self) -> None:
        """The picture is part of the format: bundles that exist were coded from it."""
        picture = reference_picture.reference_picture()
        assert picture.shape == (88, 120, 3) and picture.dtype == np.uint8
        assert reference_picture.picture_sum() == "c32fb64e469fa8ac9ea4ae8592ca0d10c805f94aaaf6166310a79a09b8f28bb9"
        assert 30 < picture.std() < 100 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000

    def test_of_another_model(self, bundle: Path, tmp_path: Path) -> None:
        other = write_bundle(weights_of(tiny_model(1)), tmp_path)
        shutil.copy(other / "reference.lalic", bundle / "reference.lalic")
        sum_again(bundle)
        assert failure(bundle)[0] == "reference" and "is another model" in failure(bundle)[1]

    @pytest.mark.parametrize(
        ("key", "by", "words"),
        [
            ("psnr", 0.5, "decoded picture has a PSNR"),
            ("bytes", 400, "coded here has"),
            ("bpp_estimated", 0.5, "estimated rate"),
        ],
    )
    def test_other_results_than_told(self, bundle: Path, key: str, by: float, words: str) -> None:
        told = json.loads((bundle / "config.json").read_text())["reference"]
        edit_config(bundle, reference=told | {key: told[key] + by})
        sum_again(bundle)
        assert failure(bundle)[0] == "reference" and words in failure(bundle)[1]

    @pytest.mark.parametrize("harm", ["cut", "empty", "large", "untold", "missing"])
    def test_harmed(self, bundle: Path, harm: str) -> None:
        file = bundle / "reference.lalic"
        if harm == "cut":
            os.truncate(file, file.stat().st_size - 1)
        elif harm == "missing":
            file.unlink()
        elif harm == "untold":
            edit_config(bundle, reference={})
        else:
            file.write_bytes(bytes(2 << 20) if harm == "large" else b"")
        sum_again(bundle)
        assert failure(bundle)[0] == "reference"


class TestCommand:
    @pytest.fixture
    def folder(self, bundle: Path) -> Path:
        """Two bundles and the sums over both."""
        shutil.rmtree(bundle)
        for quality in (3, 4):
            weights = weights_of(tiny_model(), loss={"metric": "mse", "lambda": LADDERS["mse"][quality]})
            with kept_sums(bundle.parent, f"lalic-mse-q{quality}"):
                write_bundle(weights, bundle.parent)
        return bundle.parent

    def test_folder_of_bundles(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([str(folder)]) == 0
        out = capsys.readouterr().out
        assert out.count("  ok ") == 2 * len(CHECKS) + 1 and "agrees with all 2 bundles" in out

    @pytest.mark.parametrize("harm", ["gone", "unlisted", "sums", "changed"])
    def test_folder_that_is_harmed(self, folder: Path, harm: str, capsys: pytest.CaptureFixture[str]) -> None:
        sums = folder / "SHA256SUMS"
        if harm == "gone":
            shutil.rmtree(folder / "lalic-mse-q4")
        elif harm == "unlisted":
            sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "q4" not in line))
        elif harm == "sums":
            sums.unlink()
        else:
            (folder / "lalic-mse-q4" / "README.md").write_text("# another card\n")
            sum_again(folder / "lalic-mse-q4")
        assert main([str(folder)]) == 1
        assert f"{folder}: FAILED" in capsys.readouterr().out

    def test_by_url(
        self, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("LALIC_CACHE_DIR", str(tmp_path / "cache"))
        files = {f"{NAME}/{f.name}": f.read_bytes() for f in bundle.iterdir()}
        with serve(Bucket(files)) as bucket:
            assert main([f"{bucket.url}/{NAME}"]) == 0
            assert capsys.readouterr().out.count("  ok ") == len(CHECKS)

    def test_url_of_a_folder(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("LALIC_CACHE_DIR", str(tmp_path / "cache"))
        files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        with serve(Bucket(files)) as bucket:
            with pytest.raises(
                LalicError, match=r"is a folder of bundles: add the name of one \(lalic-mse-q3, lalic-m"
            ):
                open_weights(bucket.url)
            assert main([bucket.url]) == 0
            out = capsys.readouterr().out
            assert out.count("  ok ") == 2 * len(CHECKS) and out.endswith(f"{bucket.url}/lalic-mse-q4: good\n")

    @pytest.mark.parametrize("place", ["nowhere", "file.txt", "."])
    def test_what_is_no_bundle(self, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file.txt").write_text("x")
        with pytest.raises(LalicError, match=r"not the folder of a bundle|is no release bundle"):
            main([place])


def test_a_line_says_how_it_went() -> None:
    assert str(Check("sums", True, "six")).split() == ["ok", "sums", "six"]
    assert str(Check("sums", False, "six")).split()[0] == "FAILED" and str(Check("sums", None, "x")).split()[0] == "--"
