"""Fifty of our training steps against the published recipe, written down here in plain PyTorch and CompressAI.

What lalic.train runs (its step, its model with all that makes it fast) starts from the same weights and takes the same
batches and noise. In float64 the two stay together to the last digits, so that no difference of method can hide; in
float32 to rounding. Each detail of the recipe is then changed in turn, and must be noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from checkout_root import ROOT
from compressai.entropy_models import EntropyBottleneck
from compressai.entropy_models.entropy_models import EntropyModel
from compressai.latent_codecs import CheckerboardLatentCodec
from torch import Tensor, nn

from lalic import ops
from lalic.model import LALIC
from lalic.model.blocks import EntropyParametersBlock
from lalic.model.entropy import Bottleneck, Checkerboard

sys.path.insert(0, str(ROOT))

from benchmarks import parity
from benchmarks.plain import use_plain_formulation
from benchmarks.same_steps import VALUES, Noise, Steps, apart, learned, our_steps

SIZES: dict[str, Any] = {
    "N": 8, "M": 32, "dims": [8, 12, 16, 32, 16, 8], "depths": [0, 1, 1, 1], "groups": [4, 4, 8, 16]
}  # fmt: skip
STEPS, FEW, LAMBDA = 50, 10, 0.013
RATES = [1e-3] * 30 + [1e-4] * 20


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return parity.first_weights(SIZES)


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    """Two smooth pictures for each step, uint8 (2, 3, 64, 64)."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(STEPS, 2, 3, 5, 5, generator=generator)
    return [(nn.functional.interpolate(x, 64, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8) for x in coarse]


def plain_model(state: Mapping[str, Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> LALIC:
    """The network without what makes ours fast: its formulas, and CompressAI's own entropy models."""
    model = LALIC(**SIZES)
    model.load_state_dict(state)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "biwkv", parity.formula)
        use_plain_formulation(model)

    def aggregate(self: Any, x: Tensor) -> Tensor:
        mixed = self.mix(x)
        tokens = self.norm(mixed.movedim(1, -1))
        gated = self.receptance(tokens).sigmoid() * self.value(self.key(tokens).relu() ** 2)
        return mixed + gated.movedim(-1, 1)

    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.__class__ = EntropyBottleneck
        elif isinstance(module, Checkerboard):
            module.__class__ = CheckerboardLatentCodec
        elif isinstance(module, EntropyParametersBlock):
            module.forward = MethodType(aggregate, module)  # type: ignore[method-assign]
    return model.to(dtype).train()


def recipe_steps(
    model: LALIC,
    batches: Sequence[Tensor],
    noise: Noise,
    *,
    clip: float = 1.0,
    lr: float = 1.0,
    aux_lr: float = 1e-3,
    eps: float = 1e-8,
    order: str = "main, clip, aux",
) -> Steps:
    """The published step: two Adams, the clip over all gradients of the main loss, then the auxiliary loss.

    `lr` multiplies RATES. Other values of `order` are mistakes that are easily made.
    """
    named = dict(model.named_parameters())
    main = torch.optim.Adam([p for n, p in named.items() if not n.endswith(".quantiles")], eps=eps)
    aux = torch.optim.Adam([p for n, p in named.items() if n.endswith(".quantiles")], lr=aux_lr)
    dtype, steps = next(model.parameters()).dtype, Steps()

    def auxiliary_backward() -> Tensor:
        loss = model.aux_loss()
        loss.backward()
        return loss

    with noise.given_to(model):
        for pixels, rate in zip(batches, RATES, strict=False):
            x = pixels.to(dtype) / 255
            main.zero_grad()
            aux.zero_grad()
            output = model(x)
            bpp = sum(-p.log2().sum() for p in output["likelihoods"].values()) / (x.numel() / 3)
            mse = nn.functional.mse_loss(output["x_hat"], x)
            loss = LAMBDA * 255**2 * mse + bpp
            loss.backward()
            if order == "main, aux, clip":
                aux_loss = auxiliary_backward()
            if order == "aux steps first":
                aux_loss = auxiliary_backward()
                aux.step()
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            main.param_groups[0]["lr"] = lr * rate
            main.step()
            if order == "main, clip, aux":
                aux_loss = auxiliary_backward()
            if order != "aux steps first":
                aux.step()
            for name, value in zip(VALUES, (loss, bpp, mse, aux_loss, norm), strict=True):
                steps.values[name].append(value.item())
    steps.weights = learned(model)
    return steps


@pytest.fixture(scope="module")
def start(state: dict[str, Tensor]) -> dict[str, Tensor]:
    model = LALIC(**SIZES)
    model.load_state_dict(state)
    return learned(model)


@pytest.fixture(scope="module")
def in_float64(state: dict[str, Tensor], batches: list[Tensor]) -> Steps:
    """Ours, which the changed recipes are compared with."""
    return our_steps(state, SIZES, batches, RATES, Noise(), lmbda=LAMBDA, dtype=torch.float64)


EVERYTHING = (*VALUES, "weights", "quantiles")


def test_our_steps_are_the_recipe_in_float64(
    state: dict[str, Tensor],
    batches: list[Tensor],
    start: dict[str, Tensor],
    in_float64: Steps,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = recipe_steps(plain_model(state, torch.float64, monkeypatch), batches, Noise())
    found = apart(in_float64, theirs, start)
    assert max(found[name] for name in EVERYTHING) < 1e-9, found
    assert min(theirs.values["gradient_norm"]) > 1  # every step is clipped
    assert sum(theirs.values["loss"][-5:]) < 0.5 * sum(theirs.values["loss"][:5])  # something was learnt
    assert theirs.values["aux"][-1] < 0.999 * theirs.values["aux"][0]


def test_also_where_some_steps_are_not_clipped(
    state: dict[str, Tensor],
    batches: list[Tensor],
    start: dict[str, Tensor],
    in_float64: Steps,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clip = sorted(in_float64.values["gradient_norm"][:FEW])[FEW // 2]
    few, rates = batches[:FEW], RATES[:FEW]
    ours = our_steps(state, SIZES, few, rates, Noise(), lmbda=LAMBDA, dtype=torch.float64, clip=clip)
    theirs = recipe_steps(plain_model(state, torch.float64, monkeypatch), few, Noise(), clip=clip)
    norms = theirs.values["gradient_norm"]
    assert 2 < sum(norm < clip for norm in norms) < FEW - 2
    found = apart(ours, theirs, start)
    assert max(found[name] for name in EVERYTHING) < 1e-9, found


def test_our_steps_are_the_recipe_in_float32(
    state: dict[str, Tensor], batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the published rate, from small latents, of which hardly one lies where rounding decides: where the two runs
    round one otherwise, they part by a thousandth. In float64, above, the latents are large."""
    state = {**state, "g_a.5.weight": state["g_a.5.weight"] / 100}
    model = plain_model(state, torch.float32, monkeypatch)
    start = learned(model)
    ours = our_steps(state, SIZES, batches, [r / 10 for r in RATES], Noise(), lmbda=LAMBDA)
    theirs = recipe_steps(model, batches, Noise(), lr=0.1)
    found = apart(ours, theirs, start)
    assert max(found[name] for name in VALUES) < 1e-5, found
    assert max(found["weights"], found["quantiles"]) < 1e-3, found


CHANGES: dict[str, dict[str, Any]] = {
    "no clip": {"clip": float("inf")},
    "clip 1.001": {"clip": 1.001},
    "clip over the auxiliary gradients too": {"order": "main, aux, clip"},
    "quantiles before the weights": {"order": "aux steps first"},
    "learning rate a thousandth higher": {"lr": 1.001},
    "quantiles' rate a thousandth higher": {"aux_lr": 1.001e-3},
    "epsilon of Adam 1e-7": {"eps": 1e-7},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_detail_is_noticed(
    state: dict[str, Tensor],
    batches: list[Tensor],
    in_float64: Steps,
    change: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hundred times farther apart than the recipe may be, after a fifth of its steps."""
    theirs = recipe_steps(plain_model(state, torch.float64, monkeypatch), batches[:FEW], Noise(), **change)
    pairs = [(in_float64.values[name][i], theirs.values[name][i]) for name in VALUES for i in range(FEW)]
    assert max(abs(a - b) / abs(b) for a, b in pairs) > 1e-7


def test_noise_is_the_same_whatever_the_layout() -> None:
    model, noise = nn.Identity(), Noise(3)
    contiguous = torch.zeros(2, 3, 4, 4)
    channels_last = contiguous.to(memory_format=torch.channels_last)
    quantize, drawn = EntropyModel.quantize, []
    for x in (contiguous, channels_last, contiguous.double()):
        with noise.given_to(model):
            for _ in range(2):  # two passes of two drawings
                model(x)
                drawn.append([EntropyBottleneck(3).quantize(x, "noise") for _ in range(2)])
        assert noise.drawn == [(2, 3, 4, 4)] * 2
    assert EntropyModel.quantize is quantize
    first = torch.stack([torch.stack(d) for d in drawn[:2]])
    for other in (drawn[2:4], drawn[4:]):
        assert torch.equal(first, torch.stack([torch.stack(d) for d in other]).float())
    assert len({float(x.flatten()[0]) for x in first.flatten(0, 1)}) == 4  # no two are the same
    assert float(first.min()) < -0.45 and float(first.max()) > 0.45 and abs(float(first.mean())) < 0.05


def fake_train_py(skew: float) -> dict[str, Any]:
    """Functions of the published train.py's names, with its recipe or with a clip that is not what it is told."""

    def configure_optimizers(net: nn.Module, args: Any) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        named = sorted(net.named_parameters())
        main = torch.optim.Adam([p for n, p in named if "quantiles" not in n], lr=args.learning_rate)
        return main, torch.optim.Adam([p for n, p in named if "quantiles" in n], lr=args.aux_learning_rate)

    class Loss(nn.Module):
        def __init__(self, lmbda: float, type: str):
            super().__init__()
            self.lmbda = lmbda

        def forward(self, output: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
            bpp = sum(-p.log2().sum() for p in output["likelihoods"].values()) / (x.numel() / 3)
            mse = nn.functional.mse_loss(output["x_hat"], x)
            return {"bpp_loss": bpp, "mse_loss": mse, "loss": self.lmbda * 255**2 * mse + bpp}

    def train_one_epoch(
        net: Any, criterion: Any, loader: Any, main: Any, aux: Any, epoch: int, clip: float, type: str
    ) -> None:
        assert len(loader.dataset) == 2 * len(loader)
        net.train()
        for x in loader:
            main.zero_grad()
            aux.zero_grad()
            criterion(net(x), x)["loss"].backward()
            nn.utils.clip_grad_norm_(net.parameters(), clip * skew)
            main.step()
            net.aux_loss().backward()
            aux.step()

    return {
        "configure_optimizers": configure_optimizers,
        "RateDistortionLoss": Loss,
        "train_one_epoch": train_one_epoch,
    }


@pytest.mark.parametrize("skew", [1.0, 1.01], ids=["the recipe", "another clip"])
def test_benchmark_says_whether_the_published_steps_are_ours(
    batches: list[Tensor], skew: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`compare` with a train.py of our own in place of the published one, which is not part of the repository."""
    monkeypatch.setattr(parity, "SIZES", SIZES)
    monkeypatch.setattr(parity, "STEPS_PER_EPOCH", 3)
    monkeypatch.setattr(parity, "CHANGED", {"lambda 0.1 % higher": {"lmbda": 1.001}})
    module = SimpleNamespace(LALIC=lambda **sizes: LALIC(**sizes))
    monkeypatch.setattr(parity, "published_training", lambda checkout: (module, fake_train_py(skew)))
    found = parity.compare(ROOT, batches[:6])
    rows = {row["pair"]: row for row in found["rows"]}
    assert rows["ours with lambda 0.1 % higher, float64"]["loss"] == pytest.approx(1e-3, rel=0.5)
    assert found["quantiles_gradient_from_main_loss"] == 0
    assert [len(losses) for losses in found["losses"].values()] == [6] * 4
    problems = parity.missed(found["rows"], 1e-4)
    assert bool(problems) is (skew != 1.0), problems
    if problems:
        assert any("float64: weights" in problem for problem in problems), problems
