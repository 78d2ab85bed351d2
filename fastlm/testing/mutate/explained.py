"""Why a change of a Triton kernel survives: each reason names the changes that it is for, and no survivor
goes without one."""

import re
from typing import NamedTuple


class Reason(NamedTuple):
    """Changes by patterns that match from the start: kernel's name, text of the source line, what changed.

    equal: no input tells such a change from the kernel as it is.
    """

    kernel: str
    line: str
    what: str
    reason: str
    equal: bool = False


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
_BAD_STARTS = (
    "No case can have a row of no sequence: check() refuses it on CPU tensors. On the simulator"
    " tests/test_triton_bad_values.py has such ones, and catches this."
)
_READS = (
    "Only reads of what the barrier before it made visible lie between the two, and the next one stands"
    " before the first write."
)
_WAITED = (
    "The copies go where a product has read that every warp waited for before the barrier that its step"
    " begins with, or has in its middle."
)
_PRIVATE = (
    "What is exchanged behind the loop stays inside one warp, and lies where no product of the last step"
    " reads."
)
_JOINS = (
    "The wait behind the next product is for this one too; until then nothing touches its accumulators or"
    " overwrites its operands."
)
_FENCED = "What this product reads, the fence before the product ahead of it has covered."
_FRESH = (
    "This product's registers are fresh: the fence before the product ahead of it comes after the last other"
    " use of any."
)

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
        r"bar\.sync 0 ",
        _READS,
    ),
    Reason(
        "matmul_kernel",
        "inside = ",
        r"cp\.async\.wait_group 0 -> ",
        "Of the groups after the last step the newest is empty.",
    ),
    Reason(
        "kept",
        "if TOGETHER > 1",
        "TOGETHER > 1 -> ",
        "That one column lies beside itself is nothing new to the compiler.",
    ),
    Reason("_(forward|dq)_kernel", r"return tl\.load", r"bar\.sync 0 ", _WAITED),
    Reason("_dq_kernel", r"j = j0", r"bar\.sync 0 ", _PRIVATE),
    Reason("_dkv_kernel", r"h, i0 = ", r"bar\.sync 0 ", _PRIVATE),
    Reason("_dkv_kernel", r"dropped = |ds \*= |return tl\.load", _TO_WARP, _ONE_WARP),
    Reason("_dkv_kernel", r"return tl\.dot", r"wgmma\.commit_group", _JOINS),
    Reason("_dkv_kernel", r"$", r"wgmma\.wait_group\.sync\.aligned 0", _JOINS),
    Reason("_d(q|kv|bias)_kernel", r".*tl\.dot", r"fence\.proxy\.async", _FENCED),
    Reason("_d(q|bias)_kernel", r"dp = tl\.dot", r"wgmma\.fence", _FRESH),
    Reason(
        "hide",
        r"if \(j1 >= nk\)",
        r"j1 - i0 > high|j0 - i1 < low",
        "Where they are equal the tile hides no key, and asking each key finds so.",
    ),
    Reason(
        "finish_in_parts", "if COLS", "COLS <= PART", "Two halves give what one part of that width gives."
    ),
    Reason(
        "_dbias_kernel",
        r"@triton\.jit|return tl\.load",  # where Triton puts the barrier before a tile from registers
        r"bar\.sync 0 ",
        "No case has a program sum two heads: tests/test_triton_bias_gradient.py does, and catches this.",
    ),
    Reason(
        "_dq_kernel|_forward_kernel",
        r"if tile \* BM >= nq",
        ">=|tile",
        "A tile that begins where its sequence ends has no rows: it stores nothing.",
    ),
    Reason(
        "_dkv_kernel",
        r"if tile \* BN >= written",
        ">=|tile",
        "A tile that begins where its sequence ends has no rows: it stores nothing.",
    ),
    Reason("_dkv_kernel", "end = ", "j0 < nk", "Of no keys every weight is 0."),
    Reason(
        "_dkv_kernel",
        r"base = tl\.load",
        "tl.load|i < nq",
        "Rows outside have a q, dout and delta of 0: whatever their weight, they add 0 (Triton loads 0, if"
        " told nothing).",
    ),
    Reason("_dbias_kernel", r"base = tl\.load", "tl.load|i < queries", "Rows outside are not stored."),
    Reason("_dq_kernel|_dkv_kernel|_forward_kernel", r"if .*tile == 0", "tile == 0|needs_dq", _BAD_STARTS),
    Reason("zero_gaps|owned_rows", r"rows = tl\.where|begin = |return begin", "rows <|b ==", _BAD_STARTS),
    Reason("_forward_kernel", r"rows = |tl\.store\(lse \+ \(rows", "rows|tl.store", _BAD_STARTS),
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


def explanation(record: dict, reasons: list[Reason]) -> Reason | None:
    """The one of these that a mutant matches, or None."""
    for r in reasons:
        patterns = ((r.kernel, "kernel"), (r.line, "line"), (r.what, "what"))
        if all(re.match(pattern, record[key]) for pattern, key in patterns):
            return r
    return None


def reason_for(record: dict) -> str | None:
    """Why a mutant of a Triton kernel survives, or None if nobody has said."""
    found = explanation(record, REASONS)
    return found.reason if found else None
