"""Mutation of the Triton kernels: what the tests would not see, if someone broke it.

ptx.py lists changes of a kernel's PTX (barriers, commits, waits, fences), source.py those of its source (the
comparisons and masks), points.py runs an op's cases, job.py tries each change on them, report.py tells.
"""
