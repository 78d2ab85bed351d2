"""The support matrix: which backend has a kernel for which op, read from the registry."""

from .._op import _DTYPES, BACKENDS, OPS, Op

BEGIN, END = "<!-- matrix:start -->", "<!-- matrix:end -->"
_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64"}


def support_matrix() -> str:
    """A Markdown table, one row per op and one column per backend; the same on every machine."""
    rows = [["op", *BACKENDS, "the kernels leave to the reference"], ["---"] * (len(BACKENDS) + 2)]
    for name, op in sorted(OPS.items()):
        rows.append([f"`{name}`", *(_cell(op, backend) for backend in BACKENDS), _limits(op)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(op: Op, backend: str) -> str:
    if backend == "reference":
        return "all, and f64"
    if backend not in op.backends:
        return "–"
    directions = "forward + backward" if backend in op.backward else "forward"
    return f"{directions}: " + " ".join(_SHORT[str(d).removeprefix("torch.")] for d in _DTYPES)


def _limits(op: Op) -> str:
    told = []
    for backend, limits in op.backends.items():
        if limits and limits.__doc__:
            text = limits.__doc__.splitlines()[0].rstrip(".")
            told.append(f"{backend}: {text[0].lower()}{text[1:]}")
    return "; ".join(told)
