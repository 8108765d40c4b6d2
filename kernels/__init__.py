"""BiWKV kernels: sources, build and backends. Use the operator through `lalic.ops.biwkv`.

reference.py      the definition, and BiWKV in plain PyTorch (chunked.py: one exponent per chunk)
biwkv_scan.h      the algebra of the scan, for every machine
biwkv_cpu.cpp     the C++ kernel for CPUs (biwkv_strip.h, biwkv_wide.h, biwkv_layout.h, simd.h)
biwkv_cuda.cu     the CUDA kernels (biwkv_run.cuh: a thread, biwkv_block.cuh: a block, biwkv_kernels.cuh: what they
                  do, biwkv_launch.cuh: in which order); biwkv_cuda.cpp is the operator around them
builder.py        compiles on first use (cuda_builder.py: with nvcc); backend.py chooses; cli.py is `lalic kernels`
"""
