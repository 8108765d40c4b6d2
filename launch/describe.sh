#!/bin/bash
# describe.sh CHECKOUT PYTHON: what a node is, and its kernels, which it builds. Run on every node.
root=$1 python=$2
echo "node $(hostname), task ${SLURM_NODEID:-0}, $(uname -sr), $(nproc) CPUs"
bash "$root/launch/variables.sh"
if command -v nvidia-smi > /dev/null; then
  nvidia-smi --query-gpu=index,name,driver_version,memory.total --format=csv || true
else
  echo "no nvidia-smi"
fi
"$python" - <<'END'
import platform
from importlib.metadata import PackageNotFoundError, version

print("python", platform.python_version())
for name in ("lalic", "torch", "compressai", "accelerate", "deepspeed", "numpy", "pillow"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "is not installed")
END
exec "$python" -m lalic.kernels.cli --build
