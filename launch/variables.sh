#!/bin/bash
# The environment variables that a run depends on. Nothing else is written down: it may be secret.
env | grep -E '^(SLURM|CUDA|NCCL|GLOO|LALIC|ACCELERATE|OMP|TORCH|DS)_[A-Za-z0-9_]*=' |
  grep -vE '^[A-Za-z0-9_]*(JWT|TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY)[A-Za-z0-9_]*=' |
  sed -E 's#://[^/@[:space:]]*@#://#g' | sort
