"""Do release bundles work in the published code, and do its checkpoints work here?

    python benchmarks/published_bundle.py CHECKOUT --weights release/lalic-mse-q3 --images kodim*.png [--eval]

The published code in CHECKOUT (nothing in it is changed) loads the bundle's .pth with its own `load_checkpoint`,
strictly, and both codes run on the same images. Its operator exists for CUDA alone; on a CPU it is replaced by ours,
all else is theirs. The bundles may be the six that were folded out of one model for all rates. `--full` adds a random
model of the published size. `--eval` also runs its eval.py with --real, as a program of its own, and ours beside it.

Then the other way: what the published model's own state_dict() saves is loaded here, with both spellings of the entropy
bottleneck's parameters, and must have the same fingerprint.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PROGRAM = """\
import sys
sys.path.insert(0, {root!r})
from benchmarks.published_bundle import their_eval
their_eval({arguments!r})
"""


def main() -> int:
    """Print and write the comparison; LalicError where the two codes do not agree."""
    import torch

    from benchmarks.machine import describe
    from lalic.errors import LalicError
    from lalic.files import write_json
    from lalic.release import open_weights

    args = _parser().parse_args()
    result: dict[str, Any] = {"command": _command(args), "environment": describe(1), "models": []}
    for place in args.weights:
        weights = open_weights(place)
        pth = _pth_of(Path(weights.source))
        result["models"].append({"name": weights.name, **compare(args.checkout, pth, args.images)})
    if args.full:
        with tempfile.TemporaryDirectory() as folder:
            pth = Path(folder) / "random.pth"
            torch.save(_random_state(), pth)
            result["models"].append({"name": "random, published size", **compare(args.checkout, pth, args.images[:1])})
    if args.eval:
        result["eval"] = compare_evals(args.checkout, _pth_of(Path(open_weights(args.weights[0]).source)), args.images)
    print(json.dumps(result, indent=1))
    if args.output:
        write_json(args.output, result)
    worst = max(row["x_hat_difference"] for model in result["models"] for row in model["images"])
    if worst > 1e-3:
        raise LalicError(f"the reconstructions differ by {worst:.2g}")
    return 0


def _command(args: argparse.Namespace) -> str:
    """The command without the folders of this machine."""
    words = ["python benchmarks/published_bundle.py CHECKOUT"]
    for flag, values in (("--weights", args.weights), ("--images", args.images)):
        words += [flag, *(Path(value).name for value in values)] if values else []
    return " ".join([*words, *(f"--{name}" for name in ("full", "eval") if getattr(args, name))])


def on_cpu(checkout: Path, pth: Path) -> Any:
    """The published class for the sizes of a .pth file; without CUDA, its operator is the formula, nothing is compiled.

    Its own from_state_dict knows the published sizes alone, so other sizes are told to its constructor, and the two
    hidden widths that it fixes to the blocks that it builds.
    """
    import torch
    import torch.utils.cpp_extension

    from benchmarks.published import import_published, published_sizes
    from lalic.model import load_weights
    from lalic.model.weights import AGGREGATION_RATE, CONTEXT_RATE
    from lalic.ops import biwkv

    published = import_published(checkout)
    if not torch.cuda.is_available():
        published.load_biwkv4 = lambda: None
        published.RUN_BiWKV4 = biwkv
    config = load_weights(pth).config
    widths = {"context_rate": CONTEXT_RATE, "aggregation_rate": AGGREGATION_RATE}
    sizes = published_sizes(config | widths, str(pth))

    class Sized(published.LALIC):
        def __init__(self) -> None:
            with _hidden_widths(published, config):
                super().__init__(**sizes)

    return Sized


@contextmanager
def _hidden_widths(published: Any, config: dict[str, Any]) -> Iterator[None]:
    """While its constructor runs, its blocks have the hidden widths of `config`."""
    from lalic.model.weights import CONTEXT_RATE

    block, aggregation = published.RwkvBlock_BiV4, published.EntropyParametersBlock

    def context_block(dim: int, hidden_rate: int = 4) -> Any:
        return block(dim, config["context_rate"] if hidden_rate == CONTEXT_RATE else hidden_rate)

    published.RwkvBlock_BiV4 = context_block
    published.EntropyParametersBlock = partial(aggregation, expansion_factor=config["aggregation_rate"])
    try:
        yield
    finally:
        published.RwkvBlock_BiV4, published.EntropyParametersBlock = block, aggregation


def their_checkpoint(checkout: Path, path: Path) -> Any:
    """The published model, loaded by the published eval.py's own function."""
    sized = on_cpu(checkout, path)
    sys.path.insert(0, str(checkout))
    try:
        functions = runpy.run_path(str(checkout / "eval.py"), run_name="published_eval")
    finally:
        sys.path.remove(str(checkout))
    return functions["load_checkpoint"](sized, str(path))


def compare(checkout: Path, pth: Path, images: list[Path]) -> dict[str, Any]:
    """Both codes on the same file and images: reconstructions, rates, strings; and the way back."""
    import torch

    from lalic.model import fingerprint, load_weights

    torch.set_num_threads(1)  # as the published eval.py does
    ours, theirs = load_weights(pth), their_checkpoint(checkout, pth)
    ours.update()
    theirs.update()
    rows = [_on_image(ours, theirs, path) for path in images]
    back = {
        spelling: fingerprint(_reload(state)) == fingerprint(ours) for spelling, state in _spellings(theirs).items()
    }
    told = {key: ours.config[key] for key in ("context_rate", "aggregation_rate")}
    return {"parameters": sum(p.numel() for p in ours.parameters()), **told, "images": rows, "loaded_back": back}


def _on_image(ours: Any, theirs: Any, path: Path) -> dict[str, Any]:
    import torch

    from lalic.codec.coder import pad
    from lalic.data.images import read_rgb
    from lalic.metrics import estimated_bits, to_tensor

    x = pad(to_tensor(read_rgb(path)))
    with torch.no_grad():
        a, b = ours(x), theirs(x)
        strings, theirs_strings = ours.compress(x), theirs.compress(x)
        # Their decoder on our strings: the entropy models are the same to the last bit, or it sees garbage.
        crossed = theirs.decompress(strings["strings"], strings["shape"])["x_hat"]
        decoded = ours.decompress(strings["strings"], strings["shape"])["x_hat"]
    pixels = x.shape[-1] * x.shape[-2]
    size, their_size = (sum(len(s[0]) for s in found["strings"]) for found in (strings, theirs_strings))
    return {
        "image": path.name,
        "x_hat_difference": float((a["x_hat"] - b["x_hat"]).abs().max()),
        "bpp_estimated": estimated_bits(a["likelihoods"]) / pixels,
        "bpp_estimated_published": estimated_bits(b["likelihoods"]) / pixels,
        "bytes": size,
        "bytes_published": their_size,
        "our_strings_decoded_by_published": float((crossed.clamp(0, 1) - decoded).abs().max()),
    }


def _spellings(theirs: Any) -> dict[str, dict[str, Any]]:
    """The published model's state dict as it saves it, and with either spelling of the bottleneck's parameters."""
    state = theirs.state_dict()
    new = {"_matrix": "matrices.", "_bias": "biases.", "_factor": "factors."}
    spelt: dict[str, dict[str, Any]] = {"as saved": dict(state), "old names": {}, "new names": {}}
    for name, tensor in state.items():
        older = newer = name
        if "entropy_bottleneck." in name:
            for old, long in new.items():
                older = older.replace(f"entropy_bottleneck.{long}", f"entropy_bottleneck.{old}")
                newer = newer.replace(f"entropy_bottleneck.{old}", f"entropy_bottleneck.{long}")
        spelt["old names"][older], spelt["new names"][newer] = tensor, tensor
    if len({tuple(s) for s in spelt.values()}) != 2:
        raise AssertionError("the two spellings must differ, and one of them is the one that is saved")
    return spelt


def _reload(state: dict[str, Any]) -> Any:
    """Through a file, as somebody would get it."""
    import torch

    from lalic.model import load_weights

    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "theirs.pth")
        return load_weights(Path(folder) / "theirs.pth")


def compare_evals(checkout: Path, pth: Path, images: list[Path]) -> dict[str, Any]:
    """eval.py of the published code, started as a program with --real, and ours with the same flags."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        folder.mkdir()
        for image in images:
            (folder / image.name).symlink_to(image.resolve())
        found = {}
        flags = ["-m", "LALIC", "-p", str(pth), "-q", "3", "-i", str(folder), "--real", "--verbose"]
        theirs = Path(scratch) / "theirs.json"
        program = PROGRAM.format(root=str(ROOT), arguments=[str(checkout), *flags, "-r", str(theirs)])
        subprocess.run([sys.executable, "-c", program], check=True, cwd=scratch, stdout=sys.stderr)
        ours = Path(scratch) / "ours.json"
        command = [sys.executable, "-m", "lalic.eval", *flags, "-r", str(ours)]
        subprocess.run(command, check=True, cwd=scratch, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for name, path in (("published", theirs), ("ours", ours)):
            results = json.loads(path.read_text())["results"]
            keys = ("bpp", "psnr", "psnr-unrounded", "ms-ssim-db")
            found[name] = {key: results[key][0] for key in keys if key in results}
        return found


def their_eval(arguments: list[str]) -> None:
    """Run the published eval.py in this process, with its operator replaced where there is no CUDA."""
    from compressai.registry import MODELS

    checkout, *flags = arguments
    MODELS["LALIC"] = on_cpu(Path(checkout), Path(flags[flags.index("-p") + 1]))
    sys.path.insert(0, checkout)
    sys.argv = ["eval.py", *flags]
    runpy.run_path(str(Path(checkout) / "eval.py"), run_name="__main__")


def _random_state() -> dict[str, Any]:
    """A state dict of the published size that codes a picture: small residual branches around fresh weights."""
    import torch

    from lalic.model import LALIC, published_state_dict

    torch.manual_seed(6)
    return published_state_dict(LALIC().eval())


def _pth_of(source: Path) -> Path:
    if source.is_dir():
        (source,) = source.glob("*.pth")
    return source


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="checkout of the published code")
    parser.add_argument("--weights", nargs="+", default=[], help="bundles or .pth files")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="photographs")
    parser.add_argument("--full", action="store_true", help="also a random model of the published size")
    parser.add_argument("--eval", action="store_true", help="also run its eval.py, on the first weights")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


if __name__ == "__main__":
    from lalic.errors import run_main

    run_main(main)
