"""Sharding beside `tar` + `sha256sum` of the same files, on JPEGs of OpenImages' size, in one interleaved run.

    python benchmarks/sharding.py [--count 4000] [--rounds 3] [--folder DIR] [--output FILE.json]

What is timed, each as a whole process, files in the page cache, results on the same disk:

    tar + sha256sum    `tar cf` of the folder, then `sha256sum` of every file: packing and hashing, nothing else
    the same, synced   and `sync` of the tar: our shards are on the disk when the program ends, a tar is not
    headers            data_prep/shard.py --check headers: the same, and the checks of the header, index and records
    full               data_prep/shard.py: every image decoded
    verify             data_prep/verify.py of the shards

The JPEGs are crops of photographs (LALIC_SHARED, or `shared` beside the checkout), enlarged to 1024x768 and all
different. Making them is not timed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402 -- found from the checkout

SIZE = (1024, 768)
DEMANDED = 2.0


def make_photos(photos: Path, folder: Path, count: int) -> None:
    """`count` different JPEGs of about 300 KB in `folder`, in subfolders of 500."""
    sources = sorted((photos / "kodak").glob("*.png"))
    if not sources:
        raise SystemExit(f"error: no photographs in {photos / 'kodak'} (set LALIC_SHARED)")
    with ProcessPoolExecutor() as pool:
        tasks = [(sources[i % len(sources)], folder / f"{i // 500:02d}" / f"{i:06d}.jpg", i) for i in range(count)]
        for done in pool.map(_make_photo, tasks, chunksize=32):
            del done


def _make_photo(task: tuple[Path, Path, int]) -> None:
    from PIL import Image

    source, target, seed = task
    target.parent.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    with Image.open(source) as image:
        width = generator.randint(image.width * 6 // 10, image.width * 9 // 10)
        height = min(image.height, width * SIZE[1] // SIZE[0])
        left, top = generator.randint(0, image.width - width), generator.randint(0, image.height - height)
        photo = image.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    photo.save(target, quality=generator.randint(95, 97))


def baseline(photos: Path, work: Path, sync: bool = False) -> None:
    """tar, then the sum of every file."""
    subprocess.run(["tar", "cf", str(work / "out.tar"), "-C", str(photos), "."], check=True)
    with open(work / "sums.txt", "w") as sums:
        subprocess.run(f"find '{photos}' -type f -print0 | xargs -0 sha256sum", shell=True, check=True, stdout=sums)
    if sync:
        subprocess.run(["sync", str(work / "out.tar")], check=True)


def shard(photos: Path, work: Path, *flags: str) -> None:
    """The sharding program, from a command line."""
    command = [sys.executable, ROOT / "data_prep" / "shard.py", "--input", photos, "--output", work / "shards", *flags]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def measure(tasks: dict[str, Callable[[Path], None]], folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of every task in every round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            work = folder / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            # What others left to be written is not ours to wait for.
            os.sync()
            started = time.perf_counter()
            task(work)
            if number:
                seconds[name].append(time.perf_counter() - started)
    shutil.rmtree(folder / "work")
    return seconds


def summarise(seconds: dict[str, list[float]], size: int, count: int) -> dict[str, Any]:
    """Times, rates, and ratios to the baseline of the same round."""
    base = seconds["tar + sha256sum"]
    rows = {}
    for name, runs in seconds.items():
        rows[name] = {
            "min_s": min(runs),
            "median_s": statistics.median(runs),
            "mb_per_s": size / 1e6 / min(runs),
            "images_per_s": count / min(runs),
            "of_minima": min(runs) / min(base),
            "median_of_rounds": statistics.median(a / b for a, b in zip(runs, base, strict=True)),
        }
    return {"rows": rows, "demanded": DEMANDED, "met": rows["headers"]["of_minima"] <= DEMANDED}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write it where asked; 1 when the demand is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks/sharding.py", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)
    photos = Path(os.environ.get("LALIC_SHARED", ROOT.parent / "shared")) / "data"
    workers = ["--workers", str(arguments.workers)]

    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        source = folder / "photos"
        make_photos(photos, source, arguments.count)
        sizes = [path.stat().st_size for path in source.rglob("*.jpg")]
        shard(source, folder, "--check", "headers", *workers)
        verify = [str(part) for part in (sys.executable, ROOT / "data_prep" / "verify.py", folder / "shards")]
        tasks: dict[str, Callable[[Path], None]] = {
            "tar + sha256sum": lambda work: baseline(source, work),
            "the same, synced": lambda work: baseline(source, work, sync=True),
            "headers": lambda work: shard(source, work, "--check", "headers", *workers),
            "full": lambda work: shard(source, work, *workers),
            "verify": lambda work: subprocess.run([*verify, *workers], check=True, capture_output=True) and None,
        }
        seconds = measure(tasks, folder, arguments.rounds)
    command = " ".join(["python benchmarks/sharding.py", *(sys.argv[1:] if argv is None else argv)])
    result = {
        "command": command,
        "images": len(sizes),
        "bytes": sum(sizes),
        "rounds": arguments.rounds,
        "workers": arguments.workers,
        "environment": describe(arguments.workers),
        **summarise(seconds, sum(sizes), len(sizes)),
    }
    print(f"{len(sizes)} JPEGs of {SIZE[0]}x{SIZE[1]}, {sum(sizes) / 1e6:.0f} MB, {arguments.workers} workers")
    for name, row in result["rows"].items():
        rates = f"{row['mb_per_s']:7.0f} MB/s {row['images_per_s']:7.0f} images/s"
        print(
            f"{name:18} {row['min_s']:7.2f} s {rates} {row['of_minima']:6.2f}x {row['median_of_rounds']:6.2f}x median"
        )
    print(f"headers: demanded <= {DEMANDED:g}x" + ("" if result["met"] else ", MISSED"))
    if arguments.output:
        from lalic.files import write_json

        write_json(arguments.output, result)
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
