"""The checks of `lalic verify` on one bundle, from its list of files to a picture that its weights decode.

Nothing is loaded before its checksum was found right, and nothing is unpickled but tensors.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lalic.codec.bitstream import MAX_PIXELS
from lalic.codec.coder import cut, decode_image, encode_image, pad
from lalic.data.images import read_rgb
from lalic.errors import LalicError, for_terminal
from lalic.files import sha256_of
from lalic.ladder import loss_name
from lalic.metrics import bits_per_pixel, decibels, estimated_bits, ms_ssim, psnr, to_rgb8, to_tensor
from lalic.model import LALIC, fingerprint, published_state_dict
from lalic.model.compact import learned_names
from lalic.model.lalic import check_architecture
from lalic.model.weights import MERGED_KERNEL, deduplicate, infer_architecture, normalise, read_state_dict
from lalic.reference_picture import check_reference, middle_quality
from lalic.release_contents import check_finite
from lalic.release_files import (
    CARD,
    CONFIG,
    EVALUATION,
    FLOAT16,
    FLOAT32,
    METRICS,
    REFERENCE,
    SAFETENSORS,
    SUMS,
    read_config,
    read_json,
    read_sums,
    strangers,
)
from lalic.release_rates import quality_label

GAP_PERCENT = 25.0
"""Real rate against the estimated one, above which the entropy coder and the model do not fit each other. Trained
weights reach a few percent; those that are hardly trained code much by escape codes, unknown to the likelihoods."""
_GAP_BYTES = 128
"""The strings' ends, which weigh more in a small picture."""


@dataclass(frozen=True)
class Check:
    """One line of the report; `passed` is None for what was not checked."""

    name: str
    passed: bool | None
    text: str

    def __str__(self) -> str:
        word = {True: "ok", False: "FAILED", None: "--"}[self.passed]
        return f"  {word:<7} {self.name:<10} {self.text}"


def check_bundle(folder: Path, image: Path | None = None) -> Iterator[Check]:
    """All checks of a bundle, in order; what rests on a failed one is not done. `image` is coded as well."""
    bundle = _Bundle(folder, image)
    reason = ""
    for name, action in bundle.checks().items():
        if reason:
            yield Check(name, None, f"not checked: {reason}")
            continue
        try:
            text = action()
            yield Check(name, None if text.startswith("not checked") else True, text)
        except (LalicError, OSError) as error:
            yield Check(name, False, " ".join(str(error).split()))
            # A file too many does no harm to the others.
            reason = "" if name == "files" and bundle.sums else f"{name} failed"


class _Bundle:
    """What the checks find out one after the other; each returns a line's worth of words or raises LalicError."""

    def __init__(self, folder: Path, image: Path | None):
        self.folder, self.image = folder, image
        self.sums: dict[str, str] = {}
        self.config: dict[str, Any] = {}
        self.state: dict[str, Tensor] = {}
        self.model: LALIC | None = None

    def checks(self) -> Mapping[str, Callable[[], str]]:
        checks = {
            "files": self.files,
            "sums": self.checksums,
            "config": self.configuration,
            "weights": self.weights,
            "published": self.published,
            "reference": self.reference,
        }
        return checks if self.image is None else {**checks, "image": self.picture}

    def files(self) -> str:
        folder = self.folder
        if folder.is_symlink() or not folder.is_dir():
            raise LalicError(f"{folder} is not a folder")
        sums = read_sums(folder)
        self.sums = sums
        pth = [name for name in sums if name.endswith(".pth")]
        known = {CONFIG, SAFETENSORS, METRICS, CARD, EVALUATION, REFERENCE, *pth[:1]}
        if missing := [name for name in (CONFIG, SAFETENSORS, METRICS, CARD) if name not in sums]:
            raise LalicError(f"{SUMS} does not list {missing[0]}")
        if unknown := [name for name in sums if name not in known]:
            raise LalicError(f"{SUMS} lists {unknown[0]}, which belongs to no bundle")
        for name in (*sums, SUMS):
            if (folder / name).is_symlink():
                raise LalicError(f"{name} is a link: a bundle holds files (cp -rL copies what links lead to)")
            if not (folder / name).is_file():
                raise LalicError(f"{name} is missing")
        if extra := strangers(folder, sums):
            raise LalicError(f"{for_terminal(extra[0])} is not listed in {SUMS}")
        return f"{len(sums)} files, all of them listed in {SUMS} and no others"

    def checksums(self) -> str:
        for name, digest in self.sums.items():
            if not (self.folder / name).is_file():
                raise LalicError(f"{name} is missing")
            if sha256_of(self.folder / name) != digest:
                raise LalicError(f"{name} has not the SHA-256 of {SUMS}: it was changed or copied badly")
        return f"{len(self.sums)} SHA-256 sums agree"

    def configuration(self) -> str:
        config = read_config(self.folder)
        try:
            loss, model = config["loss"], check_architecture(**config["model"])
            quality, name = quality_label(loss, model.get("rungs")), loss_name(loss)
        except (KeyError, TypeError, ValueError) as error:
            raise LalicError(f"{CONFIG} does not say model and loss: {' '.join(str(error).split())}") from error
        except LalicError as error:
            raise LalicError(f"{CONFIG}: {error}") from error
        several = isinstance(quality, list)
        if config.get("quality") != quality:
            raise LalicError(f"{CONFIG}: quality is {config.get('quality')!r}, but {quality!r} by model and loss")
        if config.get("name") != name:
            what = f"the qualities {quality}" if several else f"lambda {float(loss['lambda']):g}"
            raise LalicError(f"{CONFIG} is named {config.get('name')!r}, but {loss['metric']}, {what} is {name}")
        precision, pth = config.get("precision", FLOAT32), [file for file in self.sums if file.endswith(".pth")]
        if precision not in (FLOAT32, FLOAT16):
            raise LalicError(f"{CONFIG}: there is no precision {precision!r}")
        if several and pth:
            raise LalicError(f"{pth[0]} does not belong into a bundle of several rates")
        if precision == FLOAT32 and not several and pth != [f"{name}.pth"]:
            raise LalicError(f"there is no {name}.pth")
        if precision == FLOAT16 and pth:
            raise LalicError(f"{pth[0]} does not belong into a bundle of float16 weights")
        for file, kind in ((METRICS, dict), (EVALUATION, list)):
            if file in self.sums and not isinstance(read_json(self.folder / file), kind):
                raise LalicError(f"{file} is not what it should be")
        self.config = config
        rungs = f", qualities {model['rungs'][0]} to {model['rungs'][-1]}" if several else ""
        return f"{name}: dims {model['dims']}, depths {model['depths']}, groups {model['groups']}{rungs}, {precision}"

    def weights(self) -> str:
        """The safetensors file: strictly the layout that the configuration tells, finite, with its fingerprint."""
        state = read_state_dict(self.folder / SAFETENSORS)
        precision = FLOAT16 if self.compact else FLOAT32
        dtype = getattr(torch, precision)
        if wrong := next((n for n, t in state.items() if t.is_floating_point() and t.dtype != dtype), None):
            raise LalicError(f"{SAFETENSORS}: {wrong} is {state[wrong].dtype}, not {precision}")
        check_finite(state, SAFETENSORS)
        told = check_architecture(**self.config["model"])
        try:
            found = infer_architecture(normalise(state))
            keys = [*found, *(key for key in told if key not in found)]
            if differing := [key for key in keys if key != "N" and found.get(key) != told.get(key)]:
                key = differing[0]
                raise LalicError(f"{SAFETENSORS} has {key} {found.get(key)}, but {CONFIG} says {told.get(key)}")
            model = LALIC(**told)
            model.load_state_dict(state)
        except (KeyError, ValueError, IndexError, AttributeError, TypeError, RuntimeError) as error:
            raise LalicError(f"{SAFETENSORS} does not fit {CONFIG}: {' '.join(str(error).split())[:300]}") from error
        self.model = model.eval()
        self.state = published_state_dict(self.model)
        if odd := sorted(set(state) ^ set(learned_names(model) if self.compact else deduplicate(self.state))):
            raise LalicError(f"{SAFETENSORS} has other tensors than a release: {odd[0]}")
        digest = fingerprint(self.model)
        if digest != self.config["fingerprint"]:
            raise LalicError(f"the weights have fingerprint {digest[:16]}..., not that of {CONFIG}")
        numbers = sum(t.numel() for t in self.model.parameters())
        return f"{len(state)} tensors, {numbers / 1e6:.2f} M parameters, finite, fingerprint {digest[:16]}"

    @property
    def compact(self) -> bool:
        return self.config.get("precision") == FLOAT16

    def published(self) -> str:
        """The .pth file: the published layout, name for name, with the numbers of the other file."""
        if self.model is not None and self.model.rates is not None:
            return "not checked: several rates have no .pth; `lalic export --quality` makes bundles of one rate"
        if self.compact:
            return "not checked: a compact bundle has no .pth; `lalic export --checkpoint` makes the full one"
        path = self.folder / f"{self.config['name']}.pth"
        _check_zip(path)
        found = read_state_dict(path)
        if not isinstance(found, Mapping) or list(found) != list(self.state):
            odd = next((n for n in {*found} ^ {*self.state}), "their order")
            raise LalicError(f"{path.name} has other tensors than the published layout: {odd}")
        for name, expected in self.state.items():
            tensor = found[name]
            if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                raise LalicError(f"{path.name}: {name} has another shape or type than the published layout")
            # The merged kernel is a sum of products, which other machines round otherwise.
            close = 1e-5 * float(expected.abs().max()) if name.endswith(MERGED_KERNEL) else 0.0
            if tensor.numel() and not float((tensor - expected).abs().max()) <= close:
                raise LalicError(f"{path.name}: {name} holds other numbers than {SAFETENSORS}")
        return f"{len(found)} tensors in the published layout, the same numbers in both files"

    def reference(self) -> str:
        if REFERENCE not in self.sums and "reference" not in self.config:
            return "not checked: this bundle has no reference picture; `lalic export` writes one"
        if REFERENCE not in self.sums or not isinstance(self.config.get("reference"), dict):
            raise LalicError(f"{REFERENCE} and what {CONFIG} says of it belong together, and one is missing")
        if (self.folder / REFERENCE).stat().st_size > 1 << 20:
            raise LalicError(f"{REFERENCE} is too large for its picture")
        assert self.model is not None
        data, told = (self.folder / REFERENCE).read_bytes(), self.config["reference"]
        return check_reference(self.model, told, data, self.config["fingerprint"], REFERENCE)

    def picture(self) -> str:
        """Code and decode the given image; its real rate must be that which the likelihoods promise."""
        assert self.model is not None and self.image is not None
        rgb = read_rgb(self.image, max_pixels=MAX_PIXELS)
        height, width = rgb.shape[:2]
        quality = middle_quality(self.model)
        coded = encode_image(self.model, rgb, quality=quality)
        decoded = decode_image(self.model, coded)
        with torch.inference_mode():
            out = self.model(pad(to_tensor(rgb)), quality)
        estimated = estimated_bits(out["likelihoods"]) / (height * width)
        bpp = bits_per_pixel(coded.num_bytes, height, width)
        gap = 100 * (bpp / max(estimated, 1e-9) - 1)
        whole = psnr(rgb, decoded)
        expected = psnr(rgb, to_rgb8(cut(out["x_hat"], height, width)))
        similarity = decibels(ms_ssim(rgb, decoded))
        at = "" if quality is None else f" at quality {quality:g}"
        text = (
            f"{for_terminal(self.image.name)}, {width} x {height}{at}: {bpp:.4f} bpp ({gap:+.2f} % from the estimate), "
            f"{whole:.2f} dB PSNR" + (f", {similarity:.2f} dB MS-SSIM" if similarity is not None else "")
        )
        if abs(coded.num_bytes - estimated * height * width / 8) > GAP_PERCENT / 100 * coded.num_bytes + _GAP_BYTES:
            raise LalicError(f"{text}: real and estimated rate are too far apart")
        if abs(whole - expected) > 0.1:
            raise LalicError(f"{text}: decoding gives another picture than the network ({expected:.2f} dB)")
        return text


def _check_zip(path: Path) -> None:
    """That a .pth file is torch's archive and does not unpack to more than it has bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise LalicError(f"{path.name} is not a file that torch.save writes: {error}") from error
    if any(m.compress_type != zipfile.ZIP_STORED for m in members):
        raise LalicError(f"{path.name} is packed, which torch.save does not do")
    if sum(m.file_size for m in members) > path.stat().st_size:
        raise LalicError(f"{path.name} claims to hold more bytes than it has")
