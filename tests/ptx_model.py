"""What the PTX ISA says that arithmetic instructions compute, in Python's whole numbers and fractions.

Written from its sections "Integer Arithmetic Instructions", "Floating Point Instructions", "Comparison and
Selection Instructions", "Logic and Shift Instructions", "Data Movement and Conversion Instructions: cvt".
Operands and results are bit patterns; a NaN as result is the float NaN, since its payload is free.
"""

import functools
import math
import re
from fractions import Fraction

FORMATS = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23), "f64": (11, 52)}  # bits of exponent and mantissa
WIDTH = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
NAN = math.nan


@functools.lru_cache(1 << 17)
def decode(bits, kind):
    """The value of a bit pattern: a float, which holds all four formats exactly."""
    exponent, mantissa = FORMATS[kind]
    sign = -1.0 if bits >> (exponent + mantissa) & 1 else 1.0
    e, m = bits >> mantissa & ((1 << exponent) - 1), bits & ((1 << mantissa) - 1)
    if e == (1 << exponent) - 1:
        return math.copysign(NAN if m else math.inf, sign)
    m += (e > 0) << mantissa
    return sign * math.ldexp(m, max(e, 1) - (1 << exponent - 1) + 1 - mantissa)


def encode(x, kind):
    """The bit pattern nearest to a float or Fraction, ties to even; NaN itself for NaN."""
    exponent, mantissa = FORMATS[kind]
    if x != x:
        return NAN
    infinite, lowest = ((1 << exponent) - 1) << mantissa, 2 - (1 << exponent - 1)
    negative = math.copysign(1, x) < 0 if isinstance(x, float) else x < 0
    if x in (0, math.inf, -math.inf):
        return (infinite if x else 0) | negative << exponent + mantissa
    over, under = abs(x).as_integer_ratio()
    e = over.bit_length() - under.bit_length()
    e = max(e - (over << max(-e, 0) < under << max(e, 0)), lowest)  # abs(x) is in [2^e, 2^(e + 1)), or below
    over, under = over << max(mantissa - e, 0), under << max(e - mantissa, 0)
    whole, rest = divmod(over, under)
    whole += (2 * rest, whole & 1) > (under, 0)
    return min(whole + (e - lowest << mantissa), infinite) | negative << exponent + mantissa


def flushed(x):
    """A subnormal float32 becomes a zero of its sign."""
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def unsigned(x, width):
    """The lower bits."""
    return x & ((1 << width) - 1)


def signed(x, width):
    """The lower bits as a number in two's complement."""
    x = unsigned(x, width)
    return x - (1 << width) if x >> (width - 1) else x


CUT = {"u": unsigned, "b": unsigned, "s": signed}


def two(low, high, width):
    """Two results in one register; NaN where either is."""
    return NAN if low != low or high != high else low | high << width


# Integers


def _towards_zero(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER = {  # on whole numbers; None where the ISA leaves the result open
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "mad.lo": lambda a, b, c: a * b + c,
    "min": min,
    "max": max,
    "min.relu": lambda a, b: max(min(a, b), 0),  # ".relu clamps the result to 0 if negative"
    "max.relu": lambda a, b: max(a, b, 0),
    "div": lambda a, b: _towards_zero(a, b) if b else None,
    "rem": lambda a, b: a - _towards_zero(a, b) * b if b else None,
    "neg": lambda a: -a,
    "abs": abs,
    "not": lambda a: ~a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "popc": lambda a: bin(a).count("1"),
}


def integer(name, kind, width):
    """add.s32 and the like."""
    cut = CUT[kind]
    special = {  # shifts are clamped at the width; mul.hi is the product's upper half, mul.wide all of it
        "shl": lambda a, n: unsigned(a << min(n, width), width),
        "shr": lambda a, n: unsigned(cut(a, width) >> min(n, width), width),
        "mul.hi": lambda a, b: unsigned(cut(a, width) * cut(b, width) >> width, width),
        "mad.hi": lambda a, b, c: unsigned((cut(a, width) * cut(b, width) >> width) + c, width),
        "mul.wide": lambda a, b: unsigned(cut(a, width) * cut(b, width), 2 * width),
        "mad.wide": lambda a, b, c: unsigned(cut(a, width) * cut(b, width) + c, 2 * width),
        "clz": lambda a: width - a.bit_length(),
    }
    if name not in INTEGER:
        return special.get(name)

    def compute(*operands):
        result = INTEGER[name](*(cut(o, width) for o in operands))
        return result if result is None else unsigned(result, width)

    return compute


def _bfe(kind, a, position, length):
    position, length = position & 255, length & 255
    sign = 0 if kind == "u" or length == 0 else a >> min(position + length - 1, 31) & 1
    return sum((a >> position + i & 1 if i < length and position + i <= 31 else sign) << i for i in range(32))


def _bfi(a, b, position, length):
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i <= 31:
            b = b & ~(1 << position + i) | (a >> i & 1) << position + i
    return b


def _prmt(a, b, c):
    both, result = b << 32 | a, 0
    for i in range(4):
        control = c >> 4 * i & 15
        byte = both >> 8 * (control & 7) & 255
        result |= ((255 if byte & 128 else 0) if control & 8 else byte) << 8 * i
    return result


def lop3(table):
    """lop3 with this immLut: its bit 4 a + 2 b + c, for each bit."""
    return lambda a, b, c: sum(
        (table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32)
    )


# Floating point


def smaller(a, b):
    """Of two zeros -0 is the smaller; of a NaN and a number the number."""
    if a != a or b != b:
        return b if a != a else a
    return min((a, b), key=lambda x: (x, math.copysign(1, x)))


def larger(a, b):
    """As smaller."""
    return -smaller(-a, -b)


def _with_nan(function):
    return lambda a, b: NAN if a != a or b != b else function(a, b)


def _joint_sign(function):
    return lambda a, b: function(abs(a), abs(b)) * math.copysign(1, a) * math.copysign(1, b)


def _quotient(a, b):
    if b != 0:
        return a / b
    return NAN if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1, b)


def _fused(a, b, c):
    plain = a * b + c
    if not all(map(math.isfinite, (a, b, c))):
        return plain
    return Fraction(a) * Fraction(b) + Fraction(c) or plain  # a zero has its sign from the plain sum


def _root(x):
    return NAN if x < 0 else x if x == 0 else math.sqrt(x)


def _logarithm(x):
    return NAN if x < 0 or x != x else -math.inf if x == 0 else math.inf if x == math.inf else math.log2(x)


FLOATING = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": _fused,
    "min": smaller,
    "max": larger,
    "min.NaN": _with_nan(smaller),
    "max.NaN": _with_nan(larger),
    "min.xorsign.abs": _joint_sign(smaller),
    "max.xorsign.abs": _joint_sign(larger),
    "abs": abs,
    "neg": lambda a: -a,
    "div": _quotient,
    "rcp": lambda a: _quotient(1.0, a),
    "sqrt": _root,
    "rsqrt": lambda x: _quotient(1.0, _root(x)),
    "ex2": lambda x: NAN if x != x else math.inf if x > 1100 else 2.0 ** max(x, -1100.0),
    "lg2": _logarithm,
    "tanh": math.tanh,
}
_FLOATING = re.compile(r"([a-z0-9]+)((?:\.\w+)*?)\.(f16|bf16|f32|f64)(x2)?(?:\.(f16|bf16))?$")


def floating(opcode):
    """add.rn.ftz.f32 and the like, f32x2, and a wider result than operands as in fma.rn.f32.bf16."""
    if not (match := _FLOATING.match(opcode)):
        return None
    name, modifiers, kind, pairs, narrow = match.groups()
    modifiers = modifiers.split(".")[1:]
    chosen = [m for m in modifiers if m in ("NaN", "xorsign", "abs")]
    function = FLOATING.get(".".join([name, *chosen]))
    if function is None or set(modifiers) - {"rn", "full", "approx", "ftz", *chosen}:
        return None
    flush = flushed if "ftz" in modifiers else (lambda x: x)
    kinds = [kind] * 3 if not narrow else [narrow, narrow, kind] if name == "fma" else [narrow, kind]

    def one(*operands):
        result = function(*(flush(decode(o, k)) for o, k in zip(operands, kinds, strict=False)))
        bits = encode(result, kind)
        return encode(flush(decode(bits, kind)), kind) if "ftz" in modifiers and bits == bits else bits

    width = WIDTH[kind]
    if pairs:
        return lambda *o: two(one(*(unsigned(x, width) for x in o)), one(*(x >> width for x in o)), width)
    return one


# Comparisons and conversions

COMPARED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
COMPARED |= {"lo": COMPARED["lt"], "ls": COMPARED["le"], "hi": COMPARED["gt"], "hs": COMPARED["ge"]}


def comparison(relation, joined, kind):
    """setp: a relation ending in u holds where either is NaN, the others do not."""

    def holds(a, b):
        if kind not in FORMATS:
            cut, width = CUT[kind[0]], int(kind[1:])
            return COMPARED[relation](cut(a, width), cut(b, width))
        a, b = decode(a, kind), decode(b, kind)
        unordered = a != a or b != b
        if relation in ("num", "nan"):
            return unordered == (relation == "nan")
        return relation.endswith("u") if unordered else COMPARED[relation.removesuffix("u")](a, b)

    if joined:
        return lambda a, b, c: int(INTEGER[joined](holds(a, b), bool(c)))
    return lambda a, b: int(holds(a, b))


ROUNDINGS = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def conversion(modifiers, to, source):
    """cvt.MODIFIERS.TO.SOURCE."""
    rounding = next((ROUNDINGS[m] for m in modifiers if m in ROUNDINGS), None)
    flush = flushed if "ftz" in modifiers else (lambda x: x)
    width = WIDTH.get(to) or int(to[1:])

    def to_integer(bits):
        low = -(1 << width - 1) if to[0] == "s" else 0
        high = low + (1 << width) - 1
        x = flush(decode(bits, source))
        if x != x:
            return 0 if source != "f64" and to not in ("s64", "u64") else 1 << width - 1
        x = rounding(x) if math.isfinite(x) else x
        return unsigned(int(min(max(x, low), high)), width)

    def to_whole_float(bits):
        x = flush(decode(bits, source))
        return encode(math.copysign(rounding(x), x) if math.isfinite(x) else x, to)

    if source in FORMATS:
        if to not in FORMATS:
            return to_integer
        return to_whole_float if rounding else lambda bits: encode(flush(decode(bits, source)), to)
    cut, from_width = CUT[source[0]], int(source[1:])
    if to in FORMATS:
        return lambda bits: encode(Fraction(cut(bits, from_width)), to)
    return lambda bits: unsigned(CUT[to[0]](cut(bits, from_width), width), max(width, 16))


def _packed(kind):
    """cvt.rn.f16x2.f32: a in the upper half."""
    return lambda a, b: two(encode(decode(b, "f32"), kind), encode(decode(a, "f32"), kind), 16)


def _tf32(a):
    if a & 0x7F800000 == 0x7F800000:
        return NAN if a & 0x7FFFFF else a
    return a + 0x1000 & 0xFFFFE000


def _fused_down(a, b, c):
    """fma.rm: "mantissa LSB rounds towards negative infinity"; an exact zero of two signs is then -0."""
    a, b, c = (decode(o, "f32") for o in (a, b, c))
    plain, exact = a * b + c, _fused(a, b, c)
    if not isinstance(exact, Fraction):
        signs = (math.copysign(1, a) * math.copysign(1, b), math.copysign(1, c))
        return encode(-0.0 if plain == 0 and -1 in signs else plain, "f32")
    bits = encode(exact, "f32")
    if decode(bits, "f32") <= exact:
        return bits
    return bits + 1 if bits >> 31 else bits - 1 if bits else 1 << 31 | 1


def _saturated(a):
    """cvt.sat: "clamped to the range [0.0, 1.0]"; "NaN results are flushed to +0.0f"."""
    x = decode(a, "f32")
    return encode(0.0 if x != x or x <= 0 else min(x, 1.0), "f32")


FIXED = {
    "fma.rm.f32": _fused_down,
    "cvt.sat.f32.f32": _saturated,
    "bfe.u32": functools.partial(_bfe, "u"),
    "bfe.s32": functools.partial(_bfe, "s"),
    "bfi.b32": _bfi,
    "prmt.b32": _prmt,
    "shf.l.wrap.b32": lambda a, b, n: (b << 32 | a) << (n & 31) >> 32 & 0xFFFFFFFF,
    "shf.r.wrap.b32": lambda a, b, n: (b << 32 | a) >> (n & 31) & 0xFFFFFFFF,
    "copysign.f32": lambda a, b: b & 0x7FFFFFFF | a & 0x80000000,  # the sign of a on the value of b
    "cvt.rna.tf32.f32": _tf32,
    "cvt.rn.bf16x2.f32": _packed("bf16"),
    "cvt.rn.f16x2.f32": _packed("f16"),
}


def model(opcode):
    """What an opcode computes, on bit patterns; None if nobody wrote it down here."""
    name, _, kind = opcode.rpartition(".")
    if opcode in FIXED:
        return FIXED[opcode]
    if opcode.startswith("cvta.to.") or name == "mov":
        return lambda a: a
    if name == "selp":
        return lambda a, b, c: a if c else b
    if match := re.match(r"setp\.(\w+)(?:\.(and|or|xor))?\.(\w+)$", opcode):
        return comparison(*match.groups())
    if name.startswith("cvt."):
        *modifiers, to, source = opcode.split(".")[1:]
        return conversion(modifiers, to, source)
    if kind == "pred":
        return integer(name, "u", 1)
    if match := re.match(r"[usb](16|32|64)$", kind):
        return integer(name, kind[0], int(match.group(1)))
    return floating(opcode)
