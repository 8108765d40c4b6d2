"""Writes benchmarks/README.md: the figures of results/*.json as tables. Run it after a benchmark has written there.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"

HEAD = """# Benchmarks

Each script measures beside a named baseline in one interleaved run, after checking that both sides compute the same,
and writes its figures with the machine into `results/`. The tables here are made from those files by
`python benchmarks/tables.py`. On a shared machine ratios vary by a tenth from run to run; where a script demands a
ratio it ends with 1 when that is missed.
"""


def table(titles: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    lines = [list(titles), *([str(cell) for cell in row] for row in rows)]
    body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([body[0], "|" + "---|" * len(lines[0]), *body[1:]])


def section(title: str, result: dict[str, Any], *parts: str) -> str:
    """A section with the machine and the command that made it."""
    where = result["environment"]
    device = where["cpu"] if where["device"] == "cpu" else where["device"]
    origin = f"{device}, {where['threads']} threads, torch {where['torch']}, {where['date']}: `{result['command']}`"
    return "\n\n".join([f"## {title}", origin, *parts])


def biwkv(result: dict[str, Any]) -> str:
    if "sizes" in result:
        return biwkv_on_gpu(result)
    rows = [
        (name, f"{r['of_minima']:.1f}x", f"{r['median_of_rounds']:.1f}x", r["demanded"])
        for name, r in result["ratios"].items()
    ]
    shape = ", ".join(f"{k} {v}" for k, v in result["shape"].items())
    titles = (f"float32, {shape}", "of the fastest runs", "median of rounds", "demanded")
    return section("BiWKV", result, table(titles, rows))


def biwkv_on_gpu(result: dict[str, Any]) -> str:
    names = list(result["sizes"][0]["microseconds"])
    titles = ("calls", "T", "C", *(f"{name}, us" for name in names), "floor forward, us", "floor backward, us")
    rows = [
        (
            *(row[key] for key in ("calls", "T", "C")),
            *(f"{row['microseconds'][name]:.1f}" for name in names),
            *(f"{row['floor_microseconds'][way]:.1f}" for way in ("forward", "backward")),
        )
        for row in result["sizes"]
    ]
    totals = result["milliseconds_of_44_calls"]
    last = [totals[name] for name in (*names, "floor forward", "floor backward")]
    rows.append(("**all**", "", "", *(f"**{1e3 * t:.0f}**" for t in last)))
    ratios = [
        (name, f"{r['value']:.2f}x", r["demanded"], "" if r["met"] else "missed")
        for name, r in result["ratios"].items()
    ]
    text = (
        f"{result['dtype']}, B {result['batch']}; the floor reads and writes every tensor once at "
        f"{result['copy_bytes_per_second'] / 1e12:.2f} TB/s, the rate of a large copy on this GPU."
    )
    demands = table(("ratio", "measured", "demanded", ""), ratios)
    return section("BiWKV on a GPU", result, text, table(titles, rows), demands)


def block(result: dict[str, Any]) -> str:
    parts = []
    for case in result["cases"]:
        shape = ", ".join(f"{k} {v}" for k, v in case["shape"].items())
        rows = [
            (
                row["precision"],
                row["mode"],
                row["variant"],
                f"{row['min_ms']:.1f}",
                f"{row['speed_up_of_minima']:.2f}x",
                f"{row['speed_up_median']:.2f}x",
                f"{row['saved_mib']:.1f}" if "saved_mib" in row else "",
                f"{row['peak_mib']:.1f}" if "peak_mib" in row else "",
            )
            for row in case["rows"]
        ]
        parts.append(
            table((shape, "task", "variant", "ms, fastest", "vs plain", "median", "kept MiB", "peak MiB"), rows)
        )
    return section("One Bi-RWKV block beside its plain formulation", result, *parts)


def train_step(result: dict[str, Any]) -> str:
    settings = result["settings"]
    parts = []
    for batch, variants in result["batches"].items():
        rows = [
            (name, v["error"], "", "", "")
            if "error" in v
            else (
                name,
                f"{v['images_per_second']:.3f}",
                f"{v['speed_up']:.2f}x",
                f"{v['peak_mib']:.0f}",
                f"{100 * v['peak_of_base']:.0f} %",
            )
            for name, v in variants.items()
        ]
        title = f"{settings['model']} model, crop {settings['crop']}, batch {batch}"
        parts.append(table((title, "images/s", "speed-up", "peak MiB", "of base"), rows))
    return section("Training step", result, *parts)


def profile(results: dict[str, Any]) -> str:
    names = list(results)
    groups = sorted({g for r in results.values() for g in r["groups"]})
    groups.sort(key=lambda g: -results[names[0]]["groups"].get(g, {"ms": 0})["ms"])
    rows = [(g, *(f"{r['groups'].get(g, {'ms': 0})['ms']:.0f}" for r in results.values())) for g in groups]
    rows.append(("**all operators**", *(f"**{r['operators_ms']:.0f}**" for r in results.values())))
    rows.append(("step without the profiler", *(f"{r['step_ms_without_profiler']:.0f}" for r in results.values())))
    rows.append(("operator calls", *(f"{r['operator_calls']:.0f}" for r in results.values())))
    last = results[names[-1]]
    return section("Where a training step's time goes", last, table(("ms of own time", *names), rows))


def codec(result: dict[str, Any]) -> str:
    limits = result["demanded"]
    rows = [
        (
            name,
            f"{r['median_of_rounds']:.2f}x",
            f"{r['of_minima']:.2f}x",
            f"<= {limits[name]:g}" if name in limits else "",
        )
        for name, r in result["ratios"].items()
    ]
    title = f"{result['model']} model, {result['picture']}, {result['bpp']:.2f} bpp"
    ratios = table((title, "median of rounds", "of the fastest runs", "demanded"), rows)
    stages = result["stages_ms"]
    names = list(next(iter(stages.values())))
    times = table(("ms", *names), [(task, *(f"{run[n]:.0f}" for n in names)) for task, run in stages.items()])
    return section("Encoding and decoding", result, ratios, times)


def decode_matrix(result: dict[str, Any]) -> str:
    def outcomes(row: dict[str, Any], arithmetic: str) -> list[str]:
        found = [m[arithmetic] for m in row["models"].values()]
        count = {kind: sum(f.get(kind, 0) for f in found) for kind in ("equal", "other latents", "refused")}
        worst = max(m["largest_difference"][arithmetic] for m in row["models"].values())
        return [*map(str, count.values()), f"{worst:.0e}" if worst else "0"]

    def said(value: Any) -> str:
        return ("on" if value else "off") if isinstance(value, bool) else str(value)

    settings = ("processor", "threads", "onednn", "backend", "precision")
    rows = [
        (*(said(row[key]) for key in settings), *outcomes(row, "float64"), *outcomes(row, "float32")[:3])
        for row in result["matrix"]
    ]
    titles = ("processor", "threads", "oneDNN", "BiWKV", "matmul precision", "float64: equal", "other", "refused")
    matrix = table((*titles, "largest difference", "float32: equal", "other", "refused"), rows)
    rates = [
        (
            name,
            r["images"],
            f"{r['bpp']:.3f}",
            r["bytes"]["float32"],
            r["bytes"]["float64"],
            r["exceptions"]["float64"],
            f"{r['more_percent']:+.3f} %",
            f"{r['more_percent_worst']:+.3f} %",
        )
        for name, r in result["rates"].items()
    ]
    titles = ("model", "pictures", "bpp", "bytes of float32 files", "of float64 files", "of these exceptions")
    text = (
        f"Models {', '.join(result['rates'])}; pictures {', '.join(result['images']) or 'as they came'}, encoded on "
        f"{result['encoded_on']}. Equal: the encoder's latents, bit by bit. Other: the same symbols, but means with "
        "float32's noise. The largest difference between encoder and decoder of a scale or mean before it is decided "
        f"is to be compared with the tolerance, {result['tolerance']:.1e}."
    )
    return section(
        "Files decoded by processes that compute differently",
        result,
        text,
        matrix,
        table((*titles, "more", "worst"), rates),
    )


def decode_costs(result: dict[str, Any]) -> str:
    keys = ("encode_ms_median", "decode_ms_median", "encode_cpu_ms_median", "decode_cpu_ms_median", "peak_mb")
    rows = []
    for model, both in result["costs"].items():
        rows += [(model, arithmetic, *(f"{r[key]:.0f}" for key in keys)) for arithmetic, r in both.items()]
        ratios = (both["float64"][key] / both["float32"][key] for key in keys[:-1])
        rows.append((model, "float64 / float32", *(f"{ratio:.2f}x" for ratio in ratios), ""))
    text = (
        f"{result['images'][0]}, median of the rounds; MB: by how much the process grew at its peak. The load average "
        f"of the machine was {result['environment']['load_average']:.1f}, which CPU times feel less than wall times."
    )
    titles = ("model", "arithmetic", "encode, ms", "decode, ms", "encode, CPU ms", "decode, CPU ms", "MB")
    return section("What float64 arithmetic costs", result, text, table(titles, rows))


def codec_memory(result: dict[str, Any]) -> str:
    rows = []
    for r in result["rows"]:
        case = (r["model"], f"{r['width']}x{r['height']}", r["way"])
        if "error" in r:
            rows.append((*case, r["error"], *[""] * 5))
            continue
        peaks = [f"{r[f'{task}_peak_mib']:.0f}" for task in ("encode", "decode")]
        seconds = [f"{r[f'{task}_s']:.0f} ({r[f'{task}_cpu_s']:.0f})" for task in ("encode", "decode")]
        apart = (
            [
                f"{r['y_largest_difference'] / r['y_rms']:.0e}",
                f"{r['x_hat_largest_difference']:.0e}" if "x_hat_largest_difference" in r else "",
            ]
            if "y_rms" in r
            else ["", ""]
        )
        rows.append((*case, *peaks, *seconds, *apart))
    titles = ("model", "picture", "computed", "MiB to encode", "to decode", "s to encode (of processors)", "to decode")
    text = (
        "default: in strips where a tensor would be larger than 1 GiB; whole: never. Apart: the largest difference "
        "between the two, of y beside its rms, and of the picture (white is 1) that g_s makes of the same latents. "
        "The load of the machine was "
        + " to ".join(f"{f(r['load_average'] for r in result['rows']):.0f}" for f in (min, max))
        + ", so compare the processors' seconds."
    )
    return section("Memory of the codec", result, table((*titles, "y apart", "x_hat apart"), rows), text)


def sharding(result: dict[str, Any]) -> str:
    rows = [
        (
            name,
            f"{r['min_s']:.1f}",
            f"{r['mb_per_s']:.0f}",
            f"{r['images_per_s']:.0f}",
            f"{r['of_minima']:.2f}x",
            f"{r['median_of_rounds']:.2f}x",
            f"<= {result['demanded']:g}" if name == "headers" else "",
        )
        for name, r in result["rows"].items()
    ]
    title = f"{result['images']} JPEGs of 1024x768, {result['bytes'] / 1e6:.0f} MB, {result['workers']} workers"
    titles = (title, "s, fastest", "MB/s", "images/s", "of tar + sha256sum", "median of rounds", "demanded")
    return section("Sharding", result, table(titles, rows))


def loader(result: dict[str, Any]) -> str:
    s = result["settings"]
    rows = [
        (
            r["task"],
            r["workers"],
            f"{r['images_per_second']:.0f}",
            f"{r['cpu_ms']:.2f}",
            f"{r['per_core']:.2f}x",
            f"{r['per_core_of_minima']:.2f}x",
            f"{r['wall']:.2f}x",
        )
        for r in result["rows"]
    ]
    title = f"{s['images']} JPEGs of 1024x768, {s['mean_bytes'] / 1e3:.0f} kB on average, crop {s['crop']}"
    ratios = ("images per core, ratio", "of the fastest rounds", "images/s, ratio")
    titles = (title, "workers", "images/s", "CPU ms per image", *ratios)
    demands = table(
        ("", "measured", "demanded"),
        [(name, f"{r['value']:.2f}", r["demanded"]) for name, r in result["ratios"].items()],
    )
    memory = ", ".join(f"{name.upper()} {mb:.0f} MB" for name, mb in result["memory_mb"].items())
    resume = f"{result['resume']['beginning_ms']:.0f} ms and {result['resume']['middle_ms']:.0f} ms"
    text = (
        f"A worker's memory at its peak, with a shard of {s['shard_mib']} MiB: {memory}. From reading the index to the "
        f"first batch, with two workers, at the beginning of an epoch and in the middle of one: {resume}."
    )
    return section("Loader beside the published data path", result, table(titles, rows), demands, text)


def sample_order(result: dict[str, Any]) -> str:
    s = result["settings"]
    rows = [(name, f"{1e3 * r['seconds']:.1f}", f"{r['mb']:.0f}") for name, r in result["rows"].items()]
    title = f"{s['shards'] * s['per_shard']:,} samples in {s['shards']:,} shards, index.json {s['index_mb']:.0f} MB"
    return section("Sample order", result, table((title, "ms", "MB more at the peak"), rows))


def resources(result: dict[str, Any]) -> str:
    arches = list(dict.fromkeys(row["arch"] for row in result["kernels"]))
    found = {(r["kernel"], r["type"], r["arch"]): r for r in result["kernels"]}
    kinds = dict.fromkeys((r["kernel"], r["type"]) for r in result["kernels"])
    rows = [
        (*kind, *(f"{found[(*kind, a)]['registers']} / {found[(*kind, a)]['spill_bytes']}" for a in arches))
        for kind in kinds
    ]
    origin = f"nvcc {result['nvcc']} with {result['flags']}: `{result['command']}`"
    text = table(("kernel", "type", *(f"{a}: registers / spilled bytes" for a in arches)), rows)
    return "\n\n".join(["## Registers and spills of the CUDA kernels", origin, text])


def remote_shards(result: dict[str, Any]) -> str:
    s = result["settings"]
    rows = [
        (
            r["variant"],
            f"{1e3 * r['first_batch_start_s']:.0f}",
            f"{1e3 * r['first_batch_middle_s']:.0f}",
            f"{r['middle_to_start']:.2f}",
            f"{r['images_per_s']:.0f}",
            f"{r['images_per_s_ratio']:.2f}x",
            f"{1e6 * r['read_s']:.0f}" if "read_s" in r else "",
        )
        for r in result["rows"]
    ]
    title = f"{s['shards']} shards of {s['shard_bytes'] / s['shards'] / 1e6:.0f} MB, {s['workers']} worker"
    titles = (title, "ms to the first batch", "in mid-epoch", "ratio", "images/s", "of local", "us per read")
    return section("Remote shards", result, table(titles, rows))


def faults(result: dict[str, Any]) -> str:
    rows = [
        (
            r["setup"],
            r["kind"],
            r["faults"],
            r["resumed"],
            "" if r["lost_mean"] is None else f"{r['lost_mean']:.1f}",
            "" if r["lost_worst"] is None else r["lost_worst"],
            "" if r["seconds_median"] is None else f"{r['seconds_median']:.0f}",
            r["bits_equal"],
        )
        for r in result["summary"]
    ]
    setups = result["setups"].values()
    total = [sum(r[key] for r in result["summary"]) for key in ("faults", "resumed", "bits_equal")]
    rows.append(("**all**", "", *(f"**{n}**" for n in total[:2]), "", "", "", f"**{total[2]}**"))
    ends = [end for setup in setups for end in setup["ends"]]
    disks = sorted({disk for setup in setups for disk in setup["disks"]})
    text = (
        f"A checkpoint every {result['checkpoint_every']} steps, and at every new best. Lost steps were done before "
        "the fault and had to be done again. Seconds: from the fault until the restarted command has done a step, most "
        "of them for Python's imports. Bits: of the checkpoint that the run went on from, and of the next one, beside "
        f"a run that was never disturbed. Of the {len(ends)} runs that were hit, "
        f"{sum(end['bits_equal'] for end in ends)} have equal ends, log.jsonl and TensorBoard's curves included "
        f"(without the lines that found no space). The full disk: {', '.join(disks) or 'none'}."
    )
    titles = (
        "runs",
        "fault",
        "faults",
        "resumed",
        "lost steps, mean",
        "worst",
        "s until training, median",
        "bits equal",
    )
    return section("Faults in training runs", result, table(titles, rows), text)


def backends(result: dict[str, Any]) -> str:
    s = result["settings"]
    rows = [
        (
            r["run"],
            f"{r['first']:.4f}",
            f"{r['last']:.4f}",
            *(f"{r['validation'][k]:.4f}" if k in r["validation"] else "" for k in ("loss", "bpp", "psnr")),
            f"{r['loss_largest_first_tenth']:.1e}",
            f"{r['loss_largest']:.1e}",
            f"{r['loss_mean']:.1e}",
            f"{r['aux_largest']:.1e}",
        )
        for r in result["rows"]
    ]
    title = f"{s['steps']} steps, {s.get('precision', 'fp32')}, batch {s['batch']}, crop {s['crop']}"
    titles = (title, "first loss", "last loss", "validation: loss", "bpp", "PSNR")
    apart = (f"apart, first {s['steps'] // 10} steps", "apart, largest", "apart, mean", "auxiliary loss, largest")
    note = "Apart: the relative difference of the training loss from that of the first row, at the same step."
    return section("Loss curves of the backends", result, table((*titles, *apart), rows), note)


def parity(result: dict[str, Any]) -> str:
    s, norms = result["settings"], result["gradient_norms"]
    values = ("loss", "bpp", "mse", "aux", "gradient_norm", "weights", "quantiles")
    rows = [(r["pair"], *(f"{r[name]:.1e}" for name in values)) for r in result["rows"]]
    titles = (f"{s['steps']} steps, batch {s['batch']}, crop {s['crop']}", *(name.replace("_", " ") for name in values))
    note = (
        "Of the values the largest relative difference over the steps, of weights and quantiles the distance between "
        "the two ends over the length of the way there. The rows below the first three are for scale. Gradient norms "
        f"lie between {norms[0]:.0f} and {norms[1]:.0f}; the largest gradient that the main loss gives a quantile is "
        f"{result['quantiles_gradient_from_main_loss']:g}."
    )
    return section("Our training step and the published one", result, table(titles, rows), note)


def precision(result: dict[str, Any]) -> str:
    s = result["settings"]
    rows = [
        (
            r["comparison"],
            r["run"],
            *(
                f"{r[what]:.4f} ({100 * r['from_fp32'][what]:+.2f} %)" if r["run"] != "fp32" else f"{r[what]:.4f}"
                for what in ("training", "validation")
            ),
            f"{r['bpp']:.4f}",
            f"{r['psnr']:.2f}",
        )
        for r in result["rows"]
    ]
    title = f"weights (batch {s['batch']}, crop {s['crop']})"
    titles = (title, "run", "training loss, last tenth", "validation loss", "bpp", "PSNR")
    note = (
        f"New weights: {s['steps']} steps; trained ones: {s['more_steps']} more from where float32 ended. In brackets: "
        "from float32 of the same comparison. The rounded runs are float32 too, and say how far it ends from itself."
    )
    return section(f"bf16 and float32, seed {s['seed']}", result, table(titles, rows), note)


def checkpoint(result: dict[str, Any]) -> str:
    s, ours = result["settings"], result["rows"]["asynchronous"]
    rows = [
        (
            name,
            f"{r['stopped_s']:.2f}",
            f"{r['lost_s']:.2f}",
            f"{r['lost_steps']:.2f}",
            f"{100 * r['share']:.3f} %",
            f"{r['bytes'] / 1e6:.0f}",
        )
        for name, r in result["rows"].items()
    ]
    title = f"{s['model']} model, {s['precision']}, crop {s['crop']}, batch {s['batch']}" + (
        ", EMA" if s["ema"] else ""
    )
    titles = (title, "s the step stands still", "s lost in all", "in steps", f"of {result['every']} steps", "MB")
    text = (
        f"A step takes {result['step_s']:.2f} s. The asynchronous checkpoint was written in {ours['write_s']:.1f} s "
        f"behind {ours['steps_behind']:.0f} steps; the first stood still for {result['first_stopped_s']:.2f} s, and "
        f"its copy holds {result['host_bytes'] / 1e6:.0f} MB of host memory. Load average at the start: "
        f"{result['environment']['load_average']:.1f}."
    )
    return section("Checkpoints", result, table(titles, rows), text)


def fuzz_codec(result: dict[str, Any]) -> str:
    rows = [
        (name.replace("_", " "), sum(ends.values()), ends.get("refused", 0), ends.get("right", 0))
        for name, ends in result["mutations"].items()
    ]
    rows.append(("**all**", f"**{result['files']}**", f"**{result['refused']}**", f"**{result['right']}**"))
    bad = ("wrong", "other exceptions", "crashes", "hangs")
    demands = [(f"files that ended in: {name}", result[name], "0") for name in bad]
    demands += [
        (f"{name}, worst, of a normal decode's", f"{worst:.2f}x", f"<= {result['limit']:.0f}x")
        for name, worst in result["worst"].items()
    ]
    ends = [(text.removeprefix("the file ").removeprefix("the file's "), n) for text, n in result["outcomes"].items()]
    text = (
        "Right: the very picture of a valid file came out. Memory: growth of the resident set at its peak, of which "
        f"the first {result['slack_mib']} MiB count as nothing."
    )
    kinds = table(("altered files", "tried", "refused in one line", "right"), rows)
    measured = table(("", "measured", "demanded"), demands)
    return section("Altered .lalic files", result, kinds, measured, text, table(("how they ended", "files"), ends))


def fuzz_header(result: dict[str, Any]) -> str:
    rows = [
        (name, *(figures[key] for key in ("runs", "edges", "features", "corpus", "crashed")))
        for name, figures in result["targets"].items()
    ]
    titles = (f"atheris {result['atheris']}", "runs", "edges", "features", "corpus", "crashes")
    return section("Coverage-guided fuzzing of what is read before the model runs", result, table(titles, rows))


def published_bundle(result: dict[str, Any]) -> str:
    titles = (
        "weights",
        "image",
        "x_hat, largest difference",
        "estimated bpp, ours / published",
        "bytes, ours / published",
        "our strings decoded there",
    )
    rows = [
        (
            model["name"],
            row["image"],
            f"{row['x_hat_difference']:.1e}",
            f"{row['bpp_estimated']:.7f} / {row['bpp_estimated_published']:.7f}",
            f"{row['bytes']} / {row['bytes_published']}",
            "same" if row["our_strings_decoded_by_published"] < 1e-4 else "astray",
        )
        for model in result["models"]
        for row in model["images"]
    ]
    back = sum(sum(model["loaded_back"].values()) for model in result["models"])
    text = (
        "The published code loads the `.pth` of our bundles with its own `load_checkpoint`, strictly; its operator "
        "(CUDA) is replaced by ours, so the differences are those of the rest of the network, float32 on both sides. "
        f"What it saves is loaded here with the same fingerprint, {back} of {3 * len(result['models'])} times (as "
        "saved, with the old and with the new names of the entropy bottleneck). *Astray*: its decoder lost our string: "
        "one scale that rounds otherwise is enough, which is the way of CompressAI's float32 strings between two "
        "programs, and what our files guard against."
    )
    parts = [table(titles, rows), text]
    if found := result.get("eval"):
        keys = ("bpp", "psnr", "psnr-unrounded", "ms-ssim-db")
        lines = [(n, *(f"{v[k]:.6f}" if k in v else "" for k in keys)) for n, v in found.items()]
        parts += [
            "Its `eval.py --real` as a program, and ours with the same flags, means over the images (its PSNR is that "
            "of the unrounded picture):",
            table(("eval.py", *keys), lines),
        ]
    return section("Bundles in the published code", result, *parts)


def cluster_cost(result: dict[str, Any]) -> str:
    from benchmarks.cluster_cost import curve_table
    from benchmarks.cluster_cost import table as costs

    origin = f"Arithmetic on step times, not a measurement: `{result['command']}`"
    curve = ["### A whole curve by both recipes", curve_table(result)]
    return "\n\n".join(["## What the published recipe costs on a cluster", origin, costs(result), *curve])


def linear_bound(result: dict[str, Any]) -> str:
    rows = [[m, f"{psnr:.2f}"] for m, psnr in result["psnr"].items()]
    note = "PSNR of Kodak when blocks of 16x16 keep M principal components, unquantised."
    return section("What a linear transform would reach", result, note, table(["channels M", "PSNR, dB"], rows))


def optimizers(result: dict[str, Any]) -> str:
    s, found = result["settings"], result["compared"]
    losses = [
        (
            name,
            rate,
            *(_reached(points, s["quality"]) for points in seeds.values()),
        )
        for name, rates in result["runs"].items()
        for rate, seeds in sorted(rates.items(), key=lambda item: float(item[0]))
    ]
    most = max(len(row) for row in losses) - 2
    losses = [(*row, *[""] * (most + 2 - len(row))) for row in losses]
    titles = ("optimiser", "learning rate", *(f"seed {seed}: loss (steps)" for seed in found["seeds"]))
    reached = [
        (
            seed,
            f"{r['loss']:.3f}",
            *(("never", "", "", "") if r["steps"] is None else (r["steps"], *(_percent(r[key]) for key in _SHARES))),
        )
        for seed, r in found["seeds"].items()
    ]
    reached.append(("**median**", "", "", *(f"**{_percent(found['median'][key])}**" for key in _SHARES)))
    adam_steps = next(iter(found["seeds"].values()))["adam_steps"]
    heads = ("seed", f"Adam's least loss in {adam_steps:,} steps", "Muon has it at step", "of its steps")
    heads += ("of its processor time", f"of its wall-clock time, {result['speed_threads']} threads")
    costs = [
        (
            name,
            f"{found['rates'][name]:g}",
            f"{speed['ms']:.0f} ({speed['ratio']:.2f}x)",
            f"{result['memory'][name]['peak_mib']:.0f}",
            f"{result['memory'][name]['state_mib']:.1f}",
        )
        for name, speed in result["speed"].items()
    ]
    titles_of_costs = ("optimiser", "learning rate", "ms a step", "peak MiB", "MiB of its state")
    text = (
        f"The model of `configs/{s['config']}`, q{s['quality']}, {s['precision']}, batch {s['batch']}, crop "
        f"{s['crop']}; averaged weights on {s['heldout']} held-out photographs (the {s['val_crop']} pixels square in "
        f"their middle). Clock: {result['clock']}. ms: median of turns on {result['speed_threads']} threads, and the "
        "median ratio of the turns. The target is 35 % of the wall-clock time."
    )
    return section(
        "Adam and Muon", result, text, table(heads, reached), table(titles_of_costs, costs), table(titles, losses)
    )


_SHARES = ("of_steps", "of_seconds", "of_wall_clock")


def _percent(share: float | None) -> str:
    return "never" if share is None else f"{100 * share:.1f} %"


def _reached(points: list[dict[str, Any]], quality: int) -> str:
    """Where a run ended."""
    return f"{points[-1]['heldout'][str(quality)]['loss']:.3f} ({points[-1]['step']:,})"


def rates(result: dict[str, Any]) -> str:
    from benchmarks.rates import saved

    s = result["settings"]
    low, high = s["quality"]
    rungs = [str(rung) for rung in range(low, high + 1)]
    rows = [
        (
            f"{row['steps']:,}",
            f"{row['steps_of_each']:,}",
            f"{row['steps_of_each'] * len(rungs):,}",
            saved(row),
            "" if row["bd_psnr"] is None else f"{row['bd_psnr']:+.2f} dB",
            *(f"{100 * row['loss'][rung]:+.1f} %" for rung in rungs),
        )
        for question in ("shared", "apart")
        for row in result[question]
    ]
    titles = ("steps of the one model", "of each single one", "together", "BD-rate of the one", "PSNR at equal rate")
    values = [
        (f"{name}, {steps:,} steps", *(f"{m['loss']:.3f} ({m['bpp']:.3f}, {m['psnr']:.2f})" for m in ladder.values()))
        for name, steps, ladder in _ladders(result)
    ]
    text = (
        f"The model of `configs/{s['config']}`, Muon at {s['lr']:g}, seed {s['seed']}, {s['precision']}, batch "
        f"{s['batch']}, crop {s['crop']}; averaged weights on {s['heldout']} held-out photographs, estimated rate. "
        "Negative: the one model is better. *Beyond*: even its lowest rung is better than the highest single one, and "
        "needs so many bits less. The target is -15 % where the single ones share its steps."
    )
    return section(
        "One model for several rates",
        result,
        text,
        table((*titles, *(f"loss, q{rung}" for rung in rungs)), rows),
        table(("loss (bpp, PSNR)", *(f"q{rung}" for rung in rungs)), values),
    )


def _ladders(result: dict[str, Any]) -> list[tuple[str, int, dict[str, dict[str, float]]]]:
    """Every ladder of the rows once: (whose, steps, rungs)."""
    found = {}
    for row in (*result["shared"], *result["apart"]):
        found["single ones", row["steps_of_each"]] = row["singles"]
        found["the one model", row["steps"]] = row["one"]
    return [(name, steps, ladder) for (name, steps), ladder in sorted(found.items())]


def optimizer_launches(result: dict[str, Any]) -> str:
    muon, adam = result["muon"], result["adam"]
    rows = [
        ["kernels that a step of the optimiser launches", f"{muon['launches']:,}", adam["launches"]],
        ["operations of its products, GFLOP", f"{muon['gflops']:.0f}", 0],
        ["of those of the step, products and convolutions alone", f"{100 * muon['share']:.0f} %", "0 %"],
    ]
    note = f"{result['model']} model, batch {result['batch']}, crop {result['crop']}; forward and backward pass "
    note += f"{result['model_gflops']:,.0f} GFLOP; {muon['matrices']} matrices of {muon['shapes']} shapes."
    origin = f"Counted with fake tensors, torch {result['torch']}: `{result['command']}`"
    title = "What an optimiser's step asks of a GPU"
    return "\n\n".join([f"## {title}", origin, note, table(["", "muon", "adam"], rows)])


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "biwkv": biwkv,
    "block": block,
    "train_step": train_step,
    "profile_step": profile,
    "checkpoint": checkpoint,
    "decode_matrix": decode_matrix,
    "decode_costs": decode_costs,
    "codec_c": codec,  # codec_cpu, codec_cuda, not codec_memory
    "codec_memory": codec_memory,
    "sharding": sharding,
    "loader": loader,
    "sample_order": sample_order,
    "remote_shards": remote_shards,
    "backends": backends,
    "parity": parity,
    "precision": precision,
    "kernel_resources": resources,
    "published_bundle": published_bundle,
    "faults": faults,
    "fuzz_codec": fuzz_codec,
    "fuzz_header": fuzz_header,
    "linear_bound": linear_bound,
    "optimizers": optimizers,
    "rates": rates,
    "optimizer_launches": optimizer_launches,
    "cluster_cost": cluster_cost,
}


def main() -> None:
    from lalic.files import write_text

    parts = [HEAD.rstrip()]
    for name, make in SECTIONS.items():
        for path in sorted(RESULTS.glob(f"{name}*.json")):
            parts.append(make(json.loads(path.read_text())))
    write_text(ROOT / "benchmarks" / "README.md", "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
