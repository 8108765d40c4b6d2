"""LALIC at scale: train, release and use the Bi-RWKV learned image codec (CVPR 2025, arXiv 2502.05741).

Importing this package imports neither torch nor the kernels, so that the sharding tool and `--help` start at once.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from lalic.model import LALIC

__version__ = "0.1.0"

# torch_geometric, which CompressAI imports, still calls torch.jit.script; newer torch versions announce that at
# every start of every program.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*deprecated", category=FutureWarning)


def load(weights: str | Path) -> LALIC:
    """A model in evaluation mode, ready to code pictures: `lalic.load("lalic-mse-q3")`.

    `weights` is a path, the name of a release or a URL (see lalic.fetch). Raises `lalic.errors.LalicError` in one line.
    """
    from lalic.release import open_weights

    model = open_weights(weights).model
    model.update()
    return model
