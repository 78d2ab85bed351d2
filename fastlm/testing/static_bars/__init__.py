"""What the Triton kernels compile to, per architecture: registers, spills, occupancy, accesses, main loops.

Every op is called, forward and backward, at sizes of real models; Triton's own ptxas makes the code, nothing
is run. The numbers hold for the ptxas in one release of Triton. python -m fastlm.testing.static_bars --help.
"""
