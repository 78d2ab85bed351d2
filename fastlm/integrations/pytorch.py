"""patch: gives the torch.nn modules of an existing model their fastlm classes, each proved first."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from .. import _load, _op
from ..testing.cases import Draw
from . import _proof
from ._adapters import TABLE, Adapter
from ._structures import STRUCTURES

# What is wrong fails in every draw. What is right may fail in one: where a ReLU's input rounds to the other
# side of 0, a gradient changes by a whole element (float16 decoder layers: 2 draws of 12).
_DRAWS = 3
_TWIN = {adapter.new: old for old, adapter in TABLE.items()}  # fastlm class -> torch class
_OURS = _TWIN.keys() | {adapter.new for row in STRUCTURES for adapter in row}


@dataclass(frozen=True)
class Swap:
    """One module that got a fastlm class. name: in the model, "" for the model itself."""

    name: str
    module: nn.Module = field(repr=False)
    old: type[nn.Module]
    new: type[nn.Module]


@dataclass(frozen=True)
class LeftAlone:
    """One module that kept its class, and why."""

    name: str
    class_name: str
    reason: str


@dataclass
class Report:
    """What patch did: print it, read it with to_dict(), take it back with undo()."""

    swapped: list[Swap]
    left_alone: list[LeftAlone]

    def undo(self) -> None:
        """Gives every swapped module its old class again: the model computes bitwise what it did before."""
        for swap in self.swapped:
            if type(swap.module) is swap.new:
                swap.module.__class__ = swap.old

    def to_dict(self) -> dict[str, list[dict[str, str]]]:
        """{"swapped": [{"name", "class", "reason"}, ...], "left_alone": the same}, all of them strings."""
        swapped = [
            {"name": s.name, "class": s.old.__name__, "reason": f"proved equal; now {_path(s.new)}"}
            for s in self.swapped
        ]
        alone = [{"name": a.name, "class": a.class_name, "reason": a.reason} for a in self.left_alone]
        return {"swapped": swapped, "left_alone": alone}

    def __str__(self) -> str:
        counts = defaultdict(int)
        for swap in self.swapped:
            counts[swap.old.__name__] += 1
        alike = defaultdict(list)
        for alone in self.left_alone:
            alike[alone.class_name, alone.reason].append(alone.name or "the model itself")
        lines = [f"fastlm.patch: {len(self.swapped)} modules swapped, {len(self.left_alone)} left alone"]
        lines += [f"  {count:4} x {name}" for name, count in sorted(counts.items())]
        for (class_name, reason), names in alike.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  left alone: {names[0]}{more} ({class_name}): {reason}")
        return "\n".join(lines)


def _path(kind: type) -> str:
    return f"fastlm.nn.{kind.__name__}"


def _torch_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module has, or had before a swap."""
    return _TWIN.get(type(module), type(module))


def _tensor_kind(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the module's floating parameters; without any, of its model's."""
    for part in (module, model):
        for p in part.parameters():
            if p.is_floating_point():
                return p.device, p.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def _no_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel would run for such tensors: a swap to the reference would only make a model slower."""
    if device.type == "meta":
        return "it is on the meta device, where nothing can be proved"
    missing = [_load.MISSING[backend] for backend, kind in _op._DEVICES.items() if kind == device.type]
    if all(missing):
        return "; ".join(missing) or f"fastlm has no kernels for {device.type}"
    if dtype not in _op._DTYPES:
        return f"fastlm's kernels take float32, float16 and bfloat16, it is {dtype}"
    return None


def _changed_forward(module: nn.Module) -> str | None:
    for name, part in module.named_modules():
        if "forward" in part.__dict__:
            return f"{f'its part {name}' if name else 'it'} has a forward of its own, set on the instance"
    return None


def _why_not(module: nn.Module, model: nn.Module, adapter: Adapter) -> str | None:
    """None if the module may be swapped: its structure allows it and the proof succeeds."""
    device, dtype = _tensor_kind(module, model)
    reason = _no_kernel(device, dtype) or _changed_forward(module) or adapter.why_not(module)
    if reason is not None:
        return reason
    part = adapter.part(module)
    new_class = {part: adapter.new}
    for seed in range(_DRAWS):
        trials = [
            trial._replace(inputs=tuple(x.to(device) for x in trial.inputs))
            for trial in adapter.trials(part, Draw(seed, dtype))
        ]
        reason = _proof.refusal(part, trials, _torch_class, lambda m: new_class.get(m, type(m)))
        if reason is None:
            return None
    return reason


def _subclass_reason(module: nn.Module) -> str | None:
    for old, adapter in TABLE.items():
        if isinstance(module, old) and type(module) is not adapter.new and adapter.applies(module):
            return f"a subclass of {old.__name__} may compute something else"
    return None


def _candidates(module: nn.Module) -> tuple[Adapter, ...]:
    """The adapters to try, best first: by the module's class, or else by its structure."""
    adapter = TABLE.get(type(module))
    if adapter is not None:
        return (adapter,) if adapter.applies(module) else ()
    if type(module).__module__.startswith("torch.nn."):
        return ()
    return next((row for row in STRUCTURES if row[0].applies(module)), ())


def _swap(name: str, module: nn.Module, model: nn.Module, report: Report) -> None:
    """Swaps one module if its class or its structure is known and the proof succeeds; reports either."""
    reason = None if type(module) in TABLE else _subclass_reason(module)
    for adapter in () if reason else _candidates(module):
        why = _why_not(module, model, adapter)
        if why is None:
            report.swapped.append(Swap(name, module, type(module), adapter.new))
            module.__class__ = adapter.new
            return
        reason = reason or why
    if reason is not None:
        report.left_alone.append(LeftAlone(name, type(module).__name__, reason))


def _parts_first(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module), each module once, after all its parts: a whole is proved with its new parts."""
    seen.add(module)
    for part_name, part in module.named_children():
        if part not in seen:
            yield from _parts_first(part, f"{name}.{part_name}" if name else part_name, seen)
    yield name, module


def patch(model: nn.Module) -> Report:
    """Swaps the modules of a model for their fastlm twins, in place, each after a proof.

    What is swapped: the classes of torch.nn that fastlm.nn has, and by their structure the RMSNorm classes of
    Hugging Face's models (a weight and an eps) and gated MLPs (gate_proj, up_proj, down_proj, act_fn).

    An instance keeps everything but its class: parameters, state_dict keys, hooks, requires_grad, dtype,
    device, training mode, what is shared; pickle and deepcopy work. Each swap is proved first: on small
    random inputs, in the module's dtype, in evaluation mode, a copy in the new class may be at most twice
    as far from float64 as one in the old class, in output and gradients. What fails, and what fastlm has no
    kernel for, is left alone with the reason. Swapping twice changes nothing. With dropout, training draws
    other masks than torch's.

    Args:
        model: any module; if it is itself of such a class, it is swapped too.

    Returns:
        Report: swapped, left_alone, undo(), to_dict(); print it.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report([], [])
    for name, module in _parts_first(model, "", set()):
        if type(module) not in _OURS:
            _swap(name, module, model, report)
    return report


@contextmanager
def patched(model: nn.Module) -> Iterator[Report]:
    """The model is patched inside the `with`, and computes bitwise what it did before after it.

    model: as in patch. Yields: its Report. Raises: what patch raises.
    """
    report = patch(model)
    try:
        yield report
    finally:
        report.undo()
