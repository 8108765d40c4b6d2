"""Every variant of a checkpoint loads to the same model; what is none ends in one line."""

from __future__ import annotations

import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from lalic.errors import LalicError
from lalic.model import LALIC, fingerprint, load_weights, published_state_dict
from lalic.model.weights import deduplicate, infer_architecture

# N is the floor of some widths and can be read off a file only where it has an effect; 12 has one here.
TINY = {"N": 12, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 2, 1, 1), "groups": (4, 4, 8, 16)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return LALIC(**TINY).eval()


def _old_names(state):
    """Entropy-bottleneck parameters as CompressAI named them before 1.2.7."""
    for new, old in (("matrices.", "_matrix"), ("biases.", "_bias"), ("factors.", "_factor")):
        state = {n.replace(f"entropy_bottleneck.{new}", f"entropy_bottleneck.{old}"): t for n, t in state.items()}
    return state


def _updated(state):
    """Coding tables filled, as in files saved after `update()`."""
    model = LALIC.from_state_dict(state)
    model.update()
    return model.state_dict()


VARIANTS = {
    "plain": lambda s: s,
    "state_dict wrapper": lambda s: {"epoch": 3, "state_dict": s},
    "model_state_dict wrapper": lambda s: {"model_state_dict": s, "loss": 1.0},
    "DataParallel": lambda s: {f"module.{n}": t for n, t in s.items()},
    "wrapped DataParallel": lambda s: {"state_dict": {f"module.{n}": t for n, t in s.items()}},
    "old bottleneck names": _old_names,
    "after update()": _updated,
    "without derived kernels": lambda s: {n: t for n, t in s.items() if "reparam" not in n},
    "short names only": deduplicate,
    "long names only": lambda s: {n: t for n, t in s.items() if not n.startswith(("h_a.", "h_s."))},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_load(model, variant, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(VARIANTS[variant](published_state_dict(model)), path)
    loaded = load_weights(path)
    assert loaded.config == model.config
    want, have = published_state_dict(model), published_state_dict(loaded)
    assert want.keys() == have.keys()
    assert all(torch.equal(want[n], have[n]) for n in want)
    assert fingerprint(loaded) == fingerprint(model)


def test_variants_are_different_files(model):
    names = {k: tuple(v(published_state_dict(model))) for k, v in VARIANTS.items() if k != "after update()"}
    assert len(set(names.values())) == len(names)


def test_safetensors_and_bundle_folder(model, tmp_path):
    save_file(deduplicate(published_state_dict(model)), tmp_path / "model.safetensors")
    assert fingerprint(load_weights(tmp_path / "model.safetensors")) == fingerprint(model)
    assert fingerprint(load_weights(tmp_path)) == fingerprint(model)


@pytest.mark.parametrize(
    "architecture",
    [
        TINY,
        {"N": 128, "dims": (8, 8, 8, 24, 8, 8), "depths": (0, 1, 2, 0), "groups": (8, 16)},
        {"N": 4, "dims": (4, 8, 12, 200, 8, 4), "depths": (1, 0, 0, 2), "groups": (16, 16, 32, 64, 72)},
        {"N": 1, "dims": (4, 8, 12, 40, 8, 4), "depths": (1, 0, 0, 2), "groups": (40,)},
        {**TINY, "N": 9, "context_rate": 3, "aggregation_rate": 1},
        {**TINY, "N": 2, "context_rate": 1, "aggregation_rate": 5},
    ],
    ids=lambda a: f"N{a['N']}",
)
def test_architecture_is_inferred(architecture):
    state = LALIC(**architecture).state_dict()
    found = infer_architecture(state)
    rebuilt = LALIC(**found).state_dict()
    assert {n: t.shape for n, t in rebuilt.items()} == {n: t.shape for n, t in state.items()}
    assert {k: found[k] for k in ("dims", "depths", "groups")} == {
        k: list(architecture[k]) for k in ("dims", "depths", "groups")
    }
    assert found["context_rate"] == architecture.get("context_rate", 8)
    assert found["aggregation_rate"] == architecture.get("aggregation_rate", 2)


def test_full_size_architecture_is_inferred():
    model = LALIC()
    assert infer_architecture(model.state_dict()) == model.config


def test_published_layout_hides_what_the_mask_hides(model):
    drifted = LALIC.from_state_dict(model.state_dict())
    for k in range(4):
        conv = drifted.latent_codec.y.latent_codec[f"y{k}"].context_prediction
        with torch.no_grad():
            conv.weight.add_((1 - conv.mask) * 3)
    assert fingerprint(drifted) == fingerprint(model)


def test_fingerprint_sees_every_weight(model):
    state = model.state_dict()
    for name in ("g_a.0.bias", "h_s.1.att.decay", "latent_codec.hyper.entropy_bottleneck.quantiles"):
        changed = LALIC.from_state_dict(state)
        with torch.no_grad():
            dict(changed.named_parameters(remove_duplicate=False))[name].view(-1)[0] += 1e-3
        assert fingerprint(changed) != fingerprint(model), name


class _Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('this file ran code')",))


def _bad_files(tmp_path, model):
    state = published_state_dict(model)
    whole = tmp_path / "whole.pth"
    torch.save(state, whole)
    (tmp_path / "half.pth").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "garbage.pth").write_bytes(b"not a checkpoint at all" * 9)
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "page.pth").write_bytes(b"\n<!DOCTYPE html><html><body>Sign in</body></html>")
    (tmp_path / "page.safetensors").write_bytes(b"<html>Not found</html>")
    (tmp_path / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"state_dict": _Bomb()}))
    (tmp_path / "garbage.safetensors").write_bytes(b"\xff" * 64)
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({**state, "g_a.2.gamma1": torch.ones(5)}, tmp_path / "shape.pth")
    torch.save({n: t for n, t in state.items() if n != "g_s.0.bias"}, tmp_path / "missing.pth")
    torch.save({**state, "g_a.99.surprise": torch.ones(1)}, tmp_path / "unexpected.pth")


@pytest.mark.parametrize(
    "name, words",
    [
        ("absent.pth", "no such"),
        ("half.pth", "damaged"),
        ("garbage.pth", "damaged"),
        ("empty.pth", "is empty"),
        ("page.pth", "is a web page"),
        ("page.safetensors", "is a web page"),
        ("pointer.safetensors", "is a Git LFS pointer"),
        ("bomb.pth", "damaged or is not a weights file that can be read safely"),
        ("garbage.safetensors", "damaged"),
        ("linear.pth", "not a LALIC checkpoint"),
        ("list.pth", "not LALIC weights"),
        ("shape.pth", "another architecture"),
        ("missing.pth", "another architecture"),
        ("unexpected.pth", "another architecture"),
        ("", "not a release bundle"),
    ],
)
def test_what_is_no_checkpoint(name, words, model, tmp_path):
    _bad_files(tmp_path, model)
    with pytest.raises(LalicError, match=words) as error:
        load_weights(tmp_path / name)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_damaged_bytes_are_one_line(form, tmp_path):
    """The readers raise anything from IndexError to struct.error on them; each must come out as one LalicError."""
    state = {"g_a.0.weight": torch.rand(4, 3, 5, 5), "g_a.0.bias": torch.rand(4)}
    whole = tmp_path / f"whole.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(state, whole)
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=form == "zip")
    members = {}
    if form == "zip":
        with zipfile.ZipFile(whole) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    generator, harmed = random.Random(1), tmp_path / f"harmed{whole.suffix}"
    for _ in range(150):
        if form == "zip":  # the pickle inside, with a right CRC around it
            with zipfile.ZipFile(harmed, "w") as archive:
                for name, data in members.items():
                    archive.writestr(name, _flip(data, generator) if name.endswith("data.pkl") else data)
        else:
            harmed.write_bytes(_flip(whole.read_bytes(), generator, 900))
        with pytest.raises(LalicError) as error:
            load_weights(harmed)
        assert "\n" not in str(error.value)


def _flip(data, generator, most=None):
    data = bytearray(data)
    for _ in range(generator.choice([1, 2, 5])):
        data[generator.randrange(min(len(data), most or len(data)))] = generator.randrange(256)
    return bytes(data)
