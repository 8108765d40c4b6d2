"""LALIC at scale: train, release and use the Bi-RWKV learned image codec (CVPR 2025, arXiv 2502.05741).

Importing this package imports neither torch nor the kernels, so that the sharding tool and `--help` start at once.
"""

__version__ = "0.1.0"
