"""The model card (README.md) of a release bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lalic.model import LALIC

PUBLISHED_DIMS = [96, 144, 256, 320, 256, 192]
PUBLISHED_DEPTHS = [2, 4, 6, 6]
PUBLISHED_IMAGES = 48 * 400_000
"""Crops seen by the published recipe: 48 epochs over 400K images."""

_CARD = """\
---
license: mit
library_name: lalic
tags: [image-compression, learned-image-compression, rwkv, compressai]
pipeline_tag: image-to-image
---

# {name}

Weights of LALIC (Linear Attention Modeling for Learned Image Compression), a learned image codec built of
Bi-RWKV blocks, trained for {metric_name} with lambda = {lmbda:g}{quality}.
{warning}
## What it is

| | |
|---|---|
| architecture | LALIC, dims {dims}, depths {depths}, channel groups {groups} |
| parameters | {parameters:.2f} M |
| loss | {loss} |
| trained for | {training} |
| weights | {kind}float32 |
| fingerprint | `{fingerprint}` |

{recipe}## Use it

```sh
lalic compress photo.png photo.lalic --weights {name}
lalic decompress photo.lalic photo.png --weights {name}
python -m lalic.eval -m LALIC -p {name} -q {name} -i IMAGES -o RECON --result result.json --real
```

```python
from lalic.codec import decode_image, encode_image
from lalic.data.images import read_rgb
from lalic.model import load_weights

model = load_weights("{name}")  # this folder, its .safetensors or its .pth
model.update()  # builds the tables of the entropy coder
coded = encode_image(model, read_rgb("photo.png"))
print(coded.num_bytes, "bytes")
picture = decode_image(model, coded)  # (H, W, 3) uint8
```

`{name}.pth` is a plain state dict in the layout of the published code and loads there as it is.
`model.safetensors` holds the same tensors, each once. Neither needs unpickling of code.

## Numbers

{numbers}
## Limits

A file decodes only where the same probabilities are computed as where it was encoded: same weights, same
kind of device, same versions of torch and lalic. The decoder checks that they agree and stops with an
error where they do not. Pictures are 8-bit RGB.

## Licence and citation

MIT. If you use LALIC, cite its authors:

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


def model_card(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    recipe: Mapping[str, Any],
    model: LALIC,
    sums: Mapping[str, str],
) -> str:
    """Markdown text of the card.

    Args:
        config: the bundle's config.json.
        metrics: the bundle's metrics.json.
        recipe: what is known about the training, as label -> text; "crops seen" -> int is compared with the
            published recipe. Empty for weights whose training is not known.
        model: the model, for its number of parameters.
        sums: SHA-256 by file name.
    """
    metric, lmbda = config["loss"]["metric"], config["loss"]["lambda"]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    images = recipe.get("crops seen")
    told = "".join(f"- {label}: {_number(value)}\n" for label, value in recipe.items())
    steps = f"{config['step']:,} steps" if config["step"] is not None else "not known (weights given as a file)"
    return _CARD.format(
        name=config["name"],
        metric_name={"mse": "mean squared error", "ms-ssim": "MS-SSIM"}[metric],
        lmbda=lmbda,
        quality=f" (quality {config['quality']} of the ladder)" if config["quality"] else "",
        warning=_warning(config, images),
        dims=config["model"]["dims"],
        depths=config["model"]["depths"],
        groups=config["model"]["groups"],
        parameters=parameters,
        loss="lambda * 255^2 * MSE + bpp" if metric == "mse" else "lambda * (1 - MS-SSIM) + bpp",
        training=steps,
        kind={"ema": "exponential moving average over the training, ", "raw": "those of the last step, "}.get(
            config.get("weights") or "", ""
        ),
        fingerprint=config["fingerprint"],
        recipe=f"## Training\n\n{told}\n" if told else "",
        numbers=_numbers(metrics),
        sums="\n".join(f"{digest}  {file}" for file, digest in sorted(sums.items())),
    )


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


def _numbers(metrics: Mapping[str, Any]) -> str:
    rows = [(k, v) for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)]
    if not rows:
        return "No validation numbers came with this checkpoint; run `lalic.eval` as above.\n"
    body = "".join(f"| {key} | {_number(value)} |\n" for key, value in rows)
    return (
        "Validation during training (estimated rate, not a benchmark), from `metrics.json`:\n\n"
        f"| | |\n|---|---|\n{body}"
    )


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
