"""The stored limits as a page shows them."""

from .bars import COMPILERS
from .occupancy import LIMITS
from .record import Kernel


def markdown(kernels: dict[str, Kernel], release: str, backend: str = "triton") -> str:
    """What all have in common, then a table for each op. release: of the compiler that made them."""
    name, _, exceptions = COMPILERS[backend]
    kept = [k for k in kernels.values() if not (k.spills or k.stack)]
    lines = [
        f"{len(kernels)} kernels, compiled by the ptxas in {name} {release}; {len(kept)} keep all"
        " values in registers. Of each architecture: registers of a thread · KiB of shared memory and threads"
        " of a block · warps resident, in percent of what the multiprocessor holds · widest global load and"
        " store in bits · what the innermost loops that multiply matrices use.",
    ]
    if exceptions:
        lines += ["", "| what falls short | of what | why |", "| --- | --- | --- |"]
        lines += [f"| `{keys}` | {aim} | {why} |" for keys, aim, why in exceptions]
    for op in dict.fromkeys(key.split()[0] for key in kernels):
        own = {key.removeprefix(f"{op} "): k for key, k in kernels.items() if key.split()[0] == op}
        lines += ["", f"<details><summary>{op}</summary>", "", *_table(own), "", "</details>"]
    return "\n".join(lines)


def beside(cuda: dict[str, Kernel], triton: dict[str, Kernel]) -> str:
    """A row for each call that both know: its largest count of registers, and its least occupancy."""
    lines = [f"| call | {' | '.join(f'sm_{arch}' for arch in LIMITS)} |"]
    lines.append("| --- |" + " --- |" * len(LIMITS))
    theirs, rows = _calls(triton), {}
    for call, kernels in _calls(cuda).items():
        if call in theirs:
            sides = (kernels, theirs[call])
            cells = tuple(" / ".join(_worst(side, arch) for side in sides) for arch in LIMITS)
            op, _, made = call.partition(" ")
            rows.setdefault((op, *cells), []).append(made)
    return "\n".join(
        lines + [f"| {op}: {', '.join(made)} | {' | '.join(cells)} |" for (op, *cells), made in rows.items()]
    )


def _calls(kernels: dict[str, Kernel]) -> dict[str, dict[str, Kernel]]:
    """Call -> its kernels by what follows it in their keys."""
    found: dict[str, dict[str, Kernel]] = {}
    for key, kernel in kernels.items():
        call, name = _parts(key)
        found.setdefault(call, {})[name] = kernel
    return found


def _worst(kernels: dict[str, Kernel], arch: int) -> str:
    own = [k for name, k in kernels.items() if name.endswith(f" sm_{arch}")]
    if not own:
        return "–"
    return f"{max(k.registers for k in own)} {min(k.occupancy for k in own)}%"


def _table(kernels: dict[str, Kernel]) -> list[str]:
    """A row for each call and kernel; calls whose kernels have the same figures share one."""
    rows: dict[tuple, list[str]] = {}
    calls = dict.fromkeys(key.rpartition(" sm_")[0] for key in kernels)
    for call in calls:
        cells = tuple(_cell(kernels.get(f"{call} sm_{arch}")) for arch in LIMITS)
        made, name = _parts(call)
        rows.setdefault((name, *cells), []).append(made)
    lines = [f"| kernel | calls | {' | '.join(f'sm_{arch}' for arch in LIMITS)} |"]
    lines.append("| --- | --- |" + " --- |" * len(LIMITS))
    return lines + [
        f"| {name} | {', '.join(made)} | {' | '.join(cells)} |" for (name, *cells), made in rows.items()
    ]


def _parts(call: str) -> tuple[str, str]:
    """("768 bf16", "norm_forward") of "768 bf16 norm_forward"."""
    words = call.split()
    at = max(i for i, word in enumerate(words) if word in ("f32", "f16", "bf16")) + 1
    return " ".join(words[:at]), " ".join(words[at:])


def _cell(kernel: Kernel | None) -> str:
    if kernel is None:
        return ""
    told = [
        str(kernel.registers),
        f"{kernel.shared / 1024:.3g} {kernel.threads}",
        f"{kernel.occupancy}%",
        f"{kernel.loads} {kernel.stores}",
    ]
    told += [f"**{kernel.spills} spills, {kernel.hot_spills} in loops**"] * bool(
        kernel.spills or kernel.stack
    )
    told += [f"{kernel.matrix} {kernel.copies}".strip()] * bool(kernel.matrix)
    return " · ".join(told)
