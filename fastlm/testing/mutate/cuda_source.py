"""The comparisons in csrc/cuda's device code, and both ways to flip them: one, or all behind a number each.

clang-format puts a space on either side of a comparison and none inside a template's brackets.
"""

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_FLIPPED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
_COMPARISON = re.compile(r"(?<=\s)(<=?|>=?|==|!=)(?=\s)")
_HIDDEN = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?!pragma)[^\n]*', re.S | re.M)
_HEAD = re.compile(r"(?m)^(?!namespace|using|#|\}|\s)")
_ENDS = ("&&", "||", "?", " :", ",", ";", "{", "}", "return", " = ", "=\n", "+=", "|=", "&=", "|", "!(")
_NEVER = re.compile(r"static_assert|conditional_t|\brequires\b")
_CONDITION = re.compile(r".*(#pragma unroll\n\s*for |\bconstexpr\s*)(?=\()", re.S)
_BOUNDS = re.compile(r"__launch_bounds__\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
_COUNTING = re.compile(r"(#pragma unroll \d[^\n]*)?\n\s*for \(\w+ \w+ = ([^;]+); \w+\s$")
_CONSTANT = re.compile(r"(?:\d+|k[A-Z]\w*|\w+::k[A-Z]\w*|[-+*/ ])+")
_FUNCTION = re.compile(r"(?:__device__|__global__|__host__)[^;{}=]*?\b(\w+)\s*\(")

# `a < Flip<7>() < b` is a < b, or a <= b where %envreg0 is 7: %envreg0 is what nobody else reads.
FLIPS = """
namespace fastlm {
template <unsigned kNumber>
struct Flip {
  __host__ __device__ static bool on() {
    unsigned number = 0;
#ifdef __CUDA_ARCH__
    asm("mov.u32 %0, %%envreg0;" : "=r"(number));
#endif
    return number == kNumber;
  }
};
template <unsigned kNumber, class A>
struct Flipped {
  A a;
};
#define FASTLM_FLIP(op, result)                                          \\
  template <class A, unsigned kNumber>                                   \\
  __host__ __device__ auto operator op(A a, Flip<kNumber>) {             \\
    return Flipped<kNumber, A>{a};                                       \\
  }                                                                      \\
  template <class A, unsigned kNumber, class B>                          \\
  __host__ __device__ bool operator op(Flipped<kNumber, A> left, B b) {  \\
    const A a = left.a;                                                  \\
    const bool flip = Flip<kNumber>::on();                               \\
    return result;                                                       \\
  }
FASTLM_FLIP(<, (a < b) | (flip & (a == b)))
FASTLM_FLIP(<=, (a <= b) & !(flip & (a == b)))
FASTLM_FLIP(>, (a > b) | (flip & (a == b)))
FASTLM_FLIP(>=, (a >= b) & !(flip & (a == b)))
FASTLM_FLIP(==, (a == b) != flip)
FASTLM_FLIP(!=, (a != b) != flip)
}  // namespace fastlm
"""


class Comparison(NamedTuple):
    """One operator of a file.

    start, end: its place in the text. line: of the file. function: that it is in. what: the change in words.
    number: of its flip.
    """

    file: Path
    start: int
    end: int
    line: int
    function: str
    what: str
    number: int


@functools.cache
def comparisons(file: Path) -> tuple[Comparison, ...]:
    """Those of device code that are made at run time.

    Not what a compile-time condition, a constant or the bound of an unrolled loop compares: a wrong one of
    these does not compile, or indexes registers that there are not.
    """
    text = file.read_text()
    code = _HIDDEN.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)
    found, alike = [], Counter()
    for start, end in _device_blocks(code):
        for match in _COMPARISON.finditer(code, start, end):
            before = code[start : match.start()]
            left, right = _left(before), _right(code[match.end() : end])
            if "{" not in before or _is_constant(before) or _counts(before, right):
                continue
            line = code.count("\n", 0, match.start()) + 1
            what = f"{left} {match[1]} {right} -> {left} {_FLIPPED[match[1]]} {right}"
            alike[line, what] += 1
            what += f" ({alike[line, what]})" * (alike[line, what] > 1)
            number = int(hashlib.sha256(f"{file.name} {line} {what}".encode()).hexdigest()[:7], 16)
            function = (_FUNCTION.findall(_BOUNDS.sub("", before)) or ["?"])[-1]
            found.append(Comparison(file, match.start(), match.end(), line, function, what, number))
    return tuple(found)


def flipped(one: Comparison) -> str:
    """Its file's text with this comparison flipped."""
    text = one.file.read_text()
    return text[: one.start] + _FLIPPED[text[one.start : one.end]] + text[one.end :]


def behind_numbers(file: Path) -> str:
    """A file's text with every comparison flipped while %envreg0 has its number."""
    text = file.read_text()
    for c in reversed(comparisons(file)):
        op = text[c.start : c.end]
        text = f"{text[: c.start]}{op} Flip<{c.number}u>() {op}{text[c.end :]}"
    return text


def _device_blocks(code: str) -> Iterator[tuple[int, int]]:
    """Where top-level functions and structs of device code begin and end."""
    end = 0
    for head in _HEAD.finditer(code):
        if head.start() < end:
            continue
        opened = re.compile(r"[;{]").search(code, head.start())
        if opened is None or opened.group() == ";":
            end = opened.end() if opened else len(code)
            continue
        end = _closing(code, opened.start()) or len(code)
        begin = code[head.start() : opened.start()]
        block = code[head.start() : end]
        if "constexpr" not in begin and ("__device__" in block or "__global__" in block):
            yield head.start(), end


def _closing(code: str, start: int, pair: str = "{}") -> int | None:
    """Behind what closes the bracket that opens at `start`; None if nothing does."""
    depth = 0
    for at in range(start, len(code)):
        depth += (code[at] == pair[0]) - (code[at] == pair[1])
        if depth == 0:
            return at + 1
    return None


def _is_constant(before: str) -> bool:
    """Whether what a comparison is part of is known when the kernel is compiled."""
    statement = re.split(r"[;{}]", before)[-1]
    if _NEVER.search(statement):
        return True
    condition = _CONDITION.match(before)
    if condition and _closing(before, condition.end(), "()") is None:
        return True
    return bool(re.search(r"\bconstexpr\b(?!\s*\()", statement))


def _counts(before: str, bound: str) -> bool:
    """Whether a comparison ends a loop from a constant to a constant: nvcc unrolls it without being told."""
    begun = _COUNTING.search(before)
    return bool(begun and not begun[1] and _CONSTANT.fullmatch(begun[2]) and _CONSTANT.fullmatch(bound))


def _left(before: str) -> str:
    """The operand that ends here."""
    depth, at = 0, len(before)
    while at > 0:
        depth += (before[at - 1] in ")]") - (before[at - 1] in "([")
        if depth < 0 or depth == 0 and any(before[:at].endswith(e) for e in _ENDS):
            break
        at -= 1
    return " ".join(before[at:].split())


def _right(after: str) -> str:
    """The operand that begins here."""
    depth, at = 0, 0
    while at < len(after):
        depth += (after[at] in "([") - (after[at] in ")]")
        if depth < 0 or depth == 0 and any(after.startswith(e, at) for e in _ENDS[:-1]):
            break
        at += 1
    return " ".join(after[:at].split())
