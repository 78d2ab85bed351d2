"""The stored limits as a page shows them."""

import triton

from .bars import EXCEPTIONS
from .occupancy import LIMITS
from .record import Kernel


def markdown(kernels: dict[str, Kernel]) -> str:
    """What all have in common, then a table for each op."""
    kept = [k for k in kernels.values() if not (k.spills or k.stack)]
    lines = [
        f"{len(kernels)} kernels, compiled by the ptxas in Triton {triton.__version__}; {len(kept)} keep all"
        " values in registers. Of each architecture: registers of a thread · KiB of shared memory and threads"
        " of a block · warps resident, in percent of what the multiprocessor holds · widest global load and"
        " store in bits · what the innermost loops that multiply matrices use.",
    ]
    if EXCEPTIONS:
        lines += ["", "| what falls short | of what | why |", "| --- | --- | --- |"]
        lines += [f"| `{keys}` | {aim} | {why} |" for keys, aim, why in EXCEPTIONS]
    for op in dict.fromkeys(key.split()[0] for key in kernels):
        own = {key.removeprefix(f"{op} "): k for key, k in kernels.items() if key.split()[0] == op}
        lines += ["", f"<details><summary>{op}</summary>", "", *_table(own), "", "</details>"]
    return "\n".join(lines)


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
