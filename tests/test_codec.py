"""The codec: exact round trips, any size, and no damaged, foreign or hostile file that passes for a picture."""

from __future__ import annotations

import copy
import tracemalloc
import zlib
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from compressai.entropy_models import EntropyModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_codec import ARITHMETICS, picture, tiny_model

from lalic.codec import CodedImage, alpha, bitstream, decode_image, encode_image
from lalic.codec.coder import latent_shapes, pad
from lalic.codec.pictures import Picture, decode_picture, encode_picture
from lalic.errors import LalicError
from lalic.metrics import to_rgb8, to_tensor
from lalic.model import LALIC, fingerprint

SIZES = [(1, 1), (1, 70), (33, 1), (63, 65), (64, 64), (100, 40)]
LONG = [(1, 8192), (8192, 1), (129, 1023)]


@pytest.fixture(scope="module")
def model() -> LALIC:
    return tiny_model()


@pytest.fixture(scope="module", params=ARITHMETICS)
def arithmetic(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def coded(model: LALIC, arithmetic: str) -> CodedImage:
    return encode_image(model, picture(40, 70), arithmetic)


class TestRoundTrip:
    @pytest.mark.parametrize(("height", "width"), SIZES, ids=lambda v: str(v))
    def test_any_size(self, model: LALIC, arithmetic: str, height: int, width: int) -> None:
        round_trip(model, arithmetic, height, width)

    @pytest.mark.slow
    @pytest.mark.parametrize(("height", "width"), LONG, ids=lambda v: str(v))
    def test_long_sides(self, model: LALIC, arithmetic: str, height: int, width: int) -> None:
        round_trip(model, arithmetic, height, width)

    def test_is_what_the_model_codes(self, model: LALIC) -> None:
        coded = encode_image(model, picture(40, 70), bitstream.FLOAT32)
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
        assert encode_image(model, picture(40, 70), coded.arithmetic) == coded
        assert encode_image(tiny_model(), picture(40, 70), coded.arithmetic) == coded

    def test_a_failure_leaves_nothing_behind(self, model: LALIC, coded: CodedImage) -> None:
        before = [m.entropy_coder for m in model.modules() if isinstance(m, EntropyModel)]
        with pytest.raises(LalicError):
            decode_image(model, replace(coded, checks=bytes(len(coded.checks))))
        after = [m.entropy_coder for m in model.modules() if isinstance(m, EntropyModel)]
        assert all(a is b for a, b in zip(before, after, strict=True))
        assert encode_image(model, picture(40, 70), coded.arithmetic) == coded

    def test_padding_repeats_the_border(self) -> None:
        x = to_tensor(picture(3, 5))
        padded = pad(x)
        assert padded.shape == (1, 3, 64, 64)
        assert torch.equal(padded[..., :3, :5], x)
        assert torch.equal(padded[..., 2:, 4:], x[..., 2:3, 4:5].expand(1, 3, 62, 60))


def round_trip(model: LALIC, arithmetic: str, height: int, width: int) -> None:
    """Code noise of that size, write, read and decode it: the size is kept, and the pixels are the encoder's y_hat."""
    rgb = picture(height, width)
    image = encode_image(model, rgb, arithmetic)
    parsed = bitstream.parse(bitstream.pack(image, fingerprint(model), 0, threads=1), "test")
    assert parsed.image == image
    decoded = decode_image(model, parsed.image)
    assert decoded.shape == rgb.shape and decoded.dtype == np.uint8
    if arithmetic == bitstream.FLOAT32:
        plain = model.compress(pad(to_tensor(rgb)))
        x_hat = model.decompress(plain["strings"], plain["shape"])["x_hat"]
        assert np.array_equal(decoded, to_rgb8(x_hat[..., :height, :width]))


class TestGrayAndAlpha:
    @pytest.mark.parametrize("gray", [False, True], ids=["rgb", "gray"])
    @pytest.mark.parametrize("transparent", [False, True], ids=["opaque", "alpha"])
    def test_there_and_back(self, model: LALIC, arithmetic: str, gray: bool, transparent: bool) -> None:
        rgb = np.repeat(picture(40, 70)[..., :1], 3, axis=2) if gray else picture(40, 70)
        mask = picture(40, 70, seed=1)[..., 0] if transparent else None
        coded = encode_picture(model, Picture(rgb, mask, gray), arithmetic)
        decoded = decode_picture(model, coded)
        assert decoded.gray == gray and coded.colour == ("gray" if gray else "rgb")
        painted = decode_image(model, coded)
        if gray:
            exact = np.round(painted.astype(np.float64).mean(axis=2))
            assert np.array_equal(decoded.rgb, np.repeat(exact.astype(np.uint8)[..., None], 3, axis=2))
        else:
            assert np.array_equal(decoded.rgb, painted)
        assert (decoded.alpha is None and not coded.alpha) if mask is None else np.array_equal(decoded.alpha, mask)

    def test_opaque_alpha_costs_nothing(self, model: LALIC) -> None:
        opaque = np.full((40, 70), 255, np.uint8)
        coded = encode_picture(model, Picture(picture(40, 70), opaque), bitstream.FLOAT32)
        assert coded == encode_image(model, picture(40, 70), bitstream.FLOAT32)

    @pytest.mark.parametrize(
        "change", [{"colour": "gray"}, {"alpha": alpha.encode(np.zeros((40, 70), np.uint8))}], ids=str
    )
    def test_are_covered_by_the_checks(self, model: LALIC, coded: CodedImage, change: dict[str, object]) -> None:
        """A file with right CRCs: nothing but the strings' checks can tell."""
        data = bitstream.pack(replace(coded, **change), fingerprint(model), 0, 1)
        with pytest.raises(LalicError, match="computes other probabilities"):
            decode_picture(model, bitstream.parse(data, "x").image)


class TestAlpha:
    """The alpha section, beside an undoing of the filters written from docs/bitstream.md."""

    MASKS: ClassVar[dict[str, NDArray[np.uint8]]] = {
        "noise": picture(9, 14)[..., 0],
        "column": np.arange(30, dtype=np.uint8).reshape(30, 1),
        "rows": np.repeat(np.arange(20, dtype=np.uint8)[:, None] * 11, 31, axis=1),
        "columns": picture(20, 1)[..., 0] + np.arange(90, dtype=np.uint8) * np.uint8(11),
        "plane": (np.add.outer(np.arange(40) * 5, np.arange(50) * 9) % 256).astype(np.uint8),
        "disc": ((np.add.outer((np.arange(60) - 30) ** 2, (np.arange(60) - 30) ** 2) < 500) * 255).astype(np.uint8),
        "one": np.zeros((1, 1), np.uint8),
    }

    @staticmethod
    def plain(section: bytes, width: int, height: int) -> list[list[int]]:
        values = list(zlib.decompress(section[1:]))
        rows = [values[y * width : (y + 1) * width] for y in range(height)]
        if section[0] & 1:
            for y in range(1, height):
                rows[y] = [(a + b) % 256 for a, b in zip(rows[y], rows[y - 1], strict=True)]
        if section[0] & 2:
            for row in rows:
                for x in range(1, width):
                    row[x] = (row[x] + row[x - 1]) % 256
        return rows

    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    def test_without_loss(self, mask: np.ndarray) -> None:
        section = alpha.encode(mask)
        height, width = mask.shape
        assert np.array_equal(alpha.decode(section, width, height), mask)
        assert self.plain(section, width, height) == mask.tolist()

    @pytest.mark.parametrize("filter", range(4))
    def test_every_filter(self, filter: int) -> None:
        section = bytes([filter]) + zlib.compress(picture(9, 14)[..., 0].tobytes())
        assert alpha.decode(section, 14, 9).tolist() == self.plain(section, 14, 9)

    def test_filters_are_worth_it(self) -> None:
        plain = {name: 1 + len(zlib.compress(mask.tobytes(), 9)) for name, mask in self.MASKS.items()}
        coded = {name: len(alpha.encode(mask)) for name, mask in self.MASKS.items()}
        assert all(coded[name] <= plain[name] for name in plain)
        assert all(coded[name] < plain[name] / 2 for name in ("columns", "plane"))

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            (b"\4" + zlib.compress(bytes(12)), "no filter"),
            (b"\0", "does not hold 4 x 3"),
            (b"\0not zlib", "no zlib stream"),
            (b"\0" + zlib.compress(bytes(11)), "does not hold 4 x 3"),
            (b"\0" + zlib.compress(bytes(13)), "does not hold 4 x 3"),
            (b"\0" + zlib.compress(bytes(12)) + b"\0", "does not hold 4 x 3"),
            (b"\0" + zlib.compress(bytes(12))[:-1], "does not hold 4 x 3"),
            (b"\0" + zlib.compress(bytes(12))[:-1] + b"\0", "no zlib stream"),
            (b"\0" + zlib.compress(bytes(1 << 26), 9), "does not hold 4 x 3"),
            (b"\0" + zlib.compress(b"\xff" * 12), "opaque"),
        ],
        ids=lambda v: v if isinstance(v, str) else "",
    )
    def test_what_no_encoder_writes(self, section: bytes, message: str) -> None:
        with pytest.raises(LalicError, match=message):
            alpha.decode(section, 4, 3)

    def test_a_bomb_takes_no_memory(self) -> None:
        """64 MB of zeros for a picture of twelve pixels."""
        bomb = b"\0" + zlib.compress(bytes(1 << 26), 9)
        tracemalloc.start()
        with pytest.raises(LalicError):
            alpha.decode(bomb, 4, 3)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * len(bomb)


class TestHostile:
    """Files with a right CRC around wrong content."""

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
        first, *others = coded.strings if len(coded.strings) > 1 else (coded.strings[0][:40], coded.strings[0][40:])
        with pytest.raises(LalicError):
            decode_image(model, replace(coded, strings=(others[0], first, *others[1:])))
        if len(coded.strings) == 1:
            with pytest.raises(LalicError):
                decode_image(model, replace(coded, strings=(others[0] + first,)))

    @pytest.mark.parametrize(
        "change", [{"width": 200}, {"width": 71}, {"height": 41}, {"width": 40, "height": 70}], ids=str
    )
    def test_other_size(self, model: LALIC, coded: CodedImage, change: dict[str, int]) -> None:
        """Latents of the same shape too: the picture would be cut at another place."""
        with pytest.raises(LalicError):
            decode_image(model, replace(coded, **change))

    def test_other_arithmetic(self, model: LALIC, coded: CodedImage, arithmetic: str) -> None:
        (other,) = set(ARITHMETICS) - {arithmetic}
        with pytest.raises(LalicError):
            decode_image(model, replace(coded, arithmetic=other))

    @pytest.mark.parametrize("size", [40_000, 40_000_000])
    def test_strings_longer_than_any_encoder_writes(self, model: LALIC, coded: CodedImage, size: int) -> None:
        """A long string of escape codes would make the entropy decoder read beyond all memory of the process."""
        for i in range(len(coded.strings)):
            strings = [*coded.strings[:i], b"\xff" * size, *coded.strings[i + 1 :]]
            with pytest.raises(LalicError, match="longer than any"):
                decode_image(model, replace(coded, strings=tuple(strings)))

    def test_too_few_strings(self, model: LALIC, coded: CodedImage) -> None:
        with pytest.raises(LalicError, match=r"another model|float64 files hold one"):
            decode_image(model, replace(coded, strings=coded.strings[2:]))
        with pytest.raises(LalicError, match="another model"):
            decode_image(model, replace(coded, checks=coded.checks[2:]))


class TestDesynchronisation:
    """A decoder that computes something else than the encoder did."""

    @pytest.mark.parametrize("part", ["h_s.0.bias", "channel_context.y2", "y1.entropy_parameters"])
    def test_other_arithmetic(self, model: LALIC, coded: CodedImage, part: str) -> None:
        other = copy.deepcopy(model)
        with torch.no_grad():
            name, parameter = next((n, p) for n, p in other.named_parameters() if part in n)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        assert not torch.equal(parameter, model.get_parameter(name))
        with pytest.raises(LalicError, match=r"computes other probabilities|does not fit what this machine computes"):
            decode_image(other, coded)

    def test_other_tables(self, model: LALIC) -> None:
        coded = encode_image(model, picture(40, 70), bitstream.FLOAT32)
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

    def test_diverged_model_is_refused(self, model: LALIC, arithmetic: str) -> None:
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.g_a[-1].bias.fill_(float("nan"))
        with pytest.raises(LalicError, match="not finite"):
            encode_image(broken, picture(10, 10), arithmetic)
