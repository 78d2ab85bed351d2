"""Mutation of the GPU kernels: what the tests would not see, if someone broke it.

ptx.py lists changes of a kernel's PTX (barriers, commits, waits, fences); source.py those of Triton kernels'
source (the comparisons and masks), cuda_source.py those of CUDA kernels' (the comparisons), which cuda.py
compiles; points.py runs an op's cases, job.py tries each change on them, report.py tells.
"""
