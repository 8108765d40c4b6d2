"""The report as a file: whole, self-contained, honest about what is missing, and safe against names."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from report_sample import BLUES, LABELS, NAMES, RED, flat, write_sample

from lalic.errors import LalicError
from lalic.model import LALIC, published_state_dict
from lalic.report import PictureOptions, write_report
from lalic.report.chart import ticks
from lalic.report.cli import main
from lalic.report.html import number, size, slug, text
from lalic.report.pictures import chosen, heat, heat_colours
from lalic.report.viewer import shortened

VOID = {"meta", "link", "img", "input"}


class Page(HTMLParser):
    """A parser that insists on balanced tags, and collects what tests ask for."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not set(self.open) & {"script", "style"}:
            self.words.append(data)

    @property
    def said(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, name: str) -> Iterator[str]:
        return (value for _, attrs in self.tags for key, value in attrs.items() if key == name and value is not None)

    def pictures(self) -> dict[str, np.ndarray]:
        """The embedded pictures by their alternative text."""
        out = {}
        for tag, attrs in self.tags:
            if tag == "img":
                data = base64.b64decode(str(attrs["src"]).split(",", 1)[1])
                out[str(attrs["alt"])] = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        return out


def report(result: dict[str, Any], folder: Path, recon: Path | None = None, **options: Any) -> Page:
    write_report(result, folder / "r.html", reconstructions=recon, options=PictureOptions(**options))
    return Page((folder / "r.html").read_text())


@pytest.fixture
def result(tmp_path: Path) -> dict[str, Any]:
    return write_sample(tmp_path)


class TestFile:
    def test_needs_nothing_from_anywhere(self, result: dict[str, Any], tmp_path: Path) -> None:
        page = report(result, tmp_path, tmp_path / "recon")
        links = [*page.attributes("src"), *page.attributes("href"), *page.attributes("action")]
        ids = set(page.attributes("id"))
        assert len(ids) == len(list(page.attributes("id")))
        for link in links:
            assert link.startswith("data:") or (link.startswith("#") and link[1:] in ids)
        content = (tmp_path / "r.html").read_text()
        assert not re.search(r"url\((?!#)|@import|https?://", content)

    def test_only_its_own_script_may_run(self, result: dict[str, Any], tmp_path: Path) -> None:
        page = report(result, tmp_path, tmp_path / "recon")
        content = (tmp_path / "r.html").read_text()
        scripts = re.findall(r"<script>(.*?)</script>", content, re.S)
        assert len(scripts) == 1
        digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
        policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
        assert f"script-src 'sha256-{digest}'" in str(policy)
        assert "default-src 'none'" in str(policy)
        assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]

    def test_same_input_same_bytes(self, result: dict[str, Any], tmp_path: Path) -> None:
        report(result, tmp_path, tmp_path / "recon")
        first = (tmp_path / "r.html").read_bytes()
        report(result, tmp_path, tmp_path / "recon")
        assert (tmp_path / "r.html").read_bytes() == first

    def test_holds_all_numbers(self, result: dict[str, Any], tmp_path: Path) -> None:
        page = report(result, tmp_path)
        link = next(h for h in page.attributes("href") if h.startswith("data:application/json"))
        held = json.loads(base64.b64decode(link.split(",", 1)[1]))
        assert held["qualities"] == LABELS
        assert len(held["records"]) == len(result["records"])
        assert held["results"]["psnr"] == pytest.approx(result["results"]["psnr"], abs=1e-7)

    def test_what_it_says(self, result: dict[str, Any], tmp_path: Path) -> None:
        page = report(result, tmp_path, tmp_path / "recon")
        for words in (
            "LALIC on images",
            "4 operating points on 3 images, rates from real bytes. CPU & <co>.",
            "0.100 – 0.400",
            "1 image could not be read and count in no number: images/<i>broken.png (damaged)",
            "at least 4 points, the anchor curve has 2",
            "Not on MS-SSIM, which this result does not have.",
            "All 3 images.",
            "libjpeg-turbo 3",
        ):
            assert words in page.said
        for name in (NAMES[0], NAMES[1], "c\\u202egnp.exe.png"):
            assert name in page.said


class TestPictures:
    def test_exact_pixels_and_error_by_hand(self, result: dict[str, Any], tmp_path: Path) -> None:
        pictures = report(result, tmp_path, tmp_path / "recon", lossless=True).pictures()
        assert len(pictures) == len(NAMES) * (1 + 2 * len(LABELS))
        assert (pictures[f"{NAMES[0]}, original"] == RED).all()
        for label in LABELS:
            assert (pictures[f"{NAMES[0]}, reconstruction by {label}"] == BLUES[label]).all()

    def test_error_map(self) -> None:
        a = np.zeros((1, 4, 3), np.uint8)
        b = a.copy()
        b[0, 1:] = [(3, 0, 0), (0, 30, 30), (255, 255, 255)]
        # The mean of the three differences, times 8, no more than 255.
        expected = heat_colours()[[0, 8, 160, 255]]
        assert np.array_equal(heat(a, b, 8)[0], expected)
        assert np.array_equal(heat(b, a, 8)[0], expected)
        tall = np.random.default_rng(0).integers(0, 256, (2, 600, 3, 3), dtype=np.uint8)
        level = np.minimum(np.abs(tall[0].astype(int) - tall[1]).sum(axis=2) * 8 // 3, 255)
        assert np.array_equal(heat(tall[0], tall[1], 8), heat_colours()[level])
        brightness = heat_colours().astype(int) @ (299, 587, 114)
        assert (np.diff(brightness) >= 0).all()

    def test_lossy_pictures_tell_how_exact_they_are(self, result: dict[str, Any], tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        for path in (tmp_path / "images").rglob("*.png"):
            Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
        for path in (tmp_path / "recon").rglob("*.png"):
            flat((9, 9, 9), (80, 60)).save(path)
        for record in result["records"]:
            record["psnr"] = None
        page = report(result, tmp_path, tmp_path / "recon", quality=50)
        worst = np.inf
        for name in (NAMES[0], NAMES[1]):
            original = np.asarray(Image.open(tmp_path / "images" / name)).astype(float)
            shown = page.pictures()[f"{name}, original"]
            worst = min(worst, 10 * np.log10(255**2 / ((original - shown) ** 2).mean()))
        said = float(re.search(r"at least ([\d.]+) dB from the exact pixels", page.said)[1])  # type: ignore[index]
        assert said <= worst + 0.05
        assert said == pytest.approx(worst, abs=1)

    def test_large_pictures_are_reduced(self, result: dict[str, Any], tmp_path: Path) -> None:
        page = report(result, tmp_path, tmp_path / "recon", max_side=48)
        assert {p.shape for p in page.pictures().values()} == {(32, 48, 3)}
        assert "reduced to 48 pixels" in page.said
        assert "480 × 320" in page.said

    def test_how_many(self, result: dict[str, Any], tmp_path: Path) -> None:
        page = report(result, tmp_path, tmp_path / "recon", max_images=2)
        assert "2 of 3 images" in page.said
        page = report(result, tmp_path, tmp_path / "recon", max_bytes=1)
        assert "1 of 3 images" in page.said
        assert "reached 1 B" in page.said
        assert not report(result, tmp_path, tmp_path / "recon", max_images=0).pictures()

    def test_chosen_from_the_lowest_to_the_highest(self) -> None:
        by_file = {
            f: {"q": {"file": f, "psnr": p}} for f, p in zip("abcde", (33.0, 30.0, None, 31.0, 32.0), strict=True)
        }
        assert chosen(by_file, ["q"], 3) == ["b", "c", "e"]
        assert chosen(by_file, ["q"], 9) == list("abcde")
        assert chosen(by_file, ["q"], 1) == ["b"]

    def test_missing_and_foreign_pictures_are_told(self, result: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "images" / NAMES[1]).unlink()
        (tmp_path / "recon" / "low" / NAMES[0]).unlink()
        flat((1, 2, 3)).save(tmp_path / "recon" / "high" / NAMES[0])
        flat(RED, (10, 10)).save(tmp_path / "recon" / "best" / NAMES[0])
        page = report(result, tmp_path, tmp_path / "recon")
        assert f"no reconstruction of {NAMES[0]} by low" in page.said
        assert "it is of another run" in page.said
        assert "is 10x10 pixels large, the image 480x320" in page.said
        shown = page.pictures()
        assert f"{NAMES[0]}, reconstruction by {LABELS[1]}" in shown
        assert f"{NAMES[0]}, reconstruction by high" not in shown
        assert f"{NAMES[1]}, original" not in shown
        assert "no reconstruction by low" in page.said

    def test_moved_folder(self, result: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "images").rename(tmp_path / "elsewhere")
        write_report(result, tmp_path / "r.html", tmp_path / "elsewhere", tmp_path / "recon")
        assert len(Page((tmp_path / "r.html").read_text()).pictures()) == len(NAMES) * 9
        assert not report(result, tmp_path, tmp_path / "recon").pictures()

    def test_no_file_outside_the_folders_is_embedded(self, result: dict[str, Any], tmp_path: Path) -> None:
        """A result from somebody else may name any file; with --images only that folder is read."""
        inside = tmp_path / "inside"
        inside.mkdir()
        flat(RED).save(tmp_path / "secret.png")
        for label in LABELS:
            flat(BLUES[label]).save(tmp_path / "recon" / label / "secret.png")
        for record in result["records"]:
            record["file"] = str(tmp_path / "images" / ".." / "secret.png")
        write_report(result, tmp_path / "r.html", inside, tmp_path / "recon")
        page = Page((tmp_path / "r.html").read_text())
        assert not page.pictures()
        assert "Not shown" in page.said

    def test_without_reconstructions(self, result: dict[str, Any], tmp_path: Path) -> None:
        assert "No folder of reconstructions was given" in report(result, tmp_path).said

    @pytest.mark.parametrize("wrong", [{"max_side": 0}, {"max_images": -1}, {"quality": 0}, {"gain": 0}])
    def test_options_are_checked(self, wrong: dict[str, int]) -> None:
        with pytest.raises(LalicError, match="a report"):
            PictureOptions(**wrong)


class TestOtherResults:
    def test_published_code(self, tmp_path: Path) -> None:
        """It writes a name, a description and lists, but no records."""
        results = {"bpp": [0.1, 0.2, 0.3, 0.4], "psnr": [28.0, 30, 32, 33], "encoding_time": [1, 1, 1, 1.5]}
        page = report({"name": "LALIC", "description": "Inference (ans)", "results": results}, tmp_path)
        assert "no records of single images" in page.said
        assert "Encode" in page.said
        assert "Inference (ans)" in page.said

    def test_compressai(self, tmp_path: Path) -> None:
        results = {"psnr-rgb": [30.0, 31.0], "ms-ssim-rgb": [0.9, 0.99], "bpp": [0.5, 1.0]}
        page = report({"name": "mbt2018", "description": "", "results": results}, tmp_path)
        assert "10.00 – 20.00" in page.said
        assert len([tag for tag, attrs in page.tags if tag == "svg" and attrs["class"] == "chart"]) == 2

    def test_one_point_without_quality(self, tmp_path: Path) -> None:
        page = report({"name": "x", "results": {"bpp": [8.0], "psnr": [None]}}, tmp_path)
        assert "nothing to draw" in page.said

    def test_published_curves_of_a_known_test_set(self, tmp_path: Path) -> None:
        records = [{"file": f"kodak/kodim{i:02d}.png"} for i in range(1, 25)]
        results = {"bpp": [0.114841, 0.186171, 0.285692, 0.425758, 0.601301, 0.830638]}
        results["psnr"] = [29.255744, 30.853991, 32.555155, 34.31158, 36.095768, 37.933255]
        page = report({"name": "Mine", "results": results, "records": records}, tmp_path)
        assert "Mine on Kodak" in page.said
        assert "−15.26 %" in page.said
        alone = tmp_path / "alone"
        write_report({"name": "Mine", "results": results}, alone / "r.html", with_published=False)
        assert "nothing to compare with" in Page((alone / "r.html").read_text()).said

    @pytest.mark.parametrize(
        "damaged",
        [
            {"records": "none"},
            {"records": [{"file": 3}, {"file": ""}, {}, 4]},
            {"models": [1, 2], "environment": 7, "images": [], "skipped": [5], "qualities": ["a"]},
            {"qualities": ["a", "a"], "models": [{"loss": {"lambda": "x"}}, {"loss": None}]},
            {"records": [{"file": "a.png", "quality": "1", "bpp": "much", "psnr": [], "width": {}, "bytes": -1}]},
        ],
    )
    def test_odd_members_do_not_end_it(self, tmp_path: Path, damaged: dict[str, Any]) -> None:
        results = {"bpp": [0.1, 0.2], "psnr": [30.0, 31.0], "bpp-gap-percent": ["x", None], "enc_time": ["y", {}]}
        report({"name": "x", "results": results, **damaged}, tmp_path, tmp_path)


class TestCommand:
    def test_writes_the_page(self, result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path, more = tmp_path / "r.json", tmp_path / "more.json"
        path.write_text(json.dumps(result))
        more.write_text(json.dumps({"name": "<Other>", "results": result["results"]}))
        output = tmp_path / "made" / "r.html"
        arguments = ["--reconstructions", str(tmp_path / "recon"), "--compare", str(more), "--max-images", "1"]
        assert main([str(path), "-o", str(output), *arguments]) == 0
        page = Page(output.read_text())
        assert "1 of 3 images" in page.said
        assert "<Other>" in page.said
        assert str(output) in capsys.readouterr().out

    def test_results_of_one_name_are_told_apart(self, result: dict[str, Any], tmp_path: Path) -> None:
        for name, factor in (("mine", 1.0), ("theirs", 0.5)):
            results = {**result["results"], "bpp": [factor * b for b in result["results"]["bpp"]]}
            (tmp_path / f"{name}.json").write_text(json.dumps({"name": "LALIC", "results": results}))
        output = tmp_path / "r.html"
        assert main([str(tmp_path / "mine.json"), "-o", str(output), "--compare", str(tmp_path / "theirs.json")]) == 0
        page = Page(output.read_text())
        assert "LALIC (mine), evaluated" in page.said
        assert "LALIC (theirs) +100.00 %" in page.said

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere.json"], "no such file|cannot be read"),
            (["ANCHORS"], "anchors alone"),
            (["RESULT", "--images", "nowhere"], "no such folder"),
            (["RESULT", "--max-side", "1"], "16 pixels or more"),
            (["RESULT", "--compare", "nowhere.json"], "no such file"),
        ],
    )
    def test_bad_input_is_one_line_and_writes_nothing(
        self, result: dict[str, Any], tmp_path: Path, arguments: list[str], message: str
    ) -> None:
        places = {"RESULT": tmp_path / "r.json", "ANCHORS": tmp_path / "a.json"}
        places["RESULT"].write_text(json.dumps(result))
        places["ANCHORS"].write_text(json.dumps({"anchors": result["anchors"]}))
        with pytest.raises(LalicError, match=message) as caught:
            main([*(str(places.get(a, a)) for a in arguments), "-o", str(tmp_path / "r.html")])
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "r.html").exists()


def test_evaluation_writes_its_report(tmp_path: Path) -> None:
    from lalic.eval import main as evaluate

    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 256, (40, 70, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{name}.png")
    torch.manual_seed(0)
    model = LALIC(N=8, dims=(8, 12, 16, 32, 16, 8), depths=(1, 1, 1, 1), groups=(4, 4, 8, 16))
    torch.save(published_state_dict(model), tmp_path / "lalic-mse-q1.pth")
    folders = ["-i", str(tmp_path / "images"), "-o", str(tmp_path / "recon")]
    outputs = ["--result", str(tmp_path / "r.json"), "--report", str(tmp_path / "made" / "r.html")]
    assert evaluate(["-p", str(tmp_path / "lalic-mse-q1.pth"), *folders, *outputs]) == 0
    page = Page((tmp_path / "made" / "r.html").read_text())
    assert "rates estimated from the likelihoods" in page.said
    assert len(page.pictures()) == 2 * 3
    # The same page comes from the result file alone.
    assert main([str(tmp_path / "r.json"), "-o", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "made" / "r.html").read_bytes()


class TestText:
    def test_shortened_labels(self) -> None:
        assert shortened(["lalic-mse-q1", "lalic-mse-q2"]) == ["q1", "q2"]
        assert shortened(["lalic-mse-q1", "lalic-ms-ssim-q1"]) == ["mse-q1", "ms-ssim-q1"]
        for labels in (["q1", "q2"], ["lalic-q1"], ["a-", "a-b"], []):
            assert shortened(labels) == labels

    def test_markup_and_control_characters(self) -> None:
        assert text("<b>\"&'\x1b[31m\u202e") == "&lt;b&gt;&quot;&amp;&#x27;\\x1b[31m\\u202e"
        assert text("\udcff.png") == "\\udcff.png"
        assert re.fullmatch(r"[a-z0-9-]+", slug('"><script>', 3))
        assert slug("q1", 0) != slug("q1", 1)

    def test_numbers(self) -> None:
        assert number(-1.005, 1) == "−1.0"
        assert number(12345.678, 2) == "12\u202f345.68"
        assert number(0.4, 2, sign=True) == "+0.40"
        assert [number(v, 2) for v in (None, float("nan"), float("inf"), "3", True)] == ["–"] * 5
        assert [size(v) for v in (0, 1023, 1536, 200 * 1024, 3 * 2**30)] == [
            "0 B",
            "1023 B",
            "1.5 KiB",
            "200 KiB",
            "3.0 GiB",
        ]

    @pytest.mark.parametrize(("low", "high", "first", "last", "step"), [(0, 1, 0, 1, 0.2), (26.3, 38.1, 28, 38, 2)])
    def test_ticks_are_round(self, low: float, high: float, first: float, last: float, step: float) -> None:
        found = ticks(low, high, 6)
        assert found[0] == first
        assert found[-1] == last
        assert np.allclose(np.diff(found), step)
