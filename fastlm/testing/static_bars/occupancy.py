"""How many blocks of a kernel a multiprocessor holds at once.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", for the limits;
cuda_occupancy.h of the CUDA toolkit, which tests/test_static_bars.py compares this with, for the rules.
"""

from typing import NamedTuple

REGISTERS = 64 << 10  # of a multiprocessor, and the most that one block may have
_QUARTERS = 4  # parts of a multiprocessor, each with its own quarter of the registers
RESERVED = 1 << 10  # bytes of shared memory that the driver takes from each block


class Limits(NamedTuple):
    """Of one multiprocessor. shared, block_shared: bytes, for all blocks and at most for one."""

    warps: int
    blocks: int
    shared: int
    block_shared: int


LIMITS = {
    80: Limits(64, 32, 164 << 10, 163 << 10),
    90: Limits(64, 32, 228 << 10, 227 << 10),
    100: Limits(64, 32, 228 << 10, 227 << 10),
    120: Limits(48, 24, 100 << 10, 99 << 10),
}


class Occupancy(NamedTuple):
    """blocks: resident at once. share: of the warps that there could be. limit: what there is no more of."""

    blocks: int
    share: float
    limit: str


def occupancy(arch: int, registers: int, shared: int, threads: int) -> Occupancy:
    """Of blocks of `threads` threads with `registers` each and `shared` bytes, all shared memory being free.

    arch: 80, 90, 100 or 120. Registers come in 256 a warp, shared memory in 128 bytes.
    """
    limits, warps = LIMITS[arch], -(-threads // 32)
    warp_registers = -(-registers * 32 // 256) * 256
    quarter = REGISTERS // _QUARTERS // warp_registers
    fits = warp_registers * -(-warps // _QUARTERS) * _QUARTERS <= REGISTERS
    block_shared = -(-(shared + RESERVED) // 128) * 128
    most = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": quarter * _QUARTERS // warps if fits else 0,
        "shared memory": limits.shared // block_shared if shared <= limits.block_shared else 0,
    }
    limit = min(most, key=most.__getitem__)
    return Occupancy(most[limit], most[limit] * warps / limits.warps, limit)
