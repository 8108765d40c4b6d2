"""lalic.eval: every flag, every number against an independent one, and no folder that ends in silence."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lalic.anchors import curves_of, measure_pillow, published
from lalic.codec.coder import encode_image, pad
from lalic.errors import LalicError
from lalic.eval import averages, main, reconstruction_names
from lalic.evaluation.options import labels_of
from lalic.measure import measure
from lalic.metrics import to_tensor
from lalic.model import LALIC, load_weights, published_state_dict
from lalic.plot import read_curve

TINY = {"N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 1, 1, 1), "groups": (4, 4, 8, 16)}
FLOAT32 = ("--arithmetic", "float32")  # CompressAI's strings
SIZES = {"b.png": (64, 100), "sub/a.png": (40, 40), "sub/c.png": (70, 64)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("weights")
    paths = []
    for seed, spread in ((0, 1), (1, 40)):
        torch.manual_seed(seed)
        model = LALIC(**TINY)
        with torch.no_grad():
            model.g_a[-1].weight.mul_(spread)
        paths.append(folder / f"lalic-mse-q{seed + 1}.pth")
        torch.save(published_state_dict(model), paths[-1])
    return paths


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def evaluate(checkpoints: list[Path], images: Path, tmp_path: Path, *flags: str) -> dict[str, Any]:
    result = tmp_path / "result.json"
    arguments = ["-m", "LALIC", "-p", *map(str, checkpoints), "-i", str(images), "--result", str(result)]
    assert main([*arguments, *flags]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(result.read_text(), parse_constant=refuse)


def rgb_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def report(checkpoints: list[Path], images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("real")
    flags = ("-q", "low", "high", "-o", str(folder / "recon"), "--real", "--verbose", "-c", "ans", *FLOAT32)
    return {**evaluate(checkpoints, images, folder, *flags), "folder": folder}


def test_the_folder_of_the_result_is_made(checkpoints: list[Path], images: Path, tmp_path: Path) -> None:
    evaluate(checkpoints[:1], images, tmp_path / "made" / "here")
    assert (tmp_path / "made/here/result.json").exists()


class TestReal:
    def test_published_tools_can_read_it(self, report: dict[str, Any]) -> None:
        assert report["name"] == "LALIC"
        assert isinstance(report["description"], str)
        for key in ("bpp", "psnr", "enc_time", "dec_time"):
            assert [type(v) for v in report["results"][key]] == [float, float]
        assert set(report["results"]) >= {"psnr-unrounded", "ms-ssim", "ms-ssim-db", "peak-memory-bytes"}
        for record in report["records"]:
            assert {"file", "quality", "bpp", "psnr", "enc_time", "dec_time"} <= set(record)
        curve = read_curve(report["folder"] / "result.json")
        assert curve.bpp == report["results"]["bpp"]

    def test_one_record_for_each_image_and_checkpoint(self, report: dict[str, Any], images: Path) -> None:
        seen = [(r["quality"], r["file"]) for r in report["records"]]
        assert seen == [(q, str(images / name)) for q in ("low", "high") for name in sorted(SIZES)]

    def test_bytes_are_those_of_the_model(self, report: dict[str, Any], checkpoints: list[Path]) -> None:
        for path, label in zip(checkpoints, ("low", "high"), strict=True):
            model = load_weights(path)
            model.update()
            for record in (r for r in report["records"] if r["quality"] == label):
                rgb = rgb_of(Path(record["file"]))
                strings = model.compress(pad(to_tensor(rgb)))["strings"]
                size = sum(len(s) for (s,) in strings)
                assert record["bytes"] == size
                assert record["bpp"] == pytest.approx(8 * size / rgb.shape[0] / rgb.shape[1], abs=1e-8)

    def test_quality_is_that_of_the_written_picture(self, report: dict[str, Any], images: Path) -> None:
        skimage = pytest.importorskip("skimage.metrics")
        for record in report["records"]:
            name = Path(record["file"]).relative_to(images)
            written = rgb_of(report["folder"] / "recon" / record["quality"] / name)
            psnr = skimage.peak_signal_noise_ratio(rgb_of(Path(record["file"])), written, data_range=255)
            assert record["psnr"] == pytest.approx(psnr, abs=1e-6)
            assert record["psnr-unrounded"] == pytest.approx(record["psnr"], abs=0.1)

    def test_averages(self, report: dict[str, Any]) -> None:
        low = [r for r in report["records"] if r["quality"] == "low"]
        assert report["results"]["bpp"][0] == pytest.approx(np.mean([r["bpp"] for r in low]), abs=1e-7)
        assert report["results"]["psnr"][0] == pytest.approx(np.mean([r["psnr"] for r in low]), abs=1e-7)
        times = [r["enc_time"] for r in low[1:]]
        assert report["results"]["enc_time"][0] == pytest.approx(np.mean(times), abs=1e-7)

    def test_small_images_have_no_ms_ssim(self, report: dict[str, Any]) -> None:
        assert report["results"]["ms-ssim-db"] == [None, None]

    def test_environment(self, report: dict[str, Any]) -> None:
        environment = report["environment"]
        assert environment["torch"] == torch.__version__
        assert environment["threads"] == torch.get_num_threads()
        assert environment["device"] == "cpu"


class TestTimes:
    def run(self, checkpoints: list[Path], sizes: list[tuple[int, int]], tmp_path: Path, *flags: str) -> dict[str, Any]:
        (tmp_path / "i").mkdir()
        for i, size in enumerate(sizes):
            Image.new("RGB", size, (10 * i, 0, 0)).save(tmp_path / "i" / f"{i}.png")
        return evaluate(checkpoints[:1], tmp_path / "i", tmp_path, *flags)

    def test_first_of_a_size_is_left_out(self, checkpoints: list[Path], tmp_path: Path) -> None:
        # The second is padded to the size of the first.
        report = self.run(checkpoints, [(64, 64), (60, 50), (90, 64), (64, 64), (100, 20)], tmp_path)
        timings = [r["timing"] for r in report["records"]]
        assert timings == ["first", "warm", "new-size", "warm", "warm"]
        times = [r["forward_time"] for r in report["records"]]
        expected = np.mean([times[i] for i in (1, 3, 4)])
        assert report["results"]["forward_time"][0] == pytest.approx(expected, abs=1e-7)

    def test_all_of_different_sizes(self, checkpoints: list[Path], tmp_path: Path) -> None:
        report = self.run(checkpoints, [(64, 64), (70, 64), (140, 64)], tmp_path)
        assert [r["timing"] for r in report["records"]] == ["first", "new-size", "new-size"]
        times = [r["forward_time"] for r in report["records"]]
        assert report["results"]["forward_time"][0] == pytest.approx(np.mean(times[1:]), abs=1e-7)

    def test_warm_up(self, checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        forward, seen = LALIC.forward, []
        monkeypatch.setattr(LALIC, "forward", lambda self, x, q: seen.append(tuple(x.shape[2:])) or forward(self, x))
        report = self.run(checkpoints, [(64, 64), (70, 64), (64, 64)], tmp_path, "--warm-up")
        assert [r["timing"] for r in report["records"]] == ["first", "warm", "warm"]
        assert seen == [(64, 64), (64, 64), (64, 128), (64, 128), (64, 64)]


@pytest.fixture(scope="module")
def both(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two pictures that need no padding, where CompressAI and we differ; the folder and the result in it."""
    folder = tmp_path_factory.mktemp("compressai")
    (folder / "i").mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((256, 192), Image.Resampling.BICUBIC).save(folder / "i" / f"{i}.png")
    return folder, evaluate(checkpoints, folder / "i", folder, "--real", *FLOAT32)


class TestCompressAI:
    def test_its_plot_reads_the_result(self, both: tuple[Path, dict[str, Any]]) -> None:
        plot = pytest.importorskip("compressai.utils.plot.__main__")
        folder, report = both
        curve = plot.parse_json_file(folder / "result.json", "psnr")
        assert (curve["name"], curve["xs"], curve["ys"]) == (
            "LALIC",
            report["results"]["bpp"],
            report["results"]["psnr"],
        )
        curve = plot.parse_json_file(folder / "result.json", "ms-ssim")
        assert curve["ys"] == pytest.approx(-10 * np.log10(1 - np.array(report["results"]["ms-ssim"])))

    def test_its_evaluation_measures_the_same(self, both: tuple[Path, dict[str, Any]], checkpoints: list[Path]) -> None:
        theirs = pytest.importorskip("compressai.utils.eval_model.__main__")
        folder, report = both
        for i, path in enumerate(checkpoints):
            model = load_weights(path)
            model.update()
            files = sorted((folder / "i").iterdir())
            metrics = theirs.eval_model(
                model, folder, folder / "i", files, architecture="LALIC", half=False, per_image=False
            )
            assert set(metrics) <= set(report["results"])
            assert report["results"]["bpp"][i] == pytest.approx(metrics["bpp"], abs=1e-7)
            for key in ("psnr-rgb", "ms-ssim-rgb"):
                assert report["results"][key][i] == pytest.approx(metrics[key], abs=1e-4)

    def test_times_of_an_estimate(self, checkpoints: list[Path], images: Path, tmp_path: Path) -> None:
        results = evaluate(checkpoints[:1], images, tmp_path)["results"]
        assert results["encoding_time"] == results["decoding_time"]
        assert results["encoding_time"][0] == pytest.approx(results["forward_time"][0] / 2, abs=1e-7)


class TestAnchors:
    def test_beside_the_checkpoints(
        self, checkpoints: list[Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "i").mkdir()
        for name in SIZES:
            (tmp_path / "i" / Path(name).name).write_bytes((images / name).read_bytes())
        (tmp_path / "i" / "broken.png").write_bytes(b"no image")
        report = evaluate(checkpoints[:1], tmp_path / "i", tmp_path, "--anchors", "jpeg", "webp")
        assert [a["label"] for a in report["anchors"]] == ["JPEG", "WebP"]
        direct = measure_pillow([rgb_of(tmp_path / "i" / f"{n}.png") for n in "abc"], "jpeg")
        assert report["anchors"][0]["bpp"] == pytest.approx(direct.bpp, abs=1e-7)
        assert report["anchors"][0]["source"] == "measured"
        assert "JPEG" in capsys.readouterr().out

    def test_published_ones(self, checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "i").mkdir()
        for i in range(1, 25):
            Image.new("RGB", (768, 512), (i, 0, 0)).save(tmp_path / "i" / f"kodim{i:02d}.png")
        perfect = {"x_hat": torch.zeros(1, 3, 512, 768), "likelihoods": {"y": torch.full((8,), 0.5)}}
        monkeypatch.setattr(LALIC, "forward", lambda self, x, q: perfect)
        monkeypatch.setattr("lalic.measure.ms_ssim", lambda a, b: 0.5)
        report = evaluate(checkpoints[:1], tmp_path / "i", tmp_path, "--anchors", "published")
        assert report["dataset"] == "kodak"
        written = curves_of(report, "x")
        assert [(c.name, c.label, c.metrics) for c in written] == [
            (c.name, c.label, c.metrics) for c in published("kodak")
        ]
        for a, b in zip(written, published("kodak"), strict=True):
            assert a.bpp == pytest.approx(b.bpp, abs=1e-8)
            assert a.psnr == pytest.approx(b.psnr, abs=1e-8)

    @pytest.mark.parametrize("anchor", ["gif", "published"])
    def test_wrong_ones_are_refused_at_once(
        self, checkpoints: list[Path], images: Path, tmp_path: Path, anchor: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(LALIC, "forward", lambda self, x, q: pytest.fail("measured"))
        with pytest.raises(LalicError, match=r"anchor gif|no published points"):
            evaluate(checkpoints, images, tmp_path, "--anchors", anchor)


class TestEstimate:
    def test_rate_by_hand(self, checkpoints: list[Path], images: Path, tmp_path: Path) -> None:
        report = evaluate(checkpoints[:1], images, tmp_path)
        model = load_weights(checkpoints[0])
        for record in report["records"]:
            rgb = rgb_of(Path(record["file"]))
            with torch.no_grad():
                likelihoods = model(pad(to_tensor(rgb)))["likelihoods"]
            bits = sum(-np.log2(p.double().numpy()).sum() for p in likelihoods.values())
            assert record["bpp"] == pytest.approx(bits / rgb.shape[0] / rgb.shape[1], rel=1e-6)
        assert "enc_time" not in report["results"]
        assert report["results"]["forward_time"][0] > 0
        assert report["qualities"] == ["lalic-mse-q1"]

    def test_both_and_their_gap(self, checkpoints: list[Path], images: Path, tmp_path: Path) -> None:
        report = evaluate(checkpoints[:1], images, tmp_path, "--both", "-q", "x")
        estimate = evaluate(checkpoints[:1], images, tmp_path, "-q", "x")
        real = evaluate(checkpoints[:1], images, tmp_path, "-q", "x", "--real")
        results = {k: v[0] for k, v in report["results"].items()}
        assert results["bpp"] == real["results"]["bpp"][0]
        assert results["bpp-estimated"] == estimate["results"]["bpp"][0]
        gap = 100 * (results["bpp"] / results["bpp-estimated"] - 1)
        assert results["bpp-gap-percent"] == pytest.approx(gap, abs=1e-4)
        # A string ends in up to 8 bytes of coder state. The rest of the gap is the tables' precision: a scale is up to
        # 6 % off, which is a gain where the weights are random and nearly all symbols zero, as here.
        for record in report["records"]:
            estimated = record["bpp-estimated"] * record["width"] * record["height"] / 8
            assert 0.93 * estimated < record["bytes"] < 1.05 * estimated + 8

    def test_arithmetic_of_files(self, checkpoints: list[Path], images: Path, tmp_path: Path) -> None:
        report = evaluate(checkpoints[:1], images, tmp_path, "--real")
        assert report["arithmetic"] == "float64"
        model = load_weights(checkpoints[0])
        for record in report["records"]:
            coded = encode_image(model, rgb_of(Path(record["file"])))
            assert record["bytes"] == sum(len(s) for s in coded.strings) + len(coded.exceptions)
        other = evaluate(checkpoints[:1], images, tmp_path, "--real", *FLOAT32)
        assert other["arithmetic"] == "float32"
        # Eight more strings, each with the coder's state at its end, and tables that are up to 6 % off.
        for a, b in zip(report["records"], other["records"], strict=True):
            assert 0.93 * a["bytes"] < b["bytes"] < 1.07 * a["bytes"] + 8 * 8

    def test_half_precision(self, checkpoints: list[Path], images: Path, tmp_path: Path) -> None:
        full = evaluate(checkpoints[:1], images, tmp_path, "--real")
        half = evaluate(checkpoints[:1], images, tmp_path, "--real", "--half")
        assert half["environment"]["precision"].startswith("bfloat16")
        assert half["results"]["psnr-unrounded"] != full["results"]["psnr-unrounded"]
        assert half["results"]["psnr"][0] == pytest.approx(full["results"]["psnr"][0], abs=0.5)


class TestFolders:
    def test_unreadable_image_is_skipped_and_told(
        self, checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "images"
        folder.mkdir()
        rgb = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(rgb).save(folder / "good.png")
        data = (folder / "good.png").read_bytes()
        (folder / "cut.png").write_bytes(data[: len(data) // 2])
        report = evaluate(checkpoints, folder, tmp_path)
        assert [s["file"] for s in report["skipped"]] == [str(folder / "cut.png")]
        assert report["images"]["used"] == 1
        assert len(report["records"]) == 2
        assert "1 of 2 images could not be read" in capsys.readouterr().out
        assert report["results"]["forward_time"][0] == report["records"][0]["forward_time"]

    def test_what_is_no_picture(self, checkpoints: list[Path], tmp_path: Path) -> None:
        folder = tmp_path / "images"
        folder.mkdir()
        frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
        frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)
        (folder / "empty.png").write_bytes(b"")
        (folder / "page.jpg").write_bytes(b"<!DOCTYPE html><html></html>")
        Image.new("RGB", (65000, 2), "red").save(folder / "wide.png")
        chunks = (b"IHDR" + struct.pack(">IIBBBBB", 65000, 65000, 8, 2, 0, 0, 0), b"IDAT")
        png = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
        (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png))
        report = evaluate(checkpoints[:1], folder, tmp_path, "-o", str(tmp_path / "r"), "-q", "a")
        used = [Path(r["file"]).name for r in report["records"]]
        assert used == ["animated.webp", "wide.png"]
        assert report["records"][1]["width"] == 65000
        reasons = {Path(s["file"]).name: s["reason"] for s in report["skipped"]}
        assert "too many pixels" in reasons["bomb.png"]
        assert "empty file" in reasons["empty.png"]
        assert "not an image" in reasons["page.jpg"]

    def test_gray_and_cmyk(self, checkpoints: list[Path], tmp_path: Path) -> None:
        folder = tmp_path / "images"
        folder.mkdir()
        rgb = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
        Image.fromarray(rgb).convert("L").save(folder / "gray.png")
        Image.fromarray(rgb).convert("CMYK").save(folder / "cmyk.jpg")
        report = evaluate(checkpoints[:1], folder, tmp_path, "-o", str(tmp_path / "r"), "-q", "a")
        assert len(report["records"]) == 2
        assert rgb_of(tmp_path / "r" / "a" / "gray.png").shape == (30, 20, 3)

    def test_equal_names_do_not_overwrite(self) -> None:
        root = Path("images")
        names = ["a.jpg", "a.webp", "b.jpg", "sub/a.png"]
        out = reconstruction_names([root / n for n in names], root)
        assert [str(n) for n in out] == ["a.jpg.png", "a.webp.png", "b.png", "sub/a.png"]

    def test_bundle_and_run_labels(self, checkpoints: list[Path], images: Path, tmp_path: Path) -> None:
        from lalic.release import open_weights, write_bundle

        bundle = write_bundle(open_weights(checkpoints[0]), tmp_path)
        report = evaluate([bundle], images, tmp_path)
        assert report["qualities"] == ["lalic-mse-q1"]
        assert report["models"][0]["loss"] == {"metric": "mse", "lambda": 0.0018}


class TestLabels:
    @pytest.mark.parametrize(
        ("checkpoint", "label"),
        [
            ("ckpt/lalic-mse-q3.pth.tar", "lalic-mse-q3"),
            ("lalic-mse-q3", "lalic-mse-q3"),
            ("https://host/release/lalic-mse-q3/", "lalic-mse-q3"),
            ("https://host/w/lalic-mse-q3.pth?download=1#sha256=00", "lalic-mse-q3"),
        ],
    )
    def test_named_after_the_checkpoint(self, checkpoint: str, label: str) -> None:
        assert labels_of([checkpoint], None) == [label]

    def test_missing_release(self, images: Path) -> None:
        with pytest.raises(LalicError, match="lalic-ms-ssim-q1"):
            main(["-p", "lalic-ms-ssim-q1", "-i", str(images)])


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["-p", "W", "-q", "1", "2", "-i", "I"], "1 checkpoints .* 2 labels"),
            (["-p", "W", "W", "-q", "1", "1", "-i", "I"], "several checkpoints"),
            (["-p", "W", "-q", "../1", "-i", "I"], "cannot name a folder"),
            (["-p", "missing.pth", "-i", "I"], "no such checkpoint: missing.pth"),
            (["-p", "W", "-i", "nowhere"], "nowhere"),
            (["-p", "W", "-i", "E"], "no image"),
            (["-p", "W", "-i", "B"], "none of the 1 images"),
            (["-p", "T", "-i", "I"], "text.pth"),
            (["-p", "O", "-i", "I"], "other.pth"),
            (["-p", "W", "-i", "I", "--result", "E"], "empty is a folder"),
        ],
        ids=["labels", "repeated", "path", "checkpoint", "folder", "empty", "unreadable", "text", "other", "result"],
    )
    def test_one_line(
        self, checkpoints: list[Path], images: Path, tmp_path: Path, arguments: list[str], message: str
    ) -> None:
        empty, bad, text = tmp_path / "empty", tmp_path / "bad", tmp_path / "text.pth"
        empty.mkdir()
        bad.mkdir()
        (bad / "a.png").write_bytes(b"not an image")
        text.write_text("<html>")
        torch.save({"g_a.0.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
        places = {"O": tmp_path / "other.pth", "W": checkpoints[0], "I": images, "E": empty, "B": bad, "T": text}
        with pytest.raises(LalicError, match=message) as caught:
            main([str(places.get(a, a)) for a in arguments])
        assert "\n" not in str(caught.value)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_cuda_is_never_silently_ignored(self, checkpoints: list[Path], images: Path) -> None:
        with pytest.raises(LalicError, match="no CUDA device"):
            main(["-p", str(checkpoints[0]), "-i", str(images), "--cuda"])

    def test_unknown_architecture_and_coder(self, checkpoints: list[Path], images: Path) -> None:
        for extra in (["-m", "ELIC"], ["-c", "huffman"]):
            with pytest.raises(SystemExit) as caught:
                main(["-p", str(checkpoints[0]), "-i", str(images), *extra])
            assert caught.value.code == 2


class TestAverages:
    def test_first_time_and_infinities_are_left_out(self) -> None:
        rows = [
            {"bpp": 1.0, "psnr": math.inf, "enc_time": 9.0},
            {"bpp": 2.0, "psnr": 30.0, "enc_time": 1.0},
            {"bpp": 3.0, "psnr": 32.0, "enc_time": 2.0},
        ]
        assert averages(rows) == {"bpp": 2.0, "psnr": 31.0, "enc_time": 1.5}

    def test_one_image_is_timed(self) -> None:
        assert averages([{"bpp": 1.0, "enc_time": 9.0}])["enc_time"] == 9.0


def test_identical_picture_is_infinite(checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_weights(checkpoints[0])
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    perfect = {"x_hat": to_tensor(rgb), "likelihoods": {"y": torch.full((8,), 0.5)}}
    monkeypatch.setattr(type(model), "forward", lambda self, x, q: perfect)
    row, reconstruction = measure(model, rgb, real=False, estimate=True)
    assert row["psnr"] == math.inf
    assert row["bpp"] == 8 / 4096
    assert np.array_equal(reconstruction, rgb)
