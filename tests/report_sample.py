"""A small evaluation to report on: flat pictures, whose errors are known by heart, and names that want to be markup."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LABELS = ["low", "q<b>&2", "high", "best"]
NAMES = ["a/<script>alert(1)</script>.png", 'b "onload=alert(2) x=".png', "c\u202egnp.exe.png"]
RED = (255, 0, 0)
BLUES = {"low": (0, 0, 255), "q<b>&2": (0, 0, 200), "high": (0, 0, 160), "best": (0, 0, 120)}
SIZE = (480, 320)


def flat(colour: tuple[int, int, int], size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.new("RGB", size, colour)


def write_sample(folder: Path, names: list[str] | None = None) -> dict[str, Any]:
    """Originals (red) in `folder`/images, reconstructions (blues) in `folder`/recon; returns the result."""
    images, recon = folder / "images", folder / "recon"
    names = NAMES if names is None else names
    records = []
    for i, label in enumerate(LABELS):
        for name in names:
            for root, colour in ((images, RED), (recon / label, BLUES[label])):
                path = (root / name).with_suffix(".png")
                path.parent.mkdir(parents=True, exist_ok=True)
                flat(colour).save(path)
            mse = float(np.mean((np.array(RED, float) - BLUES[label]) ** 2))
            psnr = 10 * math.log10(255**2 / mse)
            row = {"file": str(images / name), "quality": label, "width": SIZE[0], "height": SIZE[1]}
            row |= {"bpp": 0.1 * (i + 1), "bytes": 77 * (i + 1), "psnr": psnr, "ms-ssim": None, "ms-ssim-db": None}
            records.append({**row, "enc_time": 0.5, "dec_time": 0.25})
    of = [[r for r in records if r["quality"] == label] for label in LABELS]
    keys = ("bpp", "psnr", "enc_time", "dec_time")
    return {
        "name": "LALIC",
        "description": "LALIC, coding: ans",
        "results": {key: [float(np.mean([r[key] for r in rows])) for rows in of] for key in keys},
        "qualities": LABELS,
        "models": [{"quality": label, "name": f"model {label}", "loss": {"lambda": 0.1}} for label in LABELS],
        "images": {"folder": str(images), "used": len(names)},
        "skipped": [{"file": "images/<i>broken.png", "reason": "damaged"}],
        "environment": {"python": "3.11", "device_name": "CPU & <co>"},
        "records": records,
        "anchors": [
            {"name": "jpeg", "label": "JPEG", "source": "measured", "codec_version": "libjpeg-turbo 3",
             "bpp": [0.1, 0.2, 0.3, 0.4], "psnr": [3.0, 4.0, 5.0, 6.0]},
            {"name": "few", "label": "Few <points>", "source": "measured", "bpp": [0.1, 0.2], "psnr": [3.0, 4.0]},
        ],
    }  # fmt: skip
