"""Measure checkpoints on a folder of images: rate, quality and time, as a table and as JSON.

    python -m lalic.eval -m LALIC -p CKPT... -q LABEL... -i IMAGES -o RECON --result OUT.json --real --verbose

Without `--real` the rate is estimated from the likelihoods; with `--real` every image is entropy-coded, and
what is measured is the picture decoded from those bytes; `--both` does both and reports their gap. Images
are extended to multiples of 64 for coding and cut back; the rate is per pixel of the image itself.

Averages are over images. Those of the times leave the first image of each checkpoint out, unless it is the
only one. An image that cannot be read is skipped, named on the screen and listed under "skipped" in the
JSON. What is infinite or undefined (PSNR of identical pictures, MS-SSIM of images up to 160 pixels) is null
in the JSON and left out of the averages. Reconstructions are written as PNG to RECON/LABEL/, in the
sub-folders of the images.
"""

from __future__ import annotations

import argparse
import io
import logging
import platform
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import compressai
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from lalic.data.images import list_images, read_rgb
from lalic.errors import LalicError, run_main
from lalic.files import atomic_open, write_json
from lalic.measure import Row, gap_percent, measure
from lalic.memory import PeakMemory
from lalic.metrics import finite_mean, json_ready
from lalic.release import Weights, open_weights, stem_of, versions

log = logging.getLogger("lalic.eval")

AVERAGED = ("bpp", "bpp-estimated", "psnr", "psnr-unrounded", "ms-ssim", "ms-ssim-db")
TIMES = ("enc_time", "dec_time", "forward_time")


def main(argv: Sequence[str] | None = None) -> int | None:
    """Evaluate all checkpoints, one after the other; the JSON is written anew after each of them."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    args.real |= args.both
    device = _device(args.cuda)
    labels = _labels(args.checkpoints, args.qualities)
    compressai.set_entropy_coder(args.entropy_coder)
    images = list_images(args.input_dir)
    names = reconstruction_names(images, args.input_dir)
    for path in args.checkpoints:
        if not path.exists():
            raise LalicError(f"no such checkpoint: {path}")
    if args.result:
        args.result.parent.mkdir(parents=True, exist_ok=True)  # now, not after an hour of evaluating

    results: list[Row] = []
    records: list[Row] = []
    models: list[Row] = []
    skipped: dict[str, str] = {}
    for path, label in zip(args.checkpoints, labels, strict=True):
        weights = open_weights(path)
        folder = args.output_dir / label if args.output_dir else None
        memory = PeakMemory(device)
        rows = _evaluate(weights, label, images, names, folder, device, args, skipped)
        records += rows
        results.append({**averages(rows), "peak-memory-bytes": memory.bytes()})
        models.append(_describe(weights, label, path))
        if args.result:
            write_json(args.result, _report(args, labels, results, records, models, skipped, device))
    print(table(labels, results))
    if skipped:
        print(f"{len(skipped)} of {len(images)} images could not be read and are not in these numbers")
    return 0


def _evaluate(
    weights: Weights,
    label: str,
    images: Sequence[Path],
    names: Sequence[Path],
    folder: Path | None,
    device: torch.device,
    args: argparse.Namespace,
    skipped: dict[str, str],
) -> list[Row]:
    """Records of one checkpoint over all readable images; what cannot be read is added to `skipped`."""
    model = weights.model.to(device).eval()
    model.set_compute_dtype(torch.bfloat16 if args.half else None)
    if args.real:
        model.update()
    rows: list[Row] = []
    for path, name in zip(tqdm(images, desc=label, unit="image", disable=None), names, strict=True):
        try:
            rgb = read_rgb(path)
        except LalicError as error:
            if str(path) not in skipped:
                log.warning("skipped: %s", error)
            skipped[str(path)] = str(error)
            continue
        try:
            row, reconstruction = measure(model, rgb, real=args.real, estimate=args.both or not args.real)
        except LalicError as error:
            raise LalicError(f"{path} with {weights.source}: {error}") from error
        rows.append({"file": str(path), "quality": label, **row})
        if args.verbose:
            tqdm.write(f"{label} {path}: " + ", ".join(f"{k} {_short(v)}" for k, v in row.items()))
        if folder:
            _write_png(reconstruction, folder / name)
    if not rows:
        raise LalicError(f"none of the {len(images)} images in {args.input_dir} could be read")
    return rows


def averages(rows: Sequence[Row]) -> Row:
    """Means over images by the names of the records; times leave the first image out where there are more."""
    out: Row = {}
    for key in AVERAGED:
        if key in rows[0]:
            out[key] = finite_mean(row[key] for row in rows)
    if "bpp-estimated" in out:
        out["bpp-gap-percent"] = gap_percent(out["bpp"], out["bpp-estimated"])
    for key in TIMES:
        if key in rows[0]:
            out[key] = finite_mean(row[key] for row in (rows[1:] or rows))
    return out


def reconstruction_names(images: Sequence[Path], root: Path) -> list[Path]:
    """Where each reconstruction goes below the output folder: the same sub-folders, `.png` for the suffix.

    Images that differ only in their suffix keep it (`a.jpg.png`, `a.webp.png`), so that none overwrites
    another.
    """
    relative = [image.relative_to(root) for image in images]
    taken = Counter(name.with_suffix(".png") for name in relative)
    return [
        name.with_suffix(".png") if taken[name.with_suffix(".png")] == 1 else name.with_name(f"{name.name}.png")
        for name in relative
    ]


def table(labels: Sequence[str], results: Sequence[Row]) -> str:
    """The averages as aligned text, one line for each checkpoint."""
    keys = [key for key in results[0] if key != "peak-memory-bytes"]
    lines = [["label", *keys, "memory"]]
    for label, row in zip(labels, results, strict=True):
        memory = f"{row['peak-memory-bytes'] / 2**20:.0f} MiB"
        lines.append([label, *(_short(row[key]) for key in keys), memory])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def _report(
    args: argparse.Namespace,
    labels: Sequence[str],
    results: Sequence[Row],
    records: Sequence[Row],
    models: Sequence[Row],
    skipped: dict[str, str],
    device: torch.device,
) -> Row:
    """What is written as JSON: the published code's name, description, results and records, and more."""
    coding = args.entropy_coder if args.real else "estimation"
    precision = "bfloat16 transforms" if args.half else "float32"
    done = list(labels[: len(results)])
    report = {
        "name": args.model,
        "description": f"{args.model}, coding: {coding}, cuda: {args.cuda}, {precision}, quality: {done}",
        "results": {key: [row[key] for row in results] for key in results[0]},
        "qualities": done,
        "models": models,
        "images": {"folder": str(args.input_dir), "used": len(records) // len(done)},
        "skipped": [{"file": file, "reason": reason} for file, reason in skipped.items()],
        "environment": environment(device, precision),
        "records": records,
    }
    return json_ready(report)


def _describe(weights: Weights, label: str, path: Path) -> Row:
    return {
        "quality": label,
        "checkpoint": str(path),
        "name": weights.name,
        "step": weights.step,
        "loss": weights.loss or None,
        "fingerprint": weights.fingerprint,
    }


def environment(device: torch.device, precision: str) -> Row:
    """What the numbers, above all the times, depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    packages = ("lalic", "torch", "compressai", "numpy", "pillow", "pytorch-msssim")
    return {
        "python": platform.python_version(),
        **versions(*packages),
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "precision": precision,
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _device(cuda: bool) -> torch.device:
    if cuda and not torch.cuda.is_available():
        raise LalicError("--cuda: this machine (or this build of torch) has no CUDA device; leave the flag out")
    return torch.device("cuda" if cuda else "cpu")


def _labels(checkpoints: Sequence[Path], qualities: Sequence[str] | None) -> list[str]:
    """One name for each checkpoint, which must do as a folder's name."""
    labels = list(qualities) if qualities is not None else [stem_of(path.resolve()) for path in checkpoints]
    if len(labels) != len(checkpoints):
        raise LalicError(f"{len(checkpoints)} checkpoints (-p) but {len(labels)} labels (-q): give one each")
    repeated = [label for label, count in Counter(labels).items() if count > 1]
    if repeated:
        raise LalicError(f"label {repeated[0]!r} stands for several checkpoints: give each its own with -q")
    wrong = [label for label in labels if "/" in label or label in ("", ".", "..")]
    if wrong:
        raise LalicError(f"label {wrong[0]!r} cannot name a folder of reconstructions: choose another with -q")
    return labels


def _write_png(rgb: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG", compress_level=1)
    with atomic_open(path) as file:
        file.write(buffer.getbuffer())


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lalic.eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", choices=("LALIC",), default="LALIC", help="architecture")
    parser.add_argument(
        "-p",
        "--checkpoint",
        dest="checkpoints",
        type=Path,
        nargs="+",
        required=True,
        metavar="CKPT",
        help="weights files, release bundles, checkpoint or run folders",
    )
    parser.add_argument(
        "-q",
        "--quality",
        dest="qualities",
        nargs="+",
        metavar="LABEL",
        help="a label for each checkpoint (default: its file name)",
    )
    parser.add_argument("-i", "--input-dir", type=Path, required=True, help="folder of images")
    parser.add_argument("-o", "--output-dir", type=Path, help="folder for the reconstructions")
    parser.add_argument("-r", "--result", type=Path, help="JSON file to write")
    parser.add_argument("--real", action="store_true", help="entropy-code, decode, and count the bytes")
    parser.add_argument("--both", action="store_true", help="--real, and the estimated rate beside it")
    parser.add_argument("--cuda", action="store_true", help="compute on the GPU; an error if there is none")
    parser.add_argument(
        "--half",
        action="store_true",
        help="run the transforms in bfloat16, on CPU and GPU; latents and probabilities stay in float32",
    )
    parser.add_argument(
        "-c",
        "--entropy-coder",
        choices=compressai.available_entropy_coders(),
        default=compressai.get_entropy_coder(),
        help="entropy coder for --real (%(default)s)",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each image")
    return parser


if __name__ == "__main__":
    run_main(main)
