"""Weights of several rates: files of version 3, at whole and real qualities, and the commands that write them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkout_root import ROOT
from PIL import Image
from test_builtin import write_bundles
from tiny_codec import ARITHMETICS, picture, tiny_model
from tiny_rates import rates_model, save_rates, write_rates_bundle

from lalic import release_builtin
from lalic.codec import CodedImage, bitstream, decode_image, encode_image
from lalic.codec.bitstream import Section
from lalic.codec.cli import main
from lalic.codec.coder import decode_latents, pad
from lalic.codec.quality import parse_quality
from lalic.errors import LalicError
from lalic.fetch import is_name
from lalic.ladder import lambda_at, range_name
from lalic.metrics import to_rgb8, to_tensor
from lalic.model import LALIC, fingerprint
from lalic.reference_picture import check_reference, code_reference
from lalic.release import open_weights

QUALITIES = (1, 4, 6, 1.001, 2.5, 4.3, 5.999)
SECTIONS = (Section(200, b"a profile, say"), Section(201, b""))


@pytest.fixture(scope="module")
def model() -> LALIC:
    return rates_model()


@pytest.fixture(scope="module", params=ARITHMETICS)
def arithmetic(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def coded(model: LALIC, arithmetic: str) -> CodedImage:
    return encode_image(model, picture(40, 70), arithmetic, quality=4.3, sections=SECTIONS)


def written(model: LALIC, coded: CodedImage) -> CodedImage:
    """Through a file."""
    data = bitstream.pack(coded, fingerprint(model), 7 if coded.thousandths else 3, 1)
    return bitstream.parse(data, "the file").image


class TestRoundTrip:
    @pytest.mark.parametrize("quality", QUALITIES)
    def test_is_what_the_model_codes(self, model: LALIC, arithmetic: str, quality: float) -> None:
        rgb = picture(40, 70)
        coded = encode_image(model, rgb, arithmetic, quality=quality)
        found = written(model, coded)
        assert found == coded and found.quality == quality
        decoded = decode_image(model, found)
        x = pad(to_tensor(rgb))
        if arithmetic == bitstream.FLOAT32:
            plain = model.compress(x, quality)
            assert [bytes(s) for (s,) in plain["strings"]] == list(coded.strings)
            x_hat = model.decompress(plain["strings"], plain["shape"], quality)["x_hat"]
            assert np.array_equal(decoded, to_rgb8(x_hat[..., :40, :70]))
        else:
            x_hat = model.paint(decode_latents(model, found), quality)
            assert np.array_equal(decoded, to_rgb8(x_hat[..., :40, :70]))

    def test_the_gains_are_those_of_the_quality(self, model: LALIC) -> None:
        """The latents times exp of what interpolates between the rungs, computed here."""
        assert model.rates is not None
        x = pad(to_tensor(picture(40, 70)))
        gain = (0.7 * model.rates.gain[3] + 0.3 * model.rates.gain[4]).exp()
        expected = model.g_a(x) * gain[:, None, None]
        assert torch.allclose(model.scaled_latents(x, 4.3), expected, rtol=1e-6)
        sizes = [encode_image(model, picture(40, 70), quality=q).num_bytes for q in (1, 2.5, 4.3, 6)]
        assert sizes == sorted(sizes) and len(set(sizes)) == 4

    def test_a_quality_is_rounded_before_it_is_used(self, model: LALIC, arithmetic: str) -> None:
        rough = encode_image(model, picture(40, 70), arithmetic, quality=4.30049)
        assert rough == encode_image(model, picture(40, 70), arithmetic, quality=4.3)
        assert rough.thousandths == 4300

    def test_other_rungs(self, arithmetic: str) -> None:
        model = rates_model(1, rungs=(3, 4))
        coded = encode_image(model, picture(9, 9), arithmetic, quality=3.5)
        assert decode_image(model, written(model, coded)).shape == (9, 9, 3)

    def test_sections_change_no_pixel(self, model: LALIC, coded: CodedImage) -> None:
        without = encode_image(model, picture(40, 70), coded.arithmetic, quality=4.3)
        assert without.strings == coded.strings and written(model, coded).sections == SECTIONS
        assert np.array_equal(decode_image(model, coded), decode_image(model, without))


class TestRefused:
    @pytest.mark.parametrize(
        "change",
        [
            {"thousandths": 4301},
            {"thousandths": 4000},
            {"thousandths": 1000},
            {"sections": SECTIONS[:1]},
            {"sections": SECTIONS[1:]},
            {"sections": ()},
            {"sections": (*SECTIONS, Section(202, b""))},
            {"sections": (Section(199, SECTIONS[0].data), SECTIONS[1])},
            {"sections": (Section(200, b"a profile, sad"), SECTIONS[1])},
            {"sections": (Section(200, b""), Section(201, SECTIONS[0].data))},
        ],
        ids=str,
    )
    def test_an_altered_file_with_right_crcs(self, model: LALIC, coded: CodedImage, change: dict[str, object]) -> None:
        with pytest.raises(LalicError, match="computes other probabilities"):
            decode_image(model, written(model, replace(coded, **change)))

    def test_only_the_quality_of_a_gray_speck_is_altered(self, model: LALIC, arithmetic: str) -> None:
        """Even where all tables and symbols are the same: a black pixel, one thousandth away."""
        coded = encode_image(model, np.zeros((1, 1, 3), np.uint8), arithmetic, quality=2)
        for thousandths in (1999, 2001):
            with pytest.raises(LalicError):
                decode_image(model, written(model, replace(coded, thousandths=thousandths)))

    @pytest.mark.parametrize("thousandths", [6001, 65535])
    def test_a_quality_that_the_model_does_not_have(self, model: LALIC, coded: CodedImage, thousandths: int) -> None:
        with pytest.raises(LalicError, match=r"quality [0-9.]+ is not one of the model: it has 1 to 6$"):
            decode_image(model, written(model, replace(coded, thousandths=thousandths)))

    def test_weights_of_one_rate(self, coded: CodedImage) -> None:
        with pytest.raises(LalicError, match=r"weights of several rates \(quality 4\.3\), not with these$"):
            decode_image(tiny_model(), coded)

    def test_a_file_of_one_rate(self, model: LALIC, arithmetic: str) -> None:
        coded = encode_image(tiny_model(), picture(9, 9), arithmetic)
        with pytest.raises(LalicError, match=r"written with weights of one rate, and these have several$"):
            decode_image(model, coded)

    @pytest.mark.parametrize("quality", [0.999, 6.001, 0, -1, float("nan"), float("inf")])
    def test_encoding_outside_the_range(self, model: LALIC, quality: float) -> None:
        with pytest.raises(LalicError, match=r"is not one of the model: it has 1 to 6$"):
            encode_image(model, picture(9, 9), quality=quality)

    def test_a_quality_too_many_or_none(self, model: LALIC) -> None:
        with pytest.raises(LalicError, match=r"has one rate and takes no quality, but 4\.3 was given"):
            encode_image(tiny_model(), picture(9, 9), quality=4.3)
        with pytest.raises(LalicError, match="several rates: give a quality from 1 to 6"):
            encode_image(model, picture(9, 9))


class TestQuality:
    @pytest.mark.parametrize(("text", "value"), [("3", 3), ("4.3", 4.3), ("4.300", 4.3), ("1.0010", 1.001), ("-1", -1)])
    def test_what_people_write(self, text: str, value: float) -> None:
        assert parse_quality(text) == value

    @pytest.mark.parametrize("text", ["", "high", "nan", "inf", "1e3", "4,3", ".5", "4.", " 4", "9" * 40, "4.3\n"])
    def test_no_number(self, text: str) -> None:
        with pytest.raises(LalicError, match=r"is not a number such as 3 or 4\.3$"):
            parse_quality(text)

    @pytest.mark.parametrize("text", ["4.3001", "1.00049"])
    def test_too_many_decimals(self, text: str) -> None:
        with pytest.raises(LalicError, match=f"quality {text} has more than three decimals"):
            parse_quality(text)

    def test_names(self) -> None:
        assert range_name("mse") == "lalic-mse-vbr"
        for metric in ("mse", "ms-ssim"):
            assert is_name(range_name(metric))
        assert not is_name("lalic-mse-vbr2")


def test_reference_picture(model: LALIC, tmp_path: Path) -> None:
    """Of a bundle of all rates: coded in the middle of its range."""
    file = tmp_path / "reference.lalic"
    told = code_reference(model, fingerprint(model), 7, file)
    parsed, size = bitstream.read(file)
    assert (parsed.version, parsed.image.quality, size) == (3, 3.5, told["bytes"])
    assert check_reference(model, told, file.read_bytes(), fingerprint(model), "reference.lalic")


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a photograph; no weights are in reach."""
    for name in ("LALIC_WEIGHTS", "LALIC_HUB_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LALIC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(release_builtin, "builtin_folder", lambda: None)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Image.fromarray(picture(37, 50)).save("photo.png")


def about(file: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The lines of `lalic info` by what they begin with; the first under ""."""
    capsys.readouterr()
    assert main(["info", file]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    return {"": first} | {key: value.strip() for key, value in (line.split(":", 1) for line in lines)}


class TestCommands:
    @pytest.fixture
    def weights(self, model: LALIC) -> str:
        return str(save_rates(model, Path("w.safetensors")))

    @pytest.mark.parametrize("quality", ["1", "4.3", "2.125", "6"])
    @pytest.mark.parametrize("number", ["float64", "float32"])
    def test_there_and_back(
        self, model: LALIC, weights: str, quality: str, number: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ["--weights", weights, "--quality", quality, "--arithmetic", number, "--verify"]
        assert main(["compress", "photo.png", "a.lalic", *flags]) == 0
        assert f"model w at quality {quality}" in capsys.readouterr().out
        found = bitstream.read(Path("a.lalic"))[0].image
        assert found == encode_image(model, picture(37, 50), number, quality=float(quality))
        assert main(["decompress", "a.lalic", "back.png", "--weights", weights]) == 0
        assert f"model w at quality {quality}" in capsys.readouterr().out
        assert np.array_equal(np.asarray(Image.open("back.png")), decode_image(model, found))

    def test_the_default_is_told(self, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
        main(["compress", "photo.png", "a.lalic", "--weights", weights])
        assert "model w at quality 5 (the default)" in capsys.readouterr().out
        save_rates(rates_model(2, rungs=(1, 2, 3)), Path("low.safetensors"))
        main(["compress", "photo.png", "b.lalic", "--weights", "low.safetensors"])
        assert "model low at quality 3 (the default)" in capsys.readouterr().out

    def test_info(self, model: LALIC, capsys: pytest.CaptureFixture[str]) -> None:
        bundle = write_rates_bundle(model, Path("own"))
        main(["compress", "photo.png", "a.lalic", "--weights", str(bundle), "--quality", "4.3"])
        assert f"model lalic-mse-vbr at quality 4.3 (lambda {lambda_at('mse', 4.3):.4g})" in capsys.readouterr().out
        lines = about("a.lalic", capsys)
        assert "format version 3" in lines[""] and lines["model"].startswith("lalic-mse-vbr (fingerprint ")
        assert lines["quality"] == f"4.3, which stands for lambda {lambda_at('mse', 4.3):.4g}"
        assert "section" not in lines and "section" not in lines["bytes"]

    def test_info_on_sections_and_unknown_weights(self, model: LALIC, capsys: pytest.CaptureFixture[str]) -> None:
        coded = encode_image(model, picture(9, 9), quality=2.5, sections=SECTIONS[:1])
        Path("a.lalic").write_bytes(bitstream.pack(coded, fingerprint(model), 0, 1))
        lines = about("a.lalic", capsys)
        assert lines["quality"] == "2.5" and lines["model"].startswith("a model of several rates")
        assert lines["section"] == "type 200, 14 bytes, of a kind that this version ignores"
        assert " + 14 sections + " in lines["bytes"]
        numbers = [int(word) for word in lines["bytes"].replace(",", "").split() if word.isdigit()]
        assert numbers[0] == sum(numbers[1:])

    @pytest.mark.parametrize(("quality", "message"), [("7", "it has 1 to 6"), ("0.999", "it has 1 to 6")])
    def test_outside_the_range(self, weights: str, quality: str, message: str) -> None:
        with pytest.raises(LalicError, match=f"quality {quality} is not one of the model: {message}$"):
            main(["compress", "photo.png", "a.lalic", "--weights", weights, "--quality", quality])
        assert not Path("a.lalic").exists()

    def test_a_file_without_a_name_in_reach(self, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LALIC_WEIGHTS", weights)
        main(["compress", "photo.png", "a.lalic", "--quality", "2.5"])
        assert bitstream.read(Path("a.lalic"))[0].image.quality == 2.5
        assert main(["decompress", "a.lalic", "back.png"]) == 0


@pytest.fixture(scope="module")
def _bundles(model: LALIC, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_bundles(tmp_path_factory.mktemp("all") / "weights", {3: 1, 5: 2})
    write_rates_bundle(model, folder)
    return folder


class TestWhichWeights:
    """Bundles of one rate for 3 and 5, and one of all rates."""

    @pytest.fixture(params=["built in", "./release"])
    def bundles(
        self, request: pytest.FixtureRequest, _bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Path:
        if request.param == "./release":
            return Path(shutil.copytree(_bundles, "release"))
        folder = Path(shutil.copytree(_bundles, tmp_path / "site"))
        monkeypatch.setattr(release_builtin, "builtin_folder", lambda: folder)
        return folder

    @pytest.mark.parametrize(
        ("flags", "name", "quality"),
        [
            ([], "lalic-mse-q5", None),
            (["--quality", "3"], "lalic-mse-q3", None),
            (["--quality", "3.000"], "lalic-mse-q3", None),
            (["--quality", "1"], "lalic-mse-vbr", 1),
            (["--quality", "4.3"], "lalic-mse-vbr", 4.3),
            (["--weights", "lalic-mse-vbr"], "lalic-mse-vbr", 5),
            (["--weights", "lalic-mse-vbr", "--quality", "3"], "lalic-mse-vbr", 3),
        ],
    )
    def test_chosen(self, bundles: Path, flags: list[str], name: str, quality: float | None) -> None:
        assert main(["compress", "photo.png", "a.lalic", *flags]) == 0
        found = bitstream.read(Path("a.lalic"))[0]
        assert found.model_name.split()[0] == name and found.image.quality == quality
        assert main(["decompress", "a.lalic", "back.png"]) == 0

    def test_only_the_range_is_there(self, bundles: Path) -> None:
        for name in ("lalic-mse-q3", "lalic-mse-q5"):
            shutil.rmtree(bundles / name)
        (bundles / "SHA256SUMS").unlink()
        main(["compress", "photo.png", "a.lalic"])
        assert bitstream.read(Path("a.lalic"))[0].image.quality == 5

    def test_a_quality_that_none_has(self, bundles: Path) -> None:
        in_reach = r" in reach \(release/lalic-mse-q3: 3, .*-vbr: 1 to 6 in steps of 0\.001\): choose with --weights$"
        built_in = r": choose with --quality among 3, 5, or 1 to 6 in steps of 0\.001$"
        with pytest.raises(LalicError, match=rf"quality 6\.5({in_reach}|{built_in})"):
            main(["compress", "photo.png", "a.lalic", "--quality", "6.5"])

    def test_single_rates_alone(self, bundles: Path) -> None:
        shutil.rmtree(bundles / "lalic-mse-vbr")
        (bundles / "SHA256SUMS").unlink()
        with pytest.raises(LalicError, match=r"quality 4\.3( in reach .*lalic-mse-q3: 3,|: choose .* among 3, 5$)"):
            main(["compress", "photo.png", "a.lalic", "--quality", "4.3"])

    @pytest.mark.parametrize("bundles", ["built in"], indirect=True)
    def test_a_lost_built_in_range(self, bundles: Path) -> None:
        main(["compress", "photo.png", "good.lalic", "--quality", "4.3"])
        shutil.rmtree(bundles / "lalic-mse-vbr")
        (bundles / "SHA256SUMS").write_text("0" * 64 + "  lalic-mse-vbr/config.json\n")
        for command in (
            ["compress", "photo.png", "a.lalic", "--quality", "4.3"],
            ["decompress", "good.lalic", "b.png"],
        ):
            with pytest.raises(LalicError, match="the built-in weights lalic-mse-vbr are missing"):
                main(command)


class TestVersion2:
    """Files of weights of one rate say nothing of rates, and are what they were."""

    def test_a_folded_model(self, model: LALIC) -> None:
        single = model.at(4.3)
        single.update()
        coded = encode_image(single, picture(40, 70))
        data = bitstream.pack(coded, fingerprint(single), 3, 1)
        assert data[4] == 2 and coded.quality is None
        with pytest.raises(LalicError, match="one rate"):
            decode_image(model, bitstream.parse(data, "x").image)

    @pytest.mark.parametrize("file", sorted((ROOT / "weights").glob("lalic-mse-q*/reference.lalic")), ids=str)
    def test_committed_files(self, file: Path) -> None:
        """Written before there was another version: read, and written again as the same bytes."""
        data = file.read_bytes()
        parsed = bitstream.parse(data, "x")
        assert (parsed.version, parsed.image.quality, parsed.image.sections) == (2, None, ())
        assert bitstream.pack(parsed.image, parsed.fingerprint.hex(), parsed.label, parsed.threads) == data
        weights = open_weights(file.parent)
        weights.model.update()
        assert decode_latents(weights.model, parsed.image).dtype == torch.float64
