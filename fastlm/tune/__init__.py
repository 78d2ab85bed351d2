"""`fastlm tune`: which configurations of the Triton kernels are fastest on this GPU; only on request."""
