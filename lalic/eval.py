"""Measure checkpoints on a folder of images: rate, quality and time, as a table and as JSON.

    lalic eval -p CKPT... [-q LABEL...] -i IMAGES -o RECON --result OUT.json --both [--anchors all]
    lalic eval -p BUNDLE [-q 1 2.5 6] -i IMAGES ...        weights of several rates, at these qualities or all rungs
    torchrun --nproc_per_node N -m lalic.eval ...    (also: accelerate launch -m lalic.eval, srun -n N)

Without `--real` the rate is estimated from the likelihoods; with `--real` every image is entropy-coded, and
what is measured is the picture decoded from those bytes; `--both` does both and reports their gap. Images
are extended to multiples of 64 for coding and cut back; the rate is per pixel of the image itself.

Averages are over images. Those of the times leave out each process's first image of a checkpoint, and every
image that is the first of its size, where others remain. An image that cannot be read is skipped, named on
the screen and listed under "skipped" in the JSON. What is infinite or undefined (PSNR of identical pictures,
MS-SSIM of images up to 160 pixels) is null in the JSON and left out of the averages. Reconstructions are
written as PNG to RECON/LABEL/, in the sub-folders of the images.

Several processes share the images between them. With `--result`, what is measured is kept at once in
OUT.json.progress/: an evaluation that was killed goes on there when it is started again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import compressai
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from lalic import anchors
from lalic.codec.bitstream import FLOAT32
from lalic.curve import Curve
from lalic.data.images import list_images, read_rgb
from lalic.errors import LalicError, for_terminal, run_main
from lalic.evaluation.journal import ImageSums, Journal, key_of
from lalic.evaluation.options import Point, check_together, device_of, labels_of, parser, points_of, precision
from lalic.evaluation.ranks import Ranks, place, usable_cpus
from lalic.evaluation.result import averages, columns, describe_weights, environment, same_numbers, short, table
from lalic.fetch import is_name
from lalic.files import atomic_open, sha256_of, write_json
from lalic.measure import Row, Session
from lalic.metrics import json_ready
from lalic.release import Weights, open_weights
from lalic.remote import is_url, without_password
from lalic.report import write_report

log = logging.getLogger("lalic.eval")


@dataclass
class Work:
    """What all checkpoints of one evaluation share."""

    args: argparse.Namespace
    command: list[str]
    ranks: Ranks
    device: torch.device
    images: list[Path]
    names: list[Path]
    """Where each image's reconstruction goes, below the output folder and the label."""
    journal: Journal
    dataset: str | None
    sums: ImageSums = field(default_factory=ImageSums)
    skipped: dict[str, str] = field(default_factory=dict)
    results: list[Row] = field(default_factory=list)
    records: list[Row] = field(default_factory=list)
    models: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    @property
    def environment(self) -> Row:
        """Of this process."""
        return environment(self.device, precision(self.args), self.ranks.size)


def main(argv: Sequence[str] | None = None) -> int | None:
    """Evaluate all checkpoints, one after the other; the JSON is written anew after each operating point."""
    args = parser(__doc__).parse_args(argv)
    args.real |= args.both
    if args.anchors == []:
        args.anchors = ["all"]
    ranks = Ranks(place(os.environ))
    level = logging.INFO if ranks.first else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(message)s")
    work = ranks.together(lambda: _prepare(args, list(sys.argv[1:] if argv is None else argv), ranks))
    for i, checkpoint in enumerate(args.checkpoints):
        weights = ranks.together(partial(open_weights, checkpoint))
        for point in ranks.together(partial(points_of, weights.model.rates, args.checkpoints, args.qualities, i)):
            rows = _evaluate(weights, point, work)
            work.records += rows
            work.results.append(averages(rows))
            work.models.append(describe_weights(weights, point, checkpoint))
            if ranks.first and args.result:
                write_json(args.result, _report(work))
    ranks.close()
    if not ranks.first:
        return 0
    if args.anchors:
        work.curves = anchors.gather(_readable(work), args.anchors, work.dataset, jobs=usable_cpus(), progress=True)
        if args.result:
            write_json(args.result, _report(work))
    if args.report:
        write_report(_report(work), args.report, args.input_dir, args.output_dir)
    work.journal.remove()
    print(table(work.models, work.results))
    if work.curves:
        print(anchors.table(work.curves))
    if work.skipped:
        print(f"{len(work.skipped)} of {len(work.images)} images could not be read and are not in these numbers")
    return 0


def _prepare(args: argparse.Namespace, command: list[str], ranks: Ranks) -> Work:
    """Find everything that is wrong with the command line before anything is measured."""
    device = device_of(args.cuda, ranks.local_rank)
    if len(args.checkpoints) > 1:  # of one, it depends on its rates what -q means
        labels_of(args.checkpoints, args.qualities)
        check_together(args.checkpoints)
    compressai.set_entropy_coder(args.entropy_coder)
    images = list_images(args.input_dir)
    for path in args.checkpoints:
        if not (is_url(path) or is_name(path) or Path(path).exists()):
            raise LalicError(f"no such checkpoint: {path}")
    dataset = anchors.dataset_of(images) if ranks.first else None
    if args.anchors and ranks.first:
        anchors.check(args.anchors, dataset)
    if args.report and ranks.first:
        if args.report.is_dir():
            raise LalicError(f"{args.report} is a folder: name the HTML file to write")
        args.report.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.result, ranks.rank)
    if args.result and ranks.first:
        if args.result.is_dir():
            raise LalicError(f"{args.result} is a folder: name the JSON file to write")
        args.result.parent.mkdir(parents=True, exist_ok=True)  # now, not after an hour of evaluating
        if args.fresh:
            journal.remove()
    names = reconstruction_names(images, args.input_dir)
    return Work(args, command, ranks, device, images, names, journal, dataset)


def _evaluate(weights: Weights, point: Point, work: Work) -> list[Row]:
    """Records of one operating point over all readable images; what cannot be read is added to `skipped`."""
    settings = {
        "fingerprint": weights.fingerprint,
        "mode": ["estimate", "real", "both"][work.args.real + work.args.both],
        "coder": [work.args.entropy_coder, work.args.arithmetic],
        "environment": same_numbers(work.environment),
        **({} if point.quality is None else {"quality": point.quality}),
    }
    done = work.ranks.share(_measured_before(settings, point.label, work) if work.ranks.first else None)
    todo = [i for i in range(len(work.images)) if str(i) not in done]
    mine = todo[work.ranks.rank :: work.ranks.size]
    if done and work.ranks.first:
        log.info("%s: %d of %d images were measured before", point.label, len(done), len(work.images))
    rows = _measure(weights, point, mine, settings, work)
    found: dict[str, Row] = dict(done)
    for theirs in work.ranks.gather({"rows": rows, "skipped": work.skipped}):
        found |= {str(i): row for i, row in theirs["rows"].items()}
        work.skipped |= theirs["skipped"]
    if not found:
        if not work.ranks.first:
            raise SystemExit(2)  # the first process says why
        raise LalicError(f"none of the {len(work.images)} images in {work.args.input_dir} could be read")
    # Whatever the file was called and the checkpoint was labelled when it was measured.
    order = sorted(int(i) for i in found)
    return [{**found[str(i)], "file": str(work.images[i]), "quality": point.label} for i in order]


def _measured_before(settings: Mapping[str, Any], label: str, work: Work) -> dict[str, Row]:
    """Records that a killed evaluation left, by the image's number; their reconstructions must still be there."""
    entries = work.journal.entries()
    found = {}
    for i, path in enumerate(work.images) if entries else ():
        entry = entries.get(key_of(settings, work.sums.of(path)))
        if entry is None:
            continue
        if work.args.output_dir:
            picture = work.args.output_dir / label / work.names[i]
            if not picture.is_file() or sha256_of(picture) != entry.get("reconstruction"):
                continue
        found[str(i)] = entry["record"]
    return found


def _measure(
    weights: Weights, point: Point, mine: Sequence[int], settings: Mapping[str, Any], work: Work
) -> dict[int, Row]:
    """Measure this process's share of the images: {number of the image: record}."""
    args, label = work.args, point.label
    model = weights.model.to(work.device).eval()
    model.set_compute_dtype(torch.bfloat16 if args.half else None)
    if args.real and args.arithmetic == FLOAT32:
        model.update()
    estimate = args.both or not args.real
    session = Session(
        model,
        real=args.real,
        estimate=estimate,
        warm_up=args.warm_up,
        arithmetic=args.arithmetic,
        quality=point.quality,
    )
    rows: dict[int, Row] = {}
    hidden = None if work.ranks.first else True  # None: where there is a terminal
    for i in tqdm(mine, desc=label, unit="image", disable=hidden):
        path = work.images[i]
        try:
            rgb = read_rgb(path)
        except LalicError as error:
            if str(path) not in work.skipped:
                log.warning("skipped: %s", for_terminal(str(error)))
            work.skipped[str(path)] = str(error)
            continue
        try:
            row, reconstruction = session.measure(rgb)
        except LalicError as error:
            raise LalicError(f"{path} with {weights.source}: {error}") from error
        rows[i] = {"file": str(path), "quality": label, **json_ready(row)}
        if work.ranks.size > 1:
            rows[i]["process"] = work.ranks.rank
        if args.verbose:
            numbers = ", ".join(f"{k} {short(v)}" for k, v in row.items())
            tqdm.write(f"{label} {for_terminal(str(path))}: {numbers}")
        written = _write_png(reconstruction, args.output_dir / label / work.names[i]) if args.output_dir else None
        work.journal.append(key_of(settings, work.sums.of(path)), rows[i], written)
    return rows


def _readable(work: Work) -> list[Path]:
    """The images that the averages are over."""
    return [path for path in work.images if str(path) not in work.skipped]


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


def _report(work: Work) -> Row:
    """What is written as JSON: the published code's name, description, results and records, and more."""
    args = work.args
    coding = f"{args.entropy_coder} ({args.arithmetic})" if args.real else "estimation"
    done = [model["quality"] for model in work.models]
    description = f"{args.model}, coding: {coding}, cuda: {args.cuda}, {precision(args)}, quality: {done}"
    report = {
        "name": args.model,
        "description": description,
        "results": columns(work.results),
        "qualities": done,
        "models": work.models,
        "arithmetic": args.arithmetic if args.real else None,
        "dataset": work.dataset,
        "images": {"folder": str(args.input_dir), "used": len(work.records) // len(done)},
        "reconstructions": str(args.output_dir) if args.output_dir else None,
        "skipped": [{"file": file, "reason": reason} for file, reason in sorted(work.skipped.items())],
        "anchors": [curve.to_json() for curve in work.curves],
        "command": shlex.join(["lalic", "eval", *map(without_password, work.command)]),
        "environment": work.environment,
        "records": work.records,
    }
    return json_ready(report)


def _write_png(rgb: NDArray[np.uint8], path: Path) -> str:
    """Write an (H, W, 3) uint8 picture; the SHA-256 of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG", compress_level=1)
    with atomic_open(path) as file:
        file.write(buffer.getbuffer())
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


if __name__ == "__main__":
    run_main(main)
