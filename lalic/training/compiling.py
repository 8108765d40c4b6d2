"""`train.compile`: the Bi-RWKV blocks through torch.compile.

All blocks share one compiled function, so blocks of one shape share one graph: a model has as many graphs as it has
block shapes, times the crops of its stages. Shapes are static. With sizes left open, the code for the second crop would
depend on having seen the first, and a run resumed in the second stage would compute other bits than one that was
never interrupted. What is compiled is the block's function, not the module, so names in state dicts stay as they
are. Only training uses it: validation sees images of any size, in evaluation mode, and takes the eager path.

A block that cannot become one graph is an error (fullgraph), and so is the recompile limit: never eager in secret.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from accelerate import Accelerator
from torch import Tensor
from torch._inductor.exc import CppCompileError
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from lalic.errors import LalicError
from lalic.model import LALIC
from lalic.model.blocks import BiRWKVBlock
from lalic.training.compile_cache import remove_half_written, remove_precompiled_headers
from lalic.training.distributed import together

logger = logging.getLogger("lalic.train")

BACKEND = "inductor"
"""torch.compile's backend."""

MOST_GRAPHS = 256
"""Far more block shapes than any model has times more crops than any run; torch's own limit is 8."""


class BlockCompiler:
    """The compiled form of `BiRWKVBlock._mix`; `graphs` counts what was compiled in this process."""

    def __init__(self, accelerator: Accelerator):
        """Raises SharedError on every rank when the machine of any cannot compile."""
        _configure()
        together(accelerator, lambda: _try_compiler(accelerator.device))
        self.graphs = 0
        self._compile_graph: Callable[..., Any] = torch._dynamo.lookup_backend(BACKEND)
        self._mix = torch.compile(BiRWKVBlock._mix, fullgraph=True, dynamic=False, backend=self._counted)

    def attach(self, model: LALIC) -> None:
        """Make the blocks of a model use the compiled form in training."""
        for module in model.modules():
            if isinstance(module, BiRWKVBlock):
                module.compiled_mix = self

    def __call__(self, block: BiRWKVBlock, x: Tensor) -> Tensor:
        """block._mix(x), x (B, C, H, W) -> (B, C, H, W); the graph for its backward is compiled when that runs."""
        before = self.graphs
        y = self._mix(block, x)
        if self.graphs > before:
            shape, dtype = "x".join(map(str, x.shape)), str(x.dtype).removeprefix("torch.")
            logger.info("compiled graph %d: Bi-RWKV block on %s %s", self.graphs, dtype, shape)
        return y

    def _counted(self, graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        self.graphs += 1
        return self._compile_graph(graph, inputs, **options)


@contextmanager
def compile_errors() -> Iterator[None]:
    """Turn what torch.compile raises into a LalicError of one line."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2])[:300] or type(error).__name__
        raise LalicError(
            f"train.compile=true: torch.compile failed ({reason}): mend that (LALIC_TRACEBACK=1 shows all of it), or "
            "set train.compile=false"
        ) from error


def _configure() -> None:
    """Settings of torch.compile; their names differ between versions."""
    dynamo, inductor = torch._dynamo.config, torch._inductor.config
    for name in ("recompile_limit", "cache_size_limit"):
        _set_where_known(dynamo, name, MOST_GRAPHS)
    for name in ("accumulated_recompile_limit", "accumulated_cache_size_limit"):
        _set_where_known(dynamo, name, 4 * MOST_GRAPHS)
    for name in ("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit"):
        _set_where_known(dynamo, name, True)
    # Otherwise kernels may be chosen by timing them, and another run may choose others.
    _set_where_known(inductor, "deterministic", True)


def _set_where_known(config: Any, name: str, value: Any) -> None:
    if hasattr(config, name):
        setattr(config, name, value)


def _try_compiler(device: torch.device) -> None:
    """A first compilation, in a cache without what a killed process left there."""
    for path in remove_half_written(Path(cache_dir())):
        logger.info("removed %s, which a killed process left half written", path)
    try:
        _compile_smallest_case(device, 16)
    except LalicError as error:
        headers = Path(default_cache_dir()) / "precompiled_headers"
        # A header that is not whole is found out by the compiler alone.
        if not _is_of_the_compiler(error) or not remove_precompiled_headers(headers):
            raise
        _compile_smallest_case(device, 17)  # torch has taken note that the other cannot be compiled


def _is_of_the_compiler(error: BaseException) -> bool:
    """Whether it comes from a C++ compiler that ran and refused the code."""
    reason = getattr(error, "inner_exception", None) or error.__cause__
    return isinstance(error, CppCompileError) or (reason is not None and _is_of_the_compiler(reason))


def _compile_smallest_case(device: torch.device, size: int) -> None:
    x = torch.ones(size, device=device, requires_grad=True)
    with compile_errors():
        torch.compile(_smallest_case, fullgraph=True, dynamic=False, backend=BACKEND)(x).backward()


def _smallest_case(x: Tensor) -> Tensor:
    return (x.sin() * x).sum()
