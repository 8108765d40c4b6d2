"""The codec: exact round trips, any size, and no damaged, foreign or hostile file that passes for a picture."""

from __future__ import annotations

import copy
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compressai.entropy_models import EntropyModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from lalic.codec import CodedImage, bitstream, decode_image, encode_image
from lalic.codec.cli import main
from lalic.codec.coder import latent_shapes, pad
from lalic.errors import LalicError
from lalic.metrics import to_rgb8, to_tensor
from lalic.model import LALIC, fingerprint, published_state_dict

Picture = NDArray[np.uint8]

TINY = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 1, 1, 1), "groups": (4, 4, 8, 16)}
SIZES = [(1, 1), (1, 70), (33, 1), (63, 65), (64, 64), (100, 40)]


def tiny_model(seed: int = 0) -> LALIC:
    """A random model whose latents are spread out, so that every string carries symbols other than zero."""
    torch.manual_seed(seed)
    model = LALIC(**TINY).eval()
    with torch.no_grad():
        model.g_a[-1].weight.mul_(40)
        model.h_a[-1].weight.mul_(20)
    model.update()
    return model


@pytest.fixture(scope="module")
def model() -> LALIC:
    return tiny_model()


def picture(height: int, width: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def coded(model: LALIC) -> CodedImage:
    return encode_image(model, picture(40, 70))


@pytest.fixture(scope="module")
def packed(model: LALIC, coded: CodedImage) -> bytes:
    return bitstream.pack(coded, fingerprint(model), bitstream.model_label("mse", 0.0067), threads=1)


def with_crc(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


class TestRoundTrip:
    @pytest.mark.parametrize(("height", "width"), SIZES, ids=lambda v: str(v))
    def test_any_size(self, model: LALIC, height: int, width: int) -> None:
        rgb = picture(height, width)
        image = encode_image(model, rgb)
        data = bitstream.pack(image, fingerprint(model), 0, threads=1)
        parsed = bitstream.parse(data, "test")
        assert parsed.image == image
        assert decode_image(model, parsed.image).shape == rgb.shape

    def test_is_what_the_model_codes(self, model: LALIC, coded: CodedImage) -> None:
        x = pad(to_tensor(picture(40, 70)))
        plain = model.compress(x)
        assert [bytes(s) for (s,) in plain["strings"]] == list(coded.strings)
        x_hat = model.decompress(plain["strings"], plain["shape"])["x_hat"]
        assert np.array_equal(decode_image(model, coded), to_rgb8(x_hat[..., :40, :70]))
        shapes = latent_shapes(model, 40, 70)
        assert [tuple(s) for s in plain["shape"]["y"]] == shapes["y"]
        assert tuple(plain["shape"]["hyper"]) == shapes["hyper"]

    def test_latents_are_not_trivial(self, model: LALIC, coded: CodedImage) -> None:
        assert all(len(s) > 8 for s in coded.strings)
        assert decode_image(model, coded).std() > 0

    def test_is_reproducible(self, model: LALIC, coded: CodedImage) -> None:
        assert encode_image(model, picture(40, 70)) == coded

    def test_a_failure_leaves_nothing_behind(self, model: LALIC, coded: CodedImage) -> None:
        before = [m.entropy_coder for m in model.modules() if isinstance(m, EntropyModel)]
        with pytest.raises(LalicError):
            decode_image(model, replace(coded, checks=bytes(len(coded.checks))))
        after = [m.entropy_coder for m in model.modules() if isinstance(m, EntropyModel)]
        assert all(a is b for a, b in zip(before, after, strict=True))
        assert encode_image(model, picture(40, 70)) == coded

    def test_padding_repeats_the_border(self) -> None:
        x = to_tensor(picture(3, 5))
        padded = pad(x)
        assert padded.shape == (1, 3, 64, 64)
        assert torch.equal(padded[..., :3, :5], x)
        assert torch.equal(padded[..., 2:, 4:], x[..., 2:3, 4:5].expand(1, 3, 62, 60))

    def test_overhead_is_small(self, coded: CodedImage, packed: bytes) -> None:
        assert len(packed) - coded.num_bytes <= 60


class TestDamage:
    def test_every_flipped_bit(self, packed: bytes) -> None:
        for position in range(len(packed)):
            for bit in range(8):
                damaged = bytearray(packed)
                damaged[position] ^= 1 << bit
                with pytest.raises(LalicError):
                    bitstream.parse(bytes(damaged), "damaged")

    def test_every_truncation(self, packed: bytes) -> None:
        for length in range(len(packed)):
            with pytest.raises(LalicError):
                bitstream.parse(packed[:length], "cut")

    @pytest.mark.parametrize("extra", [b"\0", b"\n", bytes(4), b"more"], ids=repr)
    def test_bytes_left_over(self, packed: bytes, extra: bytes) -> None:
        with pytest.raises(LalicError, match="damaged"):
            bitstream.parse(packed + extra, "long")

    def test_other_files(self) -> None:
        for data in (b"", b"\x89PNG\r\n\x1a\n" + bytes(50), b"<!DOCTYPE html>"):
            with pytest.raises(LalicError, match=r"not a \.lalic file"):
                bitstream.parse(data, "other")

    def test_later_version_is_named(self, packed: bytes) -> None:
        body = bytearray(packed[:-4])
        body[4] = 9
        with pytest.raises(LalicError, match="version 9"):
            bitstream.parse(with_crc(bytes(body)), "later")

    @given(data=st.binary(max_size=300))
    def test_random_bytes_behind_the_magic(self, data: bytes) -> None:
        with pytest.raises(LalicError):
            bitstream.parse(bitstream.MAGIC + data, "random")


class TestHostile:
    """Files with a right CRC around wrong content."""

    @given(data=st.data())
    @settings(max_examples=300)
    def test_header_never_breaks_the_parser(self, packed: bytes, data: st.DataObject) -> None:
        body = bytearray(packed[:-4])
        for _ in range(data.draw(st.integers(1, 4))):
            body[data.draw(st.integers(4, 60))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(20, len(body)))
        try:
            parsed = bitstream.parse(with_crc(bytes(body[:cut])), "hostile")
        except LalicError:
            return
        assert 1 <= parsed.image.width * parsed.image.height <= bitstream.MAX_PIXELS
        assert parsed.image.num_bytes <= len(body)

    @given(data=st.data())
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def test_no_wrong_picture(self, model: LALIC, coded: CodedImage, data: st.DataObject) -> None:
        strings = list(coded.strings)
        i = data.draw(st.integers(0, len(strings) - 1))
        new = data.draw(
            st.one_of(
                st.binary(max_size=64),
                st.integers(0, len(strings[i])).map(lambda n: strings[i][:n]),
                st.sampled_from([bytes(8), b"\xff" * 64, b""]),
            )
        )
        strings[i] = new
        try:
            decoded = decode_image(model, replace(coded, strings=tuple(strings)))
        except LalicError:
            return
        # Only what the entropy decoder never reads may differ.
        assert np.array_equal(decoded, decode_image(model, coded))

    def test_swapped_strings(self, model: LALIC, coded: CodedImage) -> None:
        strings = (coded.strings[1], coded.strings[0], *coded.strings[2:])
        with pytest.raises(LalicError):
            decode_image(model, replace(coded, strings=strings))

    @pytest.mark.parametrize("size", [(65535, 65535), (8193, 8192)], ids=str)
    def test_size_is_bounded_before_anything_is_allocated(
        self, model: LALIC, coded: CodedImage, size: tuple[int, int]
    ) -> None:
        data = bitstream.pack(replace(coded, width=size[0], height=size[1]), fingerprint(model), 0, 1)
        with pytest.raises(LalicError, match="--max-pixels"):
            bitstream.parse(data, "bomb")

    def test_other_size_with_other_latents(self, model: LALIC, coded: CodedImage) -> None:
        with pytest.raises(LalicError):
            decode_image(model, replace(coded, width=200))

    @pytest.mark.parametrize("size", [4096, 40_000_000])
    def test_strings_longer_than_any_encoder_writes(self, model: LALIC, coded: CodedImage, size: int) -> None:
        """A long string of escape codes would make the entropy decoder read beyond all memory of the process."""
        for i in range(len(coded.strings)):
            strings = [*coded.strings[:i], b"\xff" * size, *coded.strings[i + 1 :]]
            with pytest.raises(LalicError, match="longer than any"):
                decode_image(model, replace(coded, strings=tuple(strings)))

    def test_too_few_strings(self, model: LALIC, coded: CodedImage) -> None:
        with pytest.raises(LalicError, match="another model"):
            decode_image(model, replace(coded, strings=coded.strings[2:]))


class TestDesynchronisation:
    """A decoder that computes something else than the encoder did."""

    @pytest.mark.parametrize("part", ["h_s.0.bias", "channel_context.y2", "y1.entropy_parameters"])
    def test_other_arithmetic(self, model: LALIC, coded: CodedImage, part: str) -> None:
        other = copy.deepcopy(model)
        with torch.no_grad():
            name, parameter = next((n, p) for n, p in other.named_parameters() if part in n)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        assert not torch.equal(parameter, model.get_parameter(name))
        with pytest.raises(LalicError, match="computes other probabilities"):
            decode_image(other, coded)

    def test_other_tables(self, model: LALIC, coded: CodedImage) -> None:
        other = copy.deepcopy(model)
        table = other.latent_codec.y.latent_codec["y0"].y.gaussian_conditional._quantized_cdf
        table[3, 1] += 1
        with pytest.raises(LalicError, match="computes other probabilities"):
            decode_image(other, coded)

    def test_float_noise_in_the_means_is_no_error(self, model: LALIC, coded: CodedImage) -> None:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.g_s[0].bias.add_(1e-6)
        assert np.abs(decode_image(other, coded).astype(int) - decode_image(model, coded)).max() <= 1

    def test_diverged_model_is_refused(self, model: LALIC) -> None:
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.g_a[-1].bias.fill_(float("nan"))
        with pytest.raises(LalicError, match="not finite"):
            encode_image(broken, picture(10, 10))


class TestFormat:
    @given(
        width=st.integers(1, 65535),
        height=st.integers(1, 1024),
        words=st.lists(st.integers(0, 300), min_size=1, max_size=40),
        checksum=st.integers(0, 2**32 - 1),
        label=st.sampled_from([0, *range(1, 7), *range(9, 15)]),
        threads=st.integers(1, 64),
    )
    def test_pack_and_parse(
        self, width: int, height: int, words: list[int], checksum: int, label: int, threads: int
    ) -> None:
        strings = tuple(bytes([i % 256]) * (4 * n) for i, n in enumerate(words))
        image = CodedImage(width, height, strings, bytes(range(len(words))), checksum)
        parsed = bitstream.parse(bitstream.pack(image, "ab" * 32, label, threads), "x")
        assert parsed == bitstream.LalicFile(image, b"\xab" * 8, label, threads)

    @pytest.mark.parametrize(
        ("metric", "lmbda", "name"),
        [("mse", 0.0483, "lalic-mse-q6"), ("ms-ssim", 2.4, "lalic-ms-ssim-q1"), ("mse", 0.01, "off the quality")],
    )
    def test_model_name(self, coded: CodedImage, metric: str, lmbda: float, name: str) -> None:
        data = bitstream.pack(coded, "0123456789abcdef" * 4, bitstream.model_label(metric, lmbda), 1)
        text = bitstream.parse(data, "x").model_name
        assert name in text
        assert "0123456789abcdef" in text

    def test_size_beyond_the_format(self, coded: CodedImage) -> None:
        with pytest.raises(LalicError, match="65535"):
            bitstream.pack(replace(coded, width=65536), "00" * 32, 0, 1)


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
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No weights to be found by accident, and the thread count that a file asks for is undone."""
    monkeypatch.delenv("LALIC_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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

    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16"])
    def test_pictures_of_every_kind(self, weights: Path, tmp_path: Path, mode: str) -> None:
        source, file, back = tmp_path / "p.png", tmp_path / "p.lalic", tmp_path / "p.ppm"
        if mode == "I;16":
            Image.fromarray(picture(9, 11)[..., 0].astype(np.uint16) * 257).save(source)
        elif mode == "CMYK":
            source = tmp_path / "p.jpg"
            Image.fromarray(picture(9, 11)).convert("CMYK").save(source)
        else:
            Image.fromarray(picture(9, 11)).convert(mode).save(source)
        assert main(["compress", str(source), str(file), "--weights", str(weights)]) == 0
        assert main(["decompress", str(file), str(back), "--weights", str(weights)]) == 0
        assert np.asarray(Image.open(back)).shape == (9, 11, 3)

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

    def test_info_needs_no_torch(self) -> None:
        code = "import sys, lalic.codec.cli; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
