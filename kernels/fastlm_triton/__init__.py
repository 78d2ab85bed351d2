"""fastlm's Triton kernels: one module per op. They import torch and triton only; fastlm registers them."""
