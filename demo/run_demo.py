"""From eight photographs to a released codec in a few minutes on a CPU: `make demo`.

Every step is a command that a user would type, printed before it runs. The photographs are those that ship
inside scikit-image and scikit-learn, so nothing is downloaded. Training is killed once on purpose and resumed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = {
    "skimage": ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg"),
    "sklearn": ("china.jpg", "flower.jpg"),
}
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
SHOWN = "china"
MARK = ".lalic-demo"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for everything it writes")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml")
    parser.add_argument("--kill-at", type=int, default=120, help="kill the training once it has logged this step")
    arguments = parser.parse_args()
    started = time.monotonic()
    out = _fresh_folder(arguments.output.resolve())

    _say("Photographs from scikit-image and scikit-learn, and the BiWKV kernel for this machine")
    photos = _collect(out / "photos")
    _run(sys.executable, "-m", "lalic.kernels.cli", "--build")
    _say("Shards: the original bytes in WebDataset tars, with an index")
    _run(sys.executable, "data_prep/shard.py", "--input", photos, "--output", out / "shards")

    _say(f"Training; killed without warning once it has logged step {arguments.kill_at}")
    train = _train_command(arguments.config, out)
    _kill_once_logged(train, out / "run" / "log.jsonl", arguments.kill_at)
    _say("The same command again: it goes on from the newest whole checkpoint")
    _run(*train)

    _say("Release bundle, and its checksums")
    _run(sys.executable, "-m", "lalic.export", "--run", out / "run", "--output", out / "release")
    bundle = next((out / "release").iterdir())
    _run("sha256sum", "--check", "--quiet", "SHA256SUMS", cwd=bundle)

    _say("Evaluation with real entropy coding, and the rate that the likelihoods promised")
    label = bundle.name.rsplit("-", 1)[-1]
    result = out / "eval.json"
    _run(
        *(sys.executable, "-m", "lalic.eval", "-m", "LALIC", "-p", bundle, "-q", label, "-i", photos),
        *("-o", out / "reconstructions", "--result", result, "--real", "--both", "--report", out / "report.html"),
    )

    _say("One photograph to a file and back")
    photo = next(photos.glob(f"{SHOWN}.*"))
    lalic = (sys.executable, "-c", "from lalic.cli import main; main()")
    coded, decoded = out / f"{SHOWN}.lalic", out / f"{SHOWN}-decoded.png"
    _run(*lalic, "compress", photo, coded, "--weights", bundle, show="lalic")
    _run(*lalic, "info", coded, show="lalic")
    _run(*lalic, "decompress", coded, decoded, "--weights", bundle, show="lalic")

    _say("Pictures: the R-D plane with JPEG and WebP beside, original and reconstruction")
    _pictures(out, photos, photo, coded, decoded, result, label)
    _closing_words(out, result, time.monotonic() - started)
    return 0


def _fresh_folder(out: Path) -> Path:
    """Empty the folder of an earlier demo; a folder that holds anything else is left alone."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise SystemExit(f"error: {out} exists and is not a demo's folder: name another with --output")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    return out


def _collect(folder: Path) -> Path:
    folder.mkdir()
    for package, names in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"error: {package} is not installed: pip install -e '.[demo]'")
        for name in names:
            source = Path(spec.origin).parent / FOLDERS[package] / name
            if not source.exists():
                raise SystemExit(f"error: this {package} does not ship {name}: install another version")
            shutil.copyfile(source, folder / name)
    return folder


def _train_command(config: Path, out: Path) -> tuple[str | Path, ...]:
    return (
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", "launch/accelerate/cpu1.yaml", "-m", "lalic.train", "--config", config),
        *(f"run.dir={out / 'run'}", f"data.shards={out / 'shards'}", f"data.val={out / 'photos'}"),
    )


def _kill_once_logged(command: tuple[str | Path, ...], log: Path, step: int) -> None:
    """Start the training and send SIGKILL to its process group as soon as the log has reached `step`."""
    _show(command)
    process = subprocess.Popen([str(c) for c in command], cwd=ROOT, start_new_session=True)
    while process.poll() is None:
        lines = log.read_text().splitlines() if log.exists() else []
        if any(json.loads(line).get("step", 0) >= step for line in lines if line.endswith("}")):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"\n*** killed (SIGKILL) after step {step} was logged ***", flush=True)
            return
        time.sleep(0.2)
    raise SystemExit(f"error: training ended with status {process.returncode} before step {step}")


def _pictures(out: Path, photos: Path, photo: Path, coded: Path, decoded: Path, result: Path, label: str) -> None:
    from lalic.anchors import measure_pillow
    from lalic.data.images import read_rgb
    from lalic.metrics import bits_per_pixel, psnr
    from lalic.plot import plot_rd, read_curve, side_by_side

    curves = [read_curve(result, f"LALIC demo {label} (minutes on a CPU)")]
    curves += [measure_pillow(photos, name, qualities=(5, 10, 20, 35, 50, 70)) for name in ("JPEG", "WEBP")]
    plot_rd(curves, out / "rd.png", "The demo's codec beside JPEG and WebP, average of eight photographs")
    original, reconstruction = read_rgb(photo), read_rgb(decoded)
    rate = bits_per_pixel(coded.stat().st_size, *original.shape[:2])
    caption = f"LALIC demo: {rate:.3f} bpp, {psnr(original, reconstruction):.2f} dB"
    side_by_side(original, reconstruction, out / "side-by-side.png", (f"original {photo.name}", caption))
    print(out / "rd.png", out / "side-by-side.png", out / "report.html", sep="\n")


def _closing_words(out: Path, result: Path, seconds: float) -> None:
    records = json.loads(result.read_text())["records"]
    print(f"\n{'photograph':<22}{'bpp':>8}{'PSNR dB':>9}{'MS-SSIM dB':>12}")
    for record in records:
        name = Path(record["file"]).name
        print(f"{name:<22}{record['bpp']:>8.3f}{record['psnr']:>9.2f}{record['ms-ssim-db']:>12.2f}")
    mean = {key: sum(r[key] for r in records) / len(records) for key in ("bpp", "psnr", "ms-ssim-db")}
    print(f"{'average':<22}{mean['bpp']:>8.3f}{mean['psnr']:>9.2f}{mean['ms-ssim-db']:>12.2f}")
    print(
        "\nThis is a small model that saw eight photographs, the ones it is measured on, for a few minutes on a"
        "\nCPU. It is a poor codec and says nothing about LALIC's quality; every step it took is the one that a full"
        "\ntraining takes. The published models need about a week on a fast GPU for each rate."
    )
    print(f"\nEverything is in {out}. Time: {int(seconds // 60)} min {int(seconds % 60)} s.")


def _run(*command: str | Path, cwd: Path = ROOT, show: str | None = None) -> None:
    _show((show, *command[3:]) if show else command)
    status = subprocess.run([str(c) for c in command], cwd=cwd).returncode
    if status != 0:
        raise SystemExit(f"error: the command above ended with status {status}")


def _show(command: tuple[str | Path, ...]) -> None:
    words = ["python" if str(c) == sys.executable else str(c) for c in command]
    line = shlex.join(words).replace("python -m accelerate.commands.launch", "accelerate launch")
    print(f"$ {line}", flush=True)


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
