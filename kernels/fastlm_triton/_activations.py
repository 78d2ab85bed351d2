"""The activations and their derivatives on float32 tensors: gelu by erf, gelu_tanh, relu, silu.

Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", https://arxiv.org/abs/1606.08415. NaN stays NaN.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)): exp may overflow to infinity, of which 1 / is 0, as it should be."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def sigmoid_slope(z):
    """The derivative of sigmoid. Of |z|, as it is even: exp(-|z|) neither overflows nor cancels."""
    e = tl.exp(-tl.abs(z))
    s = 1.0 / (1.0 + e)
    return e * s * s


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """act(z). ACTIVATION: "gelu", "gelu_tanh", "relu" or "silu".

    gelu_tanh is z * sigmoid(2 u), u = sqrt(2 / pi) * (z + 0.044715 z^3), as 1 + tanh(u) = 2 sigmoid(2 u): no
    tanh is needed, and nothing cancels where it is near -1.
    """
    if ACTIVATION == "gelu":
        return z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return z * sigmoid(z * (1.5957691216057308 + 0.07135481627159869 * z * z))
    elif ACTIVATION == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(ACTIVATION == "silu")
        return z * sigmoid(z)
