"""The backends of the tests that go beyond an op's cases, many of which draw dozens of shapes.

Triton's kernels are left out: on the simulator each new shape may compile for seconds. tests/test_ops.py runs
every case on them, tests/test_triton_*.py what is theirs alone.
"""

BACKENDS = ("cpu", "reference")
