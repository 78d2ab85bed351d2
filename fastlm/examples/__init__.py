"""Plain PyTorch that knows nothing of fastlm: what the demo swaps fastlm into."""
