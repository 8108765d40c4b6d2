"""Anchors: published points as shipped, known test sets, and other codecs against files really written."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from photo_like import photo_like
from PIL import Image

from lalic import anchors
from lalic.anchors import (
    DATASETS,
    FORMATS,
    Curve,
    curves_of,
    dataset_of,
    encode,
    main,
    measure_pillow,
    published,
    read_anchors,
)
from lalic.bdrate import bd_rate
from lalic.errors import LalicError
from lalic.metrics import ms_ssim

Picture = NDArray[np.uint8]


def psnr_by_hand(a: Picture, b: Picture) -> float:
    return 10 * math.log10(255**2 / ((a.astype(float) - b.astype(float)) ** 2).mean())


def needs(key: str) -> None:
    if FORMATS[key].version() is None:
        pytest.skip(f"{FORMATS[key].label} is not installed")


class TestPublished:
    @pytest.mark.parametrize(
        ("dataset", "figure"), [("kodak", -15.26), ("clic_professional_valid", -15.41), ("tecnick", -17.63)]
    )
    def test_bd_rates_of_the_shipped_points(self, dataset: str, figure: float) -> None:
        curves = {c.name: c for c in published(dataset, "psnr")}
        lalic, vtm = curves["lalic-mse"], curves["vtm-9.1"]
        assert round(bd_rate(vtm.bpp, vtm.values("psnr"), lalic.bpp, lalic.values("psnr")), 2) == figure

    def test_shipped_points_are_the_published_ones(self, reference_dir: Path) -> None:
        reference = json.loads((reference_dir / "published_rd.json").read_text())["curves"]
        assert set(reference) == set(DATASETS)
        for dataset, curves in reference.items():
            shipped = [sorted(zip(c.bpp, c.psnr, strict=True)) for c in published(dataset)]
            wanted = [sorted(zip(c["bpp"], c["psnr"], strict=True)) for c in curves.values()]
            assert sorted(shipped) == sorted(wanted)
            similar = {tuple(sorted(c["ms-ssim-db"])) for c in curves.values() if "ms-ssim-db" in c}
            assert {tuple(sorted(c.values("ms-ssim-db"))) for c in published(dataset, "ms-ssim-db")} == similar

    def test_one_curve_of_a_codec_for_each_metric(self) -> None:
        for metric in ("psnr", "ms-ssim-db"):
            names = [c.name for c in published("kodak", metric)]
            assert len(set(names)) == len(names)
            assert "vtm-9.1" in names
        assert published("tecnick", "ms-ssim-db") == []
        assert all(c.settings and c.source == "published" for d in DATASETS for c in published(d))

    def test_unknown_set(self) -> None:
        with pytest.raises(LalicError, match="no published points for 'div2k'"):
            published("div2k")


class TestDatasetOf:
    def test_kodak_itself(self, data_dir: Path) -> None:
        assert dataset_of(data_dir / "kodak") == "kodak"
        names = [f"somewhere/else/kodim{i:02d}.webp" for i in range(24, 0, -1)]
        assert dataset_of(names) == "kodak"

    def test_only_the_whole_set(self) -> None:
        names = [f"kodim{i:02d}.png" for i in range(1, 25)]
        assert dataset_of(names[:-1]) is None
        assert dataset_of([*names, "other.png"]) is None
        assert dataset_of([*names[:-1], "kodim01.jpg"]) is None

    def test_sizes_count(self, tmp_path: Path) -> None:
        for i in range(1, 25):
            Image.new("RGB", (768, 512)).save(tmp_path / f"kodim{i:02d}.png")
        assert dataset_of(tmp_path) == "kodak"
        Image.new("RGB", (384, 256)).save(tmp_path / "kodim07.png")
        assert dataset_of(tmp_path) is None

    def test_tecnick_and_clic(self, root: Path) -> None:
        tecnick = [f"RGB_OR_1200x1200_{i:03d}.png" for i in range(1, 101)]
        assert dataset_of(tecnick) == "tecnick"
        # The first and the last of the 41, and as many of those between as are publicly listed.
        known = json.loads((root / "lalic/anchor_data/clic_professional_valid.json").read_text())["some_names"]
        assert {"alberto-montalesi-176097", "zugr-108"} <= set(known)
        clic = [f"{name}.png" for name in known] + [f"unknown-{i}.png" for i in range(41 - len(known))]
        assert dataset_of(clic) == "clic_professional_valid"
        assert dataset_of([*clic[1:], "x.png"]) is None
        assert dataset_of([*clic, "x.png"]) is None

    def test_nothing(self, tmp_path: Path) -> None:
        assert dataset_of([]) is None
        assert dataset_of(tmp_path) is None
        assert dataset_of(tmp_path / "missing") is None


class TestMeasured:
    @pytest.mark.parametrize("key", FORMATS)
    def test_against_files_really_written(self, key: str, tmp_path: Path) -> None:
        needs(key)
        pictures = [photo_like(40, 56), photo_like(193, 171, seed=5)]
        low, high = FORMATS[key].points[0], FORMATS[key].points[-1]
        curve = measure_pillow(pictures, key.lower(), [low, high], with_ms_ssim=True)
        rates, psnrs = [], []
        for i, picture in enumerate(pictures):
            path = tmp_path / f"{i}.{FORMATS[key].pillow.lower()}"
            path.write_bytes(encode(picture, key, high))
            with Image.open(path) as image:
                assert image.format == FORMATS[key].pillow
                decoded = np.asarray(image.convert("RGB"))
            rates.append(path.stat().st_size * 8 / picture.shape[0] / picture.shape[1])
            psnrs.append(psnr_by_hand(picture, decoded))
        assert curve.bpp[1] == pytest.approx(np.mean(rates))
        assert curve.psnr[1] == pytest.approx(np.mean(psnrs))
        assert curve.ms_ssim[1] == pytest.approx(ms_ssim(pictures[1], decoded))  # the other is too small for it
        assert curve.ms_ssim_db[1] == pytest.approx(-10 * math.log10(1 - curve.ms_ssim[1]))
        assert curve.bpp[0] < curve.bpp[1]
        assert curve.psnr[0] < curve.psnr[1]
        assert psnrs[1] > 30, "the pictures come back in other colours"
        assert (curve.source, curve.points) == ("measured", [low, high])
        assert any(c.isdigit() for c in curve.codec_version)

    def test_jpeg_by_hand(self) -> None:
        picture = photo_like(40, 56)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=80, optimize=True, subsampling=2)
        assert encode(picture, "JPEG", 80) == buffer.getvalue()

    def test_jpeg2000_uses_the_colour_transform(self) -> None:
        needs("JPEG2000")
        picture = photo_like(128, 128)
        grey = np.repeat(picture[..., :1], 3, axis=-1)
        data = encode(grey, "JPEG2000", 36)
        buffer = io.BytesIO()
        Image.fromarray(grey).save(buffer, "JPEG2000", quality_mode="dB", quality_layers=[36], irreversible=True)
        assert len(data) < 0.6 * len(buffer.getvalue())

    def test_two_processes_measure_the_same(self, tmp_path: Path) -> None:
        for i in range(3):
            Image.fromarray(photo_like(64, 64, i)).save(tmp_path / f"{i}.png")
        assert measure_pillow(tmp_path, "webp", [10, 60], jobs=2) == measure_pillow(tmp_path, "webp", [10, 60])

    def test_infinite_quality_is_left_out(self) -> None:
        flat = np.full((32, 32, 3), 128, dtype=np.uint8)
        curve = measure_pillow([flat], "JPEG", [90])
        assert curve.psnr == [None]
        assert not curve.has("psnr")


class TestBadInput:
    def test_unknown_format(self) -> None:
        with pytest.raises(LalicError, match="choose from JPEG, WEBP, AVIF, JPEG2000, JPEGXL"):
            measure_pillow([photo_like(8, 8)], "GIF")

    def test_missing_codec(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pillow_jxl", None)
        with pytest.raises(LalicError, match=r"JPEG XL cannot be measured: .*pip install 'lalic\[anchors\]'"):
            measure_pillow([photo_like(8, 8)], "jxl")

    def test_picture_that_a_format_cannot_hold(self) -> None:
        wide = np.zeros((1, 20000, 3), dtype=np.uint8)
        with pytest.raises(LalicError, match="WebP cannot code a picture of 20000x1"):
            measure_pillow([wide], "webp", [50])

    def test_nothing_to_measure(self) -> None:
        with pytest.raises(LalicError, match="0 images"):
            measure_pillow([], "jpeg")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("<html>", "not JSON"),
            ("[1]", "no list of anchors"),
            ('{"results": {}}', "no list of anchors"),
            ('{"anchors": [{"label": "x"}]}', "damaged"),
            ('{"anchors": [3]}', "damaged"),
            ('{"anchors": [{"label": "x", "bpp": [1, 2], "psnr": [30]}]}', "damaged"),
        ],
    )
    def test_damaged_files(self, tmp_path: Path, content: str, message: str) -> None:
        path = tmp_path / "a.json"
        path.write_text(content)
        with pytest.raises(LalicError, match=message):
            read_anchors(path)


class TestCommand:
    def test_writes_what_is_read_back(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "images").mkdir()
        for i in range(2):
            Image.fromarray(photo_like(164, 170, i)).save(tmp_path / "images" / f"{i}.png")
        output = tmp_path / "made" / "anchors.json"
        assert main([str(tmp_path / "images"), "-o", str(output), "--formats", "jpeg", "webp"]) == 0
        curves = read_anchors(output)
        assert [c.label for c in curves] == ["JPEG", "WebP"]
        direct = measure_pillow(tmp_path / "images", "jpeg", with_ms_ssim=True)
        assert curves[0].bpp == pytest.approx(direct.bpp, abs=1e-8)
        assert curves[0].values("ms-ssim-db") == pytest.approx(direct.values("ms-ssim-db"), abs=1e-8)
        assert curves[0].points == list(FORMATS["JPEG"].points)
        assert json.loads(output.read_text())["images"]["used"] == 2
        assert "JPEG" in capsys.readouterr().out

    def test_published_points_of_other_images(self, tmp_path: Path) -> None:
        Image.fromarray(photo_like(16, 16)).save(tmp_path / "a.png")
        with pytest.raises(LalicError, match="no published points for these images"):
            main([str(tmp_path), "-o", str(tmp_path / "a.json"), "--formats", "published"])

    def test_all_is_what_is_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pillow_jxl", None)
        monkeypatch.setattr(anchors, "measure_pillow", lambda images, key, **_: Curve(key, [], []))
        assert [c.label for c in anchors.gather([], ["all"], "kodak")][-1] == "JPEG2000"
        assert anchors.gather([], ["all"], "kodak")[0].source == "published"
        assert anchors.gather([], ["all"], None)[0].label == "JPEG"

    def test_round_trip(self) -> None:
        for curve in published("kodak"):
            data = json.loads(json.dumps({"anchors": [curve.to_json()]}))
            assert curves_of(data, "x") == [curve]
