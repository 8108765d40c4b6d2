"""Pictures to compare: original, reconstruction and error of each image, with a slider and a choice of checkpoint.

Without JavaScript, and on paper, the three stand beside each other, and the choice of checkpoint works all the same
(radio buttons and style rules). page.js lays them over each other and adds the slider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lalic.report.html import number, size, slug, text
from lalic.report.pictures import Gallery, PictureOptions, Shown, heat_colours
from lalic.report.tables import number_cell
from lalic.results import Result


def section(
    gallery: Gallery,
    labels: Sequence[str],
    names: Mapping[str, str],
    records: Mapping[tuple[str, str], Result],
    options: PictureOptions,
) -> str:
    """The whole section of pictures, without its heading."""
    remarks = "".join(f'<p class="remark">{text(remark)}</p>' for remark in gallery.remarks)
    if not gallery.images:
        return remarks
    slugs = {label: slug(label, i) for i, label in enumerate(labels)}
    middle = labels[len(labels) // 2]
    viewers = "".join(_viewer(shown, labels, slugs, names, records) for shown in gallery.images)
    return (
        f"<p>{_introduction(gallery, options)}</p>{remarks}"
        f'<div class="pictures"><div class="bar">{_choice(labels, slugs, middle)}{_views(options)}</div>'
        f"{viewers}</div>"
    )


def style(labels: Sequence[str]) -> str:
    """The rules that show the pictures and numbers of the chosen checkpoint."""
    rules = []
    for i, label in enumerate(labels):
        name = slug(label, i)
        rules.append(f".pictures:has(#k-{name}:checked) .of-{name}{{display:block}}")
        rules.append(f".pictures:has(#k-{name}:checked) tr.row-{name}{{background:var(--chosen);font-weight:600}}")
    return "\n".join(rules)


def shortened(labels: Sequence[str]) -> list[str]:
    """Labels without the words that all of them begin with: `lalic-mse-q1`, `lalic-mse-q2` -> `q1`, `q2`."""
    words = [label.split("-") for label in labels]
    while len(words) > 1 and all(len(w) > 1 and w[1] for w in words) and len({w[0] for w in words}) == 1:
        words = [w[1:] for w in words]
    return ["-".join(w) for w in words]


def _introduction(gallery: Gallery, options: PictureOptions) -> str:
    if len(gallery.images) == gallery.of:
        said = [f"All {gallery.of} images." if gallery.of > 1 else "The one image."]
    else:
        said = [f"{len(gallery.images)} of {gallery.of} images, from the lowest PSNR to the highest."]
    if gallery.reduced:
        said.append(f"Pictures are reduced to {options.max_side} pixels on the longer side.")
    if options.lossless:
        said.append("Originals and reconstructions are embedded without loss.")
    else:
        said.append(
            f"For the sake of this file’s size they are embedded as WebP at quality {options.quality}, which is at "
            f"least {number(gallery.lowest_psnr, 1)} dB from the exact pixels; all numbers are of the exact pixels."
        )
    return " ".join(said)


def _choice(labels: Sequence[str], slugs: Mapping[str, str], middle: str) -> str:
    options = "".join(
        f'<label><input type="radio" name="checkpoint" id="k-{slugs[label]}"{" checked" if label == middle else ""}>'
        f"<span>{text(short)}</span></label>"
        for label, short in zip(labels, shortened(labels), strict=True)
    )
    return f'<fieldset class="choice"><legend>Checkpoint</legend><div class="segments">{options}</div></fieldset>'


def _views(options: PictureOptions) -> str:
    """What the original is compared with, and how large (without JavaScript everything is shown); the error's key."""
    colours = heat_colours()
    stops = ",".join("#" + bytes(colours[i]).hex() for i in range(0, 256, 15))
    top = number(255 / options.gain, 0)
    return (
        '<fieldset class="choice live"><legend>Compared with the original</legend><div class="segments">'
        '<label><input type="radio" name="view" id="view-picture" checked><span>Reconstruction</span></label>'
        '<label><input type="radio" name="view" id="view-error"><span>Error</span></label></div></fieldset>'
        '<fieldset class="choice live"><legend>Zoom</legend><div class="segments">'
        '<label><input type="radio" name="zoom" id="zoom-1" checked><span>1×</span></label>'
        '<label><input type="radio" name="zoom" id="zoom-2"><span>2×</span></label>'
        '<label><input type="radio" name="zoom" id="zoom-4"><span>4×</span></label></div></fieldset>'
        f'<div class="key"><span>Error × {options.gain}</span><span class="scale" style="background:linear-gradient('
        f'90deg,{stops})"></span><span>0 to {top}+ of 255</span></div>'
    )


def _viewer(
    shown: Shown,
    labels: Sequence[str],
    slugs: Mapping[str, str],
    names: Mapping[str, str],
    records: Mapping[tuple[str, str], Result],
) -> str:
    name = text(names[shown.file])
    width, height = shown.shown
    size_of = f'width="{width}" height="{height}" decoding="async"'
    panes = [
        f'<figure class="pane original"><img src="{shown.original}" alt="{name}, original" {size_of}>'
        "<figcaption>Original</figcaption></figure>"
    ]
    for kind, word in (("picture", "reconstruction"), ("error", "error map")):
        pictures = []
        for label in labels:
            version = shown.versions.get(label)
            if version is None:
                pictures.append(f'<p class="absent of of-{slugs[label]}">no reconstruction by {text(label)}</p>')
                continue
            url = version.reconstruction if kind == "picture" else version.error
            alt = f"{name}, {word} by {text(label)}"
            pictures.append(f'<img class="of of-{slugs[label]}" src="{url}" alt="{alt}" {size_of}>')
        caption = "Reconstruction" if kind == "picture" else "Error"
        panes.append(f'<figure class="pane {kind}">{"".join(pictures)}<figcaption>{caption}</figcaption></figure>')
    return (
        f'<article class="viewer" style="--w:{width};--h:{height}"><h3>{name} '
        f"<small>{shown.width} × {shown.height}</small></h3>"
        f'<div class="stage" data-name="{name}">{"".join(panes)}</div>'
        f"{_numbers(shown, labels, slugs, records)}</article>"
    )


def _numbers(
    shown: Shown, labels: Sequence[str], slugs: Mapping[str, str], records: Mapping[tuple[str, str], Result]
) -> str:
    """The rates and qualities of one image at every checkpoint; the chosen one is marked."""
    rows = []
    coded = any("bytes" in records.get((shown.file, label), {}) for label in labels)
    for label, short in zip(labels, shortened(labels), strict=True):
        record = records.get((shown.file, label), {})
        num_bytes = record.get("bytes")
        cells = [
            number(record.get("bpp"), 3),
            *([size(num_bytes) if isinstance(num_bytes, int) else "–"] if coded else []),
            number_cell(record.get("psnr"), "psnr"),
            number_cell(record.get("ms-ssim-db"), "ms-ssim-db"),
        ]
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr class="row-{slugs[label]}"><th scope="row">{text(short)}</th>{body}</tr>')
    names = ['<span class="hidden">Checkpoint</span>', "bpp", *(["Bytes"] if coded else []), "PSNR", "MS-SSIM"]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
