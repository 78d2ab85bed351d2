"""Op: one declaration per operation; the kernel that runs it is chosen here, and here only.

Arguments and gradients are wired by the names in an op's two schemas. In the backward schema `d<output>` is
the gradient of a forward output, `needs` says which gradients are wanted, and any other name is a forward
argument or output of that name. A forward output y is public and differentiable where the backward schema
takes dy; a forward argument x has a gradient where the backward schema returns dx.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch.compiler import is_compiling

from . import _load

_LIBRARY = torch.library.Library("fastlm", "DEF")
_KEYS = {"cpu": "CPU", "cuda": "CUDA", "triton": "CUDA"}
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # whose tensors a backend takes
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_transform = torch._C._functorch.peek_interpreter_stack
BACKENDS = ("cuda", "triton", "cpu", "reference")

OPS: dict[str, "Op"] = {}


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


class Op:
    """One operation: its meaning (`reference`), its schemas, and its kernels.

    reference: plain differentiable PyTorch; takes the forward schema's arguments, returns the public outputs.
    check: takes the public arguments, raises TypeError / ValueError, returns the forward schema's arguments:
        the first is a floating tensor, the others are on its device, and float64 only where it is.
    forward, backward: (schema without a name, fake implementation); backward may be None.
    backends: name -> None, or a function of the forward arguments that returns a reason to refuse, or None.
    body: for an op that contains a matmul: (forward, backward) in Python, called with the backend first.
    shared_gradients: f(args, output gradients, what the backward kernel returned) -> {argument: gradient},
        for gradients equal to another: a functional op may not return one tensor twice.
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
        body: tuple[Callable, Callable | None] | None = None,
        shared_gradients: Callable | None = None,
    ):
        self.name, self.reference, self.check, self.backends = name, reference, check, backends
        self.shared_gradients = shared_gradients
        self.forward: dict[str, Callable] = {}
        self.backward: dict[str, Callable] = {}
        self._functions: dict[str, type[torch.autograd.Function]] = {}
        for backend in backends:
            bodies = body or (None, None)
            self.forward[backend] = _declare(name, backend, forward, bodies[0])
            if backward:
                self.backward[backend] = _declare(f"{name}_backward", backend, backward, bodies[1])
        schema = next(iter(self.forward.values()))._schema
        self.arguments = [a.name for a in schema.arguments]
        self.outputs = [r.name for r in schema.returns]
        self.written = [a.name for a in schema.arguments if a.is_write]  # arguments that the op writes into
        self.returns_tuple = len(self.outputs) > 1
        self._wire(next(iter(self.backward.values()))._schema if backward else None)
        for backend in self.backward:
            self._functions[backend] = _autograd_function(self, backend)
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
        if _load.MISSING[backend] is not None:
            return _load.MISSING[backend]
        device, first = _DEVICES[backend], args[0]
        if not (first.is_cpu if device == "cpu" else first.is_cuda):  # device.type costs 5 times as much
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
        for name in self.backends:
            if self._refusal(name, args) is None:
                return name
        return "reference"

    def __call__(self, backend: str | None, args: Sequence) -> tuple:
        """Runs the op on the forward schema's arguments; returns the public outputs as a tuple."""
        chosen = self.choose(backend, args)
        if chosen == "reference":
            return self.run_reference(args)
        if torch.is_grad_enabled() and chosen in self._functions and _any_requires_grad(args):
            return self._functions[chosen].apply(*args)[: self.public]
        raw = self.forward[chosen]
        outputs = raw(*args) if is_compiling() else raw._op(*args)  # without a call of Python's
        return outputs[: self.public] if self.returns_tuple else (outputs,)[: self.public]

    def run_reference(self, args: Sequence) -> tuple:
        """The reference on the forward schema's arguments, outside autocast: the public function has cast."""
        return _as_tuple(_outside_autocast(self.reference, args))

    def reference_gradients(self, args: Sequence, output_gradients: Sequence, needs: Sequence[bool]) -> list:
        """Gradients through the reference, themselves differentiable: what double backward runs on."""
        aliases = [a.view_as(a) if n else a for a, n in zip(args, needs, strict=True)]
        outputs = self.run_reference(aliases)
        pairs = [(o, g) for o, g in zip(outputs, output_gradients, strict=True) if g is not None]
        inputs = [a for a, n in zip(aliases, needs, strict=True) if n]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], inputs, [g for _, g in pairs], create_graph=True, allow_unused=True
            )
        )
        return [next(found) if n else None for n in needs]

    def gradients(self, backend: str, args: Sequence, saved: dict, grads: Sequence, needs: Sequence) -> list:
        """Calls the backward kernel with what its schema names; one gradient, or None, per argument."""
        known = [*grads, *args, *(saved.get(i) for i in range(len(self.outputs)))]
        wanted = [needs[i] for i in self.wanted]
        values = [wanted if s == -1 else known[s] for s in self.sources]
        given = _as_tuple(self.backward[backend](*values))
        found = [
            given[g] if n and g is not None else None for g, n in zip(self.gradient_of, needs, strict=True)
        ]
        if self.shared_gradients is not None:
            for name, gradient in self.shared_gradients(args, grads, given).items():
                i = self.arguments.index(name)
                found[i] = gradient if needs[i] else None
        return found


def _as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _outside_autocast(function: Callable, args: Sequence):
    device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # not on meta
        with torch.autocast(device, enabled=False):
            return function(*args)
    return function(*args)


def _any_requires_grad(args: Sequence) -> bool:
    for a in args:
        if isinstance(a, torch.Tensor) and a.requires_grad:
            return True
    return False


def _declare(name: str, backend: str, schema_and_fake: tuple[str, Callable], body: Callable | None):
    schema, fake = schema_and_fake
    _LIBRARY.define(f"{name}.{backend}{schema}")
    torch.library.register_fake(f"fastlm::{name}.{backend}", fake, lib=_LIBRARY)
    if body is not None:
        run = partial(body, backend)
        _LIBRARY.impl(f"{name}.{backend}", lambda *args: _outside_autocast(run, args), _KEYS[backend])
    return getattr(getattr(torch.ops.fastlm, name), backend)


def _autograd_function(op: Op, backend: str) -> type[torch.autograd.Function]:
    """The autograd side of one kernel. It keeps the kernel: backward may run on another thread."""
    raw, public = op.forward[backend], op.public

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            outputs = _as_tuple(raw(*args))
            ctx.is_tensor = [isinstance(a, torch.Tensor) for a in args]
            ctx.constants = [None if t else a for a, t in zip(args, ctx.is_tensor, strict=True)]
            tensors = [a for a, t in zip(args, ctx.is_tensor, strict=True) if t]
            ctx.save_for_backward(*tensors, *(outputs[i] for i in op.saved_outputs))
            ctx.mark_non_differentiable(*outputs[public:])
            ctx.set_materialize_grads(False)
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            grads, needs = grads[:public], ctx.needs_input_grad
            if all(g is None for g in grads):
                return tuple(None for _ in needs)
            kept = iter(ctx.saved_tensors)  # read once: checkpointing recomputes at the first look
            args = [next(kept) if t else c for t, c in zip(ctx.is_tensor, ctx.constants, strict=True)]
            if torch.is_grad_enabled() and not is_compiling():
                return tuple(op.reference_gradients(args, grads, needs))
            saved = dict(zip(op.saved_outputs, kept, strict=True))
            return tuple(op.gradients(backend, args, saved, grads, needs))

    Kernel.__name__ = Kernel.__qualname__ = f"{op.name}_{backend}"
    return Kernel
