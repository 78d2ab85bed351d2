"""Philox4x32-10 in plain PyTorch: the meaning of dropout in every fastlm op.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011
(https://doi.org/10.1145/2063384.2063405). One seed gives one mask on every backend.
"""

import torch

_WORD = 0xFFFFFFFF


def philox(key: torch.Tensor, counter: tuple) -> tuple:
    """The four 32-bit words of each block.

    key: int64 tensor that broadcasts with the counter. counter: four int64 tensors or ints holding 32-bit
    words. Returns: four int64 tensors with values in [0, 2^32).
    """
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps: all 64 bits of the product are there
        c0, c1, c2, c3 = ((b >> 32) & _WORD) ^ c1 ^ k0, b & _WORD, ((a >> 32) & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _scales(numbers: torch.Tensor, p: float, dtype: torch.dtype) -> torch.Tensor:
    keep = numbers >= int(p * 4294967296.0)
    scale = torch.tensor(1.0 / (1.0 - p), dtype=torch.float32).to(dtype)
    return torch.where(keep, scale.to(numbers.device), torch.zeros((), dtype=dtype, device=numbers.device))


def row_scales(seed: torch.Tensor, shape: torch.Size, p: float, dtype: torch.dtype) -> torch.Tensor:
    """What dropout multiplies a tensor of `shape` with: 0 or 1 / (1 - p), by (row, col) of its last axis.

    seed: int64 [1]. Counter (col >> 2, row low, row high, 0), lane col & 3. Returns: `shape`, `dtype`.
    """
    cols = shape[-1] if len(shape) else 1
    rows = 1
    for size in shape[:-1]:
        rows *= size
    row = torch.arange(rows, device=seed.device)[:, None]
    block = torch.arange((cols + 3) // 4, device=seed.device)[None, :]
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    words = philox(seed, (block + 0 * row, (row & _WORD) + 0 * block, (row >> 32) + 0 * block, zero))
    return _scales(torch.stack(words, -1).flatten(1)[:, :cols], p, dtype).reshape(shape)


def attention_scales(seed: torch.Tensor, shape: torch.Size, p: float, dtype: torch.dtype) -> torch.Tensor:
    """What dropout multiplies attention probabilities [B, H, Sq, Sk] with: 0 or 1 / (1 - p).

    seed: int64 [1]. Counter (j >> 2, i, b * H + h, 0), lane j & 3. Returns: `shape`, `dtype`.
    """
    batch, heads, queries, keys = shape
    device = seed.device
    block = torch.arange((keys + 3) // 4, device=device)
    query = torch.arange(queries, device=device)[:, None]
    head = torch.arange(batch * heads, device=device)[:, None, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox(seed, tuple(t + 0 * (head + query + block) for t in (block, query, head, zero)))
    return _scales(torch.stack(words, -1).flatten(-2)[..., :keys], p, dtype).reshape(shape)
