"""Shards elsewhere beside shards in a folder: time to the first batch, and images/s.

    python benchmarks/remote_shards.py [--shards 24] [--images 48] [--window 4] [--workers 1] [--rounds 5]
        [--delay 0.0] [--output FILE.json]

Shards of synthetic photographs (JPEG, 1024x768, about 200 kB) are served over HTTP by another process on this machine,
which shares its cores: what comes from a server costs more here than it does with a server elsewhere. `--delay` is
waited before every answer, as on a long way.

    local           the folder itself, the baseline of the ratios
    cache, warm     data.shards=URL, all shards in the cache already
    cache, cold     the cache is empty
    ranges          data.cache_size=0

The variants take turns. `first batch` runs from the call of build_loader to the first batch, at the beginning of an
epoch and in its middle, as after a resume. `images/s` is an epoch from its first to its last batch. `read` is the time
to read one sample without decoding it, in this process, from a warm page cache.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.machine import describe  # noqa: E402 -- found from the checkout

_SERVER = """
import sys, time
from pathlib import Path
from bucket_server import Bucket, serve
folder = Path(sys.argv[1])
bucket = Bucket({f"shards/{p.name}": p.read_bytes() for p in folder.iterdir() if p.is_file()}, delay=float(sys.argv[2]))
bucket.etags = False  # an MD5 of a shard for every answer
with serve(bucket):
    print(bucket.url, flush=True)
    sys.stdin.read()
"""

CROP, BATCH = 256, 8


def make_shards(folder: Path, shards: int, images: int) -> None:
    """Blurred noise with some grain: JPEGs of about the size of photographs."""
    from lalic.data_prep.job import Options, run_job

    generator = np.random.default_rng(0)
    (folder / "photos").mkdir()
    total = 0
    for number in range(shards * images):
        coarse = Image.fromarray(generator.integers(0, 256, (48, 64, 3), np.uint8))
        smooth = np.asarray(coarse.resize((1024, 768), Image.Resampling.BICUBIC), np.float32)
        pixels = (smooth + generator.normal(0, 9, (768, 1024, 1))).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        (folder / "photos" / f"{number:05d}.jpg").write_bytes(buffer.getvalue())
        total += buffer.tell()
    run_job(folder / "photos", folder / "shards", Options(shard_size=int(total / shards * 1.02)), workers=0)
    shutil.rmtree(folder / "photos")


class Variants:
    """How each variant opens its shards."""

    def __init__(self, shards: Path, url: str, cache: Path) -> None:
        self.shards, self.url, self.cache = shards, url, cache
        self.names = ("local", "cache, warm", "cache, cold", "ranges")

    def open(self, name: str) -> Any:
        from lalic.data.source import open_shards

        if name == "local":
            return open_shards(str(self.shards))
        if name == "ranges":
            return open_shards(self.url, cache=str(self.cache / "warm"), cache_size=0)
        if name == "cache, cold":
            shutil.rmtree(self.cache / "cold", ignore_errors=True)
        reader = open_shards(self.url, cache=str(self.cache / name.rpartition(" ")[2]))
        if name == "cache, warm":
            for shard in range(len(reader.index.names)):
                reader.cache.fetch(shard)
        return reader


def first_batch(reader: Any, arguments: argparse.Namespace, start_step: int) -> float:
    """Seconds."""
    from lalic.data.loader import build_loader

    began = time.perf_counter()
    batches = iter(build_loader(reader.index, reader=reader, start_step=start_step, **settings(reader, arguments)))
    next(batches)
    seconds = time.perf_counter() - began
    batches.close()
    return seconds


def images_per_second(reader: Any, arguments: argparse.Namespace) -> float:
    """Of an epoch, from its first batch on."""
    from lalic.data.loader import build_loader

    batches = iter(build_loader(reader.index, reader=reader, start_step=0, **settings(reader, arguments)))
    next(batches)
    began = time.perf_counter()
    count = sum(len(batch["x"]) for batch in batches)
    return count / (time.perf_counter() - began)


def settings(reader: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    order = {"crop": CROP, "seed": 1, "first_epoch": 0, "window": arguments.window}
    return {**order, "num_steps": len(reader.index) // BATCH, "batch_size": BATCH, "workers": arguments.workers}


def seconds_per_read(reader: Any) -> float:
    samples = range(0, len(reader.index), 3)
    for sample in samples:
        reader.read(sample)
    began = time.perf_counter()
    for sample in samples:
        reader.read(sample)
    return (time.perf_counter() - began) / len(samples)


def measure(variants: Variants, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant: medians over the rounds, and medians of the rounds' ratios to the baseline."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in variants.names}
    middle = arguments.shards * arguments.images // BATCH // 2
    for round_ in range(arguments.rounds + 1):
        for name in variants.names:
            row = {
                "first_batch_start_s": first_batch(variants.open(name), arguments, 0),
                "first_batch_middle_s": first_batch(variants.open(name), arguments, middle),
                "images_per_s": images_per_second(variants.open(name), arguments),
            }
            if name != "cache, cold":
                row["read_s"] = seconds_per_read(variants.open(name))
            if round_:  # the first round is warm-up
                for key, value in row.items():
                    found[name].setdefault(key, []).append(value)
    rows = []
    for name, values in found.items():
        base = found["local"]
        row = {"variant": name, **{key: statistics.median(v) for key, v in values.items()}}
        for key, v in values.items():
            row[f"{key}_ratio"] = statistics.median(a / b for a, b in zip(v, base[key], strict=True))
        pairs = zip(values["first_batch_middle_s"], values["first_batch_start_s"], strict=True)
        row["middle_to_start"] = statistics.median(a / b for a, b in pairs)
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--images", type=int, default=48, help="per shard")
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before every answer of the server")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_shards(folder, arguments.shards, arguments.images)
        shard_bytes = sum(path.stat().st_size for path in (folder / "shards").glob("*.tar"))
        command = [sys.executable, "-c", _SERVER, str(folder / "shards"), str(arguments.delay)]
        with subprocess.Popen(
            command, cwd=ROOT / "tests", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            url = server.stdout.readline().strip() + "/shards"
            rows = measure(Variants(folder / "shards", url, folder / "cache"), arguments)
            server.communicate("")
    for row in rows:
        print("  ".join(f"{name}: {value:.4g}" if name != "variant" else value for name, value in row.items()))
    if arguments.output:
        options = {name: value for name, value in vars(arguments).items() if name != "output"}
        result = {
            "command": "python benchmarks/remote_shards.py",
            "environment": describe(1),
            "settings": {**options, "shard_bytes": shard_bytes},
            "rows": rows,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
