"""What a release adds to weights: evaluations, a card that hubs read, and the published layout in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_export import _bundle, bundle, model, run_folder, tiny_model, weights_of  # noqa: F401 -- fixtures among them

from lalic.codec.bitstream import parse
from lalic.errors import LalicError
from lalic.export import main
from lalic.files import sha256_of
from lalic.ladder import lambda_of
from lalic.model import LALIC, fingerprint, published_state_dict
from lalic.release import open_weights, write_bundle
from lalic.release_files import verify_bundle

# ruff: noqa: F811 -- fixtures are arguments of the same name


def write_result(path: Path, *models: LALIC, **changes: Any) -> Path:
    """As `lalic eval` writes it, for several models at once."""
    result = {
        "name": "LALIC",
        "description": "LALIC, coding: ans, cuda: False, float32, quality: ['3']",
        "results": {
            "bpp": [0.25 + i for i in range(len(models))],
            "psnr": [30.5 + i for i in range(len(models))],
            "ms-ssim": [0.97] * len(models),
            "ms-ssim-db": [None] * len(models),
            "enc_time": [1.5] * len(models),
        },
        "models": [{"quality": str(i), "fingerprint": fingerprint(m)} for i, m in enumerate(models)],
        "images": {"folder": "/data/kodak", "used": 24},
        "environment": {"torch": "2.6", "device": "cpu"},
    }
    path.write_text(json.dumps(result | changes))
    return path


class TestEvaluations:
    def test_into_bundle_and_card(self, model: LALIC, bundle: Path, tmp_path: Path) -> None:
        result = write_result(tmp_path / "kodak.json", tiny_model(1), model)
        output = str(bundle.parent)
        assert main(["--checkpoint", str(bundle), "--output", output, "--eval", str(result), "--force"]) == 0
        verify_bundle(bundle)
        (entry,) = json.loads((bundle / "evaluation.json").read_text())
        assert (entry["dataset"], entry["images"], entry["coding"]) == ("kodak", 24, "real")
        assert entry["metrics"] == {"bpp": 1.25, "psnr": 31.5, "ms-ssim": 0.97}
        text = (bundle / "README.md").read_text()
        assert "| PSNR (dB, RGB, 8-bit) | 31.5000 |" in text and "24 images of kodak" in text
        assert "psnr | 21.5" in text, "what the bundle knew before is kept"

    def test_a_part_of_a_test_set_is_not_told_as_the_whole(self, model: LALIC, bundle: Path, tmp_path: Path) -> None:
        result = write_result(tmp_path / "part.json", model, images={"folder": "/data/kodak", "used": 2})
        main(["--checkpoint", str(bundle), "--output", str(bundle.parent), "--eval", str(result), "--force"])
        text = (bundle / "README.md").read_text()
        assert "2 images of part-of-kodak" in text
        assert "type: kodak\n" not in text

    def test_stay_and_are_replaced(self, model: LALIC, bundle: Path, tmp_path: Path) -> None:
        kodak = write_result(tmp_path / "a.json", model)
        clic = write_result(tmp_path / "b.json", model, dataset="clic_professional_valid")
        again = write_result(tmp_path / "c.json", model, results={"bpp": [9.0]})
        for results in ([kodak], [clic, again], []):
            flags = ["--eval", *map(str, results)] if results else []
            main(["--checkpoint", str(bundle), "--output", str(bundle.parent), "--force", *flags])
        found = {e["dataset"]: e["metrics"]["bpp"] for e in json.loads((bundle / "evaluation.json").read_text())}
        assert found == {"kodak": 9.0, "clic_professional_valid": 0.25}

    def test_of_other_weights(self, bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        before = (bundle / "SHA256SUMS").read_text()
        result = write_result(tmp_path / "kodak.json", tiny_model(1))
        main(["--checkpoint", str(bundle), "--output", str(bundle.parent), "--eval", str(result)])
        assert "has no numbers of these weights" in caplog.text
        assert (bundle / "SHA256SUMS").read_text() == before

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"models": [{}]}', '{"models": 3}'])
    def test_what_is_no_result(self, text: str, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(LalicError, match=r"x\.json (cannot be read|is no result)"):
            main(["--checkpoint", str(bundle), "--output", str(bundle.parent), "--eval", str(tmp_path / "x.json")])

    def test_front_matter_is_what_a_hub_reads(self, model: LALIC, bundle: Path, tmp_path: Path) -> None:
        """Parsed by the hub's own client, which raises for a model-index that it does not understand."""
        hub = pytest.importorskip("huggingface_hub")
        result = str(write_result(tmp_path / "kodak.json", model))
        arguments = ["--checkpoint", str(bundle), "--output", str(bundle.parent), "--force", "--license", "cc-by-4.0"]
        main([*arguments, "--eval", result])
        data = hub.ModelCard.load(bundle / "README.md").data
        assert (data.license, data.library_name, data.pipeline_tag) == ("cc-by-4.0", "lalic", "image-to-image")
        assert {(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results} == {
            ("kodak", "bpp", 0.25),
            ("kodak", "psnr", 30.5),
            ("kodak", "ms-ssim", 0.97),
        }

    def test_a_hostile_name_stays_text(self, model: LALIC, bundle: Path, tmp_path: Path) -> None:
        result = write_result(tmp_path / "x.json", model, dataset="a\n---\n<script>|x: [")
        main(["--checkpoint", str(bundle), "--output", str(bundle.parent), "--force", "--eval", str(result)])
        text = (bundle / "README.md").read_text()
        assert "<script>" not in text
        matter = yaml.safe_load(text.split("---\n")[1])
        assert matter["model-index"][0]["results"][0]["dataset"]["name"] == "a_---__script__x___"


class TestWhatIsReleased:
    def test_weights_that_are_not_finite_are_not(self, tmp_path: Path) -> None:
        model = tiny_model()
        with torch.no_grad():
            model.g_s[0].bias[0] = float("nan")
        with pytest.raises(LalicError, match=r"not finite, in g_s\.0\.bias"):
            write_bundle(weights_of(model), tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_bundle_gives_the_same_bundle(self, model: LALIC, run_folder: Path, tmp_path: Path) -> None:
        """Exported again from itself, nothing is lost: metrics, step, training, kind."""
        main(["--run", str(run_folder), "--output", str(tmp_path / "a")])
        main(["--checkpoint", str(tmp_path / "a" / "lalic-mse-q4"), "--output", str(tmp_path / "b")])
        sums = [(tmp_path / x / "lalic-mse-q4" / "SHA256SUMS").read_text() for x in "ab"]
        assert sums[0] == sums[1]

    @pytest.mark.parametrize("names", ["new", "old"])
    def test_round_trip_with_the_published_layout(self, model: LALIC, names: str, tmp_path: Path) -> None:
        """A published file (either spelling of the bottleneck) -> bundle -> its .pth: the published file again."""
        spelt = published_state_dict(model)
        for new, old in (("matrices.", "_matrix"), ("biases.", "_bias"), ("factors.", "_factor")):
            if names == "old":
                spelt = {
                    n.replace(f"entropy_bottleneck.{new}", f"entropy_bottleneck.{old}"): t for n, t in spelt.items()
                }
        assert any("_matrix0" in n for n in spelt) is (names == "old")
        torch.save(spelt, tmp_path / "lalic-mse-q2.pth")
        main(["--checkpoint", str(tmp_path / "lalic-mse-q2.pth"), "--output", str(tmp_path / "release")])
        back = torch.load(tmp_path / "release" / "lalic-mse-q2" / "lalic-mse-q2.pth", weights_only=True)
        expected = published_state_dict(model)
        assert list(back) == list(expected) and all(torch.equal(back[n], expected[n]) for n in expected)
        fresh = LALIC(**model.config)
        torch.nn.Module.load_state_dict(fresh, back, strict=True)  # without our own reading of names
        assert fingerprint(fresh) == fingerprint(model)

    @pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
    @pytest.mark.parametrize("quality", range(1, 7))
    def test_every_rung_of_both_ladders(self, model: LALIC, metric: str, quality: int, tmp_path: Path) -> None:
        weights = weights_of(model, loss={"metric": metric, "lambda": lambda_of(metric, quality)})
        folder = write_bundle(weights, tmp_path)
        assert folder.name == f"lalic-{metric}-q{quality}" and (folder / f"{folder.name}.pth").exists()
        label = parse((folder / "reference.lalic").read_bytes(), "x").model_name
        assert label.startswith(f"{folder.name} (fingerprint {fingerprint(model)[:16]}")

    @pytest.mark.parametrize(
        ("told", "message"),
        [
            ({"N": 40}, "do not have the widths"),
            ({"dims": [8, 12, 16, 32, 16, 9]}, "another architecture"),
            ({"N": "8"}, r"does not know \(.*N"),
            ({"more": 1}, r"does not know \(.*more"),
        ],
    )
    def test_config_of_another_architecture(self, bundle: Path, told: dict[str, Any], message: str) -> None:
        config = json.loads((bundle / "config.json").read_text())
        config["model"] |= told
        (bundle / "config.json").write_text(json.dumps(config))
        sums = {f.name: sha256_of(f) for f in bundle.iterdir() if f.name != "SHA256SUMS"}
        (bundle / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        with pytest.raises(LalicError, match=message):
            open_weights(bundle)
