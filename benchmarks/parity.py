"""Is our training step the published one? The published train.py beside lalic.train: same weights, batches and noise.

    python benchmarks/parity.py CHECKOUT --images FOLDER [--output benchmarks/results/parity_cpu.json]

The published code in CHECKOUT (nothing in it is changed) makes a cut-down model through its own constructor, its two
optimisers with its configure_optimizers, and goes through two epochs of 25 batches with its train_one_epoch, the clip
at 1.0 and its learning rates, 1e-4 and then 1e-5 by its scheduler. Ours takes the same 50 steps with what lalic.train
runs, lalic.training.step.TrainStep. Of the published code two things are replaced: its operator, which exists for CUDA
alone, by the operator's formula in plain PyTorch (all pairs of tokens); and, on both sides, what draws the noise,
because the order in which it is drawn follows the layout in memory (benchmarks/same_steps.py).

Both go in float32 and in float64. In float64 rounding is so small that any difference of method would stand out; the
last rows show by how much, for our step with one detail of the recipe changed. Ends with 1 when ours and theirs are
farther apart than --limit (float32) or a millionth of it (float64).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import runpy
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 -- found from the checkout
from torch import Tensor, nn  # noqa: E402

from benchmarks.machine import describe  # noqa: E402
from benchmarks.same_steps import Noise, Steps, apart, learned, our_steps  # noqa: E402

SIZES: dict[str, Any] = {
    "N": 8, "M": 32, "dims": [8, 12, 16, 32, 16, 8], "depths": [1, 1, 1, 1], "groups": [4, 4, 8, 16]
}  # fmt: skip
EPOCHS, STEPS_PER_EPOCH = 2, 25
RECIPE = {"learning_rate": 1e-4, "aux_learning_rate": 1e-3, "clip_max_norm": 1.0, "lmbda": 0.0130}
CHANGED: dict[str, dict[str, Any]] = {
    "clip 1.01 in place of 1": {"clip": 1.01},
    "learning rate 1 % higher": {"rate": 1.01},
    "rate of the quantiles 1 % higher": {"aux_lr": 1.01e-3},
    "lambda 0.1 % higher": {"lmbda": 1.001},
    "other noise": {"seed": 1},
}
"""What one detail of the recipe makes of our step, for scale."""


def formula(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BiWKV over all pairs of tokens: w, u (C,), k, v (B, T, C) -> (B, T, C), differentiable by autograd."""
    position = torch.arange(k.shape[1])
    between = (position[:, None] - position).abs()
    exponent = torch.where(between == 0, u[:, None, None], -(between - 1) * w[:, None, None])
    pairs = torch.exp(exponent)  # (C, T, T)
    own = torch.exp(k - k.amax(1, keepdim=True))
    return torch.einsum("cti,bic->btc", pairs, own * v) / torch.einsum("cti,bic->btc", pairs, own)


def first_weights(sizes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Random ones, in the published layout, of a model whose latents are large enough to be rounded to something."""
    from lalic.model import LALIC, published_state_dict

    torch.manual_seed(0)
    model = LALIC(**sizes)
    with torch.no_grad():
        list(model.g_a)[-1].weight.mul_(20)  # type: ignore[operator, union-attr]
        model.quantiles()[0][:, :, 1] = 0.3
    return published_state_dict(model)


def make_batches(images: Path, count: int, batch: int, crop: int) -> list[Tensor]:
    """Random crops of the photographs in a folder, the same at every call: uint8 (batch, 3, crop, crop) each."""
    from lalic.data.images import read_rgb

    paths = sorted(p for p in images.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise SystemExit(f"error: {images} holds no .jpg or .png")
    generator = torch.Generator().manual_seed(0)

    def one() -> Tensor:
        path = paths[int(torch.randint(len(paths), (), generator=generator))]
        pixels = torch.from_numpy(read_rgb(path)).movedim(2, 0)
        if min(pixels.shape[1:]) < crop:
            raise SystemExit(f"error: {path} is smaller than a crop of {crop}")
        top, left = (int(torch.randint(n - crop + 1, (), generator=generator)) for n in pixels.shape[1:])
        return pixels[:, top : top + crop, left : left + crop].clone()

    return [torch.stack([one() for _ in range(batch)]) for _ in range(count)]


class Batches(list[Tensor]):
    """What the published loop asks of a data loader."""

    @property
    def dataset(self) -> Sequence[Tensor]:
        return [image for batch in self for image in batch]


def published_training(checkout: Path) -> tuple[Any, dict[str, Any]]:
    """Its module models.lalic on the CPU, and the functions of its train.py."""
    from benchmarks.published import import_published

    module = import_published(checkout)
    module.load_biwkv4 = lambda: None
    module.RUN_BiWKV4 = formula
    sys.path.insert(0, str(checkout))
    try:
        return module, runpy.run_path(str(checkout / "train.py"), run_name="published_train")
    except ImportError as error:
        raise SystemExit(f"error: the published train.py does not import ({error}): install what it needs") from error
    finally:
        sys.path.remove(str(checkout))


def their_steps(
    checkout: Path, state: Mapping[str, Tensor], batches: Sequence[Tensor], dtype: torch.dtype, clip: float
) -> tuple[Steps, float]:
    """The epochs of the published train.py; also the largest gradient of a quantile that its clip saw."""
    module, script = published_training(checkout)
    model = module.LALIC(**SIZES)
    model.load_state_dict(state)
    model.to(dtype)
    options = SimpleNamespace(**RECIPE)
    noise = Noise()
    optimizer, aux_optimizer = script["configure_optimizers"](model, options)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.1)
    criterion = script["RateDistortionLoss"](lmbda=options.lmbda, type="mse")
    steps, seen = Steps(), [0.0]
    quiet = contextlib.redirect_stdout(io.StringIO())
    with noise.given_to(model), recorded(model, criterion, steps, seen), quiet:
        for epoch in range(EPOCHS):
            part = batches[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]
            loader = Batches(pixels.to(dtype) / 255 for pixels in part)
            script["train_one_epoch"](model, criterion, loader, optimizer, aux_optimizer, epoch, clip, type="mse")
            scheduler.step()
    steps.weights = learned(model)
    return steps, max(seen)


@contextlib.contextmanager
def recorded(model: nn.Module, criterion: nn.Module, steps: Steps, seen: list[float]) -> Iterator[None]:
    """Note the values of every step as the published functions return them, and the quantiles' gradients in `seen`."""
    clip, aux_loss = nn.utils.clip_grad_norm_, model.aux_loss
    quantiles = [p for n, p in model.named_parameters() if n.endswith(".quantiles")]

    def clipped(parameters: Any, largest: float) -> Tensor:
        seen.extend(float(q.grad.abs().max()) for q in quantiles if q.grad is not None)
        norm = clip(parameters, largest)
        steps.values["gradient_norm"].append(float(norm))
        return norm

    def auxiliary() -> Tensor:
        loss = aux_loss()  # type: ignore[operator]
        steps.values["aux"].append(float(loss.detach()))
        return loss

    def note(_module: nn.Module, _inputs: Any, output: dict[str, Tensor]) -> None:
        for name, theirs in (("loss", "loss"), ("bpp", "bpp_loss"), ("mse", "mse_loss")):
            steps.values[name].append(float(output[theirs].detach()))

    hook = criterion.register_forward_hook(note)
    with mock.patch.object(nn.utils, "clip_grad_norm_", clipped), mock.patch.object(model, "aux_loss", auxiliary):
        yield
    hook.remove()


def ours(state: Mapping[str, Tensor], batches: Sequence[Tensor], dtype: torch.dtype, **changed: Any) -> Steps:
    """The same steps by lalic.training, with the recipe or with a detail of it changed."""
    rates = [RECIPE["learning_rate"] * 0.1 ** (i // STEPS_PER_EPOCH) for i in range(len(batches))]
    factor, lmbda = changed.pop("rate", 1.0), RECIPE["lmbda"] * changed.pop("lmbda", 1.0)
    noise = Noise(changed.pop("seed", 0))
    train = {"aux_lr": RECIPE["aux_learning_rate"], "clip": RECIPE["clip_max_norm"], **changed}
    return our_steps(state, SIZES, batches, [factor * r for r in rates], noise, lmbda=lmbda, dtype=dtype, **train)


def compare(checkout: Path, batches: Sequence[Tensor]) -> dict[str, Any]:
    """Both codes in both precisions, and the changed ones."""
    from lalic.model import LALIC

    torch.set_num_threads(1)
    state = first_weights(SIZES)
    model = LALIC(**SIZES)
    model.load_state_dict(state)
    start = learned(model)
    rows, mine, theirs, clip_saw, clip = [], {}, {}, [], RECIPE["clip_max_norm"]
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        mine[name] = ours(state, batches, dtype)
        theirs[name], gradient = their_steps(checkout, state, batches, dtype, clip)
        clip_saw.append(gradient)
        rows.append({"pair": f"ours and published, {name}", **apart(mine[name], theirs[name], start)})
    truth = theirs["float64"]
    # At 1.0 every step of a new model is clipped, so once more with a limit that half of the steps keep.
    norms = truth.values["gradient_norm"]
    clip = statistics.median(norms)
    unclipped = their_steps(checkout, state, batches, torch.float64, clip)[0]
    pair = {"pair": f"ours and published, float64, clip {clip:.0f}"}
    rows.append(pair | apart(ours(state, batches, torch.float64, clip=clip), unclipped, start))
    rows.append({"pair": "published in float32 and in float64", **apart(theirs["float32"], truth, start)})
    rows.append({"pair": "ours in float32 and published in float64", **apart(mine["float32"], truth, start)})
    for name, changed in CHANGED.items():
        steps = ours(state, batches, torch.float64, **changed)
        rows.append({"pair": f"ours with {name}, float64", **apart(steps, truth, start)})
    return {
        "rows": rows,
        "quantiles_gradient_from_main_loss": max(clip_saw),
        "gradient_norms": [min(norms), max(norms)],
        "losses": {
            f"{who} {name}": steps.values["loss"]
            for who, of in (("ours", mine), ("published", theirs))
            for name, steps in of.items()
        },
    }


def missed(rows: Sequence[Mapping[str, Any]], limit: float) -> list[str]:
    """What lies farther apart than the limit, in words."""
    compared = [row for row in rows if row["pair"].startswith("ours and published")]
    found = [(row, limit * (1e-6 if "float64" in row["pair"] else 1)) for row in compared]
    return [
        f"{row['pair']}: {name} {row[name]:.1e} apart, more than {allowed:.1e}"
        for row, allowed in found
        for name in ("loss", "bpp", "mse", "aux", "gradient_norm", "weights", "quantiles")
        if not row[name] <= allowed
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison and write it where asked; 1 when the two codes do not agree."""
    parser = argparse.ArgumentParser(prog="benchmarks/parity.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="of the published code")
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="photographs to cut crops from")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--limit", type=float, default=1e-4, help="largest relative difference (%(default)s)")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)

    batches = make_batches(arguments.images, EPOCHS * STEPS_PER_EPOCH, arguments.batch, arguments.crop)
    found = compare(arguments.checkout.resolve(), batches)
    for row in found["rows"]:
        print(f"{row['pair']:50}", *(f"{n} {row[n]:.1e}" for n in ("loss", "gradient_norm", "weights", "quantiles")))
    command = f"python benchmarks/parity.py CHECKOUT --images {Path(*arguments.images.parts[-2:])}"
    settings = {"steps": len(batches), "batch": arguments.batch, "crop": arguments.crop, "model": SIZES, **RECIPE}
    result = {"command": command, "environment": describe(1), "settings": settings, "limit": arguments.limit, **found}
    if arguments.output:
        from lalic.files import write_json

        write_json(arguments.output, result)
    problems = missed(found["rows"], arguments.limit)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
