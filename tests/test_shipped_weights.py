"""The bundles that are in weights/: whole, small enough, and of use as they are installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from checkout_root import ROOT
from photo_like import photo_like
from PIL import Image
from rates_samples import loss_of, rates_model
from test_builtin import write_bundles

from lalic.metrics import psnr
from lalic.release import Weights, in_precision, write_bundle
from lalic.release_builtin import builtin_folder
from lalic.release_folder import kept_sums
from lalic.verify import main as verify

WEIGHTS = ROOT / "weights"
BUNDLES = sorted(f for f in WEIGHTS.glob("lalic-*") if f.is_dir())
ALL_RATES = [f for f in BUNDLES if f.name.endswith("-vbr")]
ONE_RATE = [f for f in BUNDLES if f not in ALL_RATES]
MOST_BYTES = 16_000_000
"""Of the bundles of one rate together, and of each bundle of all rates."""


@pytest.fixture
def bundles() -> list[Path]:
    if not BUNDLES:
        pytest.skip(f"there are no bundles in {WEIGHTS}")
    return BUNDLES


def test_the_folder_is_part_of_the_package() -> None:
    folder = builtin_folder()
    assert folder is not None and (folder / "__init__.py").is_file()


def test_whole(bundles: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify([str(WEIGHTS)]) == 0, capsys.readouterr().out


def test_small_enough(bundles: list[Path]) -> None:
    for together in (ONE_RATE, *([bundle] for bundle in ALL_RATES)):
        assert sum(f.stat().st_size for bundle in together for f in bundle.rglob("*") if f.is_file()) <= MOST_BYTES


def test_compact_with_cards(bundles: list[Path]) -> None:
    for bundle in bundles:
        config, card = json.loads((bundle / "config.json").read_text()), (bundle / "README.md").read_text()
        assert config["precision"] == "float16"
        for label in ("trained on", "steps", "time of these steps", "on"):
            assert config["training"].get(label), f"{bundle.name} does not tell: {label}"
        assert "license: other\n" in card and "esearch" in card


def test_they_code(bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger files and better pictures from the lowest rung to the highest, and within a model of all rates."""
    from lalic.codec.cli import main

    monkeypatch.setenv("LALIC_WEIGHTS", str(WEIGHTS))
    monkeypatch.chdir(tmp_path)
    pixels = photo_like(256, 192)
    Image.fromarray(pixels).save("photo.png")
    curves = [[["--weights", bundle.name] for bundle in ONE_RATE]]
    for bundle in ALL_RATES:
        lowest, highest = json.loads((bundle / "config.json").read_text())["quality"]
        between = (lowest, (lowest + highest) / 2 + 0.3, highest)
        curves.append([["--weights", bundle.name, "--quality", f"{quality:g}"] for quality in between])
    for curve in curves:
        sizes, quality = [], []
        for flags in curve:
            main(["compress", "photo.png", "photo.lalic", "--force", *flags])
            main(["decompress", "photo.lalic", "back.png", "--force"])
            sizes.append(Path("photo.lalic").stat().st_size)
            quality.append(psnr(pixels, np.asarray(Image.open("back.png"))))
        assert all(q > 20 for q in quality) and all(s < pixels.nbytes / 8 for s in sizes), (sizes, quality)
        if len(curve) > 1:
            assert sizes[0] < sizes[-1] and quality[0] < quality[-1], (sizes, quality)


@pytest.mark.slow
def test_installed_from_a_wheel(tmp_path: Path) -> None:
    """Into an environment of its own, without network, in a folder that cannot be written."""
    source = tmp_path / "source"
    for name in ("lalic", "kernels", "data_prep", "weights"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "lalic-*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "weights" / "SHA256SUMS").unlink(missing_ok=True)
    write_bundles(source / "weights", {3: 1, 5: 2})
    in_range = Weights(rates_model(), "x", "x", loss=loss_of())
    with kept_sums(source / "weights", "lalic-mse-vbr"):
        write_bundle(in_precision(in_range, "float16"), source / "weights")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source)]
    built = subprocess.run(wheel, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = tmp_path.glob("lalic-*.whl")
    shutil.rmtree(source)

    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(path)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    there = sorted(str(f.relative_to(site / "lalic")) for f in (site / "lalic" / "weights").rglob("*.*") if f.is_file())
    assert [f for f in there if f.endswith("safetensors")] == [
        f"weights/lalic-mse-{name}/model.safetensors" for name in ("q3", "q5", "vbr")
    ]
    # What lalic needs is where this Python has it, behind the wheel's own folder.
    others = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (site / "base.pth").write_text("".join(f"{p}\n" for p in others))
    for folder in (site / "lalic", *(site / "lalic").rglob("*")):
        folder.chmod(0o555 if folder.is_dir() else 0o444)

    work = tmp_path / "work"
    work.mkdir()
    Image.fromarray(photo_like(64, 48)).save(work / "photo.png")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LALIC_", "PYTHONPATH"))}
    environment |= {"LALIC_OFFLINE": "1", "LALIC_CACHE_DIR": str(tmp_path / "cache"), "LALIC_BACKEND": "torch"}

    def lalic(*arguments: str) -> str:
        command = [str(python), "-B", "-c", "from lalic.cli import main; main()", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [str(python), "-B", "-c", "import lalic; print(lalic.__file__)"]
    found = subprocess.run(where, capture_output=True, text=True, check=True, cwd=work, env=environment)
    assert found.stdout.strip() == str(site / "lalic" / "__init__.py")
    assert "model lalic-mse-q5" in lalic("compress", "photo.png", "a.lalic")
    assert "model lalic-mse-q3" in lalic("compress", "photo.png", "b.lalic", "--quality", "3")
    assert "lalic-mse-q5, built in" in lalic("info", "a.lalic")
    lalic("decompress", "a.lalic", "a.png")
    assert "good" in lalic("verify", "lalic-mse-q3")
    lalic("compress", "photo.png", "c.lalic", "--weights", "lalic-mse-vbr", "--quality", "4.3")
    assert "lalic-mse-vbr, built in" in lalic("info", "c.lalic")
    lalic("decompress", "c.lalic", "c.png")
    assert "good" in lalic("verify", "lalic-mse-vbr")
    for folder in (site / "lalic", *(f for f in (site / "lalic").rglob("*") if f.is_dir())):
        folder.chmod(0o755)
