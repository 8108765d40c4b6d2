"""Weights that come with the package: found last, by quality, name and fingerprint, and never silently wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_export import weights_of
from tiny_codec import picture, tiny_model

import lalic
from lalic import cli, release_builtin
from lalic.codec import bitstream
from lalic.codec.cli import main
from lalic.errors import LalicError
from lalic.fetch import resolve
from lalic.ladder import MSE
from lalic.release import in_precision, open_weights, write_bundle
from lalic.release_builtin import DEFAULT_QUALITY
from lalic.release_folder import kept_sums
from lalic.verify import main as verify

SEEDS = {3: 1, 5: 2}
"""Of the built-in models of these tests, by quality."""


def write_bundles(folder: Path, seeds: dict[int, int]) -> Path:
    for quality, seed in seeds.items():
        weights = weights_of(tiny_model(seed), loss={"metric": "mse", "lambda": MSE[quality]})
        with kept_sums(folder, f"lalic-mse-q{quality}"):
            write_bundle(in_precision(weights, "float16"), folder)
    return folder


@pytest.fixture(scope="module")
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundles(tmp_path_factory.mktemp("installed") / "weights", SEEDS)


@pytest.fixture(autouse=True)
def installed(_installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The built-in weights of this test, to do harm to; nothing else is in reach."""
    folder = Path(shutil.copytree(_installed, tmp_path / "site" / "weights"))
    monkeypatch.setattr(release_builtin, "builtin_folder", lambda: folder)
    for name in ("LALIC_WEIGHTS", "LALIC_HUB_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LALIC_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Image.fromarray(picture(37, 50)).save("photo.png")
    return folder


def model_of(file: str) -> str:
    """The name that a .lalic file gives its model."""
    return bitstream.read(Path(file))[0].model_name.split()[0]


def fingerprint_of(file: str) -> str:
    return bitstream.read(Path(file))[0].fingerprint.hex()


def told(bundle: Path) -> str:
    return str(json.loads((bundle / "config.json").read_text())["fingerprint"])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


class TestCompress:
    def test_works_at_once(self, installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["compress", "photo.png", "photo.lalic"]) == 0
        assert model_of("photo.lalic") == f"lalic-mse-q{DEFAULT_QUALITY}"
        assert told(installed / "lalic-mse-q5").startswith(fingerprint_of("photo.lalic"))
        assert main(["decompress", "photo.lalic", "back.png"]) == 0
        assert np.asarray(Image.open("back.png")).shape == (37, 50, 3)
        assert "model lalic-mse-q5" in capsys.readouterr().out

    @pytest.mark.parametrize("quality", [3, 5])
    def test_quality(self, quality: int) -> None:
        main(["compress", "photo.png", "photo.lalic", "--quality", str(quality)])
        assert model_of("photo.lalic") == f"lalic-mse-q{quality}"
        assert main(["decompress", "photo.lalic", "back.png"]) == 0

    def test_the_default_quality_is_not_among_them(self, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.rmtree(installed / "lalic-mse-q5")
        (installed / "SHA256SUMS").unlink()
        main(["compress", "photo.png", "photo.lalic"])
        assert model_of("photo.lalic") == "lalic-mse-q3"

    @pytest.mark.parametrize("quality", ["2", "4", "9", "-1"])
    def test_a_quality_that_is_not_there(self, quality: str) -> None:
        with pytest.raises(LalicError, match=rf"no built-in weights of quality {quality}: choose .* among 3, 5$"):
            main(["compress", "photo.png", "photo.lalic", "--quality", quality])
        assert not Path("photo.lalic").exists()

    @pytest.mark.parametrize("quality", ["high", "nan", "4.3001", "1e0", "", "4,3"])
    def test_what_is_no_quality(self, quality: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["compress", "photo.png", "photo.lalic", "--quality", quality])
        assert ended.value.code == 2 and "--quality" in capsys.readouterr().err

    def test_weights_and_the_quality_that_they_have(self) -> None:
        assert main(["compress", "photo.png", "photo.lalic", "--quality", "3", "--weights", "lalic-mse-q3"]) == 0
        with pytest.raises(LalicError, match=r"lalic-mse-q3 has one rate, quality 3, and not quality 5: leave --qua"):
            main(["compress", "photo.png", "a.lalic", "--quality", "5", "--weights", "lalic-mse-q3"])

    def test_name(self, installed: Path) -> None:
        main(["compress", "photo.png", "photo.lalic", "--weights", "lalic-mse-q3"])
        assert told(installed / "lalic-mse-q3").startswith(fingerprint_of("photo.lalic"))


class TestWhatComesFirst:
    """A model of the user's own, of quality 5 as well."""

    @pytest.fixture
    def own(self, tmp_path: Path) -> Path:
        return write_bundles(tmp_path / "own", {5: 7})

    @pytest.mark.parametrize("way", ["LALIC_WEIGHTS", "./release"])
    def test_what_is_in_reach(self, way: str, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if way == "./release":
            shutil.copytree(own, "release")
        else:
            monkeypatch.setenv("LALIC_WEIGHTS", str(own))
        for number, flags in enumerate([[], ["--quality", "5"], ["--weights", "lalic-mse-q5"]]):
            main(["compress", "photo.png", f"{number}.lalic", *flags])
            assert told(own / "lalic-mse-q5").startswith(fingerprint_of(f"{number}.lalic"))
        with pytest.raises(LalicError, match=r"none of quality 3 in reach .*--weights lalic-mse-q3 takes the built-in"):
            main(["compress", "photo.png", "3.lalic", "--quality", "3"])
        main(["compress", "photo.png", "3.lalic", "--weights", "lalic-mse-q3"])
        assert main(["decompress", "3.lalic", "3.png"]) == 0

    def test_the_default_quality_among_several(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        own = write_bundles(tmp_path / "several", {4: 8, 5: 9})
        monkeypatch.setenv("LALIC_WEIGHTS", str(own))
        main(["compress", "photo.png", "a.lalic"])
        main(["compress", "photo.png", "b.lalic", "--quality", "4"])
        assert told(own / "lalic-mse-q5").startswith(fingerprint_of("a.lalic"))
        assert told(own / "lalic-mse-q4").startswith(fingerprint_of("b.lalic"))

    def test_several_that_do_not_tell(self, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        twin = write_bundles(tmp_path / "twin", {5: 8})
        monkeypatch.setenv("LALIC_WEIGHTS", f"{own}{os.pathsep}{twin}")
        with pytest.raises(LalicError, match=r"several of quality 5 in reach .*choose with --weights or --quality$"):
            main(["compress", "photo.png", "photo.lalic"])

    @pytest.mark.parametrize("kind", ["nowhere", "empty", "text", "folder of text"])
    def test_nonsense_is_not_passed_over(self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = tmp_path / "nonsense"
        if kind == "text":
            place.write_text("weights, please")
        elif kind != "nowhere":
            place.mkdir()
        if kind == "folder of text":
            (place / "notes.txt").write_text("weights, please")
        monkeypatch.setenv("LALIC_WEIGHTS", str(place))
        with pytest.raises(LalicError) as caught:
            main(["compress", "photo.png", "photo.lalic"])
        assert "\n" not in str(caught.value)
        assert re.search(r"does not exist|there are no weights|no weights file|not a weights file", str(caught.value))
        assert not Path("photo.lalic").exists()

    def test_an_empty_release_folder_does_no_harm(self) -> None:
        Path("release").mkdir()
        assert main(["compress", "photo.png", "photo.lalic"]) == 0


class TestByName:
    def test_everywhere_a_name_is_taken(self, installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert resolve("lalic-mse-q3") == installed / "lalic-mse-q3"
        assert open_weights("lalic-mse-q3").fingerprint == told(installed / "lalic-mse-q3")
        assert lalic.load("lalic-mse-q5").config["dims"] == [8, 12, 16, 32, 16, 8]
        assert verify(["lalic-mse-q5"]) == 0
        assert "lalic-mse-q5: good" in capsys.readouterr().out

    def test_a_name_that_is_not_there(self) -> None:
        with pytest.raises(
            LalicError, match=r"no weights called lalic-mse-q1: .*\(built in: lalic-mse-q3, lalic-mse-q5\)"
        ):
            open_weights("lalic-mse-q1")

    def test_a_kind_that_they_have_not(self) -> None:
        with pytest.raises(LalicError, match=r"holds one kind of weights only$"):
            open_weights("lalic-mse-q5", "raw")


class TestHarmed:
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
    def test_flipped_byte(self, installed: Path, name: str) -> None:
        main(["compress", "photo.png", "good.lalic"])
        flip(installed / "lalic-mse-q5" / name)
        for flags in ([], ["--weights", "lalic-mse-q5"]):
            with pytest.raises(LalicError, match=r"the built-in weights lalic-mse-q5 cannot be used .*get them again"):
                main(["compress", "photo.png", "bad.lalic", *flags])
        assert not Path("bad.lalic").exists()
        with pytest.raises(LalicError, match=r"needs lalic-mse-q5"):
            main(["decompress", "good.lalic", "back.png"])
        assert not Path("back.png").exists()
        # The others still work.
        assert main(["compress", "photo.png", "other.lalic", "--quality", "3"]) == 0

    def test_a_damaged_bundle_is_told_when_a_file_needs_it(self, installed: Path) -> None:
        main(["compress", "photo.png", "good.lalic"])
        flip(installed / "lalic-mse-q5" / "model.safetensors")
        with pytest.raises(LalicError, match=r"good\.lalic needs lalic-mse-q5 .*cannot be used .*get them again with"):
            main(["decompress", "good.lalic", "back.png"])

    @pytest.mark.parametrize("what", ["bundle", "config.json"])
    def test_missing(self, installed: Path, what: str) -> None:
        main(["compress", "photo.png", "good.lalic"])
        if what == "bundle":
            shutil.rmtree(installed / "lalic-mse-q5")
        else:
            (installed / "lalic-mse-q5" / what).unlink()
        lost = r"the built-in weights lalic-mse-q5 are missing from .*: get them again with .git checkout"
        for command in (["compress", "photo.png", "bad.lalic"], ["decompress", "good.lalic", "back.png"]):
            with pytest.raises(LalicError, match=lost):
                main(command)
        with pytest.raises(LalicError, match=lost):
            open_weights("lalic-mse-q5")

    def test_missing_weights_of_a_bundle(self, installed: Path) -> None:
        (installed / "lalic-mse-q5" / "model.safetensors").unlink()
        with pytest.raises(LalicError, match="get them again with"):
            main(["compress", "photo.png", "bad.lalic"])

    @pytest.mark.parametrize("there", [True, False])
    def test_none_at_all(self, installed: Path, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.rmtree(installed)
        if not there:
            monkeypatch.setattr(release_builtin, "builtin_folder", lambda: None)
        with pytest.raises(LalicError, match=r"no built-in weights.*: get them with .*, or give --weights"):
            main(["compress", "photo.png", "photo.lalic"])
        with pytest.raises(LalicError, match=r"built in: none"):
            open_weights("lalic-mse-q5")

    def test_sums_that_are_lost(self, installed: Path) -> None:
        """The list over all bundles is for people: each bundle has its own."""
        (installed / "SHA256SUMS").write_text("nonsense")
        assert main(["compress", "photo.png", "photo.lalic"]) == 0


class TestInfo:
    def info(self, capsys: pytest.CaptureFixture[str]) -> str:
        capsys.readouterr()
        assert main(["info", "photo.lalic"]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("weights:"))

    def test_says_whether_they_are_there(
        self, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        main(["compress", "photo.png", "photo.lalic", "--quality", "3"])
        assert self.info(capsys) == "weights:    lalic-mse-q3, built in"
        shutil.copytree(installed, "release")
        assert self.info(capsys) == "weights:    lalic-mse-q3, in release"
        shutil.rmtree("release")
        shutil.rmtree(installed / "lalic-mse-q3")
        assert "not at hand: `lalic decompress` needs --weights" in self.info(capsys)
        (tmp_path / "w.pth").write_bytes(b"x")
        monkeypatch.setenv("LALIC_WEIGHTS", str(tmp_path / "w.pth"))
        assert "1 weights file in LALIC_WEIGHTS not looked into" in self.info(capsys)
        monkeypatch.setenv("LALIC_WEIGHTS", "/nowhere")
        assert "not looked for: LALIC_WEIGHTS names /nowhere" in self.info(capsys)

    def test_costs_nothing(self, installed: Path) -> None:
        """Neither torch nor a server."""
        main(["compress", "photo.png", "photo.lalic"])
        program = (
            "import sys, pathlib; from lalic import release_builtin; "
            f"release_builtin.builtin_folder = lambda: pathlib.Path({str(installed)!r}); "
            "from lalic.codec.cli import main; main(['info', 'photo.lalic']); print('torch' in sys.modules)"
        )
        environment = {**os.environ, "LALIC_HUB_URL": "http://127.0.0.1:9/"}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
        )
        assert "lalic-mse-q5, built in" in done.stdout and done.stdout.endswith("False\n")


class TestStart:
    def test_imports_what_coding_needs(self) -> None:
        """The command does without torchvision, and no stand-in is left for those who want what it stands for."""
        program = (
            "import sys; from lalic.codec.startup import import_compressai; import_compressai(); import lalic.release; "
            "print([n in sys.modules for n in ('compressai', 'torchvision', 'torch_geometric', 'transformers')]); "
            "import importlib.util; print(importlib.util.find_spec('torch_geometric').origin)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        imported, origin = done.stdout.splitlines()
        assert imported == "[True, False, False, False]" and origin.endswith("__init__.py")

    def test_a_compressai_that_wants_more(self, tmp_path: Path) -> None:
        """One that does not come up with the stand-ins is imported as it is."""
        package = tmp_path / "compressai"
        package.mkdir()
        (package / "__init__.py").write_text("from torch_geometric.nowhere import x\n")
        (tmp_path / "torch_geometric").mkdir()
        (tmp_path / "torch_geometric" / "__init__.py").touch()
        (tmp_path / "torch_geometric" / "nowhere.py").write_text("x = 1\n")
        program = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from lalic.codec.startup import import_compressai; "
            "import_compressai(); print('compressai' in sys.modules); import compressai; print(compressai.x)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["False", "1"]
