"""The node that the kernels' autograd puts into the graph keeps to the engine's rules."""

import threading
import weakref

import pytest
import torch
from torch.autograd import forward_ad

from fastlm import _load, ops

pytestmark = pytest.mark.skipif(_load.MISSING["cpu"] is not None, reason="the node is in the native library")
RAW = torch.ops.fastlm


def leaf(*shape):
    return torch.randn(shape).requires_grad_()


def test_a_second_backward_needs_retain_graph():
    y, dy = ops.softmax(leaf(3, 4)), torch.ones(3, 4)
    y.backward(dy, retain_graph=True)
    y.backward(dy)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(dy)


def test_an_argument_that_was_written_to_is_an_error():
    gate, up = leaf(3, 4), torch.randn(3, 4)
    y = ops.glu(gate, up)
    up.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_that_was_written_to_is_an_error():
    y = ops.softmax(leaf(3, 4))
    y.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "op", [ops.softmax, ops.layer_norm, lambda x: ops.cross_entropy(x, torch.tensor([1]))]
)
def test_a_graph_that_is_dropped_frees_what_it_saved(op):
    x = leaf(1, 4)
    alive = weakref.ref(x)
    y = op(x)
    del x
    assert alive() is not None
    del y
    assert alive() is None


def test_backward_frees_what_was_saved():
    x = leaf(1, 4)
    h = x * 2
    alive, y = weakref.ref(h), ops.layer_norm(h)
    del h
    y.sum().backward()
    assert alive() is None and y.grad_fn is not None


def test_only_wanted_gradients_are_computed_and_an_unused_output_is_undefined():
    x, residual, weight = leaf(3, 4), leaf(3, 4), leaf(4)
    y, h = ops.rms_norm(x, weight, residual=residual)
    (dw,) = torch.autograd.grad(y.sum(), weight, retain_graph=True)
    everything = torch.autograd.grad(y.sum(), (x, residual, weight), retain_graph=True)
    assert torch.equal(dw, everything[2]) and torch.equal(everything[0], everything[1])
    (dx,) = torch.autograd.grad(h.sum(), x)
    assert torch.equal(dx, torch.ones(3, 4))


def test_the_node_is_named_after_its_kernel():
    assert ops.glu(leaf(2), leaf(2)).grad_fn.name() == "fastlm::glu_backward"


def test_transforms_of_functions_are_refused():
    """By the raw op; the public function takes the reference."""
    with pytest.raises(RuntimeError, match="functorch|transform"):
        torch.func.grad(lambda x: RAW.glu.cpu(x, x, "silu").sum())(torch.randn(3))


def test_forward_mode_is_refused_instead_of_dropped():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(leaf(3, 4), torch.ones(3, 4))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ops.softmax(x)


def test_threads_may_walk_one_graph():
    x = leaf(64, 64)
    y = ops.layer_norm(x).square().sum()
    wanted, found = torch.autograd.grad(y, x, retain_graph=True)[0], []

    def walk():
        found.extend(torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(20))

    threads = [threading.Thread(target=walk) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(found) == 80 and all(torch.equal(f, wanted) for f in found)
