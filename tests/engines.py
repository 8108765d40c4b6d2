"""Training steps under every backend, in the processes that accelerate starts: the program of test_engines.py.

`accelerate launch ... tests/engines.py ORDERS.json` goes through a list of orders in every rank; the first one writes
what it saw to the order's file. The backend of an order is chosen as the launcher would, by the environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from checkout_root import ROOT
from torch import Tensor, nn

TINY: dict[str, Any] = {
    "N": 8, "dims": (8, 12, 16, 32, 16, 8), "depths": (1, 1, 1, 1), "groups": (4, 4, 8, 16)
}  # fmt: skip
MICRO_BATCHES = 4
"""Of one image each, over ranks and accumulation: the noise belongs to the micro-batch, so it is the same anywhere."""


def choose(backend: str) -> None:
    """Set what the launcher sets: DDP, ZeRO-1 or ZeRO-2."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(backend != "DDP").lower()
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = f"launch/deepspeed/zero{backend[-1]}.json"


def build(order: dict[str, Any]) -> Any:
    """The TrainStep of an order, from the start or from the state in the file `from`."""
    from lalic.config import LossSection, TrainSection
    from lalic.model import LALIC
    from lalic.training.distributed import start_processes
    from lalic.training.step import TrainStep

    choose(order["backend"])
    accumulation = MICRO_BATCHES // int(os.environ.get("WORLD_SIZE", 1))
    train = TrainSection(batch_size=4, cpu_threads=1, accumulation=accumulation, **order.get("train", {}))
    accelerator = start_processes(train)
    torch.manual_seed(0)
    quality = order.get("quality", 3)
    loss = LossSection(metric="mse", quality=tuple(quality) if isinstance(quality, list) else quality)
    model = LALIC(**TINY, rungs=loss.rungs)
    if model.rates is not None:
        model.rates.initialise(loss.lambdas)
    state = torch.load(order["from"], weights_only=True) if "from" in order else None
    if state:
        model.load_state_dict(state["model"])
    ours = TrainStep(accelerator, model, train, loss, 0, lag=0)
    if state:
        ours.load_state_dict(state["optimizer"])
    assert ours.engine.name == order["backend"]
    return ours


def pixels(seed: int) -> Tensor:
    """The global batch of a step, uint8 (4, 3, 64, 64)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(MICRO_BATCHES, 3, 4, 4, generator=generator)
    return (nn.functional.interpolate(coarse, 64, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def take(ours: Any, step: int) -> dict[str, float]:
    """One step; its values as means over the ranks."""
    rank, size = ours.accelerator.process_index, ours.accelerator.num_processes
    mine = [{"x": x, "bad": 0} for x in pixels(step).chunk(MICRO_BATCHES)[rank::size]]
    if (rungs := ours.loss.rungs) is not None:
        # Every rung in turn; a rank of two sees some of them alone.
        qualities = [torch.tensor([rungs[(step + i) % len(rungs)]]) for i in range(MICRO_BATCHES)]
        mine = [{**batch, "quality": q} for batch, q in zip(mine, qualities[rank::size], strict=True)]
    result = ours(mine, step=step, lr=3e-4)
    everywhere = gather_object([{k: float(v) for k, v in result.values.items()}])
    return {k: sum(values[k] for values in everywhere) / size for k in everywhere[0]}


def whole_state(ours: Any) -> dict[str, Any]:
    """As a checkpoint has it; complete on the first rank."""
    return {"model": ours.bare.state_dict(), "optimizer": ours.state_dict()}


def digests(ours: Any) -> list[str]:
    """Of the weights of every rank, and of both optimisers' state."""
    state = whole_state(ours)
    weights = hashlib.sha256()
    for value in state["model"].values():
        weights.update(value.contiguous().numpy().tobytes())
    optimizers = hashlib.sha256()
    for optimizer in state["optimizer"].values():
        for entry in optimizer["state"].values():
            for name in sorted(entry):
                optimizers.update(name.encode() + entry[name].contiguous().numpy().tobytes())
    return [*gather_object([weights.hexdigest()]), gather_object([optimizers.hexdigest()])[0]]


def broken_on_last_rank(ours: Any, where: str, step: int) -> tuple[list[str], list[str]]:
    """Digests before and after a step whose loss, or one gradient, is not finite on one rank alone."""
    import lalic.training.step as module

    last = ours.accelerator.process_index == ours.accelerator.num_processes - 1
    rate_distortion = module.rate_distortion
    hook = None
    if last and where == "loss":
        module.rate_distortion = lambda *a: {k: v * float("nan") for k, v in rate_distortion(*a).items()}
    elif last:
        hook = ours.main_parameters[-1].register_hook(lambda g: g + float("inf"))
    before = digests(ours)
    take(ours, step)
    after = digests(ours)
    module.rate_distortion = rate_distortion
    if hook is not None:
        hook.remove()
    return before, after


def obey(order: dict[str, Any]) -> dict[str, Any]:
    """The steps `first` to `last` of an order, and what else it asks for."""
    ours = build(order)
    seen: dict[str, Any] = {"values": [], "broken": {}}
    for step in range(order.get("first", 0), order["last"]):
        if step == order.get("save_at"):
            state = whole_state(ours)
            if ours.accelerator.is_main_process:
                torch.save(state, order["save_to"])
        for where in ("loss", "gradient") if step in order.get("broken", ()) else ():
            seen["broken"][f"{where} {step}"] = broken_on_last_rank(ours, where, step)
        seen["values"].append(take(ours, step))
    if "back_to" in order:
        # What a rollback does: another state into the same processes.
        ours.accelerator.wait_for_everyone()
        state = torch.load(order["back_to"], weights_only=True)
        ours.bare.load_state_dict(state["model"])
        ours.load_state_dict(state["optimizer"])
        seen["again"] = [take(ours, step) for step in range(order["back_step"], order["last"])]
    state = whole_state(ours)
    if ours.accelerator.is_main_process:
        torch.save({**seen, **state}, order["result"])
    return seen


def launch(
    folder: Path, processes: int, orders: list[dict[str, Any]], yaml: str = "deepspeed_zero1"
) -> dict[str, dict[str, Any]]:
    """Run orders on some processes; what became of each, by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    orders = [{**order, "result": str(folder / f"{order['name']}.pt")} for order in orders]
    file = folder / "orders.json"
    file.write_text(json.dumps(orders))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launcher += ["--config_file", str(ROOT / "launch" / "accelerate" / f"{yaml}.yaml")]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment.update(ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [*launcher, __file__, str(file)], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "built successfully" not in done.stdout  # DeepSpeed compiles nothing
    return {order["name"]: torch.load(order["result"], weights_only=True) for order in orders}


if __name__ == "__main__":
    for number, each in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        print(f"# {number} {each['name']}", flush=True)
        obey(each)
