"""explain: which backend would run a call, and why the others would not."""

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from . import _op, ops


class Explanation(NamedTuple):
    """chosen: the backend that the call would run on. reasons: backend -> None if it can, else why not."""

    chosen: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{name}: {reason or 'can run'}" for name, reason in self.reasons.items()]
        return "\n".join([f"runs on {self.chosen}", *lines])


def explain(op: str | Callable, *args, **kwargs) -> Explanation:
    """Says which backend would run fastlm.ops.<op>(*args, **kwargs), without running it.

    op: the op's name or its public function. The rest: its arguments.
    Returns: Explanation; print it.
    Raises: ValueError for an unknown op, and what the op raises for bad input.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _op.OPS:
        raise ValueError(f"explain: op must be one of {', '.join(sorted(_op.OPS))}, got {name!r}")
    declared = _op.OPS[name]
    raw, backend = raw_arguments(name, *args, **kwargs)
    reasons = {b: declared.why_not(b, *raw) for b in _op.BACKENDS}
    return Explanation(declared.choose(backend, raw), reasons)


def raw_arguments(name: str, *args, **kwargs) -> tuple[tuple, str | None]:
    """(the forward schema's arguments of fastlm.ops.<name>(*args, **kwargs), its backend).

    A seed that is not given is 0: nothing is drawn from the random generator.
    Raises: what the op raises for bad input.
    """
    bound = inspect.signature(getattr(ops, name)).bind(*args, **kwargs)
    bound.apply_defaults()
    values = dict(bound.arguments)
    backend = values.pop("backend")
    if "seed" in values and values["seed"] is None:
        values["seed"] = 0
    return _op.OPS[name].check(**values), backend


def raw_backward_arguments(op: "_op.Op", arguments: Sequence, outputs: Sequence) -> list:
    """The backward schema's arguments as the autograd node passes them, of a forward on raw arguments.

    The gradient of the first output is 1, those of other public outputs are None where they may be; every
    tensor's gradient is wanted.
    """
    schema = next(iter(op.backward.values()))._schema
    gradients = [torch.ones_like(o) for o in outputs[: op.public]]
    known = gradients + list(arguments) + list(outputs)
    needs = [isinstance(arguments[i], torch.Tensor) for i in op.wanted]
    found = []
    for source, declared in zip(op.sources, schema.arguments, strict=True):
        unused = 0 < source < len(gradients) and isinstance(declared.type, torch.OptionalType)
        found.append(needs if source < 0 else None if unused else known[source])
    return found
