"""The model card (README.md) of a release bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lalic.card_evaluation import markdown, model_index
from lalic.model import LALIC
from lalic.model.compact import is_rounded
from lalic.release_files import FLOAT16

PUBLISHED_DIMS = [96, 144, 256, 320, 256, 192]
PUBLISHED_DEPTHS = [2, 4, 6, 6]
PUBLISHED_IMAGES = 48 * 400_000
"""Crops seen by the published recipe: 48 epochs over 400K images."""

_CARD = """\
---
{matter}---

# {name}

Weights of LALIC (Linear Attention Modeling for Learned Image Compression), a learned image codec built of
Bi-RWKV blocks, {trained_for}.
{warning}
## What it is

| | |
|---|---|
| architecture | LALIC, dims {dims}, depths {depths}, channel groups {groups} |
| parameters | {parameters:.2f} M |
{rates}| loss | {loss} |
| trained for | {training} |
| weights | {kind}{precision} |
| fingerprint | `{fingerprint}` |
{origin}
{recipe}## Use it

```sh
{compress}
lalic decompress photo.lalic photo.png --weights {name}
{evaluate}
```

```python
import lalic
from lalic.codec import decode_image, encode_image
from lalic.data.images import read_rgb

model = lalic.load("{name}")  # this folder, a file of it, or the URL of either
coded = encode_image(model, read_rgb("photo.png"){quality})
print(coded.num_bytes, "bytes")
picture = decode_image(model, coded)  # (H, W, 3) uint8
```

{files}

## Numbers

{numbers}
## Limits

A file is decoded by the weights that wrote it. The decoder checks that it computes the probabilities that
the encoder computed, and stops with an error where it does not. Pictures have 8 bits per channel.

## Licence and citation

{licence} If you use LALIC, cite its authors:

```bibtex
@inproceedings{{lalic2025,
  author    = {{Feng, Donghui and Cheng, Zhengxue and Wang, Shen and Wu, Ronghua and
               Hu, Hongwei and Lu, Guo and Song, Li}},
  title     = {{Linear Attention Modeling for Learned Image Compression}},
  booktitle = {{IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)}},
  year      = {{2025}},
  note      = {{arXiv:2502.05741}}
}}
```

## Checksums

SHA-256, also in `SHA256SUMS` (check with `sha256sum -c SHA256SUMS`):

```
{sums}
```
"""

_FULL = """\
`{name}.pth` is a plain state dict in the layout of the published code and loads there as it is.
`model.safetensors` holds the same tensors, each once. Neither needs unpickling of code.

`lalic verify {name}` checks that this folder is whole, that both files hold the same weights, and that
they decode `reference.lalic`, a generated picture, to what the exporting machine got."""

_COMPACT = """\
`model.safetensors` holds what was learned, each tensor once, in float16. The model is exactly these numbers: rounding
the training's float32 to them made the model that the fingerprint names, and what was measured on it contains what
rounding costs. `lalic export --checkpoint {name} --output FOLDER` adds the `.pth` file that the published code loads,
with the same numbers in float32.

`lalic verify {name}` checks that this folder is whole, and that its weights decode `reference.lalic`, a
generated picture, to what the exporting machine got."""

_FULL_RATES = """\
`model.safetensors` holds all tensors, each once, in float32; it needs no unpickling of code. The published code has one
model for each rate and does not load it: `lalic export --checkpoint {name} --quality {rungs} --output FOLDER` folds
whole qualities out of it, into bundles with the `.pth` file that the published code loads.

`lalic verify {name}` checks that this folder is whole, and that its weights decode `reference.lalic`, a
generated picture, to what the exporting machine got."""

_COMPACT_RATES = """\
`model.safetensors` holds what was learned, each tensor once, in float16. The model is exactly these numbers: rounding
the training's float32 to them made the model that the fingerprint names, and what was measured on it contains what
rounding costs. The published code has one model for each rate and does not load it:
`lalic export --checkpoint {name} --quality {rungs} --output FOLDER` folds whole qualities out of it, into bundles with
the `.pth` file that the published code loads.

`lalic verify {name}` checks that this folder is whole, and that its weights decode `reference.lalic`, a
generated picture, to what the exporting machine got."""

METRIC_NAMES = {"mse": "mean squared error", "ms-ssim": "MS-SSIM"}
RUNG_COLUMNS = {"loss": "loss", "bpp": "bpp", "psnr": "PSNR (dB)", "ms_ssim": "MS-SSIM"}
"""What the card's table of validation tells of every rung."""


class Licence(NamedTuple):
    """The licence of weights: an identifier of model hubs, and words about it for the card."""

    id: str = "mit"
    note: str = ""

    @classmethod
    def told(cls, value: Any) -> Licence | None:
        """What a bundle's configuration says; None where it says nothing."""
        if not isinstance(value, Mapping) or not isinstance(value.get("id"), str):
            return None
        return cls(value["id"], " ".join(str(value.get("note") or "").split()))

    def words(self) -> str:
        """For the card: whole sentences."""
        if self == Licence():
            return "MIT."
        sentences = [] if self.id == "other" else [f"The weights: `{self.id}`."]
        if self.note:
            sentences.append(self.note if self.note[-1] in ".!?" else f"{self.note}.")
        return " ".join([*sentences, "The program: MIT."])


def model_card(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    recipe: Mapping[str, Any],
    model: LALIC,
    sums: Mapping[str, str],
    evaluations: Sequence[Mapping[str, Any]] = (),
    licence: Licence = Licence(),  # noqa: B008 -- it is immutable
) -> str:
    """Markdown text of the card.

    Args:
        config: the bundle's config.json.
        metrics: the bundle's metrics.json.
        recipe: what is known about the training, as label -> text; "crops seen" -> int is compared with the
            published recipe. Empty for weights whose training is not known.
        model: the model, for its parameters.
        sums: SHA-256 by file name.
        evaluations: the bundle's evaluation.json (lalic.card_evaluation).
        licence: of the weights.
    """
    loss, name, rungs = config["loss"], config["name"], config["model"].get("rungs")
    words = {"name": name, "rungs": " ".join(map(str, rungs or ()))}
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    images = recipe.get("crops seen")
    told = "".join(f"- {label}: {_number(value)}\n" for label, value in recipe.items())
    steps = f"{config['step']:,} steps" if config["step"] is not None else "not known (weights given as a file)"
    return _CARD.format(
        matter=_front_matter(config, evaluations, licence.id),
        name=name,
        trained_for=_trained_for(config),
        rates=f"| qualities | {rungs[0]} to {rungs[-1]}, and every number between them |\n" if rungs else "",
        origin=_origin(config),
        compress=f"lalic compress photo.png photo.lalic --weights {name}"
        + (f" --quality {_example(rungs)}" if rungs else ""),
        evaluate=_evaluate(name, rungs),
        quality=f", quality={_example(rungs)}" if rungs else "",
        warning=_warning(config, images),
        dims=config["model"]["dims"],
        depths=config["model"]["depths"],
        groups=config["model"]["groups"],
        parameters=parameters,
        loss=("lambda * 255^2 * MSE + bpp" if loss["metric"] == "mse" else "lambda * (1 - MS-SSIM) + bpp")
        + (", divided by the root of lambda over the geometric middle of all" if rungs else ""),
        training=steps,
        kind={"ema": "exponential moving average over the training, ", "raw": "those of the last step, "}.get(
            config.get("weights") or "", ""
        ),
        fingerprint=config["fingerprint"],
        recipe=f"## Training\n\n{told}\n" if told else "",
        precision=_precision(config, model),
        files=_files(config).format(**words),
        licence=licence.words(),
        numbers=_numbers(config, metrics, evaluations, rounded=is_rounded(model)),
        sums="\n".join(f"{digest}  {file}" for file, digest in sorted(sums.items())),
    )


def _trained_for(config: Mapping[str, Any]) -> str:
    loss, rungs = config["loss"], config["model"].get("rungs")
    if rungs:
        lowest, highest = loss["lambdas"][0], loss["lambdas"][-1]
        return (
            f"one model for all qualities from {rungs[0]} to {rungs[-1]} of the ladder,\n"
            f"trained for {METRIC_NAMES[loss['metric']]} with lambda = {lowest:g} to {highest:g}"
        )
    quality = f" (quality {config['quality']} of the ladder)" if config["quality"] else ""
    return f"trained for {METRIC_NAMES[loss['metric']]} with lambda = {loss['lambda']:g}{quality}"


def _origin(config: Mapping[str, Any]) -> str:
    """A row about the model of several rates that the weights were folded out of; "" for others."""
    folded = config.get("folded")
    if not folded:
        return ""
    lowest, highest = folded["quality"]
    return (
        f"| folded from | `{folded['name']}`, one model for the qualities {lowest} to {highest}, at quality "
        f"{config['quality']}; its fingerprint is `{folded['fingerprint']}`, the training is that of all of them |\n"
    )


def _example(rungs: Sequence[int]) -> float:
    """A quality for examples, between two rungs: 4.3 where the model has it."""
    return 4.3 if rungs[0] <= 4.3 <= rungs[-1] else rungs[0] + 0.5


def _evaluate(name: str, rungs: Sequence[int] | None) -> str:
    flags = f"-q {' '.join(map(str, rungs))}" if rungs else f"-q {name}"
    return f"python -m lalic.eval -m LALIC -p {name} {flags} -i IMAGES -o RECON --result result.json --real"


def _files(config: Mapping[str, Any]) -> str:
    compact = config.get("precision") == FLOAT16
    if config["model"].get("rungs"):
        return _COMPACT_RATES if compact else _FULL_RATES
    return _COMPACT if compact else _FULL


def _precision(config: Mapping[str, Any], model: LALIC) -> str:
    if config.get("precision") == FLOAT16:
        return "float16"
    return "float32, all numbers rounded to float16" if is_rounded(model) else "float32"


def _warning(config: Mapping[str, Any], images: Any) -> str:
    """Honest words about a model that is not the published one fully trained."""
    small = config["model"]["dims"] != PUBLISHED_DIMS or config["model"]["depths"] != PUBLISHED_DEPTHS
    words = []
    if small:
        words.append("it is smaller than the published architecture")
    if isinstance(images, int) and images < 0.9 * PUBLISHED_IMAGES:
        share = images / PUBLISHED_IMAGES
        words.append(
            f"its training saw {images:,} crops, {_percent(share)} of the published recipe's {PUBLISHED_IMAGES:,}"
        )
    if not words:
        return ""
    return (
        f"\n**This is not the published codec:** {', and '.join(words)}. Expect it to\ncompress worse "
        "than the numbers in the paper, and measure it before relying on it.\n"
    )


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "less than 0.1%"


def _front_matter(config: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]], licence: str) -> str:
    """What a model hub reads: YAML."""
    import yaml

    matter: dict[str, Any] = {
        "license": licence,
        "library_name": "lalic",
        "pipeline_tag": "image-to-image",
        "tags": ["image-compression", "learned-image-compression", "rwkv", "compressai", config["loss"]["metric"]],
    }
    if evaluations:
        matter["metrics"] = sorted(
            {key for e in evaluations for key in e["metrics"] if key in ("bpp", "psnr", "ms-ssim")}
        )
        matter["model-index"] = model_index(config["name"], evaluations)
    return str(yaml.safe_dump(matter, sort_keys=False, allow_unicode=True))


def _numbers(
    config: Mapping[str, Any], metrics: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]], rounded: bool
) -> str:
    measured = f"{markdown(evaluations)}\n" if evaluations else ""
    before = "; before the weights were rounded to float16" if rounded else ""
    if config["model"].get("rungs"):
        return measured + _rungs(config, metrics, before)
    rows = [(k, v) for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)]
    if not rows:
        return measured or "No numbers came with these weights; run `lalic.eval` as above.\n"
    body = "".join(f"| {key} | {_number(value)} |\n" for key, value in rows)
    return measured + (
        f"Validation during training (estimated rate, not a benchmark{before}), from `metrics.json`:\n\n"
        f"| | |\n|---|---|\n{body}"
    )


def _rungs(config: Mapping[str, Any], metrics: Mapping[str, Any], before: str) -> str:
    """The rungs of a model of several rates with their lambdas, and what validation measured at them."""
    measured = metrics.get("rungs") or {}
    columns = [key for key in RUNG_COLUMNS if any(row.get(key) is not None for row in measured.values())]
    lines = ["quality", "lambda", *(RUNG_COLUMNS[key] for key in columns)]
    table = [f"| {' | '.join(lines)} |", "|---" * len(lines) + "|"]
    for rung, lmbda in zip(config["model"]["rungs"], config["loss"]["lambdas"], strict=True):
        row = measured.get(str(rung), {})
        values = [_number(row[key]) if row.get(key) is not None else "-" for key in columns]
        table.append(f"| {' | '.join([str(rung), f'{lmbda:g}', *values])} |")
    if not columns:
        title = "The rungs of the ladder"
    else:
        where = f" on {metrics['images']} images" if metrics.get("images") else ""
        when = f" at step {metrics['step']:,}" if isinstance(metrics.get("step"), int) else ""
        title = (
            f"Validation during training{where}{when} (estimated rate, not a benchmark{before}), from `metrics.json`"
        )
    return f"{title}:\n\n" + "\n".join(table) + "\n"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
