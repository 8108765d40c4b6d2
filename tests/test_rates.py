"""A model of several rates: gains against plain arithmetic, folding, files, and what does not fit."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_codec import TINY

from lalic.errors import LalicError
from lalic.ladder import MS_SSIM, MSE, lambda_at
from lalic.model import LALIC, fingerprint, load_weights, published_state_dict
from lalic.model.compact import compact_state_dict, rounded
from lalic.model.rates import Rates, check_rungs

RUNGS = [2, 3, 4, 5]
LAMBDAS = [MSE[rung] for rung in RUNGS]


def several_rates(seed: int = 0, rungs: list[int] = RUNGS) -> LALIC:
    """A random model with spread-out latents, whose gains are no longer those that it began with."""
    torch.manual_seed(seed)
    model = LALIC(**TINY, rungs=rungs).eval()
    assert model.rates is not None
    with torch.no_grad():
        model.rates.initialise([MSE[rung] for rung in rungs])
        model.g_a[-1].weight.mul_(20)
        for table in (model.rates.gain, model.rates.inverse_gain):
            table.add_(0.1 * torch.randn(table.shape))
    return model


def picture(count: int = 1, side: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


class TestGains:
    def test_they_begin_with_half_the_logarithm_of_lambda(self) -> None:
        rates = Rates(RUNGS, 3)
        rates.initialise(LAMBDAS)
        reference = math.sqrt(LAMBDAS[0] * LAMBDAS[-1])
        for row, inverse, value in zip(rates.gain.tolist(), rates.inverse_gain.tolist(), LAMBDAS, strict=True):
            assert row == pytest.approx([math.log(value / reference) / 2] * 3, rel=1e-6)
            assert inverse == pytest.approx([-x for x in row])

    @pytest.mark.parametrize("quality", [2, 3.0, 5, 2.5, 4.25, 4.999])
    def test_between_rungs_they_are_interpolated(self, quality: float) -> None:
        rates = several_rates().rates
        assert rates is not None
        y = torch.randn(2, 32, 4, 3)
        for scale, table in ((rates.scale, rates.gain), (rates.unscale, rates.inverse_gain)):
            log_gains = [np.interp(quality, RUNGS, column) for column in table.detach().double().numpy().T]
            expected = y.double().numpy() * np.exp(log_gains)[None, :, None, None]
            np.testing.assert_allclose(scale(y, quality).detach().numpy(), expected, rtol=2e-6)

    def test_every_picture_has_its_own_quality(self) -> None:
        model, x = several_rates(), picture(3)
        qualities = [2.0, 5.0, 3.5]
        together = model(x, torch.tensor(qualities))
        for i, quality in enumerate(qualities):
            alone = model(x[i : i + 1], quality)
            torch.testing.assert_close(together["x_hat"][i : i + 1], alone["x_hat"], rtol=1e-4, atol=1e-5)
        whole = model(x, torch.tensor([3, 3, 3]))  # whole numbers, as the loader gives them
        torch.testing.assert_close(whole["x_hat"], model(x, 3)["x_hat"], rtol=1e-4, atol=1e-5)

    def test_gradients_are_those_of_the_formula(self) -> None:
        """d/dg of sum(w y exp(g)): to the drawn rungs alone, between rungs shared out."""
        rates = Rates(RUNGS, 4)
        rates.initialise(LAMBDAS)
        generator = torch.Generator().manual_seed(0)
        y, w = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2))
        (w * rates.scale(y, torch.tensor([2.0, 4.0, 4.25]))).sum().backward()
        shares = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0.75, 0.25]])
        log_gains = shares @ rates.gain.detach().double().numpy()
        of_samples = (w * y).double().sum(dim=(2, 3)).numpy() * np.exp(log_gains)
        assert rates.gain.grad is not None and rates.inverse_gain.grad is None
        np.testing.assert_allclose(rates.gain.grad.numpy(), shares.T @ of_samples, rtol=1e-5, atol=1e-6)
        assert not rates.gain.grad[1].any()

    def test_lambda_between_rungs(self) -> None:
        for metric, table in (("mse", MSE), ("ms-ssim", MS_SSIM)):
            assert [lambda_at(metric, q) for q in range(1, 7)] == list(table.values())
            assert lambda_at(metric, 2.5) == pytest.approx(math.sqrt(table[2] * table[3]))
        assert lambda_at("mse", 4.3) == pytest.approx(math.exp(0.7 * math.log(0.0130) + 0.3 * math.log(0.0250)))
        with pytest.raises(KeyError):
            lambda_at("mse", 6.5)


class TestFold:
    @pytest.mark.parametrize("quality", [2, 3, 4, 5, 2.5, 3.875])
    def test_the_folded_model_is_the_same_model(self, quality: float) -> None:
        model, x = several_rates(), picture(2, 128)
        folded = model.at(quality)
        assert "rungs" not in folded.config and folded.rates is None
        with torch.no_grad():
            y, expected = folded.g_a(x), model.scaled_latents(x, quality)
            assert float((y - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
            # The same latents to both, so that none is rounded the other way.
            codes = expected.round()
            ours, theirs = folded.g_s(codes), model.g_s(model._unscaled(codes, quality))
            assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))

    def test_its_layout_is_the_published_one(self) -> None:
        model = several_rates()
        assert model.at(4).state_dict().keys() == LALIC(**TINY).state_dict().keys()
        prints = {fingerprint(model), *(fingerprint(model.at(q)) for q in (2, 2.5, 3))}
        assert len(prints) == 4

    def test_the_model_itself_is_left_as_it_is(self) -> None:
        model = several_rates().train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert model.at(3).training
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize("quality", [1.999, 5.001, 0, -1, math.nan, math.inf])
    def test_outside_the_range(self, quality: float) -> None:
        with pytest.raises(LalicError, match="it has 2 to 5"):
            several_rates().at(quality)

    def test_quality_where_there_is_none_and_none_where_there_is(self) -> None:
        with pytest.raises(ValueError, match="takes no quality"):
            LALIC(**TINY)(picture(), 3)
        with pytest.raises(ValueError, match="give a quality"):
            several_rates()(picture())
        with pytest.raises(ValueError, match="takes no quality"):
            LALIC(**TINY).at(3)


class TestRungs:
    @pytest.mark.parametrize(
        "rungs", [[], [3], [2, 4], [3, 2], [2, 2], [0, 1], [-1, 0], [1.5, 2.5], [1, math.nan], [math.inf, 2]], ids=str
    )
    def test_that_do_not_fit(self, rungs: list[float]) -> None:
        with pytest.raises(ValueError, match="two or more whole numbers in a row"):
            check_rungs(rungs)

    def test_that_fit(self) -> None:
        assert check_rungs([1, 2]) == [1, 2] and check_rungs((3.0, 4.0, 5.0)) == [3, 4, 5]
        assert LALIC(**TINY, rungs=(3, 4)).config["rungs"] == [3, 4] and "rungs" not in LALIC(**TINY).config

    @pytest.mark.parametrize("rungs", [[2, 3, 4], [3, 4, 5, 6]], ids=str)
    def test_weights_of_others_are_refused(self, rungs: list[int]) -> None:
        with pytest.raises(RuntimeError, match="are of the rungs"):
            LALIC(**TINY, rungs=rungs).load_state_dict(several_rates().state_dict())

    def test_weights_without_gains_are_refused(self) -> None:
        with pytest.raises(RuntimeError, match=r"rates\.gain"):
            LALIC(**TINY, rungs=RUNGS).load_state_dict(LALIC(**TINY).state_dict())


class TestFiles:
    def test_float32_round_trip(self, tmp_path: Path) -> None:
        model = several_rates()
        torch.save(published_state_dict(model), tmp_path / "w.pth")
        found = load_weights(tmp_path / "w.pth")
        assert found.config["rungs"] == RUNGS and fingerprint(found) == fingerprint(model)

    def test_compact_round_trip(self, tmp_path: Path) -> None:
        model = rounded(several_rates(), "w")
        save_file(compact_state_dict(model, "w"), tmp_path / "w.safetensors")
        assert {t.dtype for t in load_file(tmp_path / "w.safetensors").values()} == {torch.float16}
        found = load_weights(tmp_path / "w.safetensors")
        assert found.config["rungs"] == RUNGS and fingerprint(found) == fingerprint(model)
        torch.testing.assert_close(found(picture(), 2.5)["x_hat"], model(picture(), 2.5)["x_hat"], rtol=0, atol=0)

    def test_the_fingerprint_knows_the_rungs_and_the_gains(self) -> None:
        models = [several_rates(rungs=rungs) for rungs in (RUNGS, [1, 2, 3, 4])]
        other = several_rates()
        assert other.rates is not None
        with torch.no_grad():
            other.rates.gain[0, 0] += 1e-3
        assert len({fingerprint(m) for m in (*models, other)}) == 3

    @pytest.mark.parametrize("rungs", [[2.0, 3.0, 4.5, 5.0], [2.0, 4.0, 5.0, 6.0], [5.0, 4.0, 3.0, 2.0]], ids=str)
    def test_damaged_rungs_are_one_line(self, rungs: list[float], tmp_path: Path) -> None:
        torch.save({**published_state_dict(several_rates()), "rates.rungs": torch.tensor(rungs)}, tmp_path / "w.pth")
        with pytest.raises(LalicError, match="in a row") as error:
            load_weights(tmp_path / "w.pth")
        assert "\n" not in str(error.value)
