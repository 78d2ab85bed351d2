"""Starting a kernel: what Triton's JIT finds out anew at each call is kept here, by what it depends on.

`kernel[grid](...)` looks at each argument, writes its options into a string and asks by it for what it has
compiled: where F.layer_norm takes 3.5 us that is 18 us for 20 arguments and 31 us for 57; launch() takes 4
and 7. It asks the same of an argument as Triton does, so it finds the same: of a pointer its dtype and its
alignment, of a number its value, or only its width in bits where the kernel's do_not_specialize names it.
"""

from collections.abc import Callable

import torch
import triton
from triton.knobs import HookChain
from triton.runtime import JITFunction, driver

_RUN = JITFunction.run


def launch(kernel: JITFunction, grid: tuple, *args, **options) -> None:
    """kernel[grid](*args, **options). args: all that are not constexpr, and maybe some that are."""
    if type(kernel) is not JITFunction or _is_watched():
        kernel[grid](*args, **options)
        return
    active = driver.active
    device = active.get_current_device()
    kept = kernel.device_caches[device][0]  # among Triton's own: who empties them, empties this
    aspects = kept.get(_aspects_of) or kept.setdefault(_aspects_of, _aspects_of(kernel, args))
    key = (aspects(*args), *options.items())
    compiled = kept.get(key)
    if compiled is None:
        kept[key] = kernel[grid](*args, **options)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream, missing = active.get_current_stream(device), len(kernel.params) - len(args)  # constexpr
    function, packed = compiled.function, compiled.packed_metadata
    compiled.run(x, y, z, stream, function, packed, None, None, None, *args, *(None,) * missing)


def _is_watched() -> bool:
    """Whether somebody wants Triton's own way: a profiler's hooks, or a stand-in for it."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook.calls if type(hook) is HookChain else hook is not None:
            return True
    return JITFunction.run is not _RUN


def _aspects_of(kernel: JITFunction, args: tuple) -> Callable:
    """A function of args: a tuple of all that Triton compiles for. As Triton's own, it is written out."""
    names, aspects = [f"a{i}" for i in range(len(args))], []
    for name, parameter, value in zip(names, kernel.params, args, strict=False):
        if value is None or isinstance(value, torch.Tensor):
            aspects.append(f"{name} if {name} is None else _aspect({name})")
        elif type(value) is float and not parameter.is_constexpr:
            aspects.append(f"{name} is None")
        elif parameter.do_not_specialize:
            aspects.append(f"{name} is not None and {name} >> 31")  # 0 and -1: 32 bits
        else:
            aspects.append(name)
    source = f"lambda {', '.join(names)}: ({', '.join(aspects)},)"
    return eval(source, {"_aspect": _aspect})


def _aspect(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return type(value) if isinstance(value, float) else value
