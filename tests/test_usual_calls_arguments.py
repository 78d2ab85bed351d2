"""Arguments that are not those of a usual call are checked, and what comes of them is what always did."""

import pytest
import torch
from torch import Tensor
from usual_calls import NAMES, SEEDED, Subclass, assert_same, assert_unusual, checked, outcome, usual, watched


def tensor_names(arguments: dict) -> list[str]:
    return [n for n, a in arguments.items() if isinstance(a, Tensor)]


CHANGES = {
    "subclass": lambda t: t.as_subclass(Subclass),
    "float64": lambda t: t.double(),
    "other_integers": lambda t: t.to(torch.int16),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "one_more_axis": lambda t: t[None],
    "one_less_axis": lambda t: t[0],
    "one_more_column": lambda t: torch.cat([t, t[..., :1]], -1),
    "one_more_row": lambda t: torch.cat([t, t[:1]]),
    "0-d": lambda t: t.flatten()[0],
    "not_a_tensor": lambda t: t.tolist(),
    "negated": lambda t: torch._neg_view(t) if t.is_floating_point() else -t,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # of complex numbers that become real ones
def test_a_changed_tensor_is_checked_or_gives_the_same(name, change):
    for argument in tensor_names(usual()[name]):
        arguments = usual()[name]
        arguments[argument] = CHANGES[change](arguments[argument])
        with watched(name) as taken:
            got = outcome(name, arguments)
        wanted = checked(name, arguments)
        if got[0] is not torch.Tensor or not got[1][0].is_meta:  # nothing to compare
            assert_same(got, wanted)
        if isinstance(wanted[1], str) or change in ("subclass", "float64", "meta", "sparse", "not_a_tensor"):
            assert taken == [False]


@pytest.mark.parametrize("change", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_mixed_types_give_the_same_as_before(name, change):
    for dtype in (torch.float32, torch.float16):
        for argument in tensor_names(usual()[name]):
            arguments = usual(dtype)[name]
            if arguments[argument].is_floating_point():
                arguments[argument] = arguments[argument].to(change)
                assert_same(outcome(name, arguments), checked(name, arguments))


@pytest.mark.parametrize("name", NAMES)
def test_any_strides_give_the_same_as_before(name):
    for argument in tensor_names(usual()[name]):
        arguments = usual()[name]
        t = arguments[argument]
        for strided in (
            t.transpose(0, -1).contiguous().transpose(0, -1),
            t[..., :1].expand_as(t),
            torch.stack([t, t], -1)[..., 0],
        ):
            arguments[argument] = strided
            if argument.endswith("_cache"):
                continue  # outcome() copies them
            assert_same(outcome(name, arguments), checked(name, arguments))


NUMBERS = {
    "layer_norm": ("eps", "dropout_p"),
    "rms_norm": ("eps", "weight_offset", "dropout_p"),
    "bias_act": ("dropout_p", "activation"),
    "glu": ("activation",),
    "softmax": ("scale", "causal", "mask"),
    "cross_entropy": ("ignore_index", "label_smoothing", "z_loss", "reduction"),
    "linear_cross_entropy": ("bias", "ignore_index", "label_smoothing", "z_loss", "reduction"),
    "dropout_add": ("dropout_p",),
    "rope": ("interleaved",),
    "attention": ("scale", "softcap", "dropout_p", "causal", "return_lse", "window", "mask", "bias"),
    "attention_varlen": ("scale", "softcap", "dropout_p", "causal", "return_lse", "window", "max_q", "max_k"),
    "decode_attention": ("scale", "softcap", "return_lse", "window", "block_table", "k_scale"),
    "append_kv": ("block_table", "k_scale"),
    "feed_forward": ("activation", "dropout_p", "b1", "b2"),
}
VALUES = (
    *(float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 0.0, 1e300, 1.0, 2.0),
    *(True, False, 0, 1, -1, 2**70, "1", "mean", "gelu", "none", "top_left", "bottom_right", "\ud800"),
    *(None, [], (1, 0), torch.tensor(1.0), torch.tensor(True), torch.float32),
)


@pytest.mark.parametrize("name", NAMES)
def test_any_value_of_a_number_gives_the_same_as_before(name):
    for argument in NUMBERS[name]:
        for value in VALUES:
            arguments = usual()[name] | {argument: value}
            if name in SEEDED:
                arguments["seed"] = 7
            assert_same(outcome(name, arguments), checked(name, arguments))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("layer_norm", {"eps": float("nan")}),
        ("layer_norm", {"eps": -1.0}),
        ("layer_norm", {"eps": 1}),
        ("layer_norm", {"eps": True}),
        ("layer_norm", {"dropout_p": 1.0, "seed": 1}),
        ("layer_norm", {"dropout_p": -0.5, "seed": 1}),
        ("layer_norm", {"dropout_p": 0.5, "seed": True}),
        ("layer_norm", {"dropout_p": 0.5, "seed": 2**63}),
        ("layer_norm", {"dropout_p": 0.5, "seed": torch.tensor(7)}),
        ("layer_norm", {"dropout_p": 0.5, "seed": torch.tensor([7, 7])}),
        ("layer_norm", {"dropout_p": 0.5, "seed": torch.tensor([7], dtype=torch.int32)}),
        ("rms_norm", {"weight": None}),  # but an offset of 1
        ("bias_act", {"activation": "tanh"}),
        ("softmax", {"causal": 1}),
        ("softmax", {"x": torch.ones(3, 4)}),
        ("softmax", {"mask": torch.ones(3, 3, dtype=torch.bool)}),
        ("cross_entropy", {"target": torch.tensor([2, -1, 3])}),
        ("cross_entropy", {"target": torch.tensor([2, 16, 3])}),
        ("cross_entropy", {"ignore_index": 2}),  # and a target of -100
        ("cross_entropy", {"label_smoothing": 1.5}),
        ("linear_cross_entropy", {"target": torch.tensor([2, -1, 3])}),
        ("linear_cross_entropy", {"target": torch.tensor([2, 17, 3])}),
        ("linear_cross_entropy", {"ignore_index": 2}),  # and a target of -100
        ("linear_cross_entropy", {"z_loss": -0.5}),
        ("linear_cross_entropy", {"weight": torch.ones(17, 15)}),
        ("linear_cross_entropy", {"weight": torch.ones(0, 16)}),
        ("linear_cross_entropy", {"weight": torch.ones(17, 16).half()}),
        ("linear_cross_entropy", {"bias": torch.ones(17).half()}),
        ("attention", {"q": torch.ones(2, 4, 5, 8)}),  # causal, and not square
        ("attention", {"kv_lengths": torch.tensor([1, 4], dtype=torch.int32)}),
        ("attention", {"kv_lengths": torch.tensor([-1, 3], dtype=torch.int32)}),
        ("attention", {"kv_lengths": torch.tensor([1, 3])}),
        ("attention", {"window": (1, 0)}),
        ("attention", {"v": torch.ones(2, 2, 3, 513)}),
        ("attention_varlen", {"cu_seqlens_k": torch.tensor([0, 1, 6], dtype=torch.int32)}),  # causal, and two
        ("attention_varlen", {"cu_seqlens_k": torch.tensor([0, 1, 6])}),
        ("attention_varlen", {"max_k": 4}),
        ("attention_varlen", {"max_q": 2**64}),
        ("attention_varlen", {"max_q": True}),
        ("attention_varlen", {"window": (1, 0)}),
        ("attention_varlen", {"alibi_slopes": torch.ones(4)}),
        ("attention_varlen", {"k": torch.ones(6, 3, 8), "v": torch.ones(6, 3, 8)}),
        ("attention_varlen", {"v": torch.ones(6, 2, 513)}),
        ("decode_attention", {"kv_lengths": torch.tensor([1, 8], dtype=torch.int32)}),
        ("append_kv", {"kv_lengths": torch.tensor([1, 5], dtype=torch.int32)}),
        ("append_kv", {"kv_lengths": torch.tensor([-1, 3], dtype=torch.int32)}),
        ("rope", {"cos": torch.ones(3, 7), "sin": torch.ones(3, 7)}),
        ("rope", {"cos": torch.ones(3, 10), "sin": torch.ones(3, 10)}),
        ("rope", {"cos": torch.ones(3, 8, requires_grad=True)}),
        ("feed_forward", {"x": torch.tensor(1.0)}),
        ("feed_forward", {"x": torch.ones(3, 15)}),
        ("feed_forward", {"w2": torch.ones(5, 9)}),
        ("feed_forward", {"b1": torch.ones(8).half()}),
        ("feed_forward", {"b2": torch.ones(1, 5)}),
        ("feed_forward", {"activation": "tanh"}),
    ],
)
def test_what_is_not_usual_is_checked(name, changed):
    assert_unusual(name, usual()[name] | changed)


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize(
    ("starts", "longest"),
    [
        ([0, 1, 6], 4),
        ([0, 7, 6], 9),
        ([0, -1, 6], 9),
        ([1, 2, 6], 9),
        ([-1, 2, 6], 9),
        ([0, 1, 5], 9),
        ([0, 1, 7], 9),
        ([0, 1, 1, 6], 9),
        ([0, 6], 9),
        ([0], 9),
        ([], 9),
        ([0, 1, 6], -1),
    ],
)
def test_starts_of_sequences_are_looked_at(side, starts, longest):
    arguments = usual()["attention_varlen"] | {"causal": False}
    with watched("attention_varlen") as taken:
        outcome("attention_varlen", arguments)
    assert taken == [True]
    changed = {f"cu_seqlens_{side}": torch.tensor(starts, dtype=torch.int32), f"max_{side}": longest}
    assert_unusual("attention_varlen", arguments | changed)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0,), (), (16,), (2, 0, 16)])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "bias_act", "glu", "dropout_add", "softmax"])
def test_empty_tensors_and_single_numbers_give_the_same_as_before(name, shape):
    arguments = {"glu": {"gate": torch.ones(shape), "up": torch.ones(shape)}}.get(
        name, {"x": torch.ones(shape)}
    )
    assert_same(outcome(name, arguments), checked(name, arguments))
