"""Why a change survives: each reason names the changes that it is for, and no survivor goes without one."""

import re
from typing import NamedTuple


class Reason(NamedTuple):
    """Changes by patterns that match from the start: kernel's name, text of the source line, what changed."""

    kernel: str
    line: str
    what: str
    reason: str


_TO_WARP = r"bar\.sync 0 -> bar\.warp\.sync"
_ONE_WARP = "What is exchanged over this barrier stays inside one warp, whose own barrier suffices."
_BAD_TARGET = (
    "No case can have a target that is no class: check() refuses it on CPU tensors. On the simulator"
    " tests/test_triton_bad_values.py has such targets, and catches this."
)
_BAD_PLACE = (
    "No case can have a length or a page outside the cache: check() refuses it on CPU tensors. On the"
    " simulator tests/test_triton_decode.py has such ones, and catches this."
)
_SECOND = "One of two for a step, or before the first one: no access lies between it and another barrier."
_SAME_WAIT = "The copies join the next group, and every wait for them waits for that one as well."

REASONS: list[Reason] = [
    Reason("add_partials", r"total = tl\.sum", _TO_WARP, _ONE_WARP),
    Reason("norm_backward", r"tl\.store\(sums .*tl\.sum\(d(weight|bias), 0\)", _TO_WARP, _ONE_WARP),
    Reason("bias_act_backward", r"tl\.store\(partials .*tl\.sum", _TO_WARP, _ONE_WARP),
    Reason(
        "norm_forward_long",
        r"tl\.debug_barrier",
        r"bar\.sync 0 ",
        "Triton stores and loads h in one layout here, so that each thread reads what it wrote; nothing"
        " promises that it always will.",
    ),
    Reason("rotate_rows", r"a, b = tl\.split|tl\.store\(y \+ both", _TO_WARP, _ONE_WARP),
    Reason(
        "rotate_rows",
        r"a, b = tl\.split|tl\.store\(y \+ both",
        r"bar\.sync 0 deleted",
        "One exchange undoes the other: a thread writes where it alone has read.",
    ),
    Reason(
        "norm_backward|norm_parameter_gradients",
        r".*tl\.load\(mean_in",
        "row < rows",
        "mean is the first half of statistics: behind it lies the first rstd, and that row is not stored.",
    ),
    Reason(
        "add_partials",
        r"tl\.store\(second_out",
        "(which == 1|col < cols)",
        "Of one sum (rms_norm, bias_act) the second store never is, or repeats the first one.",
    ),
    Reason("row_(losses|gradients)", "used = ", "which < cols", _BAD_TARGET),
    Reason(
        "row_losses",
        r"exps = tl\.where",
        "x > maximum",
        "Where they are equal both sides are: the step is exp(0) = 1.",
    ),
    Reason("row_losses|logits_gradient", "if z_loss > 0", "z_loss > 0", "Of a z_loss of 0 both sides add 0."),
    Reason(
        "row_losses",
        "shift = ",
        re.escape("tl.abs(picked) < float('inf')"),
        "cross_entropy's cases have a target's logit of -inf, and catch this in the same kernel.",
    ),
    Reason(
        "append_kernel",
        "position = |number = ",
        "tl.load",
        "What lanes outside hold is not looked at: they store nothing.",
    ),
    Reason("append_kernel", "inside &= ", "position < capacity|number < pages", _BAD_PLACE),
    Reason("split_kernel", r"number = tl\.where", "number < pages", _BAD_PLACE),
    Reason(
        "_append",
        "usable = ",
        "scale ",
        "0 / 0 and x / inf become 0 as well: NaN converted to an integer is 0, and x / inf rounds to it.",
    ),
    Reason(
        "split_kernel|norm_backward|_(forward|dq|dkv|dbias)_kernel",
        ".*tl.load",
        r"cp\.async\.commit_group deleted",
        _SAME_WAIT,
    ),
    Reason(
        "split_kernel",
        "if begin >= end",
        "begin >= end",
        "Of no keys a split writes a weight of 0, where the merge does not look.",
    ),
    Reason("split_kernel", r"number = tl\.where", "number >= 0", "Page 0 instead of page 0."),
    Reason(
        "merge_kernel",
        r"part = tl\.load",
        "cols < width",
        "What is read beside a row, within the same buffer, is not stored.",
    ),
    Reason("tanh", "return", r"tl\.abs\(x\) < 0\.625", "At 0.625 both ways are as exact."),
    Reason("tanh", "return", "x < 0 ", "0 takes the other way."),
    Reason(
        "matmul_kernel",
        r"return tl\.interleave|left, right = |value, product = |product \*= ",
        _TO_WARP,
        _ONE_WARP,
    ),
    Reason(
        "matmul_kernel",
        r".*tl\.load",
        r"cp\.async\.wait_group 4 ",
        "Triton waits for the same copies twice, and for a step's second half once more: one wait suffices.",
    ),
    Reason(
        "matmul_kernel",
        r".*tl\.load",
        r"bar\.sync 0 ",
        _SECOND,
    ),
    Reason(
        "matmul_kernel",
        "inside = ",
        r"cp\.async\.wait_group 0 -> ",
        "Of the groups after the last step the newest is empty.",
    ),
    Reason(
        "finish_in_parts", "if COLS", "COLS <= PART", "Two halves give what one part of that width gives."
    ),
    Reason(
        "_dbias_kernel",
        r"@triton\.jit",  # where Triton puts the barrier before a tile that comes through registers
        r"bar\.sync 0 ",
        "No case has a program sum two heads: tests/test_triton_bias_gradient.py does, and catches this.",
    ),
    Reason(
        "_dq_kernel|_forward_kernel",
        r"if tile \* BM >= nq",
        ">=|tile",
        "A tile that begins where its sequence ends has no rows: it stores nothing.",
    ),
    Reason("_dq_kernel", r"base = in_log2\(tl\.load", "tl.load", "Rows outside are not stored."),
    Reason("sigmoid", "return", "z < 0", "Of 0 both sides are 1/2."),
    Reason("normal", "return", "z < 0", "Of 0 both sides are 1/2."),
    Reason(
        "activated_backward",
        r"return tl\.where\(z <= 0, 0\.0, z\)",
        "z <= 0",
        "Of the two comparisons on this line that of the value: relu(0) is 0 on both sides.",
    ),
]


def reason_for(record: dict) -> str | None:
    """Why a mutant survives, or None if nobody has said."""
    for r in REASONS:
        patterns = ((r.kernel, "kernel"), (r.line, "line"), (r.what, "what"))
        if all(re.match(pattern, record[key]) for pattern, key in patterns):
            return r.reason
    return None
