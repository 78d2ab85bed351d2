"""The whitelist: every arithmetic form that the simulator knows, with its types and its meaning.

Form(results, operands, expression): types are p (predicate) or a kind u, i, f and bytes; {0}, {1}, ... are
the operands. Names in expressions are numpy and those of arithmetic.py. Memory, control and warp forms are
compiled in compile.py, tensor-core forms are in matrix.py. A form that is nowhere is refused by name.
"""

from typing import NamedTuple


class Form(NamedTuple):
    """Types of what it writes and reads, and the expression."""

    results: tuple[str, ...]
    operands: tuple[str, ...]
    expression: str


FORMS: dict[str, Form] = {}
_INTEGERS = {f"{k}{b}": f"{'u' if k == 'u' else 'i'}{b // 8}" for k in "us" for b in (16, 32, 64)}
_BITS = {"b16": "u2", "b32": "u4", "b64": "u8"}
_FLOATS = {"f32": "f4", "f64": "f8"}
_ROUND = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}


def _add(name: str, results: str, operands: str, expression: str) -> None:
    FORMS[name] = Form(tuple(results.split()), tuple(operands.split()), expression)


def _integers() -> None:
    for kind, t in _INTEGERS.items():
        for name, sign in (("add", "+"), ("sub", "-"), ("mul.lo", "*")):
            _add(f"{name}.{kind}", t, f"{t} {t}", f"{{0}} {sign} {{1}}")
        _add(f"mad.lo.{kind}", t, f"{t} {t} {t}", "{0} * {1} + {2}")
        _add(f"min.{kind}", t, f"{t} {t}", "np.minimum({0}, {1})")
        _add(f"max.{kind}", t, f"{t} {t}", "np.maximum({0}, {1})")
        _add(f"div.{kind}", t, f"{t} {t}", "quotient({0}, {1})")
        _add(f"rem.{kind}", t, f"{t} {t}", "remainder({0}, {1})")
        _add(f"shr.{kind}", t, f"{t} u4", "shift_right({0}, {1})")
        if kind == "s32":  # .relu: 0 where the result is negative
            _add("min.relu.s32", t, f"{t} {t}", "np.maximum(np.minimum({0}, {1}), 0)")
            _add("max.relu.s32", t, f"{t} {t}", "np.maximum(np.maximum({0}, {1}), 0)")
        if kind[0] == "s":
            _add(f"neg.{kind}", t, t, "-{0}")
            _add(f"abs.{kind}", t, t, "np.abs({0})")
    for k in "us":
        t = "u" if k == "u" else "i"
        for bits, wide in ((16, 4), (32, 8)):
            narrow, to = f"{t}{bits // 8}", f"{t}{wide}"
            product = f"{{0}}.astype({to.upper()}) * {{1}}"
            _add(f"mul.wide.{k}{bits}", to, f"{narrow} {narrow}", product)
            _add(f"mad.wide.{k}{bits}", to, f"{narrow} {narrow} {to}", f"{product} + {{2}}")
            _add(f"mul.hi.{k}{bits}", narrow, f"{narrow} {narrow}", f"high({{0}}, {{1}}, {to.upper()})")
        _add(f"mad.hi.{k}32", f"{t}4", f"{t}4 {t}4 {t}4", f"high({{0}}, {{1}}, {t.upper()}8) + {{2}}")
    _add("mul.hi.u64", "u8", "u8 u8", "high64({0}, {1})")
    _add("mul.hi.s64", "i8", "i8 i8", "high64_signed({0}, {1})")


def _logic() -> None:
    for kind, t in (*_BITS.items(), ("pred", "p")):
        for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
            _add(f"{name}.{kind}", t, f"{t} {t}", f"{{0}} {sign} {{1}}")
        _add(f"not.{kind}", t, t, "~{0}")
    for kind, t in _BITS.items():
        _add(f"shl.{kind}", t, f"{t} u4", "shift_left({0}, {1})")
        _add(f"shr.{kind}", t, f"{t} u4", "shift_right({0}, {1})")
    for side in ("l", "r"):
        function = "funnel_left" if side == "l" else "funnel_right"
        _add(f"shf.{side}.wrap.b32", "u4", "u4 u4 u4", f"{function}({{0}}, {{1}}, {{2}})")
    _add("bfe.u32", "u4", "u4 u4 u4", "extract({0}, {1}, {2})")
    _add("bfe.s32", "i4", "i4 u4 u4", "extract_signed({0}, {1}, {2})")
    _add("bfi.b32", "u4", "u4 u4 u4 u4", "insert({0}, {1}, {2}, {3})")
    _add("prmt.b32", "u4", "u4 u4 u4", "permute({0}, {1}, {2})")
    _add("lop3.b32", "u4", "u4 u4 u4 u4", "lookup3({0}, {1}, {2}, {3})")
    _add("popc.b32", "u4", "u4", "count_bits({0})")
    _add("clz.b32", "u4", "u4", "leading_zeros({0})")


def _flushing(name: str, results: str, operands: str, expression: str) -> None:
    """A float32 form, and the same with .ftz before its type."""
    _add(name, results, operands, expression)
    inputs = [f"flush({{{i}}})" if t == "f4" else f"{{{i}}}" for i, t in enumerate(operands.split())]
    flushed = expression.format(*inputs)
    kind = name.rsplit(".", 1)
    _add(f"{kind[0]}.ftz.{kind[1]}", results, operands, f"flush({flushed})" if results == "f4" else flushed)


def _floats() -> None:
    for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
        for rounding in ("", ".rn"):
            _flushing(f"{name}{rounding}.f32", "f4", "f4 f4", f"{{0}} {sign} {{1}}")
            _add(f"{name}{rounding}.f64", "f8", "f8 f8", f"{{0}} {sign} {{1}}")
            _add(f"{name}{rounding}.f16", "f2", "f2 f2", f"{{0}} {sign} {{1}}")
            _add(f"{name}{rounding}.f32x2", "u8", "u8 u8", f"in_pairs(lambda a, b: a {sign} b, {{0}}, {{1}})")
            half = f"(lambda a, b: a {sign} b, {{0}}, {{1}})"
            _add(f"{name}{rounding}.f16x2", "u4", "u4 u4", f"in_half_pairs{half}")
            _add(f"{name}{rounding}.bf16x2", "u4", "u4 u4", f"in_bf16_pairs{half}")
            bf16 = f"to_bf16(from_bf16({{0}}) {sign} from_bf16({{1}}))"
            _add(f"{name}{rounding}.bf16", "u2", "u2 u2", bf16)
        _add(f"{name}.rn.f32.f16", "f4", "f2 f4", f"{{0}}.astype(F4) {sign} {{1}}")
        _add(f"{name}.rn.f32.bf16", "f4", "u2 f4", f"from_bf16({{0}}) {sign} {{1}}")
    _flushing("fma.rn.f32", "f4", "f4 f4 f4", "fma({0}, {1}, {2})")
    _add("fma.rm.f32", "f4", "f4 f4 f4", "fma_down({0}, {1}, {2})")
    _add("fma.rn.f32x2", "u8", "u8 u8 u8", "in_pairs(fma, {0}, {1}, {2})")
    _add("fma.rn.f32.f16", "f4", "f2 f2 f4", "fma({0}, {1}.astype(F4), {2})")
    _add("fma.rn.f32.bf16", "f4", "u2 u2 f4", "fma(from_bf16({0}), from_bf16({1}), {2})")
    _add(
        "fma.rn.bf16x2",
        "u4",
        "u4 u4 u4",
        "in_bf16_pairs(lambda a, b, c: a.astype(F8) * b + c, {0}, {1}, {2})",
    )
    _add(
        "fma.rn.f16x2",
        "u4",
        "u4 u4 u4",
        "in_half_pairs(lambda a, b, c: (a.astype(F8) * b + c).astype(F2), {0}, {1}, {2})",
    )
    _add("fma.rn.bf16", "u2", "u2 u2 u2", "to_bf16(fma(from_bf16({0}), from_bf16({1}), from_bf16({2})))")
    _add("fma.rn.f16", "f2", "f2 f2 f2", "({0}.astype(F8) * {1} + {2}).astype(F2)")
    for name in ("max", "min"):
        _flushing(f"{name}.f32", "f4", "f4 f4", f"{name}imum({{0}}, {{1}})")
        nan = f"{name}imum({{0}}, {{1}}, np.{name}imum)"
        _add(f"{name}.NaN.f32", "f4", "f4 f4", nan)
        _add(f"{name}.ftz.NaN.f32", "f4", "f4 f4", nan.format("flush({0})", "flush({1})"))
        _add(f"{name}.xorsign.abs.f32", "f4", "f4 f4", f"joint_sign({name}imum, {{0}}, {{1}})")
    for name, function in (("abs", "np.abs({0})"), ("neg", "-{0}")):
        _flushing(f"{name}.f32", "f4", "f4", function)
        _add(f"{name}.f64", "f8", "f8", function)
    _add("copysign.f32", "f4", "f4 f4", "np.copysign({1}, {0})")
    _flushing("div.rn.f32", "f4", "f4 f4", "{0} / {1}")
    for rounding in ("full", "approx"):
        _flushing(f"div.{rounding}.f32", "f4", "f4 f4", "approximate({0}.astype(F8) / {1})")
    _add("div.rn.f64", "f8", "f8 f8", "{0} / {1}")
    _flushing("rcp.rn.f32", "f4", "f4", "F4(1) / {0}")
    _flushing("sqrt.rn.f32", "f4", "f4", "np.sqrt({0})")
    _flushing("rcp.approx.f32", "f4", "f4", "approximate(1 / {0}.astype(F8))")
    _flushing("sqrt.approx.f32", "f4", "f4", "approximate(np.sqrt({0}.astype(F8)))")
    _flushing("rsqrt.approx.f32", "f4", "f4", "approximate(1 / np.sqrt({0}.astype(F8)))")
    _flushing("ex2.approx.f32", "f4", "f4", "approximate(np.exp2({0}.astype(F8)))")
    _flushing("lg2.approx.f32", "f4", "f4", "approximate(np.log2({0}.astype(F8)))")


_RELATIONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNORDERED = {"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}


def _comparisons() -> None:
    compared = [(k, t) for k, t in (*_INTEGERS.items(), *_BITS.items())]
    for relation, sign in _RELATIONS.items():
        for kind, t in compared:
            if kind[0] != "b" or relation in ("eq", "ne"):
                _compare(relation, kind, t, f"({{0}} {sign} {{1}})")
    for name, sign in (("lo", "<"), ("ls", "<="), ("hi", ">"), ("hs", ">=")):
        for kind in ("u16", "u32", "u64"):
            _compare(name, kind, _INTEGERS[kind], f"({{0}} {sign} {{1}})")
    for kind, t, widen in (
        ("f32", "f4", "{}"),
        ("f64", "f8", "{}"),
        ("f16", "f2", "{}"),
        ("bf16", "u2", "from_bf16({})"),
    ):
        a, b = widen.format("{0}"), widen.format("{1}")
        for relation, sign in _RELATIONS.items():
            # ne is ordered in PTX: false where either is NaN; numpy's != is true there.
            ordered = f"({a} {sign} {b})" if relation != "ne" else f"(({a} < {b}) | ({a} > {b}))"
            _compare(relation, kind, t, ordered)
        for relation, sign in _UNORDERED.items():
            _compare(relation, kind, t, f"(({a} {sign} {b}) | np.isnan({a}) | np.isnan({b}))")
        _compare("num", kind, t, f"~(np.isnan({a}) | np.isnan({b}))")
        _compare("nan", kind, t, f"(np.isnan({a}) | np.isnan({b}))")


def _compare(relation: str, kind: str, t: str, expression: str) -> None:
    _add(f"setp.{relation}.{kind}", "p", f"{t} {t}", expression)
    for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        _add(f"setp.{relation}.{name}.{kind}", "p", f"{t} {t} p", f"{expression} {sign} {{2}}")


def _moves() -> None:
    for kind, t in (*_INTEGERS.items(), *_BITS.items(), *_FLOATS.items(), ("pred", "p")):
        _add(f"mov.{kind}", t, t, "{0}")
        if kind != "pred":
            _add(f"selp.{kind}", t, f"{t} {t} p", "np.where({2}, {0}, {1})")
    for space in ("global", "shared"):
        _add(f"cvta.to.{space}.u64", "u8", "u8", "{0}")


def _conversions() -> None:
    small = {"u8": "u1", "s8": "i1", **_INTEGERS}
    for to, t in small.items():
        for source, s in small.items():
            container = s if s[1] != "1" else f"{s[0]}2"
            inner = "{0}" if s[1] != "1" else f"{{0}}.astype({s.upper()})"
            result = t if t[1] != "1" else f"{t[0]}2"
            narrowed = f"{inner}.astype({t.upper()})"
            _add(
                f"cvt.{to}.{source}",
                result,
                container,
                narrowed if result == t else f"{narrowed}.astype({result.upper()})",
            )
    for kind, t in _INTEGERS.items():
        for to, f in _FLOATS.items():
            _add(f"cvt.rn.{to}.{kind}", f, t, f"{{0}}.astype({f.upper()})")
            for rounding, function in _ROUND.items():
                integer = f"to_integer({{0}}, {t.upper()}, {function})"
                _add(f"cvt.{rounding}.{kind}.{to}", t, f, integer)
                if to == "f32":
                    _add(f"cvt.{rounding}.ftz.{kind}.{to}", t, f, integer.replace("{0}", "flush({0})"))
    for kind in ("s16", "u16", "s32", "u32"):  # exact in f64, so rounded once
        _add(f"cvt.rn.f16.{kind}", "f2", _INTEGERS[kind], "{0}.astype(F8).astype(F2)")
    for rounding, function in _ROUND.items():
        _add(f"cvt.{rounding}.f32.f32", "f4", "f4", f"{function}({{0}})")
        _add(f"cvt.{rounding}.ftz.f32.f32", "f4", "f4", f"{function}(flush({{0}}))")
    _add("cvt.sat.f32.f32", "f4", "f4", "saturate({0})")
    _add("cvt.rn.f16.f32", "f2", "f4", "{0}.astype(F2)")
    _add("cvt.f32.f16", "f4", "f2", "{0}.astype(F4)")
    _add("cvt.rn.bf16.f32", "u2", "f4", "to_bf16({0})")
    _add("cvt.f32.bf16", "f4", "u2", "from_bf16({0})")
    _add("cvt.rn.bf16x2.f32", "u4", "f4 f4", "joined(to_bf16({1}), to_bf16({0}))")
    _add("cvt.rn.f16x2.f32", "u4", "f4 f4", "joined({1}.astype(F2).view(U2), {0}.astype(F2).view(U2))")
    _add("cvt.rna.tf32.f32", "u4", "f4", "to_tf32({0})")
    _add("cvt.f64.f32", "f8", "f4", "{0}.astype(F8)")
    _add("cvt.rn.f32.f64", "f4", "f8", "{0}.astype(F4)")
    for kind in ("s8", "u8"):  # of a byte in a 16-bit register
        t = f"{'i' if kind == 's8' else 'u'}1"
        _add(f"cvt.rn.f32.{kind}", "f4", "u2", f"{{0}}.astype({t.upper()}).astype(F4)")
        _add(f"cvt.rn.f16.{kind}", "f2", "u2", f"{{0}}.astype({t.upper()}).astype(F2)")


for _table in (_integers, _logic, _floats, _comparisons, _moves, _conversions):
    _table()
THREE = {  # sm_100 and up: the same name with three operands
    "max.f32": Form(("f4",), ("f4", "f4", "f4"), "maximum(maximum({0}, {1}), {2})"),
    "min.f32": Form(("f4",), ("f4", "f4", "f4"), "minimum(minimum({0}, {1}), {2})"),
    "max.NaN.f32": Form(
        ("f4",), ("f4", "f4", "f4"), "maximum(maximum({0}, {1}, np.maximum), {2}, np.maximum)"
    ),
    "min.NaN.f32": Form(
        ("f4",), ("f4", "f4", "f4"), "minimum(minimum({0}, {1}, np.minimum), {2}, np.minimum)"
    ),
}


def form_of(opcode: str, operands: int) -> Form | None:
    """The form with that many operands, its results among them; None if nobody has written it."""
    for form in (FORMS.get(opcode), THREE.get(opcode)):
        if form is not None and len(form.results) + len(form.operands) == operands:
            return form
    return None
