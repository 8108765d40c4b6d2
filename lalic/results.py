"""Result files, whoever wrote them, and the curves to compare: measured, or published and called by name.

What is understood, with one list entry for each operating point:

- `lalic.eval` and the published evaluation code: `results` with `bpp`, `psnr`, and `ms-ssim-db` or `ms-ssim`;
- CompressAI: `results` with `bpp`, `psnr-rgb`, `ms-ssim-rgb`;
- `lalic anchors`: no `results`, but a list `anchors` of curves (also beside `results`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from lalic.curve import Curve, curves_of
from lalic.errors import LalicError
from lalic.metrics import decibels
from lalic.published import DATASETS, dataset_of, published

QUALITY_NAMES = {"psnr": "PSNR", "ms-ssim-db": "MS-SSIM"}
"""What people call the qualities of lalic.curve.METRICS."""

Result = dict[str, Any]

_BEYOND = 1e6
"""No rate in bits per pixel and no quality in dB is larger; arithmetic with what is may overflow."""


def read_result(path: str | Path) -> Result:
    """The JSON object in a result file; LalicError where it is none, or holds no curve."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LalicError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise LalicError(f"{path} is not a result file: it is not JSON") from error
    if not isinstance(data, dict) or not (isinstance(data.get("results"), dict) or data.get("anchors")):
        raise LalicError(f"{path} is not a result file: it has no lists results.bpp and results.psnr")
    return data


def read_curve(path: str | Path, label: str | None = None) -> Curve:
    """The curve in a result file of `lalic.eval`, of the published code, or of CompressAI."""
    return curve_of(read_result(path), path, label)


def curve_of(result: Mapping[str, Any], source: str | Path, label: str | None = None) -> Curve:
    """The curve of a result's own codec; `source` is what messages, and a nameless curve, are called after."""
    results = result.get("results")
    if not isinstance(results, Mapping):
        raise LalicError(f"{source} is not a result file: it has no lists results.bpp and results.psnr")
    bpp, psnr = results.get("bpp"), results.get("psnr", results.get("psnr-rgb"))
    if not isinstance(bpp, list) or not isinstance(psnr, list):
        raise LalicError(f"{source} is not a result file: it has no lists results.bpp and results.psnr")
    if not bpp or len(bpp) != len(psnr):
        raise LalicError(f"{source} has {len(bpp)} rates and {len(psnr)} PSNR values: it is not a curve")
    try:
        plain = [_number(v) for v in results.get("ms-ssim", results.get("ms-ssim-rgb")) or []]
        in_db = results.get("ms-ssim-db")
        similarity = [decibels(v) for v in plain] if in_db is None else [_number(v) for v in in_db]
        rates = [float(v) for v in map(_number, bpp) if v is not None]
        curve = Curve(
            label=label or str(result.get("name") or PurePath(source).stem),
            bpp=rates,
            psnr=[_number(v) for v in psnr],
            ms_ssim_db=[v if v is None or math.isfinite(v) else None for v in similarity],
            ms_ssim=plain,
            points=_qualities(result, len(rates)),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise LalicError(f"{source} is not a result file: a rate or a quality in it is not a number") from error
    if len(rates) != len(bpp) or min(rates) <= 0 or max(rates) > _BEYOND:
        raise LalicError(f"{source} has a rate that is not a positive number of bits per pixel: it is not a curve")
    return curve


def _qualities(result: Mapping[str, Any], count: int) -> list[float]:
    """The quality at each of `count` points, where a result is of weights of several rates; else []."""
    models = result.get("models")
    told = [m.get("q") for m in models if isinstance(m, Mapping)] if isinstance(models, list) else []
    numbers = [float(q) for q in told if isinstance(q, int | float) and not isinstance(q, bool) and math.isfinite(q)]
    return numbers if len(numbers) == len(told) == count else []


def _number(value: Any) -> float | None:
    """A finite number; None for null and for infinity, which stand for "identical" and "not defined"."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    if math.isfinite(value) and abs(value) > _BEYOND:
        raise ValueError(value)
    return float(value) if math.isfinite(value) else None


def dataset_of_result(result: Mapping[str, Any]) -> str | None:
    """Which test set with published points the images of a result are; None when that cannot be said."""
    if result.get("dataset") in DATASETS:
        return str(result["dataset"])
    files = [r["file"] for r in records_of(result)]
    folder = _of_images(result).get("folder")
    return dataset_of(list(dict.fromkeys(files))) if files else dataset_of(str(folder)) if folder else None


def records_of(result: Mapping[str, Any]) -> list[Result]:
    """The records of single images that name their file; results of other programs have none."""
    records = result.get("records")
    if not isinstance(records, list):
        return []
    return [r for r in records if isinstance(r, dict) and isinstance(r.get("file"), str) and r["file"]]


def folder_of_images(result: Mapping[str, Any]) -> str | None:
    """The folder of images that a result names, as it was written where the result was made."""
    folder = _of_images(result).get("folder")
    return folder if isinstance(folder, str) else None


def _of_images(result: Mapping[str, Any]) -> Mapping[str, Any]:
    images = result.get("images")
    return images if isinstance(images, Mapping) else {}


class Collection:
    """Result files and published names as a command line gives them, resolved to curves.

    A word that is the path of a file is read; any other is looked up among the curves published for `dataset`, which
    by default is the test set of the first result file that is recognised.

    Args:
        words: files and names of the curves to judge.
        anchors: those to compare with; None for every curve that came with the results or is published.
        labels: what to call the curves of `words`, one for each; empty: their own names.
    """

    def __init__(
        self,
        words: Sequence[str],
        anchors: Sequence[str] | None = None,
        dataset: str | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        if labels and len(labels) != len(words):
            raise LalicError(f"{len(words)} curves but {len(labels)} labels: give one for each")
        asked = [*words, *(anchors or ())]
        self.results = {word: read_result(word) for word in asked if Path(word).exists()}
        found = (dataset_of_result(result) for result in self.results.values())
        self.dataset = dataset or next((d for d in found if d), None)
        self.words, self.anchors = list(words), anchors
        self._labels = dict(zip(words, labels, strict=True)) if labels else {}
        names = Counter(curve_of(r, w).label for w, r in self.results.items() if "results" in r)
        for word, result in self.results.items():
            if "results" in result and word not in self._labels:
                name = curve_of(result, word).label
                self._labels[word] = name if names[name] == 1 else f"{name} ({PurePath(word).stem})"

    def tests(self, metric: str) -> list[Curve]:
        """The curves to judge on `metric`, each once, with labels of their own."""
        return distinct(curve for word in self.words for curve in self._find(word, metric))

    def others(self, metric: str) -> list[Curve]:
        """The curves to compare with on `metric`, without those of `tests`."""
        tests = self.tests(metric)
        if self.anchors is not None:
            curves = [curve for word in self.anchors for curve in self._find(word, metric)]
        else:
            curves = published(self.dataset, metric) if self.dataset else []
            for word, result in self.results.items():
                curves += [c for c in curves_of(result, word) if not (self.dataset and c.source == "published")]
        return distinct([*tests, *curves])[len(tests) :]

    def _find(self, word: str, metric: str) -> list[Curve]:
        if word in self.results:
            result = self.results[word]
            if "results" not in result:
                return curves_of(result, word)
            return [curve_of(result, word, self._labels[word])]
        if not self.dataset:
            raise LalicError(
                f"{word}: no such file. To take a published curve of that name, say of which test set: --dataset "
                f"{', '.join(DATASETS)}"
            )
        named: dict[str, list[Curve]] = {}
        for curve in published(self.dataset):
            named.setdefault(curve.name, []).append(curve)
        if word.lower() not in named:
            raise LalicError(f"{word} is neither a file nor a curve published for {self.dataset} ({', '.join(named)})")
        curves = named[word.lower()]
        # Where it is not published on this metric it stays, and the table says so.
        chosen = next((curve for curve in curves if curve.has(metric)), curves[0])
        return [replace(chosen, label=self._labels.get(word, chosen.label))]


def distinct(curves: Iterable[Curve]) -> list[Curve]:
    """The curves without repetitions, and with a number behind a label that stands for several."""
    out: list[Curve] = []
    for curve in curves:
        if curve in out:
            continue
        # A codec may have one curve for each quality, from different runs.
        taken = {o.label for o in out if not (curve.metrics and o.metrics and set(curve.metrics).isdisjoint(o.metrics))}
        label, number = curve.label, 2
        while label in taken:
            label, number = f"{curve.label} ({number})", number + 1
        out.append(replace(curve, label=label))
    return out
