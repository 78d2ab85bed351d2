"""feed_forward: y = dropout(act(x @ w1.T + b1)) @ w2.T + b2; the products: _matmul.py.

Forward is two launches: the first writes z = x @ w1.T + b1, which backward keeps, and the dropped activation
beside it. Backward computes the activation again in the product that reads z anyway: dy @ w2, whose tiles
become dz = (dy @ w2) * act'(z) * dropout's factor before they are written, and leave db1's partial sums.
Bound by FLOPs: 2 rows hidden (in + out) forward, twice that backward.
Source: Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762, section 3.3.
"""

import torch

from ._matmul import activated_product, product, product_into_activation
from ._rows import dropout_of, given, output_like, parameter
from .bias_act import forward as bias_act


def _matrix_of(t: torch.Tensor) -> torch.Tensor:
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def forward(x, w1, b1, w2, b2, activation, dropout_p, seed):
    """(y, z [rows, hidden]), contiguous."""
    dropout = dropout_of(dropout_p, seed)
    z, act = activated_product(_matrix_of(x), w1.t(), parameter(b1), activation, dropout)
    return product(act, w2.t(), parameter(b2)).view(*x.shape[:-1], w2.shape[0]), z


def backward(dy, x, w1, b1, w2, b2, z, activation, dropout_p, seed, needs):
    """(dx, dw1, db1, dw2, db2), contiguous, those not wanted empty."""
    dy, dropout = _matrix_of(dy), dropout_of(dropout_p, seed)
    nothing = lambda: output_like(x, False)  # noqa: E731
    db1 = torch.zeros_like(b1, memory_format=torch.contiguous_format) if needs[2] else nothing()
    if any(needs[:3]):
        dz, act = output_like(z, needs[0] or needs[1]), output_like(z, needs[3])
        product_into_activation(dy, w2, z, activation, dropout, given(dz), given(act), given(db1))
    elif needs[3]:
        act = bias_act(z, None, activation, dropout_p, seed)
    dx = product(dz, w1).view(x.shape) if needs[0] else nothing()
    dw1 = product(dz.t(), _matrix_of(x)) if needs[1] else nothing()
    dw2 = product(dy.t(), act) if needs[3] else nothing()
    return dx, dw1, db1, dw2, dy.sum(0) if needs[4] else nothing()
