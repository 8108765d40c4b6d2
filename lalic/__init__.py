"""LALIC at scale: train, release and use the Bi-RWKV learned image codec (CVPR 2025, arXiv 2502.05741).

Importing this package imports neither torch nor the kernels, so that the sharding tool and `--help` start at once.
"""

import warnings

__version__ = "0.1.0"

# torch_geometric, which CompressAI imports, still calls torch.jit.script; newer torch versions announce that at
# every start of every program.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*deprecated", category=FutureWarning)
