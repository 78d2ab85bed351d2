"""Why a change of a CUDA kernel survives, as in explained.py."""

from .explained import Reason

_OWN_ARRAY = (
    "Each sort of sum, and the maximum, has shared memory of its own, and is taken once: no call before it"
    " may still read."
)
_BAD_PLACE = (
    "No case can have a length or a page outside the cache: check() refuses it on CPU tensors. On the"
    " simulator tests/test_cuda_decode.py has such ones, and catches this."
)
_BAD_TARGET = (
    "No case can have a target that is no class: check() refuses it on CPU tensors. On the simulator"
    " tests/test_cuda_kernels.py has such ones, and catches this."
)
_GAPS = (
    "No case has rows of no sequence: check() refuses such starts on CPU tensors. On the simulator"
    " tests/test_cuda_attention.py has such ones, and catches this."
)

REASONS: list[Reason] = [
    Reason(
        "(softmax_forward|row_losses|add_rows)_kernel",
        r"__syncthreads\(\);  // the call before",
        r"bar\.sync 0 ",
        _OWN_ARRAY,
        True,
    ),
    Reason(
        "team_all|moments|factor_of|sum_of_row",
        "if .lane == 0",
        "lane == 0",
        "After warp_all every lane has the same bits.",
        True,
    ),
    Reason(
        "sums_of_row",
        "if .lane % 16",
        "lane % 16",
        "The lanes of a half have the same bits of its sum.",
        True,
    ),
    Reason("assume_at_once", ".*builtin_assume", "cols >= 0", "Rows of no columns launch no kernel.", True),
    Reason(
        "scores|gradients",
        r"if \(col \+ kWidth > n\)",
        r"col \+ kWidth > n",
        "Of columns that end where the row does none is past its end.",
        True,
    ),
    Reason(
        "softmax_(forward|backward)_kernel",
        r"for \(int64_t start",
        r"start < (n|a\.cols)",
        "One turn more begins where the row ends: it has no columns, and adds exp(-inf) = 0.",
        True,
    ),
    Reason(
        "gradients",
        r"if \(col \+ k >= n\)",
        r"col \+ k >= n",
        "The first excluded y is 0: only a gradient of NaN or infinity there shows."
        " tests/test_cuda_kernels.py has one, and catches this.",
    ),
    Reason("Normal|Sigmoid", "distribution|value", "z < 0", "Of 0 both sides are 1/2, to 6e-8.", True),
    Reason("value", r".*z <= 0", "z <= 0", "relu(0) is 0 on both sides, of whatever sign.", True),
    Reason(
        "quantise",
        "const bool usable",
        "scale ",
        "0 / 0 and x / inf become 0 as well: NaN converted to an integer is 0, and x / inf rounds to it.",
        True,
    ),
    Reason("quantise_row", "if .threadIdx.x", "threadIdx.x % 32", "Every lane has the same scales.", True),
    Reason("append_kv_kernel", "if .position < 0", "position >= capacity", _BAD_PLACE),
    Reason("exists", "return page", "page < pages", _BAD_PLACE),
    Reason("is_used", "return target", "target < in.cols", _BAD_TARGET),
    Reason(
        "RowGradient|loss_of",
        ".*in.z_loss > 0",
        "in.z_loss > 0",
        "Of a z_loss of 0 both sides are the same, or NaN where lse is infinite and the loss is NaN already.",
        True,
    ),
    Reason(
        "loss_of|row_losses_kernel",
        ".*in.label_smoothing > 0",
        "in.label_smoothing > 0",
        "Without smoothing one adds up what nobody takes, the other 0 times a number, or to a loss of NaN.",
        True,
    ),
    Reason(
        "replace",
        "if .at < kWidth",
        "at < kWidth",
        "A target one column behind these is none of them: both ways give them the same.",
        True,
    ),
    Reason(
        "row_losses_kernel|store_gradient",
        r"for \(int64_t start",
        "start < in.cols",
        "One turn more begins where the row ends: it has no columns, and adds exp(-inf) = 0.",
        True,
    ),
    Reason(
        "row_losses_kernel", "if .at.thread == 0", "at.thread == 0", "Every thread has the same loss.", True
    ),
    Reason(
        "(layer|rms)_norm_forward_kernel",
        "if .at.thread == 0",
        "at.thread == 0",
        "Every thread has the same mean and rstd.",
        True,
    ),
    Reason(
        "(layer|rms)_norm_(forward|backward_long)_kernel",
        r"for \(int64_t start",
        r"start < a\.cols",
        "One turn more begins where the row ends: it has no columns, and adds 0.",
        True,
    ),
    Reason(
        "row_losses_kernel",
        r".*__syncwarp",
        r"bar\.warp\.sync",
        "Only where the gradient takes the logits' place does it matter, and ptxsim keeps no account of who"
        " reads global memory: that another lane's write may come first is not seen.",
    ),
    Reason(
        "cross_entropy_backward_kernel",
        ".*a.count > 0",
        r"\*a\.count > 0",
        "Where no row counts, none has a gradient that this factor goes into.",
        True,
    ),
    Reason(
        "reach_of",
        "const int64_t first",
        r"a\.left < 0",
        "Of a window of the own key alone this reads all keys before it, and range_of hides them.",
    ),
    Reason(
        "reach_of|range_of", ".*a.left >= ", r"a\.left >= ", "Where they are equal both sides are 0.", True
    ),
    Reason(
        "row_of",
        "return ",
        r"r < d\.cut\.rows",
        "Row `rows` is the last one once more: the same values go to the same place.",
        True,
    ),
    Reason(
        "along|step",
        r"(for \(int slot|if \(start).* < end|if \(start >= end",
        "start (<|>=) end",
        "A step that begins where the keys end has none: all its scores are hidden, and their weights are 0.",
        True,
    ),
    Reason("gather", "if .lane % 4 == 0", "lane % 4", "The four lanes of a row have the same bits.", True),
    Reason(
        "store_rows", "if .threadIdx", "threadIdx.x % 4", "The four lanes of a row have the same lse.", True
    ),
    Reason("gather", r"for \(int w = 0", "w < warps", "No warp has that turn: a barrier more.", True),
    Reason(
        "gather", "if .w == warp", r"w \+ 1 < warps", "The last warp leaves sums that nobody takes.", True
    ),
    Reason(
        "decode_attention_kernel",
        "if .cut.parts > 1",
        "begin >= end",
        "Of no keys a part writes a weight of 0, where the merge does not look.",
        True,
    ),
    Reason(
        "decode_attention_kernel",
        r"if \(begin < end\) walk.ask",
        "begin < end",
        "Of no keys none is asked for: the copies write zeros, and are waited for.",
        True,
    ),
    Reason(
        "copy",
        "if .warp == 0",
        "lane / kKeys == kValues",
        "Scales of keys and values have the same strides: both halves of a warp have found the same places.",
        True,
    ),
    Reason("exists", "return page", "page >= 0", "Page 0 is what stands for one that does not exist.", True),
    Reason(
        "decode_merge_kernel",
        "if .col < a.value_dim. out",
        r"col < a\.value_dim",
        "What is read beside a row, within the same buffer, is not stored.",
        True,
    ),
    Reason("decode_merge_kernel", "if .col == 0", "col == 0", "Every thread has the same lse.", True),
    Reason(
        "attention_dq_kernel",
        r"__syncthreads\(\);$",
        r"bar\.sync 0 ",
        "Behind the first of two walks: none touches shared memory before the second, whose barriers serve.",
        True,
    ),
    Reason("(fill|zero)_gaps", r"for \(int col", "col < kDim", _GAPS),
    Reason("for_gaps", r"const int64_t (begin|end) =|for \(int64_t row", "b ==|row <", _GAPS),
    Reason("attention_(forward|dq|dkv)_kernel", r"if \(a\.in\.[qk]\.starts", r"(at\.)?tile == 0", _GAPS),
    Reason(
        "fill_gaps", r"if \(threadIdx", r"threadIdx\.x == 0", "Every thread writes the same number.", True
    ),
    Reason(
        "store|keep_rows",
        r"if \((i < seq\.nq|lane_col)",
        r"lane_col\(\) == 0",
        "The four lanes of a row have the same numbers of it.",
        True,
    ),
    Reason(
        "attention_(forward|dq|dkv)_kernel|store_dq|store",
        r"if \((first|own\.i0|i0|j0) (>=|<) (seq\.nq|written)",
        r"(own\.)?(first|i0|j0) (>=|<) (seq\.nq|written)",
        "Of rows that begin where queries or keys end none is stored.",
        True,
    ),
    Reason(
        "along|walk",
        r"(if|for) \((keys\.begin <|int j0|j0 \+ kStep|kStages == 2 && step \+ 1)",
        r".*keys\.(begin|end)",
        "A tile behind the last seen key is copied that nobody reads, or all of it hidden.",
        True,
    ),
    Reason(
        "walk",
        r"if \(kStages == 2 && steps",
        "steps > 0",
        "Of no steps a tile is copied that nobody reads.",
        True,
    ),
    Reason(
        "sees",
        "return i0 < nq",
        "(i0 < nq|j0 < nk)",
        "A tile that begins where queries or keys end is computed, and all of it hidden or not stored.",
        True,
    ),
    Reason(
        "has_edge",
        "return j1 >= nk",
        "j1 - i0|j0 - i1",
        "Pairs are looked at one by one in a tile that hides none.",
        True,
    ),
    Reason("steps", ".*end > begin", "end > begin", "Of no rows 0 steps either way.", True),
    Reason(
        "queries_of",
        "const int end",
        "first < seq.nk",
        "Of keys that begin where keys end every pair is hidden.",
        True,
    ),
    Reason(
        "survivors",
        "for .int n = 0",
        "n < kCols",
        "Bits of pairs that there are not: nobody reads them.",
        True,
    ),
    Reason("tanh_of", "return fabsf", ".*0.625f", "At 0.625 both ways are as exact."),
]
