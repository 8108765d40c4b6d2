"""Muon: its numbers against float64 and SVD, what it takes, what it leaves out, and what it may not do to a graph."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressai.layers import MaskedConv2d
from engines import TINY, launch
from lives import in_turn
from lives import launch as launch_run
from test_resume import assert_identical, assert_same_end
from test_train import config_path, own_process_state, records  # noqa: F401 -- fixtures
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from benchmarks.optimizer_launches import count
from lalic.config import LossSection, MuonSection, TrainSection
from lalic.errors import LalicError
from lalic.model import LALIC
from lalic.model.blocks import CheckerboardConv
from lalic.training.distributed import start_processes
from lalic.training.engine import MainAdam
from lalic.training.engine_settings import deepspeed_settings
from lalic.training.muon import Muon, find_matrices
from lalic.training.orthogonal import COEFFICIENTS, Batch, Orthogonaliser, cut, starts_of
from lalic.training.step import TrainStep

CPU = torch.device("cpu")


def orthogonal(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of (n, rows, columns), in float64."""
    batch = Batch(*matrices.shape)
    ours = Orthogonaliser([batch], steps=steps, dtype=dtype, device=CPU)
    flat = torch.zeros(starts_of([batch])[-1])
    cut(flat, [batch])[0].copy_(matrices)
    return ours(flat)[0].double()


def by_svd(matrix: Tensor, steps: int = 5) -> Tensor:
    """The iteration on the singular values alone, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (s.square().sum().sqrt() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


def matrices_of(kind: str, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(2, rows, columns, generator=generator)
    if kind == "decaying":
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        x = u @ torch.diag_embed(torch.logspace(0, -6, rows).expand(2, -1)) @ v
    if kind == "rank one":
        x = x[:, :, :1] @ x[:, :1]
    return x * 1e-3


class TestOrthogonaliser:
    @pytest.mark.parametrize("kind", ["random", "decaying", "rank one"])
    @pytest.mark.parametrize(("rows", "columns"), [(16, 16), (24, 30), (32, 75), (48, 432), (64, 64)])
    @pytest.mark.parametrize("steps", [1, 2, 4, 5])
    def test_against_svd(self, kind: str, rows: int, columns: int, steps: int) -> None:
        """Both ways: on the matrix itself, and on X X^T where the matrix is wide."""
        x = matrices_of(kind, rows, columns)
        ours = orthogonal(x, steps)
        for mine, matrix in zip(ours, x, strict=True):
            # What is below float32's resolution grows like what is above it.
            assert float((mine - by_svd(matrix, steps)).abs().max()) < (1e-5 if kind == "random" else 2e-3)

    def test_singular_values_are_near_one(self) -> None:
        values = torch.linalg.svdvals(orthogonal(matrices_of("random", 64, 576)))
        assert 0.67 < float(values.min()) and float(values.max()) < 1.21
        rough = torch.linalg.svdvals(orthogonal(matrices_of("random", 64, 576), dtype=torch.bfloat16))
        assert 0.64 < float(rough.min()) and float(rough.max()) < 1.24

    def test_bfloat16_keeps_the_direction(self) -> None:
        x = matrices_of("random", 64, 128)
        for mine, matrix in zip(orthogonal(x, dtype=torch.bfloat16), x, strict=True):
            truth = by_svd(matrix)
            assert float((mine - truth).norm() / truth.norm()) < 0.05

    @pytest.mark.parametrize("columns", [16, 64])
    @pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
    def test_a_matrix_alone_is_zero_or_not_finite(self, columns: int, bad: float) -> None:
        x = matrices_of("random", 16, columns)
        x[0] = bad
        ours = orthogonal(x)
        assert torch.equal(ours[0], torch.zeros_like(ours[0])) if bad == 0 else ours[0].isnan().all()
        assert torch.equal(ours[1], orthogonal(x[1:])[0])

    def test_small_and_large_gradients(self) -> None:
        x = matrices_of("random", 16, 64)
        for scale in (1e-3, 1e3, 1e10):
            assert float((orthogonal(x * scale) - orthogonal(x)).abs().max()) < 2e-2


class Layers(nn.Module):
    """One parameter of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(40, 24)
        self.tall = nn.Linear(24, 40, bias=False)
        self.conv = nn.Conv2d(8, 24, 3)
        self.pointwise = nn.Conv2d(40, 24, 1)
        self.up = nn.ConvTranspose2d(20, 24, 3)
        self.hidden = CheckerboardConv(8, 16, kernel_size=5, stride=1, padding=2)
        self.other_mask = MaskedConv2d(16, 16, kernel_size=5, stride=1, padding=2)
        self.depthwise = nn.Conv2d(32, 32, 5, groups=32)
        self.grouped_up = nn.ConvTranspose2d(32, 32, 5, groups=2)
        self.narrow = nn.Linear(64, 15, bias=False)
        self.to_rgb = nn.ConvTranspose2d(32, 3, 5)
        self.norm = nn.LayerNorm(24)
        self.gains = nn.Parameter(torch.randn(32, 32))
        self.twice = self.wide

    def give_gradients(self, seed: int, scale: float = 1e-2) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * scale


TAKEN = ["wide.weight", "tall.weight", "conv.weight", "pointwise.weight", "up.weight", "hidden.weight"]
ZERO, ONE = torch.zeros(()), torch.ones(())


def new_muon(model: nn.Module, **settings: Any) -> Muon:
    section = MuonSection(**settings)
    return Muon(list(model.parameters()), find_matrices(model, section.min_side), section)


def take(model: Layers, muon: Muon, seeds: range, lr: float = 1e-3) -> None:
    for seed in seeds:
        model.give_gradients(seed)
        muon.set_lr(lr * (1 + seed))
        muon.apply(ZERO)


def as_matrix(name: str, tensor: Tensor) -> Tensor:
    """(out, in * k * k), by index arithmetic of its own."""
    if name == "up.weight":
        return torch.stack([tensor[:, out].reshape(-1) for out in range(tensor.shape[1])])
    if name == "hidden.weight":
        shown = [(r, c) for r in range(5) for c in range(5) if (r + c) % 2]
        return torch.stack([tensor[:, :, r, c] for r, c in shown], dim=2).flatten(1)
    return tensor.flatten(1)


class TestStep:
    def test_what_it_takes(self) -> None:
        model = Layers()
        names = {id(p): name for name, p in model.named_parameters()}
        assert [names[id(m.parameter)] for m in find_matrices(model, 16)] == TAKEN
        assert [m.shape for m in find_matrices(model, 16)] == [
            (24, 40),
            (40, 24),
            (24, 72),
            (24, 40),
            (24, 180),
            (16, 96),
        ]
        muon = new_muon(model)
        assert [tuple(b) for b in muon.batches] == [(1, 16, 96), (3, 24, 40), (1, 24, 72), (1, 24, 180)]
        assert {names[id(p)] for p in muon.rest} == set(names.values()) - set(TAKEN)
        assert "6 matrices" in muon.describe() and "adam the other" in muon.describe()

    def test_every_parameter_of_the_network_is_somebodys(self) -> None:
        model = LALIC(**TINY)
        main = model.main_parameters()
        muon = Muon(main, find_matrices(model, 16), MuonSection())
        taken = [id(m.parameter) for m in find_matrices(model, 16)]
        assert len(set(taken)) == len(taken) > 20
        assert sorted(taken + [id(p) for p in muon.rest]) == sorted(map(id, main))
        names = {id(p): name for name, p in model.named_parameters()}
        for number in map(id, muon.rest):
            parts = names[number].split(".")
            matrix = parts[-2] in ("key", "value", "receptance", "output", "mix") and parts[-1] == "weight"
            assert not matrix or min(dict(model.named_parameters())[names[number]].flatten(1).shape) < 16

    @pytest.mark.parametrize("momentum", [0.0, 0.95])
    def test_numbers_against_float64(self, momentum: float) -> None:
        model = Layers()
        old = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        mean = {name: torch.zeros_like(old[name]) for name in TAKEN}
        adam = Layers()
        theirs = torch.optim.Adam([p for n, p in adam.named_parameters() if n not in TAKEN], lr=0.0)
        muon = new_muon(model, momentum=momentum, scale=0.3, rest_lr=0.5)
        for seed in range(4):
            lr = 1e-3 * (1 + seed)
            model.give_gradients(seed)
            gradients = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
            before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
            muon.set_lr(lr)
            muon.apply(ZERO)
            adam.give_gradients(seed)
            theirs.param_groups[0]["lr"] = 0.5 * lr
            theirs.step()
            for name in TAKEN:
                mean[name] = momentum * mean[name] + (1 - momentum) * gradients[name]
                ahead = as_matrix(name, (1 - momentum) * gradients[name] + momentum * mean[name])
                moved = as_matrix(name, dict(model.named_parameters())[name].detach().double() - before[name])
                expected = -lr * 0.3 * math.sqrt(max(ahead.shape)) * by_svd(ahead)
                # The weights themselves are rounded to float32.
                assert float((moved - expected).abs().max()) < 2e-5 * lr + 3e-8, name
        for (name, ours), their in zip(model.named_parameters(), adam.parameters(), strict=True):
            if name not in TAKEN:
                assert torch.allclose(ours, their, rtol=0, atol=1e-7), name

    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
    def test_against_torch(self) -> None:
        """torch.optim.Muon, which takes plain matrices alone and multiplies in bfloat16."""
        ours, theirs = (nn.Linear(40, 24, bias=False) for _ in range(2))
        theirs.load_state_dict(ours.state_dict())
        muon = new_muon(ours, products="bf16")
        options = {"momentum": 0.95, "nesterov": True, "weight_decay": 0.0, "ns_steps": 5}
        reference = torch.optim.Muon(theirs.parameters(), lr=1e-3, adjust_lr_fn="match_rms_adamw", **options)
        start = ours.weight.detach().clone()
        for seed in range(5):
            gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(seed))
            ours.weight.grad, theirs.weight.grad = gradient.clone(), gradient.clone()
            muon.set_lr(1e-3)
            muon.apply(ZERO)
            reference.step()
        with torch.no_grad():
            assert float((ours.weight - theirs.weight).norm() / (theirs.weight - start).norm()) < 0.04

    def test_hidden_weights_of_the_checkerboard_stay(self) -> None:
        model = Layers()
        muon = new_muon(model)
        hidden = model.hidden.mask == 0
        before = model.hidden.weight.detach().clone()
        take(model, muon, range(3))
        assert int(hidden.sum()) == 13 * 8 * 16
        assert torch.equal(model.hidden.weight[hidden], before[hidden])
        assert (model.hidden.weight != before)[~hidden].all()
        momentum = muon.state_dict()["state"][number_of(model, "hidden.weight")]["momentum"]
        assert not momentum[hidden].any() and momentum[~hidden].all()

    def test_a_gradient_of_zeros_moves_nothing(self) -> None:
        model = Layers()
        muon = new_muon(model)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        muon.set_lr(1e-3)
        muon.apply(ZERO)
        assert_identical({n: p.detach() for n, p in model.named_parameters()}, before, "weights")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("at", [0, 2])
    def test_a_step_that_is_left_out_leaves_no_trace(self, bad: float, at: int) -> None:
        """Bit by bit, the sign of a zero too; the next steps are those of a run that never saw it."""
        ours, theirs = Layers(), Layers()
        for model in (ours, theirs):
            with torch.no_grad():
                model.wide.weight[0, :4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
        a, b = new_muon(ours), new_muon(theirs)
        take(ours, a, range(at))
        take(theirs, b, range(at))
        before = bits(ours, a)
        ours.give_gradients(99)
        for p in ours.parameters():
            assert p.grad is not None
            p.grad.view(-1)[::7] = bad
        a.apply(ONE)
        assert bits(ours, a) == before
        take(ours, a, range(at, at + 2))
        take(theirs, b, range(at, at + 2))
        assert bits(ours, a) == bits(theirs, b)

    def test_state_goes_through_a_file_and_stays_where_it_is(self, tmp_path: Path) -> None:
        ours, theirs = Layers(), Layers()
        a, b = new_muon(ours), new_muon(theirs)
        take(ours, a, range(3))
        torch.save({"model": ours.state_dict(), "optimizer": a.state_dict()}, tmp_path / "state.pt")
        take(theirs, b, range(7, 9))
        places = addresses(b)
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
        theirs.load_state_dict(saved["model"])
        b.load_state_dict(saved["optimizer"])
        for p, entry in zip(theirs.parameters(), saved["optimizer"]["state"].values(), strict=True):
            assert entry.keys() in ({"momentum"}, {"step", "exp_avg", "exp_avg_sq"})
            assert all(value.shape in (p.shape, ()) for value in entry.values())
        take(ours, a, range(3, 6))
        take(theirs, b, range(3, 6))
        assert bits(ours, a) == bits(theirs, b)
        assert addresses(b) == places

    def test_states_of_others_are_refused(self) -> None:
        model = Layers()
        muon = new_muon(model)
        take(model, muon, range(1))
        adam = MainAdam(list(model.parameters()))
        adam.apply(ZERO)
        with pytest.raises(LalicError, match="optimiser is adam, this run's is muon"):
            muon.load_state_dict(adam.state_dict())
        with pytest.raises(LalicError, match="optimiser is muon, this run's is adam"):
            adam.load_state_dict(muon.state_dict())
        with pytest.raises(LalicError, match="other parameters as matrices"):
            new_muon(model, min_side=30).load_state_dict(muon.state_dict())

    def test_a_step_reads_nothing_and_can_be_replayed(self) -> None:
        """As a CUDA graph does it: one step again, on the same storage, with new gradients and learning rates."""
        ours, theirs = Layers(), Layers()
        a, b = new_muon(ours), new_muon(theirs)
        take(ours, a, range(2))
        take(theirs, b, range(2))
        left_out, tape = torch.zeros(()), Tape()
        theirs.give_gradients(2)
        b.set_lr(3e-3)
        with tape:
            b.apply(left_out)
        assert not tape.host
        take(ours, a, range(2, 3), lr=1e-3)
        for seed, skip in ((3, 0.0), (4, 1.0), (5, 0.0)):
            ours.give_gradients(seed)
            fill_gradients(theirs, ours)
            left_out.fill_(skip)
            for muon in (a, b):
                muon.set_lr(1e-3 * (1 + seed))
            a.apply(torch.tensor(skip))
            tape.replay()
        assert bits(ours, a) == bits(theirs, b)


def number_of(model: nn.Module, name: str) -> int:
    return [n for n, _ in model.named_parameters()].index(name)


def bits(model: nn.Module, muon: Muon) -> list[bytes]:
    """Of weights and state."""
    state = [value for entry in muon.state_dict()["state"].values() for value in entry.values()]
    return [t.detach().contiguous().numpy().tobytes() for t in (*model.parameters(), *state)]


def addresses(muon: Muon) -> list[int]:
    """Of everything that a step reads and writes, but gradients and weights."""

    def within(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            for item in value:
                yield from within(item)
        elif isinstance(value, torch.optim.Adam):
            yield value.param_groups[0]["lr"]
            yield from (t for entry in value.state.values() for t in entry.values())
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | MuonSection | torch.dtype):
            for item in vars(value).values():
                yield from within(item)

    skip = {id(p) for p in muon.parameters}
    return [t.data_ptr() for t in within(muon) if id(t) not in skip]


def fill_gradients(target: nn.Module, source: nn.Module) -> None:
    for a, b in zip(target.parameters(), source.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        a.grad.copy_(b.grad)


class Tape(TorchDispatchMode):
    """The operators of what runs under it, with the tensors that they had; `host`: those that read from a device."""

    HOST = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.host: list[str] = []
        self._calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def now(t: Any) -> Any:
            return t.detach() if isinstance(t, Tensor) else t

        kwargs = kwargs or {}
        given = tree_map(now, (args, kwargs))
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        self.host += [name] if name in self.HOST else []
        self._calls.append((func, *given, tree_map(now, out)))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self._calls:
                for old, new in zip(*(tree_flatten(o)[0] for o in (out, func(*args, **kwargs))), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr() and "empty" not in str(func):
                        old.copy_(new)


def test_launches_and_operations_of_the_full_model() -> None:
    """What a GPU is asked for at batch 8, crop 256."""
    counted = count("full", 8, 256)
    assert counted["muon"]["launches"] <= 1400
    assert counted["muon"]["share"] <= 0.3
    assert counted["muon"]["matrices"] > 350


def test_deepspeed_is_refused() -> None:
    with pytest.raises(LalicError, match=r"train\.optimizer=muon needs whole matrices") as error:
        deepspeed_settings(TrainSection(optimizer="muon"), 2)
    assert "\n" not in str(error.value) and "multi_gpu.yaml" in str(error.value)


def test_a_broken_loss_in_the_training_step() -> None:
    """Weights, momentum, Adam's state and the quantiles' stay; and loss falls with the steps that count."""
    train = TrainSection(batch_size=2, cpu_threads=1, optimizer="muon")
    model = LALIC(**TINY)
    ours = TrainStep(start_processes(train), model, train, LossSection(quality=3), 0, lag=0)
    x = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = ours([{"x": x}], step=0, lr=3e-3).values["loss"]
    before = {k: v.clone() for k, v in tree_leaves(ours)}
    with torch.no_grad():
        weight = next(model.g_s.parameters())
        kept = weight.view(-1)[0].item()
        weight.view(-1)[0] = float("nan")
    result = ours([{"x": x}], step=1, lr=3e-3)
    assert float(result.left_out) == 1
    with torch.no_grad():
        weight.view(-1)[0] = kept
    assert_identical(dict(tree_leaves(ours)), before, "state")
    for step in range(2, 12):
        last = ours([{"x": x}], step=step, lr=3e-3).values["loss"]
    assert float(last) < 0.8 * float(first)


def tree_leaves(ours: TrainStep) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, p.detach()) for name, p in ours.bare.named_parameters())
    for kind, state in ours.state_dict().items():
        for number, entry in state["state"].items():
            for name, value in entry.items():
                yield f"{kind} {number} {name}", value


MUON = {"optimizer": "muon"}


def test_ranks_have_the_same_bits_and_resume(tmp_path: Path) -> None:
    """On two processes: equal ranks, a step broken on one applied on none, and a resume with the same bits."""
    middle = str(tmp_path / "middle.pt")
    common = {"backend": "DDP", "train": MUON}
    two = launch(
        tmp_path / "two",
        2,
        [
            {"name": "whole", **common, "last": 6, "save_at": 3, "save_to": middle, "broken": [0, 2]},
            {"name": "resumed", **common, "first": 3, "last": 6, "from": middle},
            {"name": "unbroken", **common, "last": 6},
        ],
        "cpu2",
    )
    for where in ("loss 2", "gradient 2"):  # the first forward pass zeroes what masks hide
        before, after = two["whole"]["broken"][where]
        assert before == after and len(set(after[:-1])) == 1
    assert_identical(two["whole"]["values"], two["unbroken"]["values"], "values")
    for name in ("model", "optimizer"):
        assert_identical(two["whole"][name], two["unbroken"][name], name)
        assert_identical(two["resumed"][name], two["whole"][name], name)
    one = launch(tmp_path / "one", 1, [{"name": "whole", **common, "last": 6}], "cpu1")
    losses = [[v["loss"] for v in outcome["whole"]["values"]] for outcome in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


STAGES = "stages=[{steps: 4, lr: 3e-3, crop: 64, warmup: 3}, {steps: 3, lr: 1e-3, crop: 128, decay: cosine, lr_end: 0}]"
SETTINGS = ["train.optimizer=muon", STAGES]
LEARNING_RATES = [1e-3, 2e-3, 3e-3, 3e-3, 1e-3, 0.75e-3, 0.25e-3]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_ends_with_the_same_bits(config_path: Path, tmp_path: Path, processes: int) -> None:  # noqa: F811
    orders = [
        {"run": "reference", "settings": SETTINGS},
        {"run": "killed", "kill": "step", "at": 3, "settings": SETTINGS},
        {"run": "killed", "kill": "step", "at": 5, "settings": SETTINGS},
        {"run": "killed", "settings": SETTINGS},
    ]
    if processes == 1:
        _, said = in_turn(tmp_path, config_path, [*orders, {"run": "reference", "settings": [STAGES]}])
        assert "muon trains" in said[0] and "adam the other" in said[0]
        assert "these settings differ: train.optimizer (muon -> adam)" in said[-1]
        assert "Traceback" not in said[-1]
    else:
        for order in orders:
            launch_run(processes, tmp_path, config_path, order)
    assert_same_end(tmp_path / "killed", tmp_path / "reference")
    assert [r["lr"] for r in records(tmp_path / "killed")] == pytest.approx(LEARNING_RATES, rel=1e-12)
