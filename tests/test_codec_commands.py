"""The codec's commands: pictures of every kind there and back, and one clear line for everything else."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_codec import TINY, picture, tiny_model

from lalic import cli
from lalic.codec import bitstream, decode_image, encode_image
from lalic.codec.cli import main
from lalic.codec.pictures import read_picture
from lalic.errors import LalicError
from lalic.model import LALIC, fingerprint, published_state_dict


@pytest.fixture(scope="module")
def model() -> LALIC:
    return tiny_model()


@pytest.fixture(scope="module")
def weights(model: LALIC, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "lalic-mse-q3.pth"
    torch.save(published_state_dict(model), path)
    return path


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "other.pth"
    torch.save(published_state_dict(tiny_model(7)), path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(picture(37, 50)).save(path)
    return path


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No weights to be found by accident."""
    monkeypatch.delenv("LALIC_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)


class TestCommands:
    def test_there_and_back(
        self, model: LALIC, weights: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file, back = tmp_path / "photo.lalic", tmp_path / "back.png"
        assert main(["compress", str(photo), str(file), "--weights", str(weights), "--verify"]) == 0
        assert main(["info", str(file)]) == 0
        assert main(["decompress", str(file), str(back), "--weights", str(weights)]) == 0
        out = capsys.readouterr().out
        assert "50 x 37" in out
        assert f"lalic-mse-q3 (fingerprint {fingerprint(model)[:16]})" in out
        expected = decode_image(model, encode_image(model, picture(37, 50)))
        assert np.array_equal(np.asarray(Image.open(back)), expected)

    def test_arithmetic(
        self, model: LALIC, weights: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = {a: tmp_path / f"{a}.lalic" for a in ("float64", "float32")}
        for arithmetic, file in files.items():
            main(["compress", str(photo), str(file), "--weights", str(weights), "--arithmetic", arithmetic])
            assert bitstream.read(file)[0].image == encode_image(model, picture(37, 50), arithmetic)
            main(["info", str(file)])
            assert f"arithmetic: {arithmetic}" in capsys.readouterr().out
        main(["compress", str(photo), str(tmp_path / "default.lalic"), "--weights", str(weights)])
        assert (tmp_path / "default.lalic").read_bytes() == files["float64"].read_bytes()

    @pytest.mark.parametrize(
        ("mode", "suffix"),
        [*((mode, ".png") for mode in ("L", "1", "LA", "RGBA", "P", "CMYK", "I;16", "gray in RGB"))]
        + [(mode, suffix) for mode in ("L", "RGBA") for suffix in (".bmp", ".ppm")]
        + [("LA", ".tif"), ("RGBA", ".tif"), ("LA", ".pgm")],
    )
    def test_pictures_of_every_kind(
        self, model: LALIC, weights: Path, tmp_path: Path, mode: str, suffix: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source, file, back = tmp_path / "p.png", tmp_path / "p.lalic", tmp_path / f"p{suffix}"
        rgb, mask = picture(9, 11), picture(9, 11, seed=1)[..., 0]
        if mode == "I;16":
            Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(source)
        elif mode == "CMYK":
            source = tmp_path / "p.jpg"
            Image.fromarray(rgb).convert("CMYK").save(source)
        elif mode in ("LA", "RGBA"):
            image = Image.fromarray(rgb).convert(mode)
            image.putalpha(Image.fromarray(mask))
            image.save(source)
        elif mode == "gray in RGB":
            Image.fromarray(np.repeat(rgb[..., :1], 3, axis=2)).save(source)
        else:
            Image.fromarray(rgb).convert(mode).save(source)
        assert main(["compress", str(source), str(file), "--weights", str(weights)]) == 0
        assert main(["decompress", str(file), str(back), "--force", "--weights", str(weights)]) == 0
        coded = bitstream.read(file)[0].image
        gray = mode not in ("RGBA", "P", "CMYK")
        assert coded.colour == ("gray" if gray else "rgb") and bool(coded.alpha) == (mode in ("LA", "RGBA"))
        painted = decode_image(model, coded).astype(float)
        if gray:
            painted = np.repeat(np.round(painted.mean(axis=2, keepdims=True)), 3, axis=2)
        found, note = Image.open(back), capsys.readouterr().out
        if coded.alpha and suffix in (".bmp", ".ppm", ".pgm"):
            assert "laid over white" in note
            share = mask[..., None] / 255
            assert np.abs(np.asarray(found.convert("RGB")) - (painted * share + 255 * (1 - share))).max() <= 1
            return
        assert "note" not in note
        assert (
            found.mode
            == {(False, False): "RGB", (False, True): "RGBA", (True, False): "L", (True, True): "LA"}[
                gray and suffix != ".ppm", bool(coded.alpha)
            ]
        )
        assert np.array_equal(np.asarray(found.convert("RGB")), painted)
        if coded.alpha:
            assert np.array_equal(np.asarray(found)[..., -1], mask)

    def test_colours_under_transparency_are_coded_as_they_are(
        self, model: LALIC, weights: Path, tmp_path: Path
    ) -> None:
        Image.fromarray(np.dstack([picture(9, 11), np.zeros((9, 11), np.uint8)])).save(tmp_path / "p.png")
        main(["compress", "p.png", "p.lalic", "--weights", str(weights)])
        coded = bitstream.read(tmp_path / "p.lalic")[0].image
        assert coded.strings == encode_image(model, picture(9, 11)).strings

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "GIF", "16-bit"])
    def test_one_transparent_colour(self, weights: Path, tmp_path: Path, kind: str) -> None:
        """Transparency that is no channel: a palette's entry, a colour, a gray value of 16 bits."""
        source = tmp_path / "p.img"
        gray = np.array([[0, 7, 9], [9, 7, 0]], np.uint8)
        if kind == "16-bit":
            Image.fromarray(gray.astype(np.uint16) * 257).save(source, "PNG", transparency=7 * 257)
        elif kind in ("PNG", "GIF"):
            Image.fromarray(gray).save(source, kind, transparency=7)
        else:
            Image.fromarray(np.dstack([gray, gray, gray, np.where(gray == 7, 0, 255)]).astype(np.uint8)).save(
                source, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})
            )
        main(["compress", str(source), "p.lalic", "--weights", str(weights)])
        main(["decompress", "p.lalic", "p.png", "--weights", str(weights)])
        found = Image.open(tmp_path / "p.png")
        assert found.mode == "LA"
        assert np.array_equal(np.asarray(found)[..., 1], np.where(gray == 7, 0, 255))

    def test_one_transparent_colour_of_16_bits(self, tmp_path: Path) -> None:
        pixels = np.array([[[1000, 2000, 3000], [40000, 50000, 60000]]], ">u2")
        chunks = [
            (b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)),
            (b"tRNS", struct.pack(">HHH", 40000, 50000, 60000)),
            (b"IDAT", zlib.compress(b"\0" + pixels.tobytes())),
            (b"IEND", b""),
        ]
        (tmp_path / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks))
        found = read_picture(tmp_path / "p.png")
        assert found.rgb.tolist() == (pixels >> 8).tolist()
        assert found.alpha is not None and found.alpha.tolist() == [[255, 0]]

    def test_orientation_is_applied(self, weights: Path, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        rgba = np.dstack([picture(9, 20), picture(9, 20, seed=3)[..., 0]])
        Image.fromarray(rgba).save(tmp_path / "p.png", exif=exif)
        main(["compress", "p.png", "p.lalic", "--weights", str(weights)])
        main(["decompress", "p.lalic", "q.png", "--weights", str(weights)])
        assert np.array_equal(np.asarray(Image.open("q.png"))[..., 3], np.rot90(rgba[..., 3], -1))

    def test_a_camera_file_of_two_pictures(self, weights: Path, tmp_path: Path) -> None:
        first, second = (Image.fromarray(picture(16, 16, seed)) for seed in (1, 2))
        first.save(tmp_path / "p.jpg", "MPO", save_all=True, append_images=[second])
        assert Image.open(tmp_path / "p.jpg").n_frames == 2
        main(["compress", "p.jpg", "p.lalic", "--weights", str(weights)])

    def test_the_input_is_not_overwritten(self, weights: Path, photo: Path) -> None:
        before = photo.read_bytes()
        with pytest.raises(LalicError, match="input itself"):
            main(["compress", str(photo), str(photo), "--force", "--weights", str(weights)])
        assert photo.read_bytes() == before

    def test_a_gray_suffix_for_colours(self, weights: Path, photo: Path, tmp_path: Path) -> None:
        main(["compress", str(photo), "p.lalic", "--weights", str(weights)])
        with pytest.raises(LalicError, match="holds gray"):
            main(["decompress", "p.lalic", "p.pgm", "--weights", str(weights)])
        assert not (tmp_path / "p.pgm").exists()

    def test_weights_are_found_by_fingerprint(
        self, weights: Path, other_weights: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "photo.lalic"
        main(["compress", str(photo), str(file), "--weights", str(weights)])
        monkeypatch.setenv("LALIC_WEIGHTS", f"{other_weights}:{weights}")
        assert main(["decompress", str(file), str(tmp_path / "back.png")]) == 0

    def test_only_weights_in_reach(
        self, weights: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LALIC_WEIGHTS", str(weights))
        assert main(["compress", str(photo), str(tmp_path / "photo.lalic")]) == 0

    @pytest.mark.parametrize("named", [True, False], ids=["LALIC_WEIGHTS", "nothing"])
    def test_weights_that_are_not_there(
        self,
        weights: Path,
        other_weights: Path,
        photo: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        named: bool,
    ) -> None:
        file = tmp_path / "photo.lalic"
        main(["compress", str(photo), str(file), "--weights", str(weights)])
        if named:
            monkeypatch.setenv("LALIC_WEIGHTS", str(other_weights))
        with pytest.raises(LalicError, match=r"needs lalic-mse-q3 \(fingerprint [0-9a-f]{16}\)"):
            main(["decompress", str(file), str(tmp_path / "back.png")])

    def test_another_model_names_both(
        self, model: LALIC, weights: Path, other_weights: Path, photo: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "photo.lalic"
        main(["compress", str(photo), str(file), "--weights", str(weights)])
        with pytest.raises(LalicError) as caught:
            main(["decompress", str(file), str(tmp_path / "b.png"), "--weights", str(other_weights)])
        assert fingerprint(model)[:16] in str(caught.value)
        assert fingerprint(tiny_model(7))[:16] in str(caught.value)
        assert not (tmp_path / "b.png").exists()

    def test_existing_output_is_kept(self, weights: Path, photo: Path, tmp_path: Path) -> None:
        file = tmp_path / "photo.lalic"
        file.write_bytes(b"precious")
        with pytest.raises(LalicError, match="--force"):
            main(["compress", str(photo), str(file), "--weights", str(weights)])
        assert file.read_bytes() == b"precious"
        main(["compress", str(photo), str(file), "--weights", str(weights), "--force"])
        assert bitstream.parse(file.read_bytes(), "x")

    def test_damaged_file_costs_nothing(self, weights: Path, photo: Path, tmp_path: Path) -> None:
        file, back = tmp_path / "photo.lalic", tmp_path / "back.png"
        main(["compress", str(photo), str(file), "--weights", str(weights)])
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
        back.write_bytes(b"precious")
        with pytest.raises(LalicError, match="damaged"):
            main(["decompress", str(file), str(back), "--weights", str(weights), "--force"])
        assert back.read_bytes() == b"precious"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["back.png", "photo.lalic", "photo.png"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["compress", "missing.png", "a.lalic"], "missing.png"),
            (["compress", "photo.png", "nowhere/a.lalic"], "no such folder"),
            (["compress", "photo.png", "a.lalic", "--max-pixels", "100"], "too many pixels"),
            (["info", "missing.lalic"], "no such file"),
            (["info", "photo.png"], r"not a \.lalic file"),
            (["decompress", "photo.png", "a.jpg"], "lose quality"),
            (["decompress", "photo.png", "a.png"], r"not a \.lalic file"),
        ],
        ids=lambda v: " ".join(v) if isinstance(v, list) else "",
    )
    def test_one_line_for_bad_input(self, photo: Path, weights: Path, arguments: list[str], message: str) -> None:
        extra = ["--weights", str(weights)] if arguments[0] != "info" else []
        with pytest.raises(LalicError, match=message) as caught:
            main([*arguments, *extra])
        assert "\n" not in str(caught.value)

    @pytest.mark.slow
    def test_65000_pixels_wide(self, weights: Path, tmp_path: Path) -> None:
        Image.fromarray(picture(2, 65000)).save(tmp_path / "wide.png")
        main(["compress", "wide.png", "wide.lalic", "--weights", str(weights)])
        main(["decompress", "wide.lalic", "back.png", "--weights", str(weights)])
        assert Image.open("back.png").size == (65000, 2)

    def test_info_needs_no_torch(self) -> None:
        code = "import sys, lalic.codec.cli; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def chunk(tag: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))


def png(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims that size; its pixels are missing."""
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + chunk(b"IDAT", zlib.compress(bytes(1000)))


def saved(frames: list[Image.Image], kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    first, *others = frames
    first.save(buffer, kind, **({"save_all": True, "append_images": others} if others else {}), **options)
    return buffer.getvalue()


FRAMES = [Image.fromarray(picture(8, 8, seed)) for seed in range(3)]
NO_PICTURES = {
    "empty": (b"", "empty file"),
    "text": (b"hello\n", "not an image"),
    "html": (b"<!DOCTYPE html><html></html>", "not an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "cut JPEG": (saved(FRAMES[:1], "JPEG", quality=95)[:400], "damaged"),
    "cut PNG": (saved(FRAMES[:1], "PNG")[:120], "damaged"),
    "cut TIFF": (saved(FRAMES[:1], "TIFF")[:100], "damaged|not an image"),
    "animated GIF": (saved(FRAMES, "GIF"), "3 frames"),
    "animated PNG": (saved(FRAMES, "PNG"), "3 frames"),
    "animated WebP": (saved(FRAMES, "WEBP"), "3 frames"),
    "pages": (saved(FRAMES, "TIFF"), "3 pages"),
    "floats": (saved([Image.fromarray(np.zeros((4, 4), np.float32))], "TIFF"), "floating point"),
    "32 bits": (saved([Image.fromarray(np.zeros((4, 4), np.int32))], "TIFF"), "32-bit integers"),
    "65000 square": (png(65000, 65000), "too many pixels.*: scale it down$"),
    "9000 square": (png(9000, 9000), "too many pixels.*--max-pixels"),
    "70000 wide": (png(70000, 2), "sides up to 65535"),
    "no width": (png(0, 5), "damaged|not an image"),
    "a .lalic file": (bitstream.MAGIC + bytes(50), "not an image"),
}


class TestTheRealCommand:
    """`lalic` as it is started: one line on stderr, status 2, nothing written."""

    @pytest.mark.parametrize(("data", "message"), NO_PICTURES.values(), ids=NO_PICTURES)
    def test_no_picture(
        self, data: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path
    ) -> None:
        (tmp_path / "in.png").write_bytes(data)
        self.refused(["compress", "in.png", "out.lalic", "--weights", str(weights)], message, capsys)
        assert [p.name for p in tmp_path.iterdir()] == ["in.png"]

    def test_what_is_no_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path) -> None:
        (tmp_path / "folder.png").mkdir()
        with open(tmp_path / "huge.png", "wb") as file:
            file.truncate(10 << 40)
        for name, message in (
            ("folder.png", "is a folder"),
            ("/dev/zero", "no regular file"),
            ("missing.png", "no such file"),
            ("huge.png", "too large"),
        ):
            self.refused(["compress", name, "out.lalic", "--weights", str(weights)], message, capsys)
            self.refused(["info", name], r"not a file|no such file|not a \.lalic file", capsys)

    NO_WEIGHTS = ("html", "empty", "scales", "another architecture", "another file")

    @pytest.mark.parametrize("kind", NO_WEIGHTS)
    def test_no_weights(self, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], photo: Path) -> None:
        path = tmp_path / "w.pth"
        if kind == "another architecture":
            from compressai.models import ScaleHyperprior

            torch.save(ScaleHyperprior(8, 8).state_dict(), path)
        elif kind == "scales":
            state = published_state_dict(LALIC(**TINY))
            torch.save({k: v[..., :1] for k, v in state.items()}, path)
        else:
            path.write_bytes({"html": b"<!DOCTYPE html>", "empty": b"", "another file": photo.read_bytes()}[kind])
        self.refused(["compress", str(photo), "out.lalic", "--weights", str(path)], "w.pth", capsys)
        assert not (tmp_path / "out.lalic").exists()

    @pytest.mark.parametrize("data", [b"", b"<html>", bitstream.MAGIC, bitstream.MAGIC + b"\2" * 90], ids=repr)
    @pytest.mark.parametrize("command", ["info", "decompress"])
    def test_no_lalic_file(
        self, data: bytes, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path
    ) -> None:
        (tmp_path / "in.lalic").write_bytes(data)
        rest = ["out.png", "--weights", str(weights)] if command == "decompress" else []
        self.refused([command, "in.lalic", *rest], r"in\.lalic is (not|damaged)", capsys)
        assert [p.name for p in tmp_path.iterdir()] == ["in.lalic"]

    @pytest.mark.parametrize("value", ["0", "-5", "many"])
    def test_no_number(self, value: str, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(["compress", str(photo), "out.lalic", "--max-pixels", value])
        assert ended.value.code == 2
        assert "--max-pixels" in capsys.readouterr().err

    def test_in_a_process_of_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "in.gif").write_bytes(NO_PICTURES["animated GIF"][0])
        command = [sys.executable, "-c", "from lalic.cli import main; main()", "compress", "in.gif", "out.lalic"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        assert (
            done.stderr
            == "error: in.gif: not a single picture (3 frames, an animation: save the one you want as PNG)\n"
        )

    @staticmethod
    def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1
        assert re.search(message, err), err
