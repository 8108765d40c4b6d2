"""BD-rate against published figures and exact cases, and the command that compares."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lalic.bdrate import bd_rate, compare, main
from lalic.curve import Curve
from lalic.errors import LalicError

QUALITY = [28.0, 30.0, 32.0, 34.0, 36.0]
RATE = [0.1, 0.2, 0.4, 0.7, 1.1]
PUBLISHED = [("kodak", "-15.26"), ("clic_professional_valid", "-15.41"), ("tecnick", "-17.63")]


def write(path: Path, rate: list[float], name: str = "LALIC", **more: Any) -> str:
    results = {"bpp": rate, "psnr": QUALITY[: len(rate)], **more.pop("results", {})}
    path.write_text(json.dumps({"name": name, "results": results, **more}))
    return str(path)


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The words of each line that was printed."""
    return [line.split() for line in capsys.readouterr().out.splitlines() if line]


class TestBDRate:
    @pytest.mark.parametrize(
        ("dataset", "published"), [("kodak", -15.26), ("clic_professional_valid", -15.41), ("tecnick", -17.63)]
    )
    def test_published_figures(self, reference_dir: Path, dataset: str, published: float) -> None:
        curves = json.loads((reference_dir / "published_rd.json").read_text())["curves"][dataset]
        lalic, vtm = curves["LALIC-mse"], curves["VTM-9.1"]
        value = bd_rate(vtm["bpp"], vtm["psnr"], lalic["bpp"], lalic["psnr"])
        assert round(value, 2) == published

    def test_ten_percent_fewer_bits(self) -> None:
        rate, quality = [0.1, 0.2, 0.4, 0.8, 1.5], [27.0, 30.0, 33.5, 36.0, 39.0]
        assert bd_rate(rate, quality, [r * 0.9 for r in rate], quality) == pytest.approx(-10, abs=1e-10)

    def test_order_of_points_is_free(self) -> None:
        rate, quality = [0.1, 0.2, 0.4, 0.8], [27.0, 30.0, 33.5, 36.0]
        other = [0.11, 0.19, 0.35, 0.7]
        forward = bd_rate(rate, quality, other, quality)
        assert bd_rate(rate[::-1], quality[::-1], other, quality) == forward

    def test_ratio_inverts(self) -> None:
        a, b = ([0.1, 0.2, 0.4, 0.8], [27.0, 30.0, 33.5, 36.0]), ([0.1, 0.25, 0.5, 0.7], [28.0, 31, 34, 35.5])
        there, back = bd_rate(*a, *b), bd_rate(*b, *a)
        assert (1 + there / 100) * (1 + back / 100) == pytest.approx(1, abs=1e-12)

    @pytest.mark.parametrize(
        ("rate", "quality", "message"),
        [
            ([0.1, 0.2, 0.3], [30, 31, 32], "at least 4 points"),
            ([0.1, 0.2, 0.3, 0.4], [30, 31, 32], "4 rates but 3"),
            ([0.1, 0.2, 0.3, 0.4], [50, 51, 52, 53], "share no range"),
            ([0.1, 0.2, 0.15, 0.4], [30, 31, 32, 33], "must rise"),
            ([0.1, 0.2, 0.3, 0.4], [30, 31, 31, 33], "must rise"),
            ([0.0, 0.2, 0.3, 0.4], [30, 31, 32, 33], "not positive"),
            ([0.1, 0.2, 0.3, 0.4], [30, 31, 32, math.inf], "not finite"),
            ([0.1, 0.2, 0.3, 0.4], [30, 31, 32, None], "empty value"),
        ],
        ids=["few", "lengths", "apart", "falling", "repeated", "zero", "infinite", "null"],
    )
    def test_what_is_no_curve(self, rate: list[float], quality: list[float], message: str) -> None:
        with pytest.raises(LalicError, match=message):
            bd_rate([0.1, 0.2, 0.3, 0.4], [30, 31, 32, 33], rate, quality)


class TestCompare:
    def test_range_that_both_cover(self) -> None:
        a, b = Curve("a", RATE, list(QUALITY)), Curve("b", [r / 2 for r in RATE], [q + 1 for q in QUALITY])
        pair = compare(a, b, "psnr")
        assert (pair.test, pair.anchor, pair.low, pair.high, pair.reason) == ("a", "b", 29.0, 36.0, "")
        assert pair.percent == bd_rate(b.bpp, b.values("psnr"), a.bpp, a.values("psnr"))

    def test_reasons(self) -> None:
        a = Curve("a", RATE, list(QUALITY))
        for other, reason in (
            (Curve("few", RATE[:3], list(QUALITY[:3])), "at least 4 points"),
            (Curve("far", RATE, [q + 20 for q in QUALITY]), "share no range"),
            (Curve("holes", RATE, [*QUALITY[:4], None]), "holes has no PSNR"),
        ):
            pair = compare(a, other, "psnr")
            assert pair.percent is None
            assert reason in pair.reason
        assert compare(a, a, "ms-ssim-db").reason == "a has no MS-SSIM for each of its points"


class TestCommand:
    @pytest.mark.parametrize(("dataset", "published"), PUBLISHED)
    def test_published_figures(self, capsys: pytest.CaptureFixture[str], dataset: str, published: str) -> None:
        assert main(["lalic-mse", "--anchor", "vtm-9.1", "--dataset", dataset]) == 0
        assert ["LALIC", "(MSE)", published] in lines_of(capsys)

    def test_published_figures_of_a_result_file(
        self, reference_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        curves = json.loads((reference_dir / "published_rd.json").read_text())["curves"]["kodak"]
        files = [f"kodak/kodim{i:02d}.png" for i in range(1, 25)]
        path = tmp_path / "r.json"
        records = [{"file": file} for file in files]
        path.write_text(json.dumps({"name": "ours", "results": curves["LALIC-mse"], "records": records}))
        # The test set is told by the images, and its published curves are what there is to compare with.
        assert main([str(path), "--metric", "psnr", "-o", str(tmp_path / "sub" / "bd.json")]) == 0
        printed = lines_of(capsys)
        assert printed[0] == ["test", "set:", "kodak"]
        rows = [line for line in printed if line[0] == "ours" and "-15.26" in line]
        assert len(rows) == 1
        pairs = json.loads((tmp_path / "sub" / "bd.json").read_text())["bd-rate"]
        figures = {(p["test"], p["anchor"]): p["percent"] for p in pairs}
        assert figures["ours", "VTM-9.1"] == pytest.approx(-15.26, abs=0.005)
        assert figures["ours", "LALIC (MSE)"] == pytest.approx(0, abs=1e-9)

    def test_all_pairs(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        a = write(tmp_path / "a.json", RATE)
        b = write(tmp_path / "b.json", [r / 2 for r in RATE])
        assert main([a, b, "--metric", "psnr"]) == 0
        # Two results of one name are told apart by their files.
        printed = lines_of(capsys)
        assert printed[1:] == [
            ["LALIC", "(a)", "LALIC", "(b)"],
            ["LALIC", "(a)", "+100.00"],
            ["LALIC", "(b)", "-50.00"],
        ]

    def test_anchors_in_the_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        jpeg = {"name": "jpeg", "label": "JPEG", "source": "measured", "bpp": [2 * r for r in RATE], "psnr": QUALITY}
        path = write(tmp_path / "a.json", RATE, anchors=[jpeg])
        assert main([path]) == 0
        out = capsys.readouterr().out
        assert "-50.00" in out
        assert "MS-SSIM: not computed (LALIC has no MS-SSIM for each of its points)" in out

    def test_ms_ssim_of_compressai(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """CompressAI writes MS-SSIM plainly; in dB it is -10 log10(1 - MS-SSIM)."""
        plain = [1 - 10 ** (-q / 10) for q in (10.0, 12.0, 14.0, 16.0, 18.0)]
        paths = []
        for name, factor in (("a", 1.0), ("b", 0.8)):
            results = {"bpp": [factor * r for r in RATE], "psnr-rgb": QUALITY, "ms-ssim-rgb": plain}
            (tmp_path / f"{name}.json").write_text(json.dumps({"name": name, "results": results}))
            paths.append(str(tmp_path / f"{name}.json"))
        assert main([*paths, "--metric", "ms-ssim-db"]) == 0
        assert ["b", "-20.00"] in lines_of(capsys)

    def test_one_that_fails_does_not_hide_the_others(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        paths = [write(tmp_path / f"{n}.json", RATE[:count], n) for n, count in (("a", 5), ("b", 5), ("c", 3))]
        assert main([*paths, "--metric", "psnr"]) == 0
        out = capsys.readouterr().out
        assert "+0.00" in out
        assert "at least 4 points, the anchor curve has 3" in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere.json"], "nowhere.json: no such file.*--dataset"),
            (["A"], "nothing to compare with"),
            (["A", "--anchor", "C", "--metric", "psnr"], "no BD-rate could be computed: .*at least 4 points"),
            (["A", "--anchor", "h266", "--dataset", "kodak"], r"neither a file nor .* kodak \(lalic-mse, vtm-9.1"),
            (["A", "--labels", "x", "y"], "1 curves but 2 labels"),
            (["T"], "not a result file"),
            (["E"], "it has no lists"),
        ],
        ids=["missing", "alone", "few", "unknown", "labels", "text", "empty"],
    )
    def test_bad_input_is_one_line(self, tmp_path: Path, arguments: list[str], message: str) -> None:
        places = {
            "A": write(tmp_path / "a.json", RATE),
            "C": write(tmp_path / "c.json", RATE[:3]),
            "T": str(tmp_path / "t.json"),
            "E": str(tmp_path / "e.json"),
        }
        Path(places["T"]).write_text("<html>")
        Path(places["E"]).write_text("{}")
        with pytest.raises(LalicError, match=message) as caught:
            main([places.get(a, a) for a in arguments])
        assert "\n" not in str(caught.value)
