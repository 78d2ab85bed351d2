"""Modules of one step beside their torch.nn twins: outputs, gradients, and what torch runs."""

import math

import pytest
import torch
from torch import nn
from twins import assert_alike, pair

import fastlm
from fastlm.testing.compare import KernelCalls

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(41,), (3, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str
)
def test_layer_norm_computes_what_its_twin_does(shape, options, dtype):
    ours, twin = pair(fastlm.nn.LayerNorm, nn.LayerNorm, shape, **options)
    for module in (ours, twin):
        nn.init.normal_(module.weight) if module.weight is not None else None
    twin.load_state_dict(ours.state_dict())
    x = torch.randn(6, *shape).to(dtype)
    assert assert_alike(ours.to(dtype), twin.to(dtype), [x]) == {"layer_norm", "layer_norm_backward"}


def test_layer_norm_refuses_another_shape_in_torchs_words():
    with pytest.raises(RuntimeError, match="normalized_shape"):
        fastlm.nn.LayerNorm(8)(torch.randn(3, 9))


def test_dropout_drops_in_training_and_repeats_with_the_seed():
    dropout, x = fastlm.nn.Dropout(0.25), torch.ones(200, 300)
    torch.manual_seed(3)
    first = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(dropout(x), first)
    assert set(first.unique().tolist()) == {0.0, x.new_tensor(1 / 0.75).item()}
    assert abs(first.eq(0).float().mean().item() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / x.numel())


def test_dropout_does_nothing_in_evaluation_and_at_zero():
    x = torch.randn(5)
    assert fastlm.nn.Dropout(0.5).eval()(x) is x
    assert fastlm.nn.Dropout(0.0)(x) is x


def test_dropout_of_everything_and_in_place_run_through_torch():
    x = torch.ones(1000)
    assert fastlm.nn.Dropout(1.0)(x).eq(0).all()
    with KernelCalls() as calls:
        assert fastlm.nn.Dropout(0.5, inplace=True)(x) is x
    assert not calls.names and x.eq(0).any()


@pytest.mark.parametrize("dim", [-1, 0, 1, 2, -3])
def test_softmax_computes_what_its_twin_does(dim):
    ours, twin = fastlm.nn.Softmax(dim), nn.Softmax(dim)
    assert assert_alike(ours, twin, [torch.randn(3, 4, 5)]) == {"softmax", "softmax_backward"}


def test_softmax_without_dim_is_torchs():
    with pytest.warns(UserWarning, match="Implicit dimension"):
        assert fastlm.nn.Softmax()(torch.zeros(2, 4)).eq(0.25).all()


LOSSES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "ignored": {"ignore_index": 2},
}


@pytest.mark.parametrize("shape", [(7,), (9, 7), (3, 7, 4), (2, 7, 3, 2)], ids=str)
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES.keys())
def test_cross_entropy_loss_computes_what_its_twin_does(options, shape):
    ours, twin = fastlm.nn.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    target = torch.randint(0, 7, shape[:1] + shape[2:] if len(shape) > 1 else ())
    target.view(-1)[0] = 3  # at least one row that is not ignored
    kernels = assert_alike(ours, twin, [torch.randn(shape)], lambda m, x: m(x, target))
    assert kernels == {"cross_entropy", "cross_entropy_backward"}


def test_class_weights_and_probabilities_run_through_torch():
    x, target = torch.randn(4, 5), torch.tensor([0, 4, 1, 1])
    weights = torch.rand(5)
    with KernelCalls() as calls:
        weighted = fastlm.nn.CrossEntropyLoss(weights)(x, target)
        soft = fastlm.nn.CrossEntropyLoss()(x, x.softmax(-1))
    assert not calls.names
    assert torch.equal(weighted, nn.CrossEntropyLoss(weights)(x, target))
    assert torch.equal(soft, nn.CrossEntropyLoss()(x, x.softmax(-1)))


def test_cross_entropy_loss_refuses_a_class_out_of_range():
    with pytest.raises(IndexError):
        fastlm.nn.CrossEntropyLoss()(torch.randn(2, 5), torch.tensor([0, 5]))


def test_a_mean_over_ignored_rows_only_is_zero():
    x = torch.randn(2, 5, requires_grad=True)
    loss = fastlm.nn.CrossEntropyLoss()(x, torch.full((2,), -100))
    loss.backward()
    assert loss.item() == 0 and x.grad.eq(0).all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_feed_forward_computes_what_its_steps_do(activation):
    ours = fastlm.nn.FeedForward(24, 40, 0.0, activation)
    assert list(ours.state_dict()) == ["linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"]

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear1, self.linear2 = nn.Linear(24, 40), nn.Linear(40, 24)

        def forward(self, x):
            functions = {
                "gelu": nn.GELU(),
                "gelu_tanh": nn.GELU("tanh"),
                "relu": nn.ReLU(),
                "silu": nn.SiLU(),
            }
            return self.linear2(functions[activation](self.linear1(x)))

    twin = Steps()
    twin.load_state_dict(ours.state_dict())
    assert "feed_forward" in assert_alike(ours, twin, [torch.randn(3, 5, 24)])


def test_feed_forward_drops_hidden_elements_in_training_only():
    module, x = fastlm.nn.FeedForward(24, 40, 0.5), torch.randn(5, 24)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


def test_feed_forward_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="FeedForward: activation must be one of 'gelu', .* got 'tanh'"):
        fastlm.nn.FeedForward(8, 8, activation="tanh")


def test_positional_encoding_is_the_papers():
    encoding = fastlm.nn.SinusoidalPositionalEncoding(7, max_len=20)
    table = encoding(torch.zeros(2, 20, 7))
    for position, column in [(0, 0), (0, 1), (3, 2), (19, 5), (11, 6)]:
        angle = position / 10000 ** ((column - column % 2) / 7)
        expected = math.cos(angle) if column % 2 else math.sin(angle)
        assert abs(table[1, position, column].item() - expected) < torch.finfo(torch.float32).eps
    assert not encoding.state_dict()
    seq_first = fastlm.nn.SinusoidalPositionalEncoding(7, batch_first=False)
    assert torch.equal(seq_first(torch.zeros(20, 2, 7)), table.transpose(0, 1))
    assert torch.equal(encoding(torch.zeros(20, 7)), table[0])


def test_positional_encoding_refuses_a_longer_sequence():
    with pytest.raises(ValueError, match="at most max_len=4 long, got 5"):
        fastlm.nn.SinusoidalPositionalEncoding(8, max_len=4)(torch.zeros(1, 5, 8))


def chain():
    return nn.Linear(8, 24), nn.GELU(), nn.Dropout(0.0), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3)


def test_sequential_runs_its_chains_as_one_op():
    children = chain()
    ours, twin = fastlm.nn.Sequential(*children), nn.Sequential(*children)
    assert list(ours.state_dict()) == list(twin.state_dict())
    with KernelCalls() as calls:
        ours(torch.randn(4, 8))
    assert calls.names.count("feed_forward.cpu") == 1
    assert_alike(ours, twin, [torch.randn(4, 5, 8)])


def test_sequential_calls_the_hooks_of_a_chain():
    ours, seen = fastlm.nn.Sequential(*chain()), []
    x = torch.randn(4, 8)
    fused = ours(x)
    ours[1].register_forward_hook(lambda *args: seen.append("gelu"))
    torch.testing.assert_close(ours(x), fused)
    assert seen == ["gelu"]


class HeadAndLoss(nn.Module):
    """A head, and the loss of its logits or of what goes into it."""

    def __init__(self, loss, tied):
        super().__init__()
        self.embedding, self.head = nn.Embedding(41, 24), nn.Linear(24, 41, bias=not tied)
        self.loss = loss
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x, target):
        """The loss of x, moved by what the weight says of the targets: a tied weight has two gradients."""
        x = x + self.embedding(target).sin()
        if isinstance(self.loss, nn.CrossEntropyLoss):
            return self.loss(self.head(x).flatten(0, -2), target.flatten()).reshape(-1)
        return self.loss(x, self.head.weight, target, self.head.bias).reshape(-1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES.keys())
def test_linear_cross_entropy_loss_computes_what_head_and_loss_do(options, tied):
    ours = HeadAndLoss(fastlm.nn.LinearCrossEntropyLoss(**options), tied)
    twin = HeadAndLoss(nn.CrossEntropyLoss(**options), tied)
    twin.load_state_dict(ours.state_dict())  # the loss has nothing in it
    target = torch.randint(0, 41, (3, 5))
    target[0, 0] = 3  # at least one row that is not ignored
    kernels = assert_alike(ours, twin, [torch.randn(3, 5, 24)], lambda m, x: m(x, target))
    assert "linear_cross_entropy" in kernels


def test_linear_cross_entropy_loss_shows_and_passes_on_its_options():
    loss = fastlm.nn.LinearCrossEntropyLoss(2, 0.1, 0.5, "sum")
    x, weight, target = torch.randn(4, 8), torch.randn(5, 8), torch.tensor([0, 2, 4, 1])
    options = dict(ignore_index=2, label_smoothing=0.1, z_loss=0.5, reduction="sum")
    assert torch.equal(loss(x, weight, target), fastlm.ops.linear_cross_entropy(x, weight, target, **options))
    assert repr(loss) == (
        "LinearCrossEntropyLoss(ignore_index=2, label_smoothing=0.1, z_loss=0.5, reduction='sum')"
    )
