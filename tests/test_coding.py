"""The walk that encoder and decoder share: CompressAI's strings, equal bits on both sides, tables never stale."""

from __future__ import annotations

import copy
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from compressai.entropy_models import EntropyModel, GaussianConditional
from compressai.models.base import SimpleVAECompressionModel, get_scale_table
from torch import Tensor

from lalic.codec.bitstream import FLOAT32, FLOAT64
from lalic.codec.coder import decode, encode
from lalic.codec.strings import longest_string, overrun
from lalic.errors import LalicError
from lalic.model import LALIC
from lalic.model.coding import MAX_SYMBOL, Tables, half_of, indexes_of, tables_of

# The first group has one channel: there a tensor's memory layout is ambiguous.
SIZES = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 1, 1, 1), "groups": (1, 7, 8, 16)}


@pytest.fixture(scope="module")
def model() -> LALIC:
    """Random, with latents spread out, so that every string carries symbols other than zero."""
    torch.manual_seed(0)
    model = LALIC(**SIZES).eval()
    with torch.no_grad():
        model.g_a[-1].weight.mul_(40)
        model.h_a[-1].weight.mul_(20)
    model.update()
    return model


def pictures(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width))


@contextmanager
def recorded(model: LALIC) -> Iterator[list[tuple[EntropyModel, list[int], list[int]]]]:
    """(entropy model, symbols, indexes) of every string that CompressAI's own codecs encode meanwhile."""
    calls: list[tuple[EntropyModel, list[int], list[int]]] = []

    class Spy:
        def __init__(self, owner: EntropyModel, coder: Any):
            self.owner, self.coder, self.name = owner, coder, coder.name

        def encode_with_indexes(self, symbols: list[int], indexes: list[int], *tables: Any) -> bytes:
            calls.append((self.owner, symbols, indexes))
            return self.coder.encode_with_indexes(symbols, indexes, *tables)

        def decode_with_indexes(self, *arguments: Any) -> list[int]:
            return self.coder.decode_with_indexes(*arguments)

    models = [m for m in model.modules() if isinstance(m, EntropyModel)]
    coders = [m.entropy_coder for m in models]
    for m in models:
        m.entropy_coder = Spy(m, m.entropy_coder)
    yield calls
    for m, coder in zip(models, coders, strict=True):
        m.entropy_coder = coder


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (1, 64, 192), (1, 192, 64), (3, 128, 64)])
def test_strings_are_those_of_compressai(model: LALIC, batch: int, height: int, width: int) -> None:
    x = pictures(batch, height, width)
    ours = model.compress(x)
    with torch.no_grad():
        theirs = SimpleVAECompressionModel.compress(model, x)
    assert ours["strings"] == theirs["strings"]
    assert all(len(s) > 8 for strings in ours["strings"] for s in strings)
    assert ours["shape"]["y"] == [tuple(s) for s in theirs["shape"]["y"]]
    assert ours["shape"]["hyper"] == tuple(theirs["shape"]["hyper"])
    assert torch.equal(ours["y_hat"], theirs["y_hat"])
    with torch.no_grad():
        x_hat = SimpleVAECompressionModel.decompress(model, ours["strings"], ours["shape"])["x_hat"]
    decoded = model.decompress(theirs["strings"], theirs["shape"])["x_hat"]
    assert torch.equal(decoded, x_hat)
    assert not decoded.requires_grad


def test_checks_are_what_the_format_says(model: LALIC) -> None:
    """SHA-256 over the header's text, then tables' digest, indexes and symbols of each string, z first."""
    x = pictures(1, 64, 128)
    with recorded(model) as calls, torch.no_grad():
        SimpleVAECompressionModel.compress(model, x)
    hashed, checks = b"float32 gray 128x64 0 5\nalpha", []
    for owner, symbols, indexes in calls:
        digest = 0
        for table in (owner.quantized_cdf, owner.cdf_length, owner.offset):
            digest = zlib.crc32(np.asarray(table.tolist(), dtype="<i4").tobytes(), digest)
        hashed += digest.to_bytes(4, "little") + np.asarray(indexes, dtype="<i4").tobytes()
        checks.append(hashlib.sha256(hashed).digest()[0])
        hashed += np.asarray(symbols, dtype="<i4").tobytes()
    coded = encode(model, x, FLOAT32, colour="gray", alpha=b"alpha")
    assert len(calls) == len(coded.strings) == 9
    assert list(coded.checks) == checks
    assert coded.checksum.to_bytes(4, "little") == hashlib.sha256(hashed).digest()[:4]


@pytest.mark.parametrize("arithmetic", [FLOAT32, FLOAT64])
@pytest.mark.parametrize("size", [(64, 64), (832, 832)], ids=str)
def test_encoder_and_decoder_see_the_same_bits(size: tuple[int, int], arithmetic: str) -> None:
    """Every layer of the entropy model, its inputs' strides included: layouts choose kernels, kernels round."""
    torch.manual_seed(0)
    model = LALIC(N=16, dims=(8, 8, 8, 48, 16, 8), depths=(0, 0, 0, 1), groups=(1, 7, 8, 8, 24)).eval()
    with torch.no_grad():
        model.g_a[-1].weight.mul_(40)
    model.update()
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {"encode": [], "decode": []}
    layers = [model.h_s, *model.latent_codec.y.channel_context.values()]
    for group in model.latent_codec.y.latent_codec.values():
        layers += [group.context_prediction, group.entropy_parameters]
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: seen[phase].append((args[0].clone(), out)))
    x = pictures(1, *size)
    phase = "encode"
    coded = encode(model, x, arithmetic)
    phase = "decode"
    decode(model, coded)
    assert len(seen["encode"]) == len(seen["decode"]) == 1 + 4 + 5 * 3
    for (a, a_out), (b, b_out) in zip(seen["encode"], seen["decode"], strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)
        assert torch.equal(a_out, b_out)


def test_indexes_are_those_of_compressai() -> None:
    gaussian = GaussianConditional(None)
    gaussian.update_scale_table(get_scale_table())
    table = gaussian.scale_table
    odd = torch.tensor([-1.0, 0.0, -0.0, 0.11, 1e9, float("inf"), float("-inf"), float("nan")])
    near = torch.cat([table, table.nextafter(torch.tensor(0.0)), table.nextafter(torch.tensor(999.0))])
    random = torch.randn(5000, generator=torch.Generator().manual_seed(0)).mul(3).exp()
    scales = torch.cat([odd, near, random]).view(1, 8, -1)
    expected = gaussian.build_indexes(scales)
    assert len(expected.unique()) == 64
    assert torch.equal(indexes_of(gaussian, scales), expected)
    assert indexes_of(gaussian, scales).dtype == torch.int32
    assert torch.equal(indexes_of(gaussian, scales.double()), gaussian.build_indexes(scales.double()))


def test_halves_are_the_checkerboard() -> None:
    x = torch.arange(32).view(1, 1, 4, 8)
    anchors = [[0, 2, 4, 6], [9, 11, 13, 15], [16, 18, 20, 22], [25, 27, 29, 31]]
    assert half_of(x, 0)[0, 0].tolist() == anchors
    assert sorted(half_of(x, 0).flatten().tolist() + half_of(x, 1).flatten().tolist()) == list(range(32))


class TestTables:
    def test_every_symbol_and_table(self, model: LALIC) -> None:
        """Escapes on both sides of every table, the last table, the largest integers."""
        tables = tables_of(model.latent_codec.y.latent_codec["y0"].y.gaussian_conditional)
        values = [0, 1, -1, 5, -5, 2000, -2000, 70000, -70000, MAX_SYMBOL, -MAX_SYMBOL]
        symbols = np.array(values * 64, dtype=np.int32)
        indexes = np.repeat(np.arange(64, dtype=np.int32), len(values))
        string = tables.encode(symbols, indexes)
        assert np.array_equal(tables.decode(string + bytes(64), indexes), symbols)
        assert len(string) <= longest_string(len(symbols))

    def test_the_longest_string(self, model: LALIC) -> None:
        tables = tables_of(model.latent_codec.y.latent_codec["y0"].y.gaussian_conditional)
        symbols, indexes = np.full(10000, -MAX_SYMBOL, dtype=np.int32), np.zeros(10000, dtype=np.int32)
        assert 5 * 10000 < len(tables.encode(symbols, indexes)) <= longest_string(10000)

    @pytest.mark.parametrize("value", [MAX_SYMBOL + 1, -MAX_SYMBOL - 1, 2**31 - 1, -(2**31)])
    def test_what_cannot_be_coded(self, model: LALIC, value: int) -> None:
        tables = tables_of(model.latent_codec.hyper.entropy_bottleneck)
        with pytest.raises(LalicError, match="not finite"):
            tables.encode(np.full(8, value, dtype=np.int32), np.zeros(8, dtype=np.int32))

    def test_kept_until_they_change(self, model: LALIC) -> None:
        gaussian = copy.deepcopy(model.latent_codec.y.latent_codec["y0"].y.gaussian_conditional)
        first = tables_of(gaussian)
        assert tables_of(gaussian) is first
        gaussian._quantized_cdf[3, 1] += 1
        second = tables_of(gaussian)
        assert second.digest != first.digest
        gaussian.update_scale_table(get_scale_table(max=64), force=True)
        third = tables_of(gaussian)
        assert third.digest not in (first.digest, second.digest)
        assert third.digest == Tables.of(gaussian).digest

    def test_made_in_inference_mode(self) -> None:
        """Such tensors have no version to look at: nothing may be kept."""
        gaussian = GaussianConditional(None)
        with torch.inference_mode():
            gaussian.update_scale_table(get_scale_table())
            before = tables_of(gaussian).digest
            gaussian._quantized_cdf[3, 1] += 1
            assert tables_of(gaussian).digest != before

    def test_missing(self) -> None:
        with pytest.raises(ValueError, match=r"update\(\)"):
            LALIC(**SIZES).eval().compress(pictures(1, 64, 64))

    @pytest.mark.parametrize("byte", [b"\xff", b"\x00", b"\x7f"], ids=repr)
    def test_hostile_string_ends(self, model: LALIC, byte: bytes) -> None:
        """A string of escape codes makes the decoder read far beyond it: what is there must be ours."""
        bottleneck = model.latent_codec.hyper.entropy_bottleneck
        tables = [t.tolist() for t in (bottleneck.quantized_cdf, bottleneck.cdf_length, bottleneck.offset)]
        string = byte * longest_string(4096)
        padded = string + bytes(overrun(len(string), 4096))
        found = [
            bottleneck.entropy_coder.decode_with_indexes(padded + tail, [0] * 4096, *tables)
            for tail in (bytes(1 << 20), b"\xff" * (1 << 20))
        ]
        assert found[0] == found[1], "what lies behind the padding was read"


@pytest.mark.parametrize("part", ["hyper.h_a.0.bias", "hyper.h_s.0.bias"])
def test_diverged_model_has_no_strings(model: LALIC, part: str) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.latent_codec.get_parameter(part).fill_(float("nan"))
    with pytest.raises(LalicError, match="not finite"):
        broken.compress(pictures(1, 64, 64))


def test_strings_that_do_not_fit(model: LALIC) -> None:
    coded = model.compress(pictures(2, 64, 64))
    strings, shape = coded["strings"], coded["shape"]
    with pytest.raises(ValueError, match="two for each group"):
        model.decompress(strings[1:], shape)
    with pytest.raises(ValueError, match="one length"):
        model.decompress([strings[0][:1], *strings[1:]], shape)
    with pytest.raises(ValueError, match="shapes of y"):
        model.decompress(strings, {**shape, "hyper": (1, 2)})
