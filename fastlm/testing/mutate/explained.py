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
