"""What proves kernels: the cases of every op, and the 2x rule that judges them."""
