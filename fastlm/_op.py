"""Op: one declaration per operation; the kernel that runs it is chosen here, and here only.

Arguments and gradients are wired by the names in an op's two schemas. In the backward schema `d<output>` is
the gradient of a forward output, `needs` says which gradients are wanted, and any other name is a forward
argument or output of that name. A forward output y is public and differentiable where the backward schema
takes dy; a forward argument x has a gradient where the backward schema returns dx. A forward output unit_dx,
if it has x's shape, is dx of a dy of 1: where the graph is not kept it is scaled in place, and no backward
kernel runs.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.compiler import is_compiling, is_dynamo_compiling

from . import _cuda_kernels, _load, _triton

_LIBRARY = torch.library.Library("fastlm", "DEF")
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # whose tensors a backend takes
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_transform = torch._C._functorch.peek_interpreter_stack
# Asked once: torch 2.11's compiler cannot trace the question.
_AUTOCAST = frozenset(d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d))
BACKENDS = ("cuda", "triton", "cpu", "reference")

OPS: dict[str, "Op"] = {}
RAW_OPS: list = []  # every torch overload that _declare made


class _Forced(threading.local):
    backend: str | None = None


_forced = _Forced()


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Runs every op inside the `with` on `backend`, on this thread; an op that it refuses raises.

    backend: "cuda", "triton", "cpu", "reference", or None for automatic choice.
    Raises: ValueError for another name; NotImplementedError from an op that the backend refuses.
    """
    _check_backend("use_backend", backend)
    before, _forced.backend = _forced.backend, backend
    try:
        yield
    finally:
        _forced.backend = before


def _check_backend(op: str, backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")


def may_be_usual(backend: str | None) -> bool:
    """Whether a call may be a usual one, for Op.usual to try: nobody names a backend, and nobody traces.

    What C++ cannot see; the rest it looks at itself: csrc/bindings/usual_calls.h.
    """
    return (
        backend is None
        and not is_dynamo_compiling()
        and _forced.backend is None
        and _triton.simulator.arch is None
    )


def _never(*_) -> None:
    """Instead of a builtin where there is none: no call is a usual one."""
    return None


class Op:
    """One operation: its meaning (`reference`), its schemas, and its kernels.

    reference: plain differentiable PyTorch; takes the forward schema's arguments, returns the public outputs.
    check: takes the public arguments, raises TypeError / ValueError, returns the forward schema's arguments:
        the first is a floating tensor, the others are on its device, and float64 only where it is.
    forward, backward: (schema without a name, fake implementation); backward may be None.
    backends: name -> None, or a function of the forward arguments that returns a reason to refuse, or None.
    triton_first: a function of the forward arguments: whether the call is so large that Triton's kernel was
        measured to be faster than the CUDA C++ one, which costs less to start. docs/gpu.md has the figures.
    shared_gradients: {argument: "d<another>" or "d<output>"}: a gradient equal to another, where the backward
        kernel returns none or an empty one: a functional op may not return one tensor twice.

    usual: takes check's arguments: runs a usual call in C++, with its checks, and returns the
        public outputs; None if the call is not a usual one, and then nothing has happened.
    """

    def __init__(
        self,
        name: str,
        reference: Callable,
        *,
        check: Callable,
        forward: tuple[str, Callable],
        backward: tuple[str, Callable] | None = None,
        backends: dict[str, Callable | None],
        triton_first: Callable[..., bool] | None = None,
        shared_gradients: dict[str, str] | None = None,
    ):
        self.name, self.reference, self.check, self.backends = name, reference, check, backends
        self.triton_first = triton_first
        self.usual: Callable = getattr(_load.USUAL, name, _never)
        self.forward: dict[str, Callable] = {}
        self.backward: dict[str, Callable] = {}
        for backend in backends:
            self.forward[backend] = _declare(name, backend, forward)
            if backward:
                self.backward[backend] = _declare(f"{name}_backward", backend, backward)
        schema = next(iter(self.forward.values()))._schema
        self.arguments = [a.name for a in schema.arguments]
        self.outputs = [r.name for r in schema.returns]
        self.written = [a.name for a in schema.arguments if a.is_write]  # arguments that the op writes into
        self.returns_tuple = len(self.outputs) > 1
        units = [f"unit_d{a}" for a in self.arguments]
        self.units = [self.outputs.index(u) if u in self.outputs else -1 for u in units]
        self._wire(next(iter(self.backward.values()))._schema if backward else None)
        if backward and _load.AUTOGRAD:
            self._register_autograd(forward[0], shared_gradients or {})
        OPS[name] = self

    def _wire(self, schema) -> None:
        takes = [a.name for a in schema.arguments] if schema else []
        gives = [r.name for r in schema.returns] if schema else []
        self.public = sum(f"d{o}" in takes for o in self.outputs) if schema else len(self.outputs)
        self.gradient_names = [f"d{o}" for o in self.outputs[: self.public]]
        self.saved_outputs = [i for i, o in enumerate(self.outputs) if o in takes]
        self.gradient_of = [gives.index(f"d{a}") if f"d{a}" in gives else None for a in self.arguments]
        self.wanted = [self.arguments.index(g[1:]) for g in gives]
        known = self.gradient_names + self.arguments + self.outputs
        self.sources = [-1 if t == "needs" else known.index(t) for t in takes]

    def why_not(self, backend: str, *args) -> str | None:
        """None if `backend` can run the op on these (forward schema) arguments, else the reason."""
        if backend == "reference":
            return None
        if backend not in self.backends:
            return f"{self.name} has no {backend} kernel"
        return self._refusal(backend, args)

    def _refusal(self, backend: str, args: Sequence) -> str | None:
        device, first = _DEVICES[backend], args[0]
        simulates = backend == "cuda" and _triton.simulator.arch is not None and first.is_cpu
        missing = _cuda_kernels.simulation_missing() if simulates else _load.MISSING[backend]
        if missing is not None:
            return missing
        if device == "cuda":
            reason = _triton.device_refusal(first, self.arguments[0])
            if reason is not None:
                return f"{self.name}.{backend} {reason}"
        elif not first.is_cpu:  # device.type costs 5 times as much
            return f"{self.name}.{backend} takes {device} tensors, {self.arguments[0]} is on {first.device}"
        if first.dtype not in _DTYPES:
            kinds = "float32, float16 and bfloat16"
            return f"{self.name}.{backend} takes {kinds}, {self.arguments[0]} is {first.dtype}"
        if not is_compiling() and _transform() is not None:
            return f"{self.name}.{backend} has no rule for torch.func transforms"
        limits = self.backends[backend]
        return limits(*args) if limits else None

    def choose(self, backend: str | None, args: Sequence) -> str:
        """The backend that runs the op. Raises NotImplementedError where an explicit one refuses."""
        if backend is None:
            backend = _forced.backend
        if backend is not None:
            _check_backend(self.name, backend)
            reason = self.why_not(backend, *args)
            if reason is not None:
                raise NotImplementedError(reason)
            return backend
        for name in self._best_first(args):
            if self._refusal(name, args) is None:
                return name
        return "reference"

    def _best_first(self, args: Sequence) -> Iterable[str]:
        """The backends in the order in which they are tried for a call that names none."""
        if args[0].is_cpu:  # simulated CUDA C++: only who asks for it waits for its compilers
            return (b for b in self.backends if b != "cuda")
        if self.triton_first is not None and self.triton_first(*args):
            return ("triton", *(b for b in self.backends if b != "triton"))
        return self.backends

    def __call__(self, backend: str | None, args: Sequence) -> tuple:
        """Runs the op on the forward schema's arguments; returns the public outputs as a tuple."""
        chosen = self.choose(backend, args)
        if chosen == "reference":
            return self.run_reference(args)
        raw = self.forward[chosen]
        outputs = raw(*args) if is_compiling() else raw._op(*args)  # without a call of Python's
        return outputs[: self.public] if self.returns_tuple else (outputs,)[: self.public]

    def run_reference(self, args: Sequence) -> tuple:
        """The reference on the forward schema's arguments, outside autocast: the public function has cast."""
        return _as_tuple(_outside_autocast(self.reference, args))

    def reference_gradients(self, *values) -> list[torch.Tensor]:
        """Gradients through the reference, themselves differentiable: what double backward runs on.

        values: the forward schema's arguments, the output gradients (None: not wanted), and a bool per
        argument. Returns: a gradient for each argument whose bool is true.
        """
        *args, output_gradients, needs = values
        aliases = [a.view_as(a) if n else a for a, n in zip(args, needs, strict=True)]
        outputs = self.run_reference(aliases)
        pairs = [(o, g) for o, g in zip(outputs, output_gradients, strict=True) if g is not None]
        inputs = [a for a, n in zip(aliases, needs, strict=True) if n]
        differentiated, grads = [o for o, _ in pairs], [g for _, g in pairs]
        return list(
            torch.autograd.grad(differentiated, inputs, grads, create_graph=True, materialize_grads=True)
        )

    def _register_autograd(self, forward_schema: str, shared: dict[str, str]) -> None:
        """Gives the kernels their node, csrc/bindings/autograd.cpp, wired by the schemas' names."""
        arguments, name = forward_schema[1 : forward_schema.index(") ->")], f"{self.name}_reference_gradients"
        _LIBRARY.define(f"{name}({arguments}, Tensor?[] output_gradients, bool[] needs) -> Tensor[]")
        _LIBRARY.impl(name, self.reference_gradients, "CompositeImplicitAutograd")
        codes = [self._gradient_code(shared[a]) if a in shared else -1 for a in self.arguments]
        gradient_of = [-1 if g is None else g for g in self.gradient_of]
        for backend in self.backward:
            names = (f"{self.name}.{backend}", f"{self.name}_backward.{backend}", name)
            wiring = (
                self.public,
                self.saved_outputs,
                self.sources,
                self.wanted,
                gradient_of,
                codes,
                self.units,
            )
            torch.ops.fastlm.register_autograd(*names, *wiring)

    def _gradient_code(self, gradient: str) -> int:
        """Which result of the backward kernel a gradient is, or -2 - i for that of output i."""
        if gradient in self.gradient_names:
            return -2 - self.gradient_names.index(gradient)
        return self.gradient_of[self.arguments.index(gradient[1:])]


def _as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def autocast_is_on(device: str) -> bool:
    """Whether torch.autocast is on for tensors of a device type; meta has none."""
    return device in _AUTOCAST and torch.is_autocast_enabled(device)


def _outside_autocast(function: Callable, args: Sequence):
    device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
    if autocast_is_on(device):
        with torch.autocast(device, enabled=False):
            return function(*args)
    return function(*args)


def _declare(name: str, backend: str, schema_and_fake: tuple[str, Callable]):
    """The raw op fastlm::<name>.<backend>: its schema and its fake; native kernels are registered in C++."""
    schema, fake = schema_and_fake
    _LIBRARY.define(f"{name}.{backend}{schema}")
    if backend == "triton":
        op, backward = name.removesuffix("_backward"), name.endswith("_backward")
        body = _triton.body(op, "backward" if backward else "forward")
        for key in ("CUDA", "CPU"):  # on CPU tensors the simulator runs them
            _LIBRARY.impl(f"{name}.triton", body, key)
    if backend == "cuda":
        _LIBRARY.impl(f"{name}.cuda", _cuda_kernels.simulated_body(name), "CPU")
    torch.library.register_fake(f"fastlm::{name}.{backend}", fake, lib=_LIBRARY)
    RAW_OPS.append(getattr(getattr(torch.ops.fastlm, name), backend))
    return RAW_OPS[-1]


# What csrc/bindings/autograd_node.h calls where the graph is not kept and only the GPU knows the gradient.
for _backend in ("cuda", "triton"):
    _declare("scale_units", _backend, ("(Tensor(a!) units, Tensor factor) -> ()", lambda units, factor: None))
