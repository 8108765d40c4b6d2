"""The config: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lalic import ladder
from lalic.config import RunConfig, config_text, read_config
from lalic.errors import LalicError
from lalic.training.run_folder import check_same_run
from lalic.training.typed_yaml import known_keys

BASE = """
loss: {metric: mse, quality: 3}
stages:
- {epochs: 40, lr: 1e-4, crop: 256, t_max: 16384}
- {epochs: 4, lr: 1.0e-5, crop: 512}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def refusal(path: Path, *settings: str) -> str:
    with pytest.raises(LalicError) as error:
        read_config(path, settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_values_arrive(base: Path) -> None:
    config = read_config(base, ["run.dir=runs/a=b", "stages.1.lr=3e-6", "data.workers=0", "train.clip=2"])
    assert config.folder == Path("runs/a=b")
    assert [stage.lr for stage in config.stages] == [1e-4, 3e-6]
    assert config.stages[0].tokens == 128 * 128
    assert config.data.workers == 0
    assert config.train.clip == 2.0 and isinstance(config.train.clip, float)
    assert config.loss.multiplier == ladder.MSE[3]
    assert config.model.arguments()["dims"] == (96, 144, 256, 320, 256, 192)


@pytest.mark.parametrize("metric", ["mse", "ms-ssim"])
@pytest.mark.parametrize("quality", range(1, 7))
def test_ladder(base: Path, metric: str, quality: int) -> None:
    config = read_config(base, [f"loss.metric={metric}", f"loss.quality={quality}"])
    published = {
        "mse": [0.0018, 0.0035, 0.0067, 0.0130, 0.0250, 0.0483],
        "ms-ssim": [2.40, 4.58, 8.73, 16.64, 31.73, 60.50],
    }
    assert config.loss.multiplier == published[metric][quality - 1]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("trian.batch_size=3", ["unknown key 'trian'", "'train'"]),
        ("train.bathc_size=3", ["unknown key 'train.bathc_size'", "'train.batch_size'"]),
        ("loss.lamda=0.1", ["unknown key 'loss.lamda'", "'loss.lambda'"]),
        ("batch_size=3", ["unknown key 'batch_size'", "'train.batch_size'"]),
        ("crop=256", ["unknown key 'crop'", "'stages.0.crop'"]),
        ("stages.0.learning=1", ["unknown key 'stages.0.learning'", "lr"]),
        ("stages.2.lr=1e-3", ["'stages.2.lr'", "0 to 1"]),
        ("run.dir.deep=3", ["run.dir"]),
        ("nonsense", ["key=value"]),
    ],
)
def test_unknown_key_names_the_nearest(base: Path, setting: str, words: list[str]) -> None:
    message = refusal(base, setting)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.batch_size=8.0", ["train.batch_size", "whole number", "8.0"]),
        ("train.batch_size=true", ["train.batch_size", "whole number", "true"]),
        ("train.batch_size=0", ["train.batch_size", "at least 1"]),
        ("train.clip=-1", ["train.clip", "0 (off)"]),
        ("train.clip=.nan", ["train.clip", "number"]),
        ("train.clip=.inf", ["train.clip", "number"]),
        ("train.clip=yes", ["train.clip", "number", "true"]),
        ("train.gradient_checkpointing=1", ["train.gradient_checkpointing", "true or false"]),
        ("train.precision=fp16", ["train.precision", "fp32 or bf16", "fp16"]),
        ("loss.metric=psnr", ["loss.metric", "mse or ms-ssim", "psnr"]),
        ("loss.quality=7", ["loss.quality", "1 to 6", "7"]),
        ("loss.lambda=-1", ["loss.lambda", "positive"]),
        ("stages.1.lr=0", ["stages.1.lr", "positive"]),
        ("stages.1.crop=300", ["stages.1.crop", "multiple of 64", "300"]),
        ("stages.1.epochs=0", ["stages.1.epochs", "at least 1"]),
        ("stages.1.warmup=-1", ["stages.1.warmup", "0 or more"]),
        ("stages.0={steps: 5, lr: 1e-3, crop: 64, warmup: 6}", ["stages.0.warmup", "at most the 5 steps"]),
        ("stages.1.lr_end=1e-6", ["stages.1.lr_end", "stages.1.decay=cosine or linear"]),
        ("stages.1.decay=cosine", ["stages.1.lr_end", "given with stages.1.decay=cosine", "null"]),
        ("stages.1.decay=step", ["stages.1.decay", "constant or cosine or linear"]),
        ("stages.0={steps: 5, lr: 1e-3, crop: 64, decay: linear, lr_end: 2e-3}", ["stages.0.lr_end", "0.001"]),
        ("stages.0={steps: 5, lr: 1e-3, crop: 64, decay: linear, lr_end: -1}", ["stages.0.lr_end", "between 0"]),
        ("train.optimizer=sgd", ["train.optimizer", "adam or muon"]),
        ("train.muon.momentum=0.9", ["train.muon is set", "train.optimizer is adam"]),
        ("train.muon.momentum=1", ["train.muon.momentum", "below 1"]),
        ("train.muon.scale=0", ["train.muon.scale", "positive"]),
        ("train.muon.rest_lr=-1", ["train.muon.rest_lr", "positive"]),
        ("train.muon.min_side=0", ["train.muon.min_side", "at least 1"]),
        ("train.muon.newton_schulz=0", ["train.muon.newton_schulz", "at least 1"]),
        ("train.muon.products=fp16", ["train.muon.products", "auto or fp32 or bf16"]),
        ("train.muon.nesterov=false", ["unknown key 'train.muon.nesterov'", "train.muon"]),
        ("stages=[]", ["stages", "at least one stage"]),
        ("stages=[{lr: 1e-3, crop: 64}]", ["stages.0.epochs", "stages.0.steps"]),
        ("stages=[{epochs: 1, crop: 64}]", ["stages.0.lr is missing"]),
        ("model.dims=[8, 8]", ["model.dims", "six"]),
        ("model.dims=[8, 8, 8, 32, 8, 8]", ["model.groups", "32"]),
        ("model.groups=[16, 16]", ["model.groups", "320"]),
        ("model.depths=2", ["model.depths", "list of whole numbers"]),
        ("data.max_bad=2", ["data.max_bad", "between 0 and 1"]),
        ("data.val_crop=100", ["data.val_crop", "multiple of 64"]),
        ("run.seed=-1", ["run.seed"]),
        ("checkpoint.keep=0", ["checkpoint.keep", "at least 1"]),
        ("train=[", ["train", "YAML"]),
    ],
)
def test_wrong_value_names_key_and_what_is_allowed(base: Path, setting: str, words: list[str]) -> None:
    message = refusal(base, setting)
    assert all(word in message for word in words), message


def test_crop_beyond_t_max_names_the_number_it_needs(base: Path) -> None:
    message = refusal(base, "stages.0.crop=320")
    assert "stages.0.crop" in message and "25600" in message and "16384" in message
    assert read_config(base, ["stages.0.crop=320", "stages.0.t_max=25600"]).stages[0].crop == 320
    assert refusal(base, "stages.1.t_max=65535").count("65536") == 1


def test_ms_ssim_needs_five_scales(base: Path) -> None:
    assert "stages.0.crop" in refusal(base, "loss.metric=ms-ssim", "stages.0.crop=128")
    assert "data.val_crop" in refusal(base, "loss.metric=ms-ssim", "data.val=x", "data.val_crop=128")
    assert read_config(base, ["loss.metric=ms-ssim", "stages.0.crop=192"]).stages[0].crop == 192


def test_one_of_quality_and_lambda(base: Path) -> None:
    config = read_config(base, ["loss.lambda=0.01"])
    assert config.loss.multiplier == 0.01 and config.loss.quality is None
    assert "exclude each other" in refusal(base, "loss.lambda=0.01", "loss.quality=2")
    assert "loss.quality" in refusal(base, "loss.quality=null")
    base.write_text(BASE.replace("quality: 3", "quality: 3, lambda: 0.1"))
    assert "exclude each other" in refusal(base)


def test_one_of_steps_and_epochs(base: Path) -> None:
    stage = read_config(base, ["stages.0.steps=10"]).stages[0]
    assert (stage.steps, stage.epochs) == (10, None)
    assert "stages.0" in refusal(base, "stages.0.steps=10", "stages.0.epochs=1")


def test_global_batch_must_divide(base: Path) -> None:
    assert "use 9" in refusal(base, "train.batch_size=8", "train.accumulation=3")
    train = read_config(base, ["train.batch_size=12", "train.accumulation=2"]).train
    assert [train.micro_batch(ranks) for ranks in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(LalicError, match=r"4 processes x train.accumulation 2.*use 16"):
        train.micro_batch(4)


def test_same_key_twice(base: Path) -> None:
    assert "given twice" in refusal(base, "run.seed=1", "run.seed=2")
    base.write_text(BASE + "loss: {metric: mse, quality: 4}\n")
    assert "'loss' stands twice" in refusal(base)


@pytest.mark.parametrize("text", ["", "- a\n", "loss: {quality: 3\n", "loss: 3\nstages: []\n", "\x00"])
def test_no_config_at_all(base: Path, text: str) -> None:
    base.write_text(text)
    refusal(base)


def test_missing_file(tmp_path: Path) -> None:
    assert "nowhere.yaml" in refusal(tmp_path / "nowhere.yaml")


def test_text_is_not_guessed_at(base: Path) -> None:
    config = read_config(base, ["run.dir=2024", "data.shards=1e3", "data.val="])
    assert (config.run.dir, config.data.shards, config.data.val) == ("2024", "1e3", None)


def test_written_config_reads_back(base: Path, tmp_path: Path) -> None:
    config = read_config(base, ["run.dir=x: y", "stages.0.steps=7", "model.groups=[20, 300]", "loss.lambda=1e-7"])
    path = tmp_path / "written.yaml"
    path.write_text(config_text(config))
    assert read_config(path) == config
    # Plain YAML readers see the same.
    assert yaml.safe_load(path.read_text())["loss"]["lambda"] == 1e-7


CONFIGS = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs(root: Path, name: str) -> None:
    config = read_config(root / "configs" / f"{name}.yaml")
    assert config.train.clip == 1.0
    assert config.train.aux_lr == (1e-2 if name == "demo" else 1e-3)  # the demo has too few steps for the recipe's


def test_lalic_is_the_published_recipe(root: Path) -> None:
    config = read_config(root / "configs" / "lalic.yaml")
    assert [(s.epochs, s.lr, s.crop) for s in config.stages] == [
        (40, 1e-4, 256),
        (4, 1e-5, 256),
        (4, 1e-5, 512),
    ]
    assert [s.t_max for s in config.stages] == [128 * 128, 128 * 128, 256 * 256]
    assert config.train.batch_size == 8 and config.train.precision == "fp32" and not config.data.flip
    assert config.model.depths == (2, 4, 6, 6)


def test_the_fast_recipe(root: Path) -> None:
    config, published = (read_config(root / "configs" / f"{name}.yaml") for name in ("lalic-fast", "lalic"))
    assert config.model == published.model
    assert config.loss.rungs == (1, 2, 3, 4, 5, 6) and config.loss.metric == "mse"
    assert config.train.optimizer == "muon" and config.train.ema is not None and config.train.precision == "bf16"
    assert config.stages[0].warmup > 0 and config.stages[-1].crop == 512
    # The learning rate goes on from stage to stage.
    assert config.stages[0].lr_end == config.stages[1].lr
    assert all(stage.decay == "cosine" for stage in config.stages)


def test_every_key_has_a_docstring() -> None:
    """A string stands below every field of every section."""
    source = (Path(__file__).parent.parent / "lalic" / "config.py").read_text()
    keys = {key.rsplit(".", 1)[-1] for key in known_keys(RunConfig) if "." in key}
    for key in keys - {"0"}:
        name = "lmbda" if key == "lambda" else key
        lines = source.splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith(f"    {name}: ")]
        assert starts, key
        for i in starts:
            following = "\n".join(lines[i + 1 : i + 3])
            assert '"""' in following, key


def test_reading_a_config_imports_no_torch(base: Path) -> None:
    code = f"import sys, lalic.config; lalic.config.read_config({str(base)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["run.seed=1"], ["run.seed"]),
        (["model.N=64"], ["model.N"]),
        (["train.batch_size=16", "data.window=3"], ["train.batch_size", "data.window"]),
        (["loss.quality=4"], ["loss.lambda"]),
        (["train.precision=bf16"], ["train.precision"]),
        (["stages.0.lr=1e-3"], ["stages.0.lr"]),
        (["stages.0.epochs=39"], ["stages.0.epochs"]),
        (["stages.1.warmup=2"], ["stages.1.warmup"]),
        (["train.optimizer=muon"], ["train.optimizer (adam -> muon)"]),
        (["train.optimizer=muon", "train.muon.momentum=0.9"], ["train.optimizer", "train.muon.momentum"]),
        (["stages.1.crop=256"], ["stages.1.crop"]),
        (["stages=[{epochs: 40, lr: 1e-4, crop: 256}]"], ["stages.1"]),
    ],
    ids=lambda value: ",".join(value),
)
def test_another_run_is_refused(base: Path, settings: list[str], named: list[str]) -> None:
    """In the second stage: what has been run must stay as it was."""
    with pytest.raises(LalicError) as error:
        check_same_run(read_config(base), read_config(base, settings), {"stage": 2})
    assert all(key in str(error.value) for key in named)


@pytest.mark.parametrize(
    "settings",
    [
        ["run.dir=elsewhere", "data.shards=elsewhere", "data.workers=9", "log.every=7"],
        ["checkpoint.every=3", "checkpoint.keep=9", "data.val=x", "validate.every=1"],
        ["train.accumulation=2", "train.gradient_checkpointing=true", "train.cpu_threads=3"],
        ["loss.lambda=0.0067"],
        ["stages.1.epochs=9"],
        ["stages.1.steps=9"],
        ["stages.1.t_max=70000"],
        [
            "stages=[{epochs: 40, lr: 1e-4, crop: 256}, {epochs: 4, lr: 1e-5, crop: 512}, "
            "{steps: 5, lr: 1e-6, crop: 512}]"
        ],
    ],
    ids=lambda value: ",".join(value)[:40],
)
def test_the_same_run_may_go_on(base: Path, settings: list[str]) -> None:
    check_same_run(read_config(base), read_config(base, settings), {"stage": 2})


def test_the_length_of_a_stage_that_decays_is_not_changed_under_way(base: Path) -> None:
    """Its past learning rates would have been others."""
    decay = "{{epochs: {}, lr: 1e-5, crop: 512, decay: cosine, lr_end: 0}}"
    old, new = (read_config(base, ["stages.1=" + decay.format(epochs)]) for epochs in (4, 9))
    with pytest.raises(LalicError, match=r"stages.1.epochs \(4 -> 9\)"):
        check_same_run(old, new, {"stage": 2})
    check_same_run(old, new, {"stage": 1})
