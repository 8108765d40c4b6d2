"""`lalic compare`: files at equal bytes beside brute force, what sheets show pixel by pixel, one line for errors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkout_root import ROOT
from numpy.typing import NDArray
from photo_like import photo_like
from PIL import Image
from tiny_codec import picture, tiny_model

from lalic import equal_bytes
from lalic.anchors import FORMATS, encode
from lalic.codec import cli as codec_cli
from lalic.compare import main
from lalic.equal_bytes import SCALES, best_within
from lalic.errors import LalicError
from lalic.metrics import psnr
from lalic.model import published_state_dict
from lalic.picture_sheet import CELL, Box, Version, draw_sheet, part_size, where_they_differ

Picture = NDArray[np.uint8]


def plain_jpeg(rgb: Picture, quality: int) -> bytes:
    """As somebody would write it with Pillow alone, in the smaller of two ways."""
    files = []
    for progressive in (True, False):
        buffer = io.BytesIO()
        Image.fromarray(rgb).save(
            buffer, "jpeg", quality=quality, subsampling=2, optimize=True, progressive=progressive
        )
        files.append(buffer.getvalue())
    return min(files, key=len)


@pytest.fixture(scope="module")
def files() -> tuple[Picture, dict[int, bytes]]:
    rgb = photo_like(120, 184, seed=3)
    return rgb, {q: plain_jpeg(rgb, q) for q in range(1, 101)}


class TestEqualBytes:
    def test_the_best_jpeg_of_all(self, files: tuple[Picture, dict[int, bytes]]) -> None:
        """At every border between two qualities, a byte less and a byte more too."""
        rgb, every = files
        smallest = len(every[1])
        for size in sorted({len(data) + d for data in every.values() for d in (-1, 0, 1)})[::7]:
            fitted = best_within(rgb, "jpeg", size)
            best = max((q for q, data in every.items() if len(data) <= size), default=1)
            assert (fitted.quality, fitted.data) == (best, every[best]), size
            assert fitted.fits == (size >= smallest)

    def test_bisection_sees_a_dip_above_the_border(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sizes of a scale that does not rise at every step: 20 is too large, 21 and 22 are not."""
        sizes = {q: 10 * q for q in range(1, 101)} | {20: 900, 21: 195, 22: 198}
        monkeypatch.setattr(equal_bytes, "encode", lambda rgb, key, q, **_: b"x" * sizes[q])
        fitted = best_within(photo_like(8, 8), "jpeg", 199)
        assert (fitted.quality, len(fitted.data)) == (22, 198)

    @pytest.mark.parametrize("key", list(FORMATS))
    def test_every_format(self, key: str) -> None:
        if FORMATS[key].version() is None:
            pytest.skip(FORMATS[key].missing)
        rgb = photo_like(72, 104)
        budget = len(encode(rgb, key, 35)) + 10
        fitted = best_within(rgb, key, budget)
        assert fitted.fits and fitted.quality >= 35 and FORMATS[key].label in fitted.label
        assert fitted.decoded().shape == rgb.shape and psnr(rgb, fitted.decoded()) > 20
        above = fitted.quality + 1
        assert above > SCALES[key][1] or len(encode(rgb, key, above)) > budget

    def test_the_highest_quality_when_there_is_room(self) -> None:
        assert best_within(photo_like(16, 16), "jpeg", 10**6).quality == 100

    def test_when_nothing_is_so_small(self) -> None:
        fitted = best_within(photo_like(64, 64), "jpg", 50)
        assert not fitted.fits and fitted.quality == 1 and fitted.data == plain_jpeg(photo_like(64, 64), 1)

    def test_unknown_format(self) -> None:
        with pytest.raises(LalicError, match="choose from"):
            best_within(photo_like(8, 8), "heic", 100)


class TestSheet:
    def test_where_pictures_differ_most_against_brute_force(self) -> None:
        rng = np.random.default_rng(5)
        for _ in range(10):
            a, b = (rng.integers(0, 256, (23, 31, 3), dtype=np.uint8) for _ in range(2))
            height, width = int(rng.integers(1, 23)), int(rng.integers(1, 31))
            squares = ((a.astype(float) - b) ** 2).sum(axis=2)
            sums = {
                (top, left): squares[top : top + height, left : left + width].sum()
                for top in range(23 - height + 1)
                for left in range(31 - width + 1)
            }
            found = where_they_differ(a, b, height, width)
            assert (found.top, found.left) == max(sums, key=lambda place: sums[place])
            assert found.of(a).shape == (height, width, 3)

    def test_equal_pictures(self) -> None:
        a = photo_like(20, 20)
        assert where_they_differ(a, a, 5, 6) == Box(0, 0, 6, 5)
        assert where_they_differ(a, a, 20, 20) == Box(0, 0, 20, 20)

    @pytest.mark.parametrize("zoom", [1, 3, 4, 40])
    def test_the_part_is_enlarged_pixel_by_pixel(self, zoom: int) -> None:
        rgb = picture(480, 700)
        height, width = part_size(480, 700, zoom)
        part = Box(30, 0, width, height)
        sheet = np.asarray(draw_sheet([Version(rgb, ("a", "b"))], part))
        enlarged = np.kron(part.of(rgb), np.ones((zoom, zoom, 1), np.uint8))
        left = (CELL - enlarged.shape[1]) // 2
        bottom = sheet.shape[0] - CELL // 80
        shown = sheet[bottom - enlarged.shape[0] : bottom, left : left + enlarged.shape[1]]
        assert np.array_equal(shown, enlarged)

    @pytest.mark.parametrize(("count", "across", "down"), [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 2, 2), (5, 3, 2)])
    def test_rows(self, count: int, across: int, down: int) -> None:
        rgb = photo_like(64, 96)
        one, many = (draw_sheet([Version(rgb, ("x",))] * n, Box(0, 0, 9, 9)) for n in (1, count))
        assert round(many.width / one.width) == across and round(many.height / one.height) == down

    @pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (7, 5), (768, 512), (900, 1300)])
    def test_any_size_fits(self, size: tuple[int, int]) -> None:
        rgb = photo_like(*size)
        part = where_they_differ(rgb, rgb, *part_size(*size, 4))
        sheet = draw_sheet([Version(rgb, ("a long caption " * 9, "b"))] * 2, part, "a note " * 60)
        assert sheet.width == 2 * CELL + 16 and sheet.height < 4 * CELL

    def test_captions_do_not_overlap_the_picture(self) -> None:
        """A caption that takes two lines in one column moves the pictures of all down."""
        rgb = np.full((64, 64, 3), 200, np.uint8)
        short, long = (
            draw_sheet([Version(rgb, (c,)), Version(rgb, ("x",))], Box(0, 0, 8, 8)) for c in ("x", "word " * 30)
        )
        assert long.height > short.height
        strip = np.asarray(long)[:, -CELL:]
        rows = np.flatnonzero((strip == 200).all(axis=2).any(axis=1))
        assert rows[0] >= long.height - short.height


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LALIC_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "lalic-mse-q3.pth"
    torch.save(published_state_dict(tiny_model()), path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(photo_like(170, 190)).save(tmp_path / "sea.png")
    return tmp_path / "sea.png"


class TestCommand:
    def test_bytes_are_those_of_files_that_people_send(
        self, photo: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        words = [str(photo), "-o", str(out), "--weights", str(weights), "--formats", "jpeg", "webp", "--files"]
        assert main(words) == 0
        printed = capsys.readouterr().out
        codec_cli.main(["compress", str(photo), "sent.lalic", "--weights", str(weights)])
        codec_cli.main(["decompress", "sent.lalic", "back.png", "--weights", str(weights)])
        sent = (tmp_path / "sent.lalic").read_bytes()
        assert (out / "sea-compared.lalic").read_bytes() == sent
        jpeg = (out / "sea-compared.jpg").read_bytes()
        assert len(jpeg) <= len(sent) and len((out / "sea-compared.webp").read_bytes()) <= len(sent)
        rgb = np.asarray(Image.open(photo))
        with Image.open(out / "sea-compared.jpg") as image:
            assert jpeg == plain_jpeg(rgb, best_within(rgb, "jpeg", len(sent)).quality)
            decoded = np.asarray(image)
        rows = [line for line in printed.splitlines() if line.startswith("| sea.png")]
        back = np.asarray(Image.open("back.png"))
        for row, data, shown in zip(rows, (sent, jpeg), (back, decoded), strict=False):
            mse = np.mean((rgb.astype(float) - shown) ** 2)
            assert f"| {len(data)} | {8 * len(data) / 170 / 190:.4f} | {10 * np.log10(255**2 / mse):.2f} |" in row
        assert "LALIC, lalic-mse-q3" in rows[0] and "JPEG, quality" in rows[1] and "WebP" in rows[2]
        sheet = Image.open(out / "sea-compared.png")
        assert sheet.width == 2 * CELL + 16  # four versions: two rows of two

    def test_weights_are_chosen_as_for_compress(
        self, photo: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("LALIC_WEIGHTS", str(weights))
        main([str(photo), "-o", "out", "--formats", "--quality", "3"])
        assert "LALIC, lalic-mse-q3" in capsys.readouterr().out
        with pytest.raises(LalicError, match="of quality 6"):
            main([str(photo), "-o", "out", "--quality", "6"])
        main([str(photo), "-o", "out", "--quality", "3", "--weights", str(weights)])
        with pytest.raises(LalicError, match=r"has one rate, quality 3, and not quality 4\.3"):
            main([str(photo), "-o", "out", "--quality", "4.3", "--weights", str(weights)])

    def test_same_photograph_same_sheet(self, photo: Path, weights: Path, tmp_path: Path) -> None:
        Image.fromarray(photo_like(64, 64)).save(photo)
        sheets = []
        for name in "ab":
            main([str(photo), "-o", str(tmp_path / name), "--weights", str(weights)])
            sheets.append((tmp_path / name / "sea-compared.png").read_bytes())
        assert sheets[0] == sheets[1]

    def test_a_codec_that_has_no_file_so_small(
        self, photo: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("lalic.compare.best_within", lambda rgb, format, _: best_within(rgb, format, 20))
        main([str(photo), "-o", "out", "--weights", str(weights)])
        assert "JPEG, quality 1 (its smallest)" in capsys.readouterr().out

    def test_a_folder_a_gray_photograph_and_a_crop(
        self, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in").mkdir()
        Image.fromarray(photo_like(64, 80)[..., 0]).save(tmp_path / "in" / "gray.png")
        Image.fromarray(photo_like(40, 30)).save(tmp_path / "in" / "tiny.jpg")
        options = ["--formats", "--crop", "3,4,20,10"]
        main([str(tmp_path / "in"), "-o", str(tmp_path / "in"), "--weights", str(weights), *options])
        assert {p.name for p in (tmp_path / "in").iterdir()} == {
            "gray.png", "tiny.jpg", "gray-compared.png", "tiny-compared.png",
        }  # fmt: skip
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| gray")]
        assert len(rows) == 1 and rows[0].endswith("| - |")  # too small for MS-SSIM

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["no.png"], "no such photograph"),
            (["sea.png", "--crop", "100,100,100,10"], "reaches beyond its 190 x 170"),
            (["sea.png", "--formats", "heic"], "choose from"),
            (["sea.png", "copy/sea.png"], "two folders"),
            (["sea.png", "--weights", "nothing.pth"], "nothing.pth"),
            (["text.png"], "not an image"),
        ],
    )
    def test_errors(self, words: list[str], message: str, photo: Path, weights: Path, tmp_path: Path) -> None:
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / "sea.png").write_bytes(photo.read_bytes())
        (tmp_path / "text.png").write_text("hello")
        given = [] if "--weights" in words else ["--weights", str(weights)]
        with pytest.raises(LalicError, match=message):
            main([*words, "-o", "out", *given])
        assert not list(tmp_path.glob("out/*"))

    def test_a_photograph_is_never_replaced(self, photo: Path, weights: Path, tmp_path: Path) -> None:
        kept = tmp_path / "sea-compared.png"
        photo.rename(kept)
        before = kept.read_bytes()
        (tmp_path / "sea.png").write_bytes(before)
        with pytest.raises(LalicError, match="is one of the photographs"):
            main([str(kept), str(tmp_path / "sea.png"), "-o", str(tmp_path), "--weights", str(weights)])
        assert kept.read_bytes() == before

    @pytest.mark.parametrize(
        "option", [["--crop", "1,2,3"], ["--crop", "-1,0,9,9"], ["--crop", "0,0,0,9"], ["--zoom", "0"]]
    )
    def test_bad_options(self, option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as end:
            main(["sea.png", "-o", "out", *[option[0], *option[1:]]])
        assert end.value.code == 2 and option[0] in capsys.readouterr().err.splitlines()[-1]


def test_photographs_of_kodak(data_dir: Path) -> None:
    """JPEG on a real photograph, against every quality there is."""
    found = sorted((data_dir / "kodak").glob("kodim2*.png"))
    if not found:
        pytest.skip(f"no Kodak pictures beside {ROOT}")
    rgb = np.asarray(Image.open(found[0]).convert("RGB"))
    sizes: dict[int, Any] = {q: len(plain_jpeg(rgb, q)) for q in range(1, 60)}
    for budget in (6000, 12000, 25000):
        assert best_within(rgb, "jpeg", budget).quality == max(q for q, size in sizes.items() if size <= budget)
