"""Training on a range of rates: config, drawn rungs, loss, whole runs and what they tell.

The model is tested in test_rates.py; whole runs that are killed are in test_resume.py.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from lalic.data_prep import shard
from PIL import Image
from pytorch_msssim import ms_ssim
from test_loader import loader, made, shards  # noqa: F401 -- fixtures among them
from test_loss import made_up_output
from test_order import MASK, philox
from test_train import TINY, config_path, own_process_state, pixels, records, run, without_noise  # noqa: F401
from test_verdicts import CountReads

from lalic import status
from lalic.config import LossSection, TrainSection, config_text, read_config
from lalic.curves import main as curves
from lalic.curves import rungs_table
from lalic.data.images import list_images
from lalic.data.order import random_crops, random_rungs
from lalic.errors import LalicError
from lalic.ladder import MS_SSIM, MSE
from lalic.model import LALIC, fingerprint
from lalic.release_training import training_facts
from lalic.run_history import read_history
from lalic.run_status import read_status
from lalic.training import checkpoint, inputs
from lalic.training import validate as validating
from lalic.training.distributed import start_processes
from lalic.training.loss import RungLoss, rate_distortion
from lalic.training.run_folder import check_same_run
from lalic.training.schedule import plan
from lalic.training.step import StepResult, TrainStep
from lalic.training.tracking import Tracker

# ruff: noqa: F811 -- fixtures are arguments of the same name

RANGE = "loss.quality=[1, 4]"
SHORT = ["stages=[{steps: 4, lr: 1e-3, crop: 64}]", "validate.every=2"]


class TestConfig:
    @pytest.mark.parametrize(("metric", "table"), [("mse", MSE), ("ms-ssim", MS_SSIM)])
    def test_a_range(self, metric: str, table: dict[int, float], config_path: Path, tmp_path: Path) -> None:
        settings = [f"loss.metric={metric}", "loss.quality=[2,5]", "stages=[{steps: 1, lr: 1e-3, crop: 192}]"]
        config = read_config(config_path, [*settings, "data.val_crop=192"])
        loss = config.loss
        assert (loss.quality, loss.rungs) == ((2, 5), (2, 3, 4, 5))
        assert loss.lambdas == tuple(table[rung] for rung in (2, 3, 4, 5))
        assert loss.reference == pytest.approx(math.sqrt(table[2] * table[5]))
        assert loss.weights == pytest.approx([(loss.reference / lmbda) ** 0.5 for lmbda in loss.lambdas])
        assert loss.facts() == {"metric": metric, "quality": [2, 5], "lambdas": list(loss.lambdas)}
        (tmp_path / "c.yaml").write_text(config_text(config))
        assert "quality: [2, 5]" in config_text(config) and read_config(tmp_path / "c.yaml") == config

    def test_a_single_rate_is_what_it_was(self) -> None:
        loss = LossSection(quality=3)
        assert (loss.rungs, loss.lambdas, loss.multiplier) == (None, (0.0067,), 0.0067)
        assert loss.facts() == {"metric": "mse", "lambda": 0.0067}
        assert LossSection(lmbda=0.01).facts() == {"metric": "mse", "lambda": 0.01}

    @pytest.mark.parametrize(
        ("setting", "words"),
        [
            *((f"loss.quality={text}", ["range of two rungs from 1 to 6", "[1, 6]", text]) for text in (
                "[]", "[3]", "[1, 3, 6]", "[6, 1]", "[3, 3]", "[0, 4]", "[1, 7]", "[-2, -1]",
            )),
            ("loss.quality=1-6", ["a whole number or a list of whole numbers or null", "'1-6'"]),
            ("loss.quality=2.5", ["a whole number or a list of whole numbers or null", "2.5"]),
            ("loss.quality=[1, 2.5]", ["loss.quality.1 must be a whole number", "2.5"]),
            ("loss.quality={low: 1}", ["a whole number or a list of whole numbers"]),
        ],
    )  # fmt: skip
    def test_what_is_no_range(self, setting: str, words: list[str], config_path: Path) -> None:
        with pytest.raises(LalicError) as error:
            read_config(config_path, [setting])
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value

    def test_lambda_with_a_range(self, config_path: Path) -> None:
        with pytest.raises(LalicError, match="exclude each other"):
            read_config(config_path, [RANGE, "loss.lambda=0.01"])

    def test_no_multiplier_stands_for_all(self) -> None:
        with pytest.raises(LalicError, match=r"loss\.quality=\[1, 4\] is a range of rates"):
            LossSection(quality=(1, 4)).multiplier  # noqa: B018

    @pytest.mark.parametrize(
        ("before", "after", "words"),
        [
            ("[1, 4]", "[1, 5]", "loss.quality ([1, 4] -> [1, 5])"),
            ("3", "[1, 4]", "loss.quality (3 -> [1, 4])"),
            ("[1, 4]", "3", "loss.quality ([1, 4] -> 3)"),
        ],
    )
    def test_another_range_is_another_run(self, before: str, after: str, words: str, config_path: Path) -> None:
        old, new = (read_config(config_path, [f"loss.quality={text}"]) for text in (before, after))
        with pytest.raises(LalicError, match=re.escape(words)):
            check_same_run(old, new, {"stage": 1})
        check_same_run(old, old, {"stage": 1})


class TestDrawnRungs:
    def test_they_are_the_word_that_crops_leave(self) -> None:
        """Against Philox in plain integers; the crops of the same block are drawn from its other words."""
        for seed, epoch, index in [(0, 0, 0), (11, 7, 5), (MASK, (1 << 48) - 1, 1 << 40)]:
            key = ((3 << 48 | epoch) << 64) | seed
            blocks = [philox(key, index + i, 4) for i in range(6)]
            assert random_rungs(seed, epoch, index, 6, 5).tolist() == [(block[3] * 5) >> 64 for block in blocks]
            crops = random_crops(seed, epoch, index, [200] * 6, [100] * 6, 64)
            assert [c.left for c in crops] == [(block[0] * 137) >> 64 for block in blocks]

    def test_they_are_uniform(self) -> None:
        """60,000 draws: six counts with a standard deviation of 91 each, and no rung depends on the one before."""
        drawn = random_rungs(3, 0, 0, 60_000, 6)
        assert np.abs(np.bincount(drawn, minlength=6) - 10_000).max() < 5 * 91
        pairs = np.bincount(6 * drawn[:-1] + drawn[1:], minlength=36)
        assert np.abs(pairs - 60_000 / 36).max() < 5 * 41

    @pytest.mark.parametrize(
        ("ranks", "accumulation", "workers"), [(1, 1, 0), (1, 1, 2), (2, 2, 0), (4, 1, 1), (4, 3, 0)]
    )
    def test_a_position_has_one_rung_wherever_it_is_read(
        self, ranks: int, accumulation: int, workers: int, made: Path
    ) -> None:
        """37 images in an epoch: the batches of 12 reach from one into the next."""
        expected = np.concatenate([random_rungs(11, 2 + epoch, 0, 37, 3) for epoch in range(3)])[:96]
        settings = {"rungs": (2, 3, 4), "accumulation": accumulation, "workers": workers, "world_size": ranks}
        found: dict[int, int] = {}
        for rank in range(ranks):
            for batch in loader(made / "shards", rank=rank, **settings):
                assert batch["quality"].dtype == torch.int64 and len(batch["quality"]) == len(batch["x"])
                found |= dict(zip(batch["positions"].tolist(), batch["quality"].tolist(), strict=True))
        assert [found[position] for position in range(96)] == (2 + expected).tolist()

    @pytest.mark.parametrize("workers", [0, 1])
    def test_crops_are_those_of_a_single_rate(self, workers: int, made: Path) -> None:
        with_rungs = list(loader(made / "shards", rungs=(1, 2, 3), workers=workers))
        without = list(loader(made / "shards"))
        assert all(torch.equal(a["x"], b["x"]) for a, b in zip(with_rungs, without, strict=True))
        assert "quality" not in without[0]

    def test_a_replacement_keeps_the_rung_of_its_position(self, shards: Path) -> None:
        whole = [batch["quality"].tolist() for batch in loader(shards, rungs=(1, 2, 3))]
        tar = sorted(shards.glob("*.tar"))[0]
        content = bytearray(tar.read_bytes())
        begin = content.index(b"\xff\xd8\xff")  # a JPEG's first bytes
        content[begin : begin + 3] = b"\0\0\0"
        tar.write_bytes(content)
        damaged = list(loader(shards, rungs=(1, 2, 3), max_bad=1.0))
        assert sum(batch["bad"] for batch in damaged) > 0
        assert [batch["quality"].tolist() for batch in damaged] == whole


def plain_loss(output: dict, x: torch.Tensor, metric: str, table: dict[int, float], quality: list[int]) -> Any:
    """The formula in float64: (weighed loss of the batch, [(loss, bpp, psnr) of each sample])."""
    low, high = min(table), max(table)
    reference = math.sqrt(table[low] * table[high])
    weighed, each = [], []
    for b, rung in enumerate(quality):
        a, a_hat = (t[b].double().numpy() for t in (x, output["x_hat"]))
        bits = sum(-np.log2(p[b].double().numpy()).sum() for p in output["likelihoods"].values())
        bpp = bits / (x.shape[2] * x.shape[3])
        mse = ((a - a_hat) ** 2).mean()
        distortion = 255**2 * mse
        if metric == "ms-ssim":
            distortion = 1 - float(ms_ssim(output["x_hat"][b : b + 1].double(), x[b : b + 1].double(), data_range=1.0))
        loss = table[rung] * distortion + bpp
        each.append((loss, bpp, -10 * math.log10(mse)))
        weighed.append(loss / math.sqrt(table[rung] / reference))
    return np.mean(weighed), each


class TestLoss:
    @pytest.mark.parametrize(("metric", "ladder"), [("mse", MSE), ("ms-ssim", MS_SSIM)])
    def test_is_the_formula(self, metric: str, ladder: dict[int, float]) -> None:
        output, x = made_up_output(5, 192, 256)
        section = LossSection(metric=metric, quality=(2, 5))  # type: ignore[arg-type]
        quality = [3, 5, 2, 3, 3]
        terms = RungLoss(section, torch.device("cpu"))(output, x, torch.tensor(quality))
        table = {rung: ladder[rung] for rung in (2, 3, 4, 5)}
        expected, each = plain_loss(output, x, metric, table, quality)
        assert float(terms["loss"]) == pytest.approx(expected, rel=1e-5)
        assert float(terms["bpp"]) == pytest.approx(np.mean([bpp for _, bpp, _ in each]), rel=1e-5)
        for row, rung in zip(terms["rungs"].tolist(), (2, 3, 4, 5), strict=True):
            own = [values for values, q in zip(each, quality, strict=True) if q == rung]
            assert row[-1] == len(own)
            assert row[:3] == pytest.approx(np.sum(own, axis=0) if own else [0, 0, 0], rel=1e-4)
        plain = rate_distortion(output, x, metric, 1.0)
        for name in plain.keys() - {"loss"}:
            assert float(terms[name]) == pytest.approx(float(plain[name]), rel=1e-5), name

    def test_gradient_is_the_formulas(self) -> None:
        output, x = made_up_output(2, 64, 64)
        output["x_hat"].requires_grad_()
        section, quality = LossSection(quality=(1, 6)), [1, 6]
        terms = RungLoss(section, torch.device("cpu"))(output, x, torch.tensor(quality))
        assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]
        terms["loss"].backward()
        reference = math.sqrt(MSE[1] * MSE[6])
        difference = 2 * (output["x_hat"].detach() - x).double() / x.numel() * 255**2
        expected = torch.stack([math.sqrt(MSE[q] * reference) * difference[i] for i, q in enumerate(quality)])
        torch.testing.assert_close(output["x_hat"].grad.double(), expected, rtol=1e-4, atol=1e-9)

    def test_what_is_not_finite_stays_with_its_rung(self) -> None:
        output, x = made_up_output(2, 64, 64)
        output["x_hat"][0] = x[0]  # PSNR infinite
        rungs = RungLoss(LossSection(quality=(1, 3)), torch.device("cpu"))(output, x, torch.tensor([1, 3]))["rungs"]
        assert rungs[0, 2] == math.inf and rungs[1:].isfinite().all()


def range_step(train: TrainSection, seed: int = 0, lag: int | None = None) -> TrainStep:
    section = LossSection(quality=(1, 4))
    accelerator = start_processes(train)
    torch.manual_seed(seed)
    model = LALIC(**TINY, rungs=section.rungs)
    assert model.rates is not None
    model.rates.initialise(section.lambdas)
    return TrainStep(accelerator, model, train, section, seed, lag=lag)


def batch(seed: int = 0) -> dict[str, Any]:
    return {"x": pixels(4, seed=seed), "quality": torch.tensor([1, 4, 2, 4]), "bad": 0}


class TestStep:
    def test_parts_of_a_batch_give_the_gradients_of_the_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        without_noise(monkeypatch)
        ends = []
        for parts in (1, 4):
            ours = range_step(TrainSection(batch_size=4, cpu_threads=1, accumulation=parts))
            split = {name: value.chunk(parts) for name, value in batch().items() if name != "bad"}
            result = ours([{"x": x, "quality": q} for x, q in zip(*split.values(), strict=True)], step=0, lr=1e-3)
            ends.append((ours.bare.rates.gain.detach().clone(), result))  # type: ignore[union-attr]
        (a, whole), (b, parted) = ends
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(whole.rungs, parted.rungs, rtol=1e-4, atol=1e-5)
        assert whole.rungs is not None and whole.rungs[:, -1].tolist() == [1, 1, 0, 2]
        assert float(whole.values["loss"]) == pytest.approx(float(parted.values["loss"]), rel=1e-4)

    def test_gains_of_drawn_rungs_alone_are_trained(self) -> None:
        ours = range_step(TrainSection(batch_size=4, cpu_threads=1))
        rates = ours.bare.rates
        assert rates is not None
        tables = (rates.gain, rates.inverse_gain)
        before = [table.detach().clone() for table in tables]
        ours([batch()], step=0, lr=1e-3)
        for table, old in zip(tables, before, strict=True):
            assert (table - old).abs().amax(dim=1).gt(0).tolist() == [True, True, False, True]

    def test_no_value_goes_to_the_host(self) -> None:
        ours = range_step(TrainSection(batch_size=4, cpu_threads=1), lag=1)
        ours([batch()], step=0, lr=1e-3)
        with CountReads() as reads:
            ours([batch(1)], step=1, lr=1e-3)
        assert reads.seen == []

    @pytest.mark.parametrize("train", [{"precision": "bf16"}, {"gradient_checkpointing": True}], ids=str)
    def test_other_ways_to_compute_are_near(self, train: dict[str, Any]) -> None:
        plain, other = (
            range_step(TrainSection(batch_size=4, cpu_threads=1, **more))([batch()], step=0, lr=1e-3)
            for more in ({}, train)
        )
        assert plain.rungs is not None and other.rungs is not None
        torch.testing.assert_close(plain.rungs, other.rungs, rtol=0.03 if "precision" in train else 1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def trained(config_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps on q1 to q4, in two log intervals."""
    folder = tmp_path_factory.mktemp("range") / "run"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert run(config_path, folder, RANGE, *SHORT, "log.every=2", "train.ema=0.9") == 0
    monkeypatch.undo()
    return folder


class TestRun:
    def test_checkpoint(self, trained: Path) -> None:
        found = checkpoint.find_checkpoint(trained)
        meta = checkpoint.read_meta(found)
        assert meta["loss"] == {"metric": "mse", "quality": [1, 4], "lambdas": [0.0018, 0.0035, 0.0067, 0.0130]}
        assert meta["model"]["rungs"] == [1, 2, 3, 4] and set(meta["metrics"]["rungs"]) == {"1", "2", "3", "4"}
        assert checkpoint.load_model(found).config["rungs"] == [1, 2, 3, 4]
        assert training_facts(found)["rates"] == "q1 to q4 in one training (lambda 0.0018 to 0.013)"

    def test_log_tells_every_rung(self, trained: Path) -> None:
        drawn = random_rungs(0, 0, 0, 12, 4), random_rungs(0, 1, 0, 12, 4)
        counts = [np.bincount(part, minlength=4) for part in np.concatenate(drawn)[:16].reshape(2, 8)]
        lines = records(trained)
        assert [line["step"] for line in lines] == [2, 4]
        for line, expected in zip(lines, counts, strict=True):
            rungs = line["rungs"]
            assert [rungs[q]["samples"] for q in "1234"] == expected.tolist()
            for values in rungs.values():
                assert values.keys() == {"loss", "bpp", "psnr", "samples"}
                assert all((values[name] is None) == (not values["samples"]) for name in ("loss", "bpp", "psnr"))
            told = [v for v in rungs.values() if v["samples"]]
            for name in ("bpp", "psnr"):
                assert sum(v[name] * v["samples"] for v in told) / 8 == pytest.approx(line[name], rel=1e-5)
            weights = LossSection(quality=(1, 4)).weights
            sums = [w * (v["loss"] or 0) * v["samples"] for w, v in zip(weights, rungs.values(), strict=True)]
            assert sum(sums) / 8 == pytest.approx(line["loss"], rel=1e-5)

    def test_board_tells_every_rung(self, trained: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(trained / "tensorboard"))
        board.Reload()
        (last,) = [line for line in records(trained, "validation") if line["step"] == 4]
        for q in "1234":
            for name in ("loss", "bpp", "psnr"):
                value = board.Scalars(f"validation/q{q}/{name}")[-1].value
                assert value == pytest.approx(last["rungs"][q][name], rel=1e-5)
            assert board.Scalars(f"train/q{q}/samples")
        pictures = board.Tags()["images"]
        assert len(pictures) == 2 and all(tag.startswith("validation/q3/") for tag in pictures), pictures

    def test_log_line(self, config_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO):
            run(config_path, tmp_path / "r", RANGE, "stages=[{steps: 1, lr: 1e-3, crop: 64}]", "data.val=")
        (line,) = [m for m in caplog.messages if m.startswith("step ")]
        drawn = set((1 + random_rungs(0, 0, 0, 4, 4)).tolist())
        shown = " ".join(rf"q{q} \d\.\d{{3}}/\d+\.\d" if q in drawn else f"q{q} -" for q in (1, 2, 3, 4))
        assert re.search(rf"loss \d+\.\d+ bpp \d+\.\d+ psnr \d+\.\d+ {shown} aux", line), line
        assert any("one model for q1 to q4" in message for message in caplog.messages)

    def test_ms_ssim(self, config_path: Path, tmp_path: Path) -> None:
        (tmp_path / "large").mkdir()
        for path in sorted((config_path.parent / "images").iterdir())[:2]:
            Image.open(path).resize((200, 200)).save(tmp_path / "large" / path.name)
        folders = ["--input", str(tmp_path / "large"), "--output", str(tmp_path / "shards")]
        shard.main([*folders, "--min-side", "64", "--workers", "1"])
        settings = ["loss.metric=ms-ssim", RANGE, "stages=[{steps: 1, lr: 1e-4, crop: 192}]", "data.val_crop=192"]
        settings += [f"data.shards={tmp_path}/shards", f"data.val={tmp_path}/large", "train.batch_size=2"]
        assert run(config_path, tmp_path / "run", *settings) == 0
        for kind, keys in (("train", {"samples"}), ("validation", {"bpp_y", "bpp_z", "mse"})):
            (line,) = records(tmp_path / "run", kind)
            for q, values in line["rungs"].items():
                assert values.keys() == {"loss", "bpp", "psnr", "ms_ssim"} | keys
                if values["bpp"] is not None:
                    expected = MS_SSIM[int(q)] * (1 - values["ms_ssim"]) + values["bpp"]
                    assert values["loss"] == pytest.approx(expected, rel=1e-4)

    def test_status(self, trained: Path, tmp_path: Path) -> None:
        found = read_status(trained)
        assert found.lmbda is None and found.lambdas == {"1": 0.0018, "2": 0.0035, "3": 0.0067, "4": 0.0130}
        words = status.text(found)
        last = records(trained, "validation")[-1]
        for q, lmbda in found.lambdas.items():
            values = last["rungs"][q]
            line = f"q{q} (lambda {lmbda:g}): loss {values['loss']:.4f}, bpp {values['bpp']:.4f}, psnr"
            assert line in words, words
        # Without a validation: of the newest log line.
        shutil.copytree(trained, tmp_path / "r", ignore=shutil.ignore_patterns("checkpoints"))
        kept = [line for line in (trained / "log.jsonl").read_text().splitlines() if '"validation"' not in line]
        (tmp_path / "r" / "log.jsonl").write_text("\n".join(kept) + "\n")
        rungs = records(trained)[-1]["rungs"]
        words = status.text(read_status(tmp_path / "r"))
        assert all((f"bpp {v['bpp']:.4f}" if v["samples"] else "): -") in words for v in rungs.values()), words

    @pytest.mark.parametrize(
        "rungs", [None, 3, [], "x", {"1": None}, {"1": {"bpp": "x"}}, {"a|b": {"bpp": 1}}], ids=str
    )
    def test_lines_that_no_run_writes(self, rungs: Any, trained: Path, tmp_path: Path) -> None:
        shutil.copytree(trained, tmp_path / "r")
        lines = [{**json.loads(line), "rungs": rungs} for line in (trained / "log.jsonl").read_text().splitlines()]
        (tmp_path / "r" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert status.text(read_status(tmp_path / "r"))
        assert read_history(tmp_path / "r").rungs in ([], [1])
        assert curves([str(tmp_path / "r"), "-o", str(tmp_path / "c.svg")]) == 0

    def test_curves(self, trained: Path, config_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        history = read_history(trained)
        assert history.rungs == [1, 2, 3, 4] and read_history(trained).until("steps", 2).rungs == [1, 2, 3, 4]
        lines = records(trained)
        for q in "1234":
            for name in ("loss", "bpp", "psnr"):
                told = [line["rungs"][q][name] for line in lines]
                expected = [math.nan if value is None else value for value in told]
                assert history.train.values[f"q{q}/{name}"] == pytest.approx(expected, nan_ok=True)
        assert run(config_path, tmp_path / "single", *SHORT, "log.every=2") == 0
        assert rungs_table([read_history(tmp_path / "single")], ["single"]) == ""
        capsys.readouterr()
        assert curves([str(trained), str(tmp_path / "single"), "-o", str(tmp_path / "c.svg")]) == 0
        printed = capsys.readouterr().out
        last = records(trained, "validation")[-1]["rungs"]
        for q in "1234":
            assert re.search(rf"\| run \| q{q} \| [^|]+ \| {last[q]['loss']:.4f}, {last[q]['bpp']:.4f}, ", printed)
        picture = (tmp_path / "c.svg").read_text()
        assert all(picture.count(f"<!-- q{q} -->") == 3 for q in "1234")  # loss, bpp, PSNR


class TestValidation:
    def test_every_rung_against_the_folded_models(self, trained: Path, config_path: Path) -> None:
        config = read_config(config_path)
        images, section = list_images(config.data.val), LossSection(quality=(1, 4))
        model = checkpoint.load_model(checkpoint.find_checkpoint(trained))
        metrics, shown = validating.validate(Accelerator(cpu=True), model, images, section, crop=64, pictures=2)
        assert [name for name, _ in shown] == ["q3/00.png", "q3/01.png"]
        singles = {}
        for q in (1, 2, 3, 4):
            single, _ = validating.validate(Accelerator(cpu=True), model.at(q), images, LossSection(quality=q), crop=64)
            singles[q] = single
            for name in ("loss", "bpp", "bpp_y", "psnr"):
                assert metrics["rungs"][str(q)][name] == pytest.approx(single[name], rel=2e-3), (q, name)
        assert metrics["bpp"] == pytest.approx(np.mean([v["bpp"] for v in metrics["rungs"].values()]))
        weighed = [w * v["loss"] for w, v in zip(section.weights, metrics["rungs"].values(), strict=True)]
        assert metrics["loss"] == pytest.approx(np.mean(weighed)) and metrics["ms_ssim"] is None
        assert metrics["images"] == 3

    def test_two_ranks_find_the_numbers_of_one(
        self, trained: Path, config_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The rows of both ranks, one after the other in this process, added up."""
        images = list_images(read_config(config_path).data.val)
        model = checkpoint.load_model(checkpoint.find_checkpoint(trained))
        section, accelerator = LossSection(quality=(1, 4)), Accelerator(cpu=True)
        expected, _ = validating.validate(accelerator, model, images, section, crop=64)
        tables: list[torch.Tensor] = []

        def summed(_: Accelerator, table: torch.Tensor) -> torch.Tensor:
            tables.append(table)
            return torch.stack(tables).sum(dim=0)

        monkeypatch.setattr(validating, "sum_over_ranks", summed)
        monkeypatch.setattr(validating, "together", lambda _, action: action())
        monkeypatch.setattr(type(accelerator), "num_processes", 2)
        for rank in (0, 1):
            monkeypatch.setattr(type(accelerator), "process_index", rank)
            found, _ = validating.validate(accelerator, model, images, section, crop=64)
        assert all(bool(table.any()) for table in tables) and found == expected


class TestStart:
    """`train.init_from`, from one rate to several and back."""

    def source(self, folder: Path, quality: tuple[int, int] | None) -> Path:
        torch.manual_seed(5)
        rungs = None if quality is None else range(quality[0], quality[1] + 1)
        model = LALIC(**TINY, rungs=None if rungs is None else list(rungs))
        if model.rates is not None:
            torch.nn.init.normal_(model.rates.gain)
        torch.save(model.state_dict(), folder / "w.pt")
        return folder / "w.pt"

    def begin(self, config_path: Path, source: Path, *settings: str) -> LALIC:
        return inputs.new_model(read_config(config_path, [f"train.init_from={source}", *settings]))

    def test_fresh_gains_follow_lambda(self, config_path: Path) -> None:
        config = read_config(config_path, [RANGE])
        model = inputs.new_model(config)
        assert model.rates is not None
        expected = [math.log(lmbda / config.loss.reference) / 2 for lmbda in config.loss.lambdas]
        assert model.rates.gain[:, 7].tolist() == pytest.approx(expected)
        assert model.rates.inverse_gain[:, 0].tolist() == pytest.approx([-g for g in expected])

    def test_one_rate_into_several(self, config_path: Path, tmp_path: Path) -> None:
        source = self.source(tmp_path, None)
        found, model = torch.load(source), self.begin(config_path, source, RANGE)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in found.items())
        fresh = inputs.new_model(read_config(config_path, [RANGE]))
        assert model.rates is not None and fresh.rates is not None
        assert torch.equal(model.rates.gain, fresh.rates.gain)

    @pytest.mark.parametrize("wanted", ["[2, 5]", "[3, 4]", "[2, 3]"])
    def test_several_rates_into_some_of_them(self, wanted: str, config_path: Path, tmp_path: Path) -> None:
        source = self.source(tmp_path, (2, 5))
        found, model = torch.load(source), self.begin(config_path, source, f"loss.quality={wanted}")
        low, high = json.loads(wanted)
        for name, tensor in model.state_dict().items():
            expected = found[name][low - 2 : high - 1] if name.startswith("rates.") else found[name]
            assert torch.equal(tensor, expected), name

    @pytest.mark.parametrize("quality", [2, 4])
    def test_several_rates_into_one(self, quality: int, config_path: Path, tmp_path: Path) -> None:
        source = self.source(tmp_path, (2, 5))
        model = self.begin(config_path, source, f"loss.quality={quality}")
        several = LALIC(**TINY, rungs=[2, 3, 4, 5])
        several.load_state_dict(torch.load(source))
        assert model.rates is None and fingerprint(model) == fingerprint(several.at(quality))

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (["loss.quality=[1, 4]"], "rates 2 to 5, and loss.quality=[1, 4] needs others"),
            (["loss.quality=6"], "rates 2 to 5, and loss.quality=6 needs others"),
            (["loss.lambda=0.01"], "rates 2 to 5, and loss.lambda=0.01 needs others"),
            (["loss.quality=[2, 5]", "model.depths=[1, 1, 2, 1]"], "another architecture"),
        ],
        ids=str,
    )
    def test_what_does_not_fit(self, settings: list[str], words: str, config_path: Path, tmp_path: Path) -> None:
        with pytest.raises(LalicError, match=re.escape(words)) as error:
            self.begin(config_path, self.source(tmp_path, (2, 5)), *settings)
        assert "\n" not in str(error.value)


def test_a_step_that_is_left_out_is_in_no_mean(config_path: Path, tmp_path: Path) -> None:
    config = read_config(config_path, [RANGE, f"run.dir={tmp_path}"])
    tracker = Tracker(Accelerator(cpu=True), config, plan(config.stages, 4, lambda crop: 12))
    tracker.open(0)
    names = ("loss", "bpp", "psnr", "aux", "gradient_norm")
    good, bad = (
        StepResult(dict.fromkeys(names, torch.tensor(v)), torch.tensor(left_out), torch.full((4, 4), v))
        for v, left_out in ((2.0, 0.0), (math.nan, 1.0))
    )
    for result in (good, bad):
        tracker.add(result, [{"bad": 0}], seconds=1.0, waited=0.0)
    tracker.write(2, plan(config.stages, 4, lambda crop: 12).stages[0])
    tracker.close()
    (line,) = records(tmp_path)
    assert line["rungs"]["2"] == {"loss": 1.0, "bpp": 1.0, "psnr": 1.0, "samples": 2} and line["skipped_steps"] == 1


def test_interval_goes_on_with_another_number_of_ranks(config_path: Path, tmp_path: Path) -> None:
    """The sums of two ranks, of an interval that a checkpoint has cut, go on in the first one's tracker."""
    config = read_config(config_path, [RANGE, f"run.dir={tmp_path}"])
    schedule, accelerator = plan(config.stages, 4, lambda crop: 12), Accelerator(cpu=True)
    ours = range_step(TrainSection(batch_size=4, cpu_threads=1))
    results = [ours([batch(seed)], step=seed, lr=1e-3) for seed in range(3)]
    states = []
    for rank in (0, 1):
        tracker = Tracker(accelerator, config, schedule)
        tracker.add(results[rank], [{"bad": 0}], seconds=1.0, waited=0.0)
        states.append(tracker.state_dict())
    tracker = Tracker(accelerator, config, schedule)
    tracker.open(0)
    tracker.load_state_dicts(states, 2)
    tracker.add(results[2], [{"bad": 0}], seconds=1.0, waited=0.0)
    tracker.write(2, schedule.stages[0])
    tracker.close()
    (line,) = records(tmp_path)
    means = [float(result.values["loss"]) for result in results]
    assert line["loss"] == pytest.approx(((means[0] + means[1]) / 2 + means[2]) / 2)
    assert line["skipped_steps"] == 0
    sums = sum(result.rungs for result in results if result.rungs is not None)
    assert [line["rungs"][q]["samples"] for q in "1234"] == [3, 3, 0, 6]
    assert line["rungs"]["4"]["bpp"] == pytest.approx(float(sums[3, 1]) / 6, rel=1e-6)  # type: ignore[index]
    assert line["rungs"]["3"] == {"loss": None, "bpp": None, "psnr": None, "samples": 0}
