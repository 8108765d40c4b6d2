"""Float64 arithmetic: the same latents whatever the decoder's rounding, and no list of exceptions but the encoder's."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compressai.models.base import get_scale_table
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lalic.codec.bitstream import FLOAT32, FLOAT64, CodedImage
from lalic.codec.coder import decode, decode_latents, encode, pad
from lalic.errors import LalicError
from lalic.model import LALIC, depthwise, exact, published_state_dict
from lalic.model.choices import Near, Recorder, Replay
from lalic.model.coding import tables_of
from lalic.model.exact import STEP, Exact, bottleneck_tables, gaussian_tables, in_float64, scale_borders, scale_table

SIZES = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 1, 1, 1), "groups": (1, 7, 8, 16)}
GOLDEN = Path(__file__).with_name("float64_golden.json")


def make_model(seed: int = 0) -> LALIC:
    """Weights from numpy's generator, the same on every machine; latents spread out."""
    model = LALIC(**SIZES).eval()
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith("quantiles"):
                fan = max(1, parameter[0].numel())
                parameter.copy_(torch.from_numpy(generator.normal(0, fan**-0.5, parameter.shape)))
            elif name.endswith("bias") or "biases" in name:
                parameter.copy_(torch.from_numpy(generator.normal(0, 0.1, parameter.shape)))
            elif name.endswith(("decay", "boost", "alpha")):
                parameter.copy_(torch.from_numpy(generator.normal(0, 1, parameter.shape)))
        model.g_a[-1].weight.mul_(2)
        model.h_a[-1].weight.mul_(2)
    return model


@pytest.fixture(scope="module")
def model() -> LALIC:
    model = make_model()
    model.update()
    return model


def picture(height: int = 70, width: int = 100, seed: int = 0) -> Tensor:
    pixels = np.random.default_rng(seed).integers(0, 256, (1, 3, height, width))
    return torch.from_numpy(pixels / 255).float()


@pytest.fixture(scope="module")
def coded(model: LALIC) -> CodedImage:
    return encode(model, picture())


@pytest.fixture(scope="module")
def latents(model: LALIC, coded: CodedImage) -> Tensor:
    return decode_latents(model, coded)


@contextmanager
def rounding(size: float) -> Iterator[None]:
    """Another machine: every scale and mean of the float64 path is off by up to `size`, relative above 1."""
    original = Exact.decide
    generator = torch.Generator().manual_seed(1)

    def decide(self: Exact, model: Any, scales: Tensor, means: Tensor) -> Any:
        def off(x: Tensor) -> Tensor:
            noise = 2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1
            return x + size * noise * x.abs().clamp_min(1)

        return original(self, model, off(scales), off(means))

    Exact.decide = decide  # type: ignore[method-assign]
    try:
        yield
    finally:
        Exact.decide = original  # type: ignore[method-assign]


@pytest.fixture
def many(model: LALIC, monkeypatch: pytest.MonkeyPatch) -> tuple[CodedImage, Tensor]:
    """A file with many exceptions, since its tolerance is a hundredth of a step, and its latents."""
    monkeypatch.setattr(exact, "TOLERANCE", 1e-5)
    image = encode(model, picture())
    assert len(image.exceptions) > 50
    return image, decode_latents(model, image)


class TestRoundTrip:
    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 70), (65, 1), (64, 64), (130, 70)], ids=str)
    def test_decoder_has_the_encoders_latents(self, model: LALIC, height: int, width: int) -> None:
        x = picture(height, width)
        y_hat = decode_latents(model, encode(model, x))
        assert y_hat.dtype == torch.float64
        assert torch.equal(y_hat, model.messages(pad(x), Exact(Recorder()))[2])
        assert decode(model, encode(model, x)).shape == x.shape

    def test_latents_are_exact_in_float32(self, latents: Tensor) -> None:
        steps = latents / STEP
        assert torch.equal(steps, steps.round())
        assert torch.equal(latents.float().double(), latents)
        assert latents.abs().max() > 5

    def test_is_reproducible(self, model: LALIC, coded: CodedImage) -> None:
        assert encode(model, picture()) == coded

    def test_needs_no_update(self, coded: CodedImage, latents: Tensor) -> None:
        fresh = make_model()
        assert encode(fresh, picture()) == coded
        assert torch.equal(decode_latents(fresh, coded), latents)

    def test_costs_next_to_nothing(self, model: LALIC, coded: CodedImage) -> None:
        assert coded.num_bytes <= 1.005 * encode(model, picture(), FLOAT32).num_bytes

    def test_one_picture_at_a_time(self, model: LALIC) -> None:
        with pytest.raises(ValueError, match="one by one"):
            model.messages(torch.rand(2, 3, 64, 64), Exact(Recorder()))

    def test_unknown_arithmetic(self, model: LALIC, coded: CodedImage) -> None:
        with pytest.raises(LalicError, match="no such arithmetic: 'float16'"):
            encode(model, picture(), "float16")
        with pytest.raises(LalicError, match="no such arithmetic"):
            decode(model, replace(coded, arithmetic="float16"))


def test_decisions_are_those_of_the_whole_model_in_float64(model: LALIC) -> None:
    """Beside CompressAI's modules of a model that was converted as a whole, on full grids, in their own order."""
    double = copy.deepcopy(model).double()
    messages, _, y_hat = model.messages(pad(picture()), Exact(Recorder()))
    z = messages[0].symbols + double.latent_codec.hyper.entropy_bottleneck.quantiles[:, 0, 1].view(1, -1, 1, 1)
    codec = double.latent_codec.y
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in y_hat.shape[-2:]), indexing="ij")
    anchors = (rows + columns) % 2 == 0
    remaining, start = iter(messages[1:]), 0
    with torch.no_grad():
        side = double.h_s(z)
        for k, size in enumerate(model.config["groups"]):
            own = y_hat[:, start : start + size]
            known = [codec.channel_context[f"y{k}"](y_hat[:, :start])] if k else []
            group = codec.latent_codec[f"y{k}"]
            for half, mask in enumerate((anchors, ~anchors)):
                context = group.context_prediction(own * anchors) * half
                scales, means = group.entropy_parameters(torch.cat([context, *known, side], 1)).chunk(2, 1)
                parameters = next(remaining).parameters
                table = np.array(scale_table())
                # The nearest on a logarithmic scale.
                distances = np.abs(np.log(table) - np.log(scales[..., mask].clamp_min(1e-9).numpy())[..., None])
                expected = torch.from_numpy(distances.argmin(-1))
                assert torch.equal(parameters.indexes.flatten(), expected.flatten())
                assert parameters.steps is not None
                assert torch.equal(parameters.steps.flatten(), (means[..., mask] / STEP).round().int().flatten())
            start += size


class TestOtherMachines:
    @pytest.mark.parametrize("size", [1e-13, 1e-10, 4e-10])
    def test_rounding_changes_nothing(self, model: LALIC, coded: CodedImage, latents: Tensor, size: float) -> None:
        with rounding(size):
            assert torch.equal(decode_latents(model, coded), latents)

    @pytest.mark.parametrize("size", [1e-4, 1e-2])
    def test_too_much_is_refused(self, model: LALIC, coded: CodedImage, size: float) -> None:
        with rounding(size), pytest.raises(LalicError, match=r"other probabilities|does not fit what this machine"):
            decode_latents(model, coded)

    def test_exceptions_decide(self, model: LALIC, many: tuple[CodedImage, Tensor]) -> None:
        """Just under half the tolerance off, the decoder would take some decisions otherwise; the list says which."""
        image, expected = many
        otherwise = 0
        original = Replay.settle

        def settle(self: Replay, first: int, kind: int, near: Near) -> Any:
            nonlocal otherwise
            choices = original(self, first, kind, near)
            otherwise += int((choices != near.choices).sum())
            return choices

        with pytest.MonkeyPatch.context() as patch, rounding(4.9e-6):
            patch.setattr(Replay, "settle", settle)
            assert torch.equal(decode_latents(model, image), expected)
        assert otherwise > 5

    def test_both_kinds_of_exceptions(self, model: LALIC, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exact, "TOLERANCE", 1e-5)
        image = encode(model, picture(512, 448))
        kinds = {number % 2 for number, _ in plain_list(image.exceptions)}
        assert kinds == {0, 1}
        expected = decode_latents(model, image)
        with rounding(4.9e-6):
            assert torch.equal(decode_latents(model, image), expected)

    def test_another_process_that_computes_otherwise(
        self, model: LALIC, coded: CodedImage, latents: Tensor, tmp_path: Path
    ) -> None:
        """One thread, no oneDNN, the PyTorch BiWKV, an older processor's instructions."""
        torch.save(published_state_dict(model), tmp_path / "model.pth")
        (tmp_path / "image.json").write_text(as_json(coded))
        program = (
            "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_arithmetic as t\n"
            "from lalic.model import load_weights\n"
            "torch.set_num_threads(1); torch.backends.mkldnn.enabled = False\n"
            "model = load_weights(sys.argv[2] + '/model.pth')\n"
            "image = t.from_json(open(sys.argv[2] + '/image.json').read())\n"
            "print(t.digest_of(t.decode_latents(model, image)))\n"
        )
        environment = os.environ | {"LALIC_BACKEND": "torch", "ATEN_CPU_CAPABILITY": "default"}
        command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] == digest_of(latents)

    def test_a_file_that_another_machine_wrote(self) -> None:
        golden = json.loads(GOLDEN.read_text())
        y_hat = decode_latents(make_model(), from_json(json.dumps(golden["image"])))
        assert digest_of(y_hat) == golden["latents"]

    def test_float32_is_refused_or_right(self, model: LALIC) -> None:
        """The control: so little rounding, and the float32 file is lost, but never painted as something else."""
        image = encode(model, picture(), FLOAT32)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.h_s[-1].bias.add_(1e-3)
        with pytest.raises(LalicError, match="files of float64 arithmetic do not need that"):
            decode(other, image)

    def test_lower_precision_of_the_transforms(self, model: LALIC, coded: CodedImage, latents: Tensor) -> None:
        """set_compute_dtype is for g_a and g_s here: side information stays what it is."""
        half = copy.deepcopy(model)
        half.set_compute_dtype(torch.bfloat16)
        assert torch.equal(decode_latents(half, coded), latents)
        written = encode(half, picture())
        assert torch.equal(decode_latents(model, written), decode_latents(half, written))


class TestWeights:
    def test_a_copy_never_goes_stale(self, coded: CodedImage, latents: Tensor) -> None:
        changing = make_model(1)
        assert encode(changing, picture()) != coded
        changing.load_state_dict(make_model().state_dict())
        assert encode(changing, picture()) == coded
        with torch.no_grad():
            changing.h_s[0].bias.add_(0.5)
        with pytest.raises(LalicError):
            decode_latents(changing, coded)
        with torch.no_grad():
            changing.h_s[0].bias.copy_(make_model().h_s[0].bias)
        assert torch.equal(decode_latents(changing, coded), latents)

    def test_tables_follow_the_weights(self) -> None:
        bottleneck = make_model().latent_codec.hyper.entropy_bottleneck
        arithmetic = Exact(Recorder())
        first = arithmetic.tables(bottleneck)
        assert arithmetic.tables(bottleneck) is first
        with torch.no_grad():
            bottleneck.biases[0].add_(0.5)
        second = arithmetic.tables(bottleneck)
        assert second.digest != first.digest
        assert second.digest == bottleneck_tables(bottleneck).digest

    def test_copies_share_no_weights(self, model: LALIC) -> None:
        double = in_float64(model.h_s)
        assert all(p.dtype == torch.float64 and not p.requires_grad for p in double.parameters())
        assert all(p.dtype == torch.float32 and p.requires_grad for p in model.h_s.parameters())
        for ours, theirs in zip(double.parameters(), model.h_s.parameters(), strict=True):
            assert torch.equal(ours.float(), theirs)

    @pytest.mark.parametrize("part", ["hyper.h_s.0.bias", "y.y1.entropy_parameters.0.mix.bias"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
    def test_diverged(self, model: LALIC, part: str, value: float) -> None:
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.latent_codec.get_parameter(part.replace("y.y1", "y.latent_codec.y1")).fill_(value)
        with pytest.raises(LalicError, match="not finite"):
            encode(broken, picture())


class TestDepthwise:
    """The float64 convolution of the CPU, beside torch's own."""

    @pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 33, 4, 16)], ids=str)
    @pytest.mark.parametrize("strip", [1, 300, 1 << 18])
    def test_is_the_convolution(
        self, shape: tuple[int, int, int, int], strip: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(depthwise, "SHIFTED_ELEMENTS", strip)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        kernel = torch.randn(shape[3], 1, 5, 5, generator=generator, dtype=torch.float64)
        for layout in (x, x.transpose(1, 2)):
            expected = F.conv2d(layout.permute(0, 3, 1, 2), kernel, padding=2, groups=shape[3]).permute(0, 2, 3, 1)
            assert torch.allclose(depthwise.depthwise_conv(layout, kernel), expected, rtol=0, atol=1e-13)

    def test_gradients(self) -> None:
        x = torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
        kernel = torch.randn(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(depthwise.depthwise_conv, (x, kernel))

    def test_threads_change_no_bit(self) -> None:
        x = torch.randn(1, 64, 64, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        kernel = torch.randn(48, 1, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            y = depthwise.depthwise_conv(x, kernel)
            torch.set_num_threads(2)
            assert torch.equal(depthwise.depthwise_conv(x, kernel), y)
        finally:
            torch.set_num_threads(before)


class TestTables:
    def test_gaussians_are_exact(self) -> None:
        """Beside 40 digits: every mass rounds to the same integer, so no library's last bit matters."""
        mpmath = pytest.importorskip("mpmath")
        mpmath.mp.dps = 40
        closest = 1.0
        for scale in scale_table()[::9]:
            for k in range(0, int(6 * scale), max(1, int(scale / 4))):
                mass = 65536 * (mpmath.ncdf((0.5 - k) / scale) - mpmath.ncdf((-0.5 - k) / scale))
                closest = min(closest, float(abs(mass - mpmath.floor(mass) - 0.5)))
                ours = exact._normal((0.5 - k) / scale) - exact._normal((-0.5 - k) / scale)
                assert round(65536 * ours) == int(mpmath.nint(mass))
        assert closest > 1e-6

    def test_gaussians_are_those_of_compressai(self, model: LALIC) -> None:
        ours = gaussian_tables("ans")
        theirs = tables_of(model.latent_codec.y.latent_codec["y0"].y.gaussian_conditional)
        assert ours._offsets == theirs._offsets
        assert ours._lengths == theirs._lengths
        for a, b in zip(ours._rows, theirs._rows, strict=True):
            assert np.abs(np.subtract(a, b)).max() <= 8

    def test_scales_are_those_of_compressai(self) -> None:
        assert np.allclose(scale_table(), get_scale_table().numpy(), rtol=1e-5, atol=0)
        assert all(scale * 2**20 == int(scale * 2**20) for scale in scale_table())

    def test_borders_lie_between_two_scales_in_equal_ratios(self) -> None:
        for low, border, high in zip(scale_table()[:-1], scale_borders(), scale_table()[1:], strict=True):
            assert abs(Fraction(border) ** 2 / (Fraction(low) * Fraction(high)) - 1) < Fraction(1, 2**51)

    def test_gaussians_never_change(self) -> None:
        """They are part of the format: a file's strings are decoded with them for ever."""
        assert gaussian_tables("ans").digest.hex() == "972ca17f"

    def test_bottleneck_is_that_of_compressai(self, model: LALIC) -> None:
        bottleneck = model.latent_codec.hyper.entropy_bottleneck
        ours, theirs = bottleneck_tables(bottleneck), tables_of(bottleneck)
        assert ours._offsets == theirs._offsets
        for a, b in zip(ours._rows, theirs._rows, strict=True):
            assert np.abs(np.subtract(a, b)).max() <= 2


class TestHostile:
    @pytest.mark.parametrize("arithmetic", [FLOAT32, FLOAT64])
    @pytest.mark.parametrize(
        "change",
        [{"width": 101}, {"height": 71}, {"colour": "gray"}, {"alpha": b"x"}, {"width": 70, "height": 100}],
        ids=str,
    )
    def test_an_edited_header_fits_no_strings(self, model: LALIC, arithmetic: str, change: dict[str, Any]) -> None:
        """101 x 71 has the same latents as 100 x 70: only the checks tell."""
        image = encode(model, picture(), arithmetic)
        decode(model, image)
        with pytest.raises(LalicError):
            decode(model, replace(image, **change))

    def test_an_edited_arithmetic(self, model: LALIC, coded: CodedImage) -> None:
        with pytest.raises(LalicError):
            decode(model, replace(coded, arithmetic=FLOAT32, exceptions=b""))
        with pytest.raises(LalicError, match="its arithmetic does not know"):
            decode(model, replace(coded, arithmetic=FLOAT32, exceptions=b"\x02"))
        with pytest.raises(LalicError):
            decode(model, replace(encode(model, picture(), FLOAT32), arithmetic=FLOAT64))

    def test_every_changed_list_is_refused(self, model: LALIC, many: tuple[CodedImage, Tensor]) -> None:
        image, _ = many
        generator = np.random.default_rng(0)
        listed = image.exceptions
        for _ in range(12):
            changed = bytearray(listed)
            changed[generator.integers(len(listed))] ^= 1 << generator.integers(8)
            with pytest.raises(LalicError):
                decode_latents(model, replace(image, exceptions=bytes(changed)))
        for changed_list in (
            b"",
            listed[:-1],
            listed + b"\x00",
            listed + listed,
            listed[3:],
            b"\xff" * 1000,
            bytes(99999),
        ):
            with pytest.raises(LalicError):
                decode_latents(model, replace(image, exceptions=changed_list))

    def test_the_list_itself_is_checked(self, model: LALIC, many: tuple[CodedImage, Tensor]) -> None:
        """Before and beside the checks: an event left out, one invented, one with the other choice."""
        image, _ = many
        events = plain_list(image.exceptions)
        with pytest.raises(LalicError, match="is missing that lies on a border"):
            decode_without_checks(model, image, Replay(plain_bytes(events[1:2]), 10**6))
        free = next(n for n in range(100000) if n not in dict(events))
        with pytest.raises(LalicError, match="lie on no border"):
            decode_without_checks(model, image, Replay(plain_bytes(sorted([*events, (free, 0)])), 10**6))
        flipped = [(n, c ^ (n == events[3][0])) for n, c in events]
        with pytest.raises(LalicError, match="other probabilities"):
            decode_without_checks(model, image, Replay(plain_bytes(flipped), 10**6))

    @pytest.mark.parametrize(
        ("listed", "message"),
        [
            (b"\x80", "cut off"),
            (b"\x02\x82", "cut off"),
            (b"\x82\x00", "malformed"),
            (b"\xff\xff\xff\xff\xff\xff\x01", "malformed"),
            (b"\xff\xff\xff\xff\x7f", "beyond the picture"),
            (b"\x28", "beyond the picture"),
            (b"\x00" * 21, "longer than the picture"),
            (b"\xfe\xff\xff\xff\xff\x7f" * 19, "beyond the picture"),
        ],
        ids=repr,
    )
    def test_malformed(self, listed: bytes, message: str) -> None:
        with pytest.raises(LalicError, match=message):
            Replay(listed, 10)

    def test_the_longest_list(self) -> None:
        assert Replay(b"\x01" * 20, 10)._numbers.tolist() == list(range(20))

    @given(data=st.data())
    @settings(max_examples=200)
    def test_written_and_read(self, data: st.DataObject) -> None:
        """Recorder and Replay beside a plain reading of what the documentation says."""
        scales = sorted(data.draw(st.sets(st.integers(0, 10**7))))
        means = sorted(data.draw(st.sets(st.integers(0, 10**7))))
        recorder, events = Recorder(), []
        for kind, positions in enumerate((scales, means)):
            choices = data.draw(st.lists(st.integers(0, 1), min_size=len(positions), max_size=len(positions)))
            near = Near(
                np.array(positions, dtype=np.int64), np.zeros(len(positions)), np.array(choices, dtype=np.int64)
            )
            recorder.settle(5, kind, near)
            events += [(2 * (5 + p) + kind, c) for p, c in zip(positions, choices, strict=True)]
        listed = recorder.listed()
        assert plain_list(listed) == sorted(events)
        assert plain_bytes(sorted(events)) == listed
        replay = Replay(listed, 10**7 + 6)
        assert list(zip(replay._numbers.tolist(), replay._choices.tolist(), strict=True)) == sorted(events)

    @given(listed=st.binary(max_size=40))
    @settings(max_examples=300)
    def test_any_bytes(self, listed: bytes) -> None:
        """Refused, or a list that is written the same way again."""
        try:
            replay = Replay(listed, 1000)
        except LalicError:
            return
        events = list(zip(replay._numbers.tolist(), replay._choices.tolist(), strict=True))
        assert all(0 <= number < 2000 for number, _ in events)
        assert plain_bytes(events) == listed


def plain_list(listed: bytes) -> list[tuple[int, int]]:
    """(number, choice) of every event."""
    events, number, value, shift = [], -1, 0, 0
    for byte in listed:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            number += value // 2 + 1
            events.append((number, value % 2))
            value = shift = 0
    return events


def plain_bytes(events: list[tuple[int, int]]) -> bytes:
    out, before = b"", -1
    for number, choice in events:
        value = 2 * (number - before - 1) + choice
        before = number
        while value >= 128:
            out += bytes([value % 128 + 128])
            value //= 128
        out += bytes([value])
    return out


def decode_without_checks(model: LALIC, image: CodedImage, choices: Replay) -> Tensor:
    """What coder.decode does, with that list in place of the file's; the strings' checks know the file's list."""
    from lalic.codec.coder import _Reader, latent_shapes, symbol_counts

    grid = latent_shapes(model, image.height, image.width)["hyper"]
    counts = symbol_counts(model, image.height, image.width)
    y_hat = model.latents(1, grid, _Reader(image, counts).read, Exact(choices))
    choices.finish()
    return y_hat


def digest_of(y_hat: Tensor) -> str:
    return hashlib.sha256(y_hat.numpy().astype("<f8").tobytes()).hexdigest()


def as_json(image: CodedImage) -> str:
    def plain(value: Any) -> Any:
        return base64.b64encode(value).decode() if isinstance(value, bytes) else value

    fields = {name: plain(value) for name, value in vars(image).items()}
    return json.dumps(fields | {"strings": [plain(s) for s in image.strings]})


def from_json(text: str) -> CodedImage:
    fields = json.loads(text)
    strings = tuple(base64.b64decode(s) for s in fields.pop("strings"))
    for name in ("checks", "exceptions", "alpha"):
        fields[name] = base64.b64decode(fields[name])
    return CodedImage(strings=strings, **fields)
