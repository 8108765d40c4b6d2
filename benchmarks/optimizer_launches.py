"""What a step of an optimiser asks of a GPU: kernels that are launched and operations of its products, counted.

    python benchmarks/optimizer_launches.py [--model full] [--batch 8] [--crop 256] [--output FILE.json]

Nothing is computed: the tensors are fake (torch's FakeTensorMode), so this takes seconds on any machine. An operator
counts as one launch; a `_foreach` or fused one as many as its lists need, and one each where the tensors do not lie in
memory alike; views as none. The operations are those of the products in bfloat16, beside those of the model's forward
and backward pass (torch.utils.flop_counter: convolutions and products, two operations for each multiply and add).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.stepping import MODELS, read_model_config  # noqa: E402 -- found from the checkout

TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36}
"""How many tensors a `_foreach` kernel takes, by the number of its lists (ATen's MultiTensorApply.cuh)."""

VIEWS = (
    "view",
    "expand",
    "permute",
    "transpose",
    "t",
    "unbind",
    "split",
    "slice",
    "select",
    "narrow",
    "detach",
    "alias",
)
VIEWS += ("unsqueeze", "_unsafe_view", "as_strided", "split_with_sizes", "unflatten", "empty", "empty_like", "device")
VIEWS += ("_record_function_enter_new", "_record_function_exit")
"""Operators that launch nothing."""


def launches_of(name: str, arguments: Sequence[Any]) -> int:
    """Kernels that the operator `name` of ATen launches."""
    lists = [a for a in arguments if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    if name.startswith("_fused_adam"):
        return math.ceil(len(lists[0]) / TENSORS_PER_LAUNCH[4])
    if name.startswith("_foreach"):
        alike = all(len({_strides(t) for t in same}) == 1 for same in zip(*lists, strict=False))
        return math.ceil(len(lists[0]) / TENSORS_PER_LAUNCH[len(lists)]) if alike else len(lists[0])
    return 0 if name in VIEWS else 1


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Of the sides that are longer than one."""
    return tuple(stride for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if side > 1)


class Launches(TorchDispatchMode):
    """Counts what runs under it: `by_name` {operator: launches}."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if count := launches_of(name, args):
            self.by_name[name] += count
        return func(*args, **(kwargs or {}))


def fake_parameters(model: nn.Module) -> FakeTensorMode:
    """Replace a model's parameters by fake ones, of the mode that is returned."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()))
    return mode


def count(model_name: str, batch: int, crop: int) -> dict[str, Any]:
    """Launches of Muon's and of Adam's step, and operations of Muon's products and of the model's passes."""
    from lalic.config import MuonSection
    from lalic.model import LALIC
    from lalic.training.engine import MainAdam
    from lalic.training.loss import rate_distortion
    from lalic.training.muon import Muon, find_matrices

    model = LALIC(**read_model_config(model_name).model.arguments()).train()
    mode = fake_parameters(model)
    result: dict[str, Any] = {"model": model_name, "batch": batch, "crop": crop}
    # The operations of the compiled kernels are not counted, those of the PyTorch form are.
    with mode, patch.dict(os.environ, LALIC_BACKEND="torch"):
        with FlopCounterMode(display=False) as passes:
            x = torch.rand(batch, 3, crop, crop)
            rate_distortion(model(x), x, "mse", 0.013)["loss"].backward()
        muon = Muon(model.main_parameters(), find_matrices(model, MuonSection().min_side), MuonSection(products="bf16"))
        for name, optimizer in (("muon", muon), ("adam", MainAdam(model.main_parameters()))):
            optimizer.set_lr(1e-3)
            optimizer.apply(torch.zeros(()))  # the first step of Adam makes its state
            with Launches() as counted:
                optimizer.apply(torch.zeros(()))
            result[name] = {"launches": counted.by_name.total(), "by_operator": dict(counted.by_name.most_common())}
    step = passes.get_total_flops()
    products = muon.orthogonalise.flops()
    result["muon"] |= {
        "matrices": sum(b.matrices for b in muon.batches),
        "shapes": len(muon.batches),
        "gflops": products / 1e9,
        "share": products / (products + step),
    }
    return {**result, "model_gflops": step / 1e9, "torch": torch.__version__}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the counts, write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="full", help="which config's model (%(default)s)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args(argv)
    result = count(arguments.model, arguments.batch, arguments.crop)
    muon = result["muon"]
    print(
        f"{result['model']}: forward and backward {result['model_gflops']:.0f} GFLOP, muon {muon['gflops']:.0f} GFLOP",
        end="",
    )
    print(f" ({100 * muon['share']:.1f} % of the step) in {muon['matrices']} matrices of {muon['shapes']} shapes")
    for name in ("muon", "adam"):
        listed = ", ".join(f"{k} {v}" for k, v in list(result[name]["by_operator"].items())[:8])
        print(f"{name}: {result[name]['launches']} launches ({listed})")
    if arguments.output:
        from lalic.files import write_json

        command = " ".join(["python benchmarks/optimizer_launches.py", *(sys.argv[1:] if argv is None else argv)])
        write_json(arguments.output, {"command": command, **result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
