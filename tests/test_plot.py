"""Pictures of curves: what is drawn, the same bytes each time, and pixels that stay as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lalic.curve import Curve
from lalic.errors import LalicError
from lalic.plot import colour, main, plot_rd, side_by_side, window
from lalic.report.chart import Series, marker
from lalic.results import read_curve

Picture = NDArray[np.uint8]
pytest.importorskip("matplotlib")

LINE = Curve("line", [0.9, 0.2], [33.0, 28.0], [15.0, 10.0])


def random_picture(height: int, width: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class TestPlotRD:
    @pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
    def test_same_input_same_bytes(self, tmp_path: Path, suffix: str) -> None:
        curves = [Curve("one point", [0.5], [30.0]), LINE]
        paths = [tmp_path / name / f"rd{suffix}" for name in "ab"]
        for path in paths:
            plot_rd(curves, path, "Rate-distortion")
        first, second = (path.read_bytes() for path in paths)
        assert first == second
        assert first.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
        if suffix == ".png":
            assert np.asarray(Image.open(paths[0])).std() > 1

    def test_points_are_where_they_belong(self, tmp_path: Path) -> None:
        """The markers in the SVG, in the coordinates of the axes' ticks."""
        curve = Curve("c", [0.2, 0.4, 0.8], [30.0, 32.0, 36.0])
        plot_rd([curve], tmp_path / "rd.svg", "")
        text = (tmp_path / "rd.svg").read_text()
        line = re.search(r'<g id="line2d_\d+">\s*<path d="([^"]*)" clip-path[^>]*stroke: #d55e00', text, re.I)
        assert line, "the curve is drawn as a line of its colour"
        xs, ys = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", line[1]), float).T
        assert (xs[1] - xs[0]) / (xs[2] - xs[0]) == pytest.approx(1 / 3, abs=1e-3)
        assert (ys[0] - ys[1]) / (ys[0] - ys[2]) == pytest.approx(1 / 3, abs=1e-3)

    def test_two_panels(self, tmp_path: Path) -> None:
        plot_rd([LINE], tmp_path / "one.png", "t")
        plot_rd([LINE], tmp_path / "two.png", "t", ["psnr", "ms-ssim-db"])
        one, two = (Image.open(tmp_path / f"{name}.png").width for name in ("one", "two"))
        assert two == 2 * one

    def test_no_two_of_nine_curves_look_alike(self) -> None:
        curves = [Curve(f"{i}", [0.1], [30.0]) for i in range(9)]
        looks = set()
        for i, curve in enumerate(curves):
            shape = marker(Series(curve, i, own=False), 0, 0)
            looks.add((colour(i), shape))
        assert len(looks) == 9
        assert [colour(i) for i in range(9)].count(0) == [colour(i) for i in range(9)].count(1) == 1

    def test_missing_values_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(LalicError, match="no psnr"):
            plot_rd([Curve("x", [0.1, 0.2], [30.0, None])], tmp_path / "rd.png", "t")

    def test_a_label_is_no_formula(self, tmp_path: Path) -> None:
        plot_rd([Curve("$\\no such command$", [0.2, 0.4], [30.0, 32.0])], tmp_path / "rd.png", "a $ and $\\b")

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        with pytest.raises(LalicError, match=r"\.svg"):
            plot_rd([Curve("x", [0.1], [30.0])], tmp_path / "rd.jpg", "t")

    def test_window_ends_a_little_beyond_the_results(self) -> None:
        far = Curve("far", [0.01, 4.0], [10.0, 50.0])
        right, low, high = window([LINE, far], [LINE], "psnr")
        assert 0.9 < right < 1.2
        assert 22 < low < 28
        assert 33 < high < 37


class TestCommand:
    def test_with_live_codecs(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "images").mkdir()
        Image.fromarray(random_picture(32, 32)).save(tmp_path / "images" / "a.png")
        result = tmp_path / "result.json"
        result.write_text(json.dumps({"name": "LALIC", "results": {"bpp": [0.4], "psnr": [25.0]}}))
        output = tmp_path / "rd.png"
        assert main([str(result), "-o", str(output), "--images", str(tmp_path / "images")]) == 0
        assert output.stat().st_size > 1000
        assert str(output) in capsys.readouterr().out

    def test_published_curves_of_the_test_set(self, tmp_path: Path) -> None:
        output = tmp_path / "rd.svg"
        assert main(["lalic-mse", "--dataset", "kodak", "-o", str(output), "--metric", "both"]) == 0
        text = output.read_text()
        # Letters are drawn as shapes; what they spell stands in comments.
        for label in ("LALIC (MSE)", "LALIC (MS-SSIM)", "VTM-9.1", "Kodak, 24 pictures"):
            assert f"<!-- {label} -->" in text
        assert text.count("<!-- VTM-9.1 -->") == 2
        assert main(["lalic-mse", "--dataset", "kodak", "-o", str(output), "--anchor"]) == 0
        assert "<!-- VTM-9.1 -->" not in output.read_text()

    def test_suffix_is_refused_before_anything_is_measured(self, tmp_path: Path) -> None:
        with pytest.raises(LalicError, match="can be written as"):
            main(["lalic-mse", "--dataset", "kodak", "-o", str(tmp_path / "rd.gif"), "--images", "nowhere"])


class TestReadCurve:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "not a result file"),
            ("[" * 100_000, "not a result file"),
            ('{"results": {}}', "not a result file"),
            ('{"results": {"bpp": [1], "psnr": []}}', "not a curve"),
            ('{"results": {"bpp": [1], "psnr": ["good"]}}', "not a number"),
            ('{"results": {"bpp": [0], "psnr": [30]}}', "positive"),
            ('{"results": {"bpp": [1e300], "psnr": [30]}}', "not a number"),
            ('{"results": {"bpp": [1], "psnr": [1%s]}}' % ("0" * 400), "not a number"),
            ('{"results": {"bpp": [null], "psnr": [30]}}', "positive"),
        ],
        ids=["cut", "deep", "empty", "lengths", "text", "zero", "huge", "long", "null"],
    )
    def test_what_is_no_result(self, tmp_path: Path, content: str, message: str) -> None:
        path = tmp_path / "r.json"
        path.write_text(content)
        with pytest.raises(LalicError, match=message):
            read_curve(path)


def test_side_by_side_keeps_the_pixels(tmp_path: Path) -> None:
    a, b = random_picture(30, 50), random_picture(30, 50, seed=1)
    path = tmp_path / "pair.png"
    side_by_side(a, b, path, ("original", "a caption much longer than the picture is wide"))
    canvas = np.asarray(Image.open(path))
    assert np.array_equal(canvas[-30:, :50], a)
    assert np.array_equal(canvas[-30:, -50:], b)
