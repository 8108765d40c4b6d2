"""The command line of `lalic eval`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import compressai
import torch
from safetensors import safe_open

from lalic.anchors import FORMATS
from lalic.codec.bitstream import FLOAT32, FLOAT64
from lalic.codec.quality import parse_quality
from lalic.errors import LalicError
from lalic.model.rates import RUNGS, Rates
from lalic.release import stem_of
from lalic.release_files import SAFETENSORS


class Point(NamedTuple):
    """An operating point: a line of the table, and a folder of reconstructions."""

    label: str
    quality: float | None = None
    """Of weights of several rates."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """All flags; `description` is the help's text."""
    parser = argparse.ArgumentParser(
        prog="lalic eval", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", choices=("LALIC",), default="LALIC", help="architecture")
    parser.add_argument(
        "-p",
        "--checkpoint",
        dest="checkpoints",
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
        metavar="Q",
        help="of weights of several rates: the qualities to measure (default: every rung); otherwise a label for each "
        "checkpoint (default: its file name)",
    )
    parser.add_argument("-i", "--input-dir", type=Path, required=True, help="folder of images")
    parser.add_argument("-o", "--output-dir", type=Path, help="folder for the reconstructions")
    parser.add_argument("-r", "--result", type=Path, help="JSON file to write")
    parser.add_argument("--real", action="store_true", help="entropy-code, decode, and count the bytes")
    parser.add_argument("--both", action="store_true", help="--real, and the estimated rate beside it")
    parser.add_argument(
        "--arithmetic",
        choices=(FLOAT64, FLOAT32),
        default=FLOAT64,
        help="of --real: float64, as in .lalic files, or float32, CompressAI's strings (%(default)s)",
    )
    parser.add_argument("--cuda", action="store_true", help="compute on the GPU; an error if there is none")
    parser.add_argument(
        "--half",
        action="store_true",
        help="run the transforms in bfloat16, on CPU and GPU; latents and probabilities stay in full precision",
    )
    parser.add_argument(
        "-c",
        "--entropy-coder",
        choices=compressai.available_entropy_coders(),
        default=compressai.get_entropy_coder(),
        help="entropy coder for --real (%(default)s)",
    )
    parser.add_argument(
        "--anchors",
        nargs="*",
        metavar="FORMAT",
        help=f"measure other codecs on the same images ({', '.join(f.lower() for f in FORMATS)}, or all that "
        "are installed), or take published points (published); all by default",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="HTML",
        help="also write one page with tables, curves, BD-rate and (with -o) pictures; lalic report has its options",
    )
    parser.add_argument(
        "--warm-up",
        action="store_true",
        help="run each new size once before it is measured, so that the times of all images but the first count",
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what a killed evaluation had measured")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each image")
    return parser


def precision(args: argparse.Namespace) -> str:
    """What the transforms are computed in."""
    return "bfloat16 transforms" if args.half else "float32"


def device_of(cuda: bool, local_rank: int) -> torch.device:
    """The CPU, or the GPU of this process."""
    if not cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LalicError("--cuda: this machine (or this build of torch) has no CUDA device; leave the flag out")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def points_of(rates: Rates | None, checkpoints: Sequence[str], qualities: Sequence[str] | None, i: int) -> list[Point]:
    """The points of checkpoint number `i`, whose model has these `rates`: one, or those of a curve.

    Raises LalicError for qualities that weights of several rates do not have, and for labels that do not do.
    """
    if rates is None:
        return [Point(labels_of(checkpoints, qualities)[i])]
    if len(checkpoints) > 1:
        raise _not_alone(checkpoints[i])
    values = range(rates.lowest, rates.highest + 1) if qualities is None else map(parse_quality, qualities)
    points = [Point(f"{value:g}", float(value)) for value in values]
    for point in points:
        assert point.quality is not None
        rates.check(point.quality)
    if (repeated := _repeated([point.label for point in points])) is not None:
        raise LalicError(f"quality {repeated} is given twice (-q): once is enough")
    return points


def check_together(checkpoints: Sequence[str]) -> None:
    """LalicError for weights of several rates among others, as far as files on this machine tell without loading."""
    for checkpoint in checkpoints if len(checkpoints) > 1 else ():
        path = Path(checkpoint)
        file = path / SAFETENSORS if path.is_dir() else path
        # What is damaged, or no such file, is told when it is opened.
        several = False
        with suppress(Exception), safe_open(file, "pt") as tensors:
            several = RUNGS in tensors.keys()  # noqa: SIM118 -- no mapping
        if several:
            raise _not_alone(checkpoint)


def _not_alone(checkpoint: str) -> LalicError:
    return LalicError(
        f"{checkpoint} has several rates, which make a curve of their own: evaluate it alone, as the only -p"
    )


def _repeated(labels: Sequence[str]) -> str | None:
    return next((label for label, count in Counter(labels).items() if count > 1), None)


def labels_of(checkpoints: Sequence[str], qualities: Sequence[str] | None) -> list[str]:
    """One name for each checkpoint, which must do as a folder's name."""
    labels = list(qualities) if qualities is not None else [_name_of(path) for path in checkpoints]
    if len(labels) != len(checkpoints):
        one_rate = f"; {checkpoints[0]} has one rate" if len(checkpoints) == 1 else ""
        raise LalicError(f"{len(checkpoints)} checkpoints (-p) but {len(labels)} labels (-q): give one each{one_rate}")
    if (repeated := _repeated(labels)) is not None:
        raise LalicError(f"label {repeated!r} stands for several checkpoints: give each its own with -q")
    wrong = [label for label in labels if "/" in label or label in ("", ".", "..")]
    if wrong:
        raise LalicError(f"label {wrong[0]!r} cannot name a folder of reconstructions: choose another with -q")
    return labels


def _name_of(checkpoint: str) -> str:
    """`release/lalic-mse-q3`, `ckpt/lalic-mse-q3.pth.tar` or a URL of such -> `lalic-mse-q3`."""
    if "://" in checkpoint:
        return stem_of(Path(checkpoint.partition("#")[0].partition("?")[0].rstrip("/")))
    return stem_of(Path(checkpoint).resolve())
