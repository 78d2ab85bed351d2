"""The activations and their derivatives on float32 tensors: gelu by erf, gelu_tanh, relu, silu.

Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", https://arxiv.org/abs/1606.08415. NaN stays NaN.
"""

import triton
import triton.language as tl


@triton.jit
def normal(z):
    """(The normal distribution at z, exp(-z^2 / 2)): one exp and one division; erf has an exp of its own.

    For z <= 0 it is exp(-z^2 / 2) * t * P(t), t = 1 / (1 + 0.305 |z|), the form of Abramowitz and Stegun
    26.2.17, with the P of csrc/cpu/activations.h, fitted to 1.1e-7 relative error.
    """
    exponential = tl.exp(-0.5 * z * z)
    t = 1.0 / (1.0 + 0.305 * tl.abs(z))
    p = 0.036773404 * t - 0.153303191
    p = p * t + 0.186270812
    p = p * t - 0.0384986577
    p = p * t + 0.121304937
    p = p * t + 0.103332617
    p = p * t + 0.122481374
    p = p * t + 0.121638755
    tail = p * t * exponential
    return tl.where(z < 0, tail, 1.0 - tail), exponential


@triton.jit
def sigmoid(z):
    """(sigmoid(z), its derivative), by exp(-|z|), which neither overflows nor cancels."""
    e = tl.exp(-tl.abs(z))
    s = 1.0 / (1.0 + e)
    return tl.where(z < 0, e * s, s), e * s * s


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """act(z). ACTIVATION: "gelu", "gelu_tanh", "relu" or "silu"."""
    return activated_backward(z, z, ACTIVATION)[0]


@triton.jit
def activated_backward(z, g, ACTIVATION: tl.constexpr):
    """(act(z), g * act'(z)). ACTIVATION: "gelu", "gelu_tanh", "relu" or "silu".

    gelu_tanh is z * sigmoid(2 u), u = sqrt(2 / pi) * (z + 0.044715 z^3): 1 + tanh(u) = 2 sigmoid(2 u).
    """
    if ACTIVATION == "gelu":
        distribution, exponential = normal(z)
        return z * distribution, g * (z * (exponential * 0.3989422804014327) + distribution)
    elif ACTIVATION == "gelu_tanh":
        linear, cubic = 1.5957691216057308, 0.07135481627159869  # 2 sqrt(2 / pi), that times 0.044715
        s, slope = sigmoid(z * (linear + cubic * (z * z)))
        return z * s, g * (z * (linear + 3 * cubic * (z * z)) * slope + s)
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z), tl.where(z <= 0, 0.0, g)
    else:
        tl.static_assert(ACTIVATION == "silu")
        s, slope = sigmoid(z)
        return z * s, g * (z * slope + s)
