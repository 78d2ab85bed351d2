"""All workloads, and the choice among them."""

from functools import partial

from .. import ops
from ..cli.errors import CommandError
from ..testing.cases import cases_of
from . import matmuls, rowwise
from .workload import Baseline, Workload

WORKLOADS = [*rowwise.WORKLOADS, *matmuls.WORKLOADS]


def of_cases(op: str) -> list[Workload]:
    """The op's test cases as workloads, beside the op's own reference; their sizes are the cases' own."""
    forward_only = cases_of(op)[1] == ()
    return [
        Workload(
            op,
            case.name,
            case.inputs,
            (),
            (),
            {"eager": Baseline(partial(_reference, op))},
            lambda arguments, direction: None,
            pick=_first,
            directions=("forward",) if forward_only else ("both",),
        )
        for case in cases_of(op)[0]
    ]


def _first(output, arguments: dict):
    return output[0] if isinstance(output, tuple) else output


def _reference(op: str, **arguments):
    return _first(getattr(ops, op)(**arguments, backend="reference"), arguments)


def chosen(op_names: list[str], part: str, cases: bool = False) -> list[Workload]:
    """The workloads of these ops (all if none is named) whose title holds `part`.

    cases: the ops' test cases instead. Raises: CommandError for an unknown op.
    """
    known = sorted({w.op for w in WORKLOADS})
    for name in op_names:
        if name not in known:
            raise CommandError(f"--op must be one of {', '.join(known)}, got {name}")
    wanted = op_names or known
    among = [w for op in wanted for w in of_cases(op)] if cases else [w for w in WORKLOADS if w.op in wanted]
    return [w for w in among if part in w.title]
