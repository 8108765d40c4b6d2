"""The training loader beside the published data path: images/s, CPU time per image, memory, first batch of a resume.

    python benchmarks/loader.py FOLDER [FOLDER ...] [--work FOLDER] [--rounds 5] [--output FILE.json]

FOLDER holds photographs. Resized to 1024x768, in JPEGs of about OpenImages' mean size, they become both plain files
and shards. Crops are 256x256 in batches of 8:

    published    compressai.datasets.ImageFolder (PIL, convert("RGB")), torchvision's RandomCrop and ToTensor, torch's
                 DataLoader, shuffled: what the published train.py does
    ours         lalic.data.loader over the shards
    ours, pillow the same with data.decoder=pillow: whole images are decoded

before which the crops of the last two are compared bit by bit. Every round runs each of them once with 0, 1 and 2
workers, one thread per process. Timed is the steady state: from a batch after the workers' start on, with nobody
waiting for the batches but the clock. An image's CPU time is that of the main process and of the workers together;
images/s per core are its inverse.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import MALLOC, describe  # noqa: E402 -- found from the checkout

CROP, BATCH = 256, 8
WORKERS = (0, 1, 2)
OPENIMAGES_BYTES = 300_000
"""The mean of the first 400,000 images: 120 GB."""
DEMANDED = {"images per core": 4.0, "resume": 1.5, "worker memory": 500.0}


def resized(task: tuple[Path, int, Path, int]) -> None:
    """Write one photograph at 1024x768 (or upright); each `variant` is cut a little differently."""
    from PIL import Image

    source, variant, target, quality = task
    image = Image.open(source).convert("RGB")
    size = (1024, 768) if image.width >= image.height else (768, 1024)
    box = (variant, 2 * variant, image.width - 2 * variant, image.height - variant)
    image.resize(size, Image.Resampling.LANCZOS, box=box).save(target, "JPEG", quality=quality)


def make_inputs(work: Path, folders: Sequence[Path], shard_bytes: int) -> int:
    """Photographs in work/files/train, somewhat more than one shard of them in work/shards; returns the quality."""
    from lalic.data.images import list_images

    files, shards = work / "files" / "train", work / "shards"
    files.mkdir(parents=True, exist_ok=True)
    sources = [path for folder in folders for path in list_images(folder)]
    sizes = {}
    for quality in (99, 98, 97, 96, 95, 93, 90, 85):
        for i, source in enumerate(sources[:: max(1, len(sources) // 24)]):
            resized((source, 0, work / f"try{i}.jpg", quality))
        tries = list(work.glob("try*.jpg"))
        sizes[quality] = sum(path.stat().st_size for path in tries) / len(tries)
        for path in tries:
            path.unlink()
    quality = min(sizes, key=lambda q: abs(sizes[q] - OPENIMAGES_BYTES))
    count = max(4 * BATCH, int(1.1 * shard_bytes / sizes[quality]))
    tasks = [(sources[i % len(sources)], i // len(sources), files / f"{i:06d}.jpg", quality) for i in range(count)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        for _ in pool.imap_unordered(resized, tasks, chunksize=8):
            pass
    command = [sys.executable, str(ROOT / "data_prep" / "shard.py"), "--input", str(files), "--output", str(shards)]
    subprocess.run([*command, "--shard-size", str(shard_bytes)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return quality


def published(work: Path, workers: int) -> Iterable[Any]:
    from compressai.datasets import ImageFolder
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import transforms

    transform = transforms.Compose([transforms.RandomCrop((CROP, CROP)), transforms.ToTensor()])
    dataset = ImageFolder(str(work / "files"), split="train", transform=transform)
    # As shuffle=True, over so many epochs that none ends, and no worker starts, while time is taken.
    endless = RandomSampler(dataset, num_samples=10**7)
    return DataLoader(dataset, batch_size=BATCH, sampler=endless, num_workers=workers)


def ours(work: Path, workers: int, decoder: Any = "auto", start: int = 0, steps: int = 10**6) -> Iterable[Any]:
    from lalic.data.index import ShardIndex
    from lalic.data.loader import build_loader

    order: Any = {"crop": CROP, "seed": 1, "first_epoch": 0, "start_step": start, "num_steps": steps}
    index = ShardIndex.load(work / "shards")
    return build_loader(index, **order, batch_size=BATCH, workers=workers, decoder=decoder)


TASKS: dict[str, Callable[[Path, int], Iterable[Any]]] = {
    "published": published,
    "ours": ours,
    "ours, pillow": lambda work, workers: ours(work, workers, "pillow"),
}


def check_same(work: Path) -> None:
    """End the program when the two decoders give different crops."""
    import torch

    for a, b in zip(ours(work, 0, "auto", 0, 12), ours(work, 0, "pillow", 0, 12), strict=True):
        if not torch.equal(a["x"], b["x"]) or not torch.equal(a["positions"], b["positions"]):
            raise SystemExit("error: the decoders disagree; no times of wrong results")


def workers_cpu() -> float:
    """Seconds of CPU time of the living child processes."""
    total = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def steady(batches: Iterator[Any], workers: int, count: int) -> dict[str, float]:
    """Images/s and CPU milliseconds per image over `count` batches, after the workers are under way."""
    for _ in range(2 + 4 * workers):
        next(batches)
    cpu, began = time.process_time() + workers_cpu(), time.perf_counter()
    for _ in range(count):
        next(batches)
    taken = time.perf_counter() - began
    cpu = time.process_time() + workers_cpu() - cpu
    return {"images_per_second": count * BATCH / taken, "cpu_ms": 1e3 * cpu / (count * BATCH)}


def measure_speed(work: Path, rounds: int, count: int) -> list[dict[str, Any]]:
    """One row for every task and number of workers: medians over the rounds, and the ratios to the published path."""
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for workers, (name, task) in itertools.product(WORKERS, TASKS.items()):
            batches = iter(task(work, workers))
            runs.setdefault((name, workers), []).append(steady(batches, workers, count))
            del batches  # ends the workers
    rows = []
    for (name, workers), results in runs.items():
        base = runs["published", workers]
        ratios = [b["cpu_ms"] / r["cpu_ms"] for b, r in zip(base, results, strict=True)]
        rows.append(
            {
                "task": name,
                "workers": workers,
                "images_per_second": statistics.median(r["images_per_second"] for r in results),
                "cpu_ms": statistics.median(r["cpu_ms"] for r in results),
                "per_core": statistics.median(ratios),
                "per_core_of_minima": min(b["cpu_ms"] for b in base) / min(r["cpu_ms"] for r in results),
                "wall": statistics.median(
                    r["images_per_second"] / b["images_per_second"] for b, r in zip(base, results, strict=True)
                ),
            }
        )
    return rows


def measure_resume(work: Path, repeats: int = 15) -> dict[str, float]:
    """Milliseconds from reading the index to the first batch, at an epoch's beginning and amid the third."""
    from lalic.data.index import ShardIndex

    steps = len(ShardIndex.load(work / "shards")) // BATCH
    taken: dict[str, list[float]] = {"beginning": [], "middle": []}
    for i in range(repeats + 1):
        # Batches differ in what their crops cost: another one each time.
        for name, start in (("beginning", 0 + i % 4), ("middle", 2 * steps + steps // 2 + i)):
            began = time.perf_counter()
            batches = iter(ours(work, 2, "auto", start))
            next(batches)
            if i:
                taken[name].append(1e3 * (time.perf_counter() - began))
            del batches
    medians = {f"{name}_ms": statistics.median(times) for name, times in taken.items()}
    return {**medians, "ratio": medians["middle_ms"] / medians["beginning_ms"]}


def measure_memory(work: Path, count: int) -> dict[str, float]:
    """MB of one worker process over `count` batches: peak of its resident set, of its share of it, of its own part."""
    most: dict[str, float] = {"rss": 0.0, "pss": 0.0, "uss": 0.0}
    for i, _ in zip(range(count), ours(work, 2), strict=False):
        if i % 8:
            continue
        for process in multiprocessing.active_children():
            status = _kilobytes(Path(f"/proc/{process.pid}/status"))
            maps = _kilobytes(Path(f"/proc/{process.pid}/smaps_rollup"))
            now = {"rss": status["VmHWM"], "pss": maps["Pss"], "uss": maps["Private_Clean"] + maps["Private_Dirty"]}
            most = {name: max(most[name], now[name] / 1e3) for name in most}
    return most


def _kilobytes(path: Path) -> dict[str, int]:
    lines = (line.split(":", 1) for line in path.read_text().splitlines() if line.endswith("kB"))
    return {name: int(value.split()[0]) for name, value in lines}


def run(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, printed as they come."""
    import torch

    torch.set_num_threads(1)
    quality = make_inputs(work, arguments.folders, arguments.shard_mib << 20)
    check_same(work)
    sizes = [path.stat().st_size for path in (work / "files" / "train").iterdir()]
    print(f"{len(sizes)} JPEGs of 1024x768, quality {quality}, {sum(sizes) / len(sizes) / 1e3:.0f} kB on average")
    memory = measure_memory(work, arguments.batches)
    print("a worker's memory at its peak: " + ", ".join(f"{name} {mb:.0f} MB" for name, mb in memory.items()))
    resume = measure_resume(work)
    print("first batch: " + ", ".join(f"{name} {value:.2f}" for name, value in resume.items()))
    rows = measure_speed(work, arguments.rounds, arguments.batches)
    for row in rows:
        print(
            f"{row['task']:14} {row['workers']} workers {row['images_per_second']:7.1f} images/s "
            f"{row['cpu_ms']:6.2f} ms CPU, {row['per_core']:.2f}x per core ({row['per_core_of_minima']:.2f}x of the "
            f"fastest), {row['wall']:.2f}x images/s"
        )
    least = min(row["per_core"] for row in rows if row["task"] == "ours")
    ratios = {
        "images per core": {"value": least, "demanded": ">= 4", "met": least >= DEMANDED["images per core"]},
        "resume": {"value": resume["ratio"], "demanded": "< 1.5", "met": resume["ratio"] < DEMANDED["resume"]},
        "worker memory": {
            "value": memory["rss"],
            "demanded": "< 500",
            "met": memory["rss"] < DEMANDED["worker memory"],
        },
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio['value']:.2f}, demanded {ratio['demanded']}" + ("" if ratio["met"] else ", MISSED"))
    settings = {"images": len(sizes), "quality": quality, "mean_bytes": sum(sizes) / len(sizes), "crop": CROP}
    return {
        "settings": {**settings, "batch": BATCH, "shard_mib": arguments.shard_mib, "rounds": arguments.rounds},
        "rows": rows,
        "resume": resume,
        "memory_mb": memory,
        "ratios": ratios,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures, write them where asked; 1 when a demand is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks/loader.py", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="photographs")
    parser.add_argument("--work", type=Path, help="make files and shards in here (default: a temporary folder)")
    parser.add_argument("--shard-mib", type=int, default=512, help="size of the shard (default: 512)")
    parser.add_argument("--batches", type=int, default=48, help="timed in every round (default: 48)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args(argv)

    command = " ".join(["python benchmarks/loader.py", *(sys.argv[1:] if argv is None else argv)])
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        result = {"command": command, "environment": describe(1), **run(Path(work), arguments)}
    if arguments.output:
        from lalic.files import write_json

        write_json(arguments.output, result)
    return 0 if all(row["met"] for row in result["ratios"].values()) else 1


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        os.environ.update(MALLOC)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(main())
