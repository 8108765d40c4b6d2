"""What a release tells of its training: data, time, machine and where its weights came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_export import model, run_folder, tiny_model, weights_of  # noqa: F401 -- fixtures among them
from test_train import config_path, finished, own_process_state, run  # noqa: F401 -- fixtures among them

from lalic.export import main
from lalic.release import write_bundle
from lalic.release_training import seconds_of_steps, started_from, training_facts
from lalic.training import checkpoint
from lalic.training.events import read_events

# ruff: noqa: F811 -- fixtures are arguments of the same name


def write_lines(path: Path, *entries: Any) -> None:
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))


def step_line(step: int, seconds: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "step_seconds": seconds}


class TestSeconds:
    def test_means_over_the_steps_since_the_line_before(self, tmp_path: Path) -> None:
        log = tmp_path / "log.jsonl"
        write_lines(log, step_line(100, 0.5), {"kind": "validation", "step": 100}, step_line(150, 2), step_line(250, 1))
        assert seconds_of_steps(log, 250) == 100 * 0.5 + 50 * 2 + 100 * 1
        assert seconds_of_steps(log, 200) == 150, "not those behind the checkpoint"

    @pytest.mark.parametrize("line", ["", "{", "[]", "3", '{"kind": "train"}', '{"kind": "train", "step": "x"}'])
    def test_lines_that_are_none(self, line: str, tmp_path: Path) -> None:
        write_lines(tmp_path / "log.jsonl", step_line(10, 0.5), line, step_line(20, 0.5))
        assert seconds_of_steps(tmp_path / "log.jsonl", 20) == 10

    def test_no_log(self, tmp_path: Path) -> None:
        assert seconds_of_steps(tmp_path / "log.jsonl", 20) == 0


class TestStart:
    def test_of_a_bundle(self, tmp_path: Path) -> None:
        bundle = write_bundle(weights_of(tiny_model()), tmp_path)
        assert started_from("https://user:secret@host/x?key=1", bundle) == {"name": "lalic-mse-q3", "step": 1000}

    def test_of_a_checkpoint(self, run_folder: Path) -> None:
        place = run_folder / "checkpoints" / "step-00000500"
        assert started_from(str(run_folder), place) == {"name": "demo", "step": 500}

    @pytest.mark.parametrize("place", ["old/w.pth", "w.pth.tar", "https://u:p@host/a/w.safetensors?k=v#sha256=00"])
    def test_of_a_file(self, place: str, tmp_path: Path) -> None:
        assert started_from(place, tmp_path / "nowhere") == {"name": "w", "step": None}


class TestFacts:
    CONFIG = (
        'data: {name: "BSDS500, 280\\n photographs"}\n'
        "train: {batch_size: 4, precision: fp32, init_from: ../runs/high}\n"
        "stages:\n- {steps: 2000, lr: 0.0001, crop: 128}\n"
    )

    def write(self, run: Path, config: str, **more: Any) -> Path:
        meta = {"step": 1000, "ema": {"decay": 0.99}, "world_size": 2, "device": "cpu", "cpu_threads": 1, **more}
        return checkpoint.save(run, 1000, tensors={}, texts={"config.yaml": config}, meta=meta)

    def test_all_of_them(self, tmp_path: Path) -> None:
        run = tmp_path / "low"
        place = self.write(run, self.CONFIG)
        write_lines(run / "log.jsonl", step_line(500, 2.0), step_line(1000, 1.0), step_line(1500, 9.0))
        write_lines(
            run / "events.jsonl",
            {"kind": "started", "step": 0, "init_from": {"name": "high", "step": 40000}},
            {"kind": "resumed", "step": 400, "changed": ["device NVIDIA H100 -> cpu", "torch 2.6 -> 2.7"]},
            {"kind": "resumed", "step": 1200, "changed": ["device cpu -> NVIDIA H100"]},
        )
        assert training_facts(place, averaged=True) == {
            "trained on": "BSDS500, 280 photographs",
            "steps": 1000,
            "batch size": 4,
            "crops seen": 4000,
            "started from": "high at step 40,000",
            "precision of the transforms": "fp32",
            "stages": "steps 2000, learning rate 0.0001, crop 128",
            "decay of the averaged weights": "0.99",
            "time of these steps": "0:25:00 h",
            "on": "cpu, 2 processes of 1 thread; NVIDIA H100 up to step 400",
        }

    def test_muon_with_warm_up_and_decay(self, tmp_path: Path) -> None:
        stage = "{steps: 9, lr: 0.003, crop: 64, warmup: 2, decay: cosine, lr_end: 0.0}"
        config = f"train: {{optimizer: muon}}\nstages:\n- {stage}\n"
        facts = training_facts(self.write(tmp_path / "low", config))
        assert facts["optimiser"] == "muon"
        assert facts["stages"] == "steps 9, learning rate 0.003 to 0.0 (cosine), crop 64, warm-up 2"

    def test_stages_that_are_not_done(self, tmp_path: Path) -> None:
        facts = training_facts(self.write(tmp_path / "low", self.CONFIG, total_steps=2000))
        assert facts["stages"].endswith("crop 128 (planned; these weights are of step 1,000 of 2,000)")

    def test_a_name_that_was_given_later(self, tmp_path: Path) -> None:
        place = self.write(tmp_path / "low", "data: {name: null}\n")
        assert "trained on" not in training_facts(place)
        (tmp_path / "low" / "config.yaml").write_text("data: {name: Kodak}\n")
        assert training_facts(place)["trained on"] == "Kodak"

    def test_runs_of_old(self, tmp_path: Path) -> None:
        """Without events that tell the start, it has its name at least; a machine that is not told is not guessed."""
        facts = training_facts(self.write(tmp_path / "low", self.CONFIG, device=None))
        assert facts["started from"] == "high" and not {"on", "time of these steps"} & facts.keys()

    @pytest.mark.parametrize("text", ["[", "3", "data: 3\ntrain: [1]\nstages: {}\n", ""])
    def test_configs_that_are_none(self, text: str, tmp_path: Path) -> None:
        assert training_facts(self.write(tmp_path / "low", text))["steps"] == 1000


def test_a_run_from_weights_tells_it_on_its_card(finished: Path, config_path: Path, tmp_path: Path) -> None:
    """From the first event of a real run to the card, and a name that is given when the run goes on."""
    again = tmp_path / "again"
    source = Path(shutil.copytree(finished, tmp_path / "first"))
    settings = [f"train.init_from={source}", "loss.quality=4"]
    assert run(config_path, again, *settings, "stages=[{steps: 2, lr: 1e-3, crop: 64}]") == 0
    begun = read_events(again)[0]
    assert (begun["kind"], begun["init_from"]) == ("started", {"name": "first", "step": 7})
    shutil.rmtree(source)
    (again / "DONE").unlink()
    settings += ["data.name=twelve pictures", "stages=[{steps: 3, lr: 1e-3, crop: 64}]"]
    assert run(config_path, again, *settings) == 0
    assert main(["--run", str(again), "--output", str(tmp_path / "release")]) == 0
    card = (tmp_path / "release" / "lalic-mse-q4" / "README.md").read_text()
    for line in ("trained on: twelve pictures", "steps: 3", "started from: first at step 7", "on: cpu, 1 process of 1"):
        assert f"- {line}" in card
    assert "- time of these steps: 0:0" in card
