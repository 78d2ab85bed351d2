"""Runs a compiled kernel: all threads of many blocks in lock step, in flow.py's order of its basic blocks.

That order brings threads together again where their paths join. What a GPU only promises for threads that
arrive together (barriers, shuffles, votes) is checked to be so.
"""

import numpy as np

from .compile import Compiled
from .matrix import Matrix
from .memory import Allocations, Shared, aligned, raise_finding, unordered

_LANES = 1 << 14  # of one batch of blocks: 64 KB a register, so that the busy ones stay in the L2 cache
_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum,
               "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip
_LIMIT = 1 << 22  # basic blocks a launch may run: something waits for ever beyond


def _unset(kind) -> np.ndarray:
    """What a register holds that nothing has set: all bits 1, of a float NaN, so that its use shows."""
    dtype = np.dtype(kind)
    return np.full(dtype.itemsize, 1 if dtype.kind == "b" else 0xFF, np.uint8).view(dtype)


class Registers:
    """Every register's value for all threads, read and written for those that run now."""

    def __init__(self, count: int):
        self.count, self.lanes, self.values = count, None, {}

    def get(self, name: str, kind: str) -> np.ndarray:
        """Of the running threads; an array of one number where all have the same."""
        value = self.values.get(name)
        if value is None:
            value = self.values[name] = _unset(bool if kind == "p" else kind)
        return value if self.lanes is None or value.size == 1 else value[self.lanes]

    def put(self, name: str, value: np.ndarray) -> None:
        """Sets the running threads' values."""
        if self.lanes is not None:
            full = np.empty(self.count, value.dtype)
            full[:] = self.values[name] if name in self.values else _unset(value.dtype)
            full[self.lanes] = value
            value = full
        self.values[name] = value


class Machine:
    """One batch of blocks of a launch; the compiled code calls it for all that is not arithmetic.

    environment: what %envreg0 holds, which the PTX ISA leaves to the driver.
    """

    environment = 0

    def __init__(
        self,
        compiled: Compiled,
        grid,
        threads,
        shared,
        arguments: bytes,
        first: int,
        blocks: int,
        memory: Allocations,
        profile,
    ):
        self.compiled, self.grid, self.threads = compiled, grid, threads
        self.per_block = threads[0] * threads[1] * threads[2]
        self.arguments, self.memory, self.profile = arguments, memory, profile
        self.first, self.count = first, blocks * self.per_block
        self.shared = Shared(blocks, shared, compiled.cell)
        self.epoch = np.zeros(blocks, np.int64)  # barriers that each block has passed
        self.alive = np.full(blocks, self.per_block)
        self.warp_epoch = np.zeros(self.count // 32, np.int64)
        self.committed = np.zeros(self.count, np.int64)  # groups of asynchronous copies, of each thread
        self.copies: list[tuple] = []
        self.registers = Registers(self.count)
        self.matrix = Matrix(self)
        self._all = np.arange(self.count)

    def run(self) -> None:
        """To the end of every thread."""
        waiting = {0: self._all}
        last, ranks = len(self.compiled.functions), [*self.compiled.ranks, len(self.compiled.functions)]
        for _ in range(_LIMIT):
            if not waiting:
                return
            at = min(waiting, key=ranks.__getitem__)
            lanes = waiting.pop(at)
            if at >= last:
                self._leave(lanes)
                continue
            self._enter(lanes)
            if self.profile is not None:
                self.profile.block(self.compiled.program.blocks[at].instructions, lanes)
            target, other, predicate = self.compiled.functions[at](self.registers, self)
            for to, which in self._split(lanes, target, other, predicate):
                if to < 0:
                    self._leave(which)
                else:
                    waiting[to] = np.union1d(waiting[to], which) if to in waiting else which
        raise_finding("launch", f"{self.compiled.program.name} does not end")

    def _split(self, lanes, target, other, predicate):
        if predicate is None:
            return [(target, lanes)]
        taken = np.broadcast_to(predicate, lanes.shape)
        if taken.all():
            return [(target, lanes)]
        if not taken.any():
            return [(other, lanes)]
        return [(target, lanes[taken]), (other, lanes[~taken])]

    def _leave(self, lanes) -> None:
        np.subtract.at(self.alive, lanes // self.per_block, 1)
        for own, *_ in self.copies:
            if (late := own[np.isin(own, lanes)]).size:
                what = "ends while an asynchronous copy of its own is under way"
                raise_finding("async", f"{what}; {self._where(late[0])}")

    def _enter(self, lanes) -> None:
        self.lanes = lanes
        whole = lanes.size == self.count
        self.registers.lanes = None if whole else lanes
        self.block = lanes // self.per_block
        self.thread = lanes - self.block * self.per_block
        self.whole_warps = lanes.size % 32 == 0 and bool(
            (lanes[::32] % 32 == 0).all() and (lanes[31::32] - lanes[::32] == 31).all()
        )
        self._tag()

    def _tag(self) -> None:
        self.tags = (
            self.epoch[self.block] << 24 | (self.warp_epoch[self.lanes >> 5] & 0xFF) << 16 | self.thread
        )

    def special(self, name: str) -> np.ndarray:
        """%tid.x and the like."""
        root, _, axis = name.partition(".")
        axis = "xyz".index(axis) if axis else 0
        if root == "tid":
            x, y, _ = self.threads
            return (self.thread // (1, x, x * y)[axis] % self.threads[axis]).astype(np.uint32)
        if root == "ctaid":
            x, y, _ = self.grid
            return ((self.first + self.block) // (1, x, x * y)[axis] % self.grid[axis]).astype(np.uint32)
        if root in ("ntid", "nctaid"):
            return np.array([(self.threads if root == "ntid" else self.grid)[axis]], np.uint32)
        if root in ("laneid", "warpid"):
            return (self.thread % 32 if root == "laneid" else self.thread // 32).astype(np.uint32)
        if root == "envreg0":
            return np.array([self.environment], np.uint32)
        raise NotImplementedError(f"ptxsim: special register %{name}")

    def parameter(self, base: np.ndarray, offset: int, kind) -> np.ndarray:
        """From the packed arguments: one number, or one for each thread where their addresses differ."""
        if base.size == 1:
            return np.frombuffer(self.arguments, kind, 1, int(base[0]) + offset)
        places = base.astype(np.int64)[:, None] + offset + np.arange(np.dtype(kind).itemsize)
        return np.frombuffer(self.arguments, np.uint8)[places].view(kind)[:, 0]

    def fail(self, kind: str, site: int, lane: int, what: str) -> None:
        """Raises a finding at an instruction, of the running thread number `lane`."""
        instruction = self.compiled.sites[site]
        where = f"{self._where(self.lanes[lane])}, line {instruction.line}"
        raise_finding(kind, f"{what}; {where}: {instruction.text}")

    def _where(self, lane) -> str:
        """The kernel, block and thread of a thread of this batch."""
        block, thread = divmod(int(lane), self.per_block)
        return f"{self.compiled.program.name}, block {self.first + block}, thread {thread}"

    def of_all(self, value: np.ndarray) -> np.ndarray:
        """A number per running thread, of an array that may hold one for all."""
        return value if value.size == self.lanes.size else np.broadcast_to(value, self.lanes.shape)

    # Memory

    def _active(self, address, guard):
        address = self.of_all(address)
        if guard is None:
            return None, address
        which = np.flatnonzero(self.of_all(guard))
        return which, address[which]

    def load(self, site: int, space: str, address, unit: int, count: int, guard, old: tuple) -> tuple:
        """Values of `unit` bytes, count at each address; threads that the guard stops keep theirs."""
        which, address = self._active(address, guard)
        if address.size == 0:
            return old
        values = self._fetch(site, space, address, unit, count, which)
        if which is None:
            return tuple(values[:, n] for n in range(count))
        merged = []
        for n, kept in enumerate(old):
            if kept is not None:
                full = np.empty(self.lanes.shape, kept.dtype)
                full[:] = kept
                full[which] = values[:, n]
                kept = full
            merged.append(kept)
        return tuple(merged)

    def _fetch(self, site, space, address, unit, count, which) -> np.ndarray:
        if space == "global":
            return self._fetch_global(site, address, unit, count, which)
        return self.read_shared(site, address, unit, count, which)

    def read_shared(self, site, address, unit, count, which) -> np.ndarray:
        """count numbers of `unit` bytes at each address, by the threads `which` (None: all that run)."""
        flat = self._shared_offsets(site, address, unit * count, which)
        tags = self.tags if which is None else self.tags[which]
        self._check(site, self.shared.read(self.shared.cells(flat, unit * count), tags), which)
        return self.shared.view(unit)[(flat // unit)[:, None] + np.arange(count)]

    def hand_on(self, site, address, size, which) -> None:
        """What lies at these addresses, just read by others, is for the threads `which`: they read it too."""
        cells = self.shared.cells(self.block[which] * self.shared.pitch + address, size)
        self._check(site, self.shared.read(cells, self.tags[which]), which)

    def write_shared(self, site, address, unit, data, which) -> None:
        """data [threads, count], numbers of `unit` bytes."""
        size = unit * data.shape[1]
        flat = self._shared_offsets(site, address, size, which)
        tags = self.tags if which is None else self.tags[which]
        self._check(site, self.shared.write(self.shared.cells(flat, size), tags, False), which)
        view, index = self.shared.view(unit), (flat // unit)[:, None] + np.arange(data.shape[1])
        view[index] = data
        self._one_value(site, view[index], data, which)

    def read_by_proxy(self, site, address, size, which) -> tuple[np.ndarray, np.ndarray]:
        """A wgmma's operand: (flat offsets, cells). It is read until the wgmma is waited for."""
        flat = self._shared_offsets(site, address, size, which)
        cells = self.shared.cells(flat, max(size, self.shared.cell))
        self._check(site, self.shared.read_by_proxy(cells, self.tags[which]), which)
        return flat, cells

    def fence_proxy(self) -> None:
        """fence.proxy.async: what these threads wrote may be read by wgmma."""
        self.shared.fence(np.unique(self.block))

    def _check(self, site, wrong, which) -> None:
        if wrong is None:
            return
        kind, lanes = wrong
        lane = lanes[0] if which is None else which[lanes[0]]
        what = {
            "poison": "reads shared memory that nobody wrote",
            "race": "meets another thread's access with no barrier between them",
            "async": "meets shared memory that an asynchronous copy still writes or a wgmma still reads",
            "proxy": "reads by wgmma what was written with no fence.proxy.async since",
        }
        self.fail(kind, site, lane, what[kind])

    def _aligned(self, site, address, size, which) -> None:
        if (wrong := aligned(address, size)) is not None:
            lane = wrong[0] if which is None else which[wrong[0]]
            self.fail(
                "alignment", site, lane, f"address {int(address[wrong[0]]):#x} is not a multiple of {size}"
            )

    def _shared_offsets(self, site, address, size, which) -> np.ndarray:
        self._aligned(site, address, size, which)
        if address.min() < 0 or address.max() + size > self.shared.size:
            wrong = np.flatnonzero((address < 0) | (address + size > self.shared.size))[0]
            lane = wrong if which is None else which[wrong]
            what = f"shared address {int(address[wrong])} + {size} of {self.shared.size} bytes"
            self.fail("bounds", site, lane, what)
        if self.profile is not None:
            lanes = self.lanes if which is None else self.lanes[which]
            self.profile.shared(self.compiled.sites[site], lanes, address, size)
        return (self.block if which is None else self.block[which]) * self.shared.pitch + address

    def _pieces(self, site, address, size, which):
        self._aligned(site, address, size, which)
        for part, at, offset in self.memory.pieces(address, size):
            if at is None:
                lane = part[0] if which is None else which[part[0]]
                what = f"address {int(address[part[0]]):#x} + {size} is in no tensor of this launch"
                self.fail("bounds", site, lane, what)
            if self.profile is not None:
                lanes = self.lanes if which is None else self.lanes[which]
                lanes = lanes if part is None else lanes[part]
                self.profile.memory(self.compiled.sites[site], lanes, self.memory.names[at], offset, size)
            yield part, at, offset

    def _fetch_global(self, site, address, unit, count, which) -> np.ndarray:
        values = None
        for part, at, offset in self._pieces(site, address, unit * count, which):
            view = self.memory.view(at, unit)
            found = view[(offset // unit)[:, None] + np.arange(count)]
            if (writers := self.memory.writers(at, False)) is not None:
                lanes, places = _picked(which, part), offset[:, None] + unit * np.arange(count)
                wrong = unordered(writers[places], self._global_tags(lanes))
                self._ordered(site, wrong, lanes, "reads")
            if part is None:
                return found
            if values is None:
                values = np.empty((address.size, count), view.dtype)
            values[part] = found
        return values

    def store(self, site: int, space: str, address, unit: int, values: tuple, guard) -> None:
        """Writes values[n] of `unit` bytes behind one another at each address."""
        which, address = self._active(address, guard)
        if address.size == 0:
            return
        count = len(values)
        data = np.empty((address.size, count), values[0].dtype)
        for n, value in enumerate(values):
            data[:, n] = value if which is None or value.size == 1 else value[which]
        if space == "shared":
            self.write_shared(site, address, unit, data, which)
            return
        for part, at, offset in self._pieces(site, address, unit * count, which):
            view, index = self.memory.view(at, unit), (offset // unit)[:, None] + np.arange(count)
            mine = data if part is None else data[part]
            if (writers := self.memory.writers(at, True)) is not None:
                lanes, places = _picked(which, part), offset[:, None] + unit * np.arange(count)
                tags = self._global_tags(lanes)
                wrong = unordered(writers[places], tags) & (view[index] != mine)
                self._ordered(site, wrong, lanes, "writes something else over")
                writers[places] = tags
            view[index] = mine
            self._one_value(site, view[index], mine, _picked(which, part))

    def _global_tags(self, lanes) -> np.ndarray:
        tags = (self.first + 1 + self.block) << 40 | self.tags
        return (tags if lanes is None else tags[lanes])[:, None]

    def _ordered(self, site, wrong, lanes, does: str) -> None:
        if wrong.any():
            lane = np.flatnonzero(wrong.any(1))[0]
            what = f"{does} global memory that another thread of this launch wrote, with nothing between"
            self.fail("race", site, lane if lanes is None else lanes[lane], what)

    def _one_value(self, site, there, mine, which) -> None:
        """Threads that write to one place in one instruction must write one value."""
        if not np.array_equal(there, mine):
            lane = np.flatnonzero((there != mine).any(1))[0]
            what = (
                "another thread writes something else there: where a product and a sum over lanes were fused,"
            )
            what += " lanes differ in their last bit (enable_fp_fusion=False)"
            self.fail("race", site, lane if which is None else which[lane], what)

    # Asynchronous copies

    def copy(self, site: int, to, source, size: int, given, guard) -> None:
        """cp.async: `given` bytes of `size` are read (None: all), the rest are zeros; they land at a wait."""
        which, to = self._active(to, guard)
        if to.size == 0:
            return
        source = self.of_all(source)
        source = source if which is None else source[which]
        data = np.zeros((to.size, size), np.uint8)
        given = np.broadcast_to(size if given is None else given, self.lanes.shape)
        given = given if which is None else given[which]
        if given.max() > size:
            self.fail("bounds", site, int(np.argmax(given)), f"copies more than {size} bytes")
        for amount in np.unique(given):
            if amount:
                some = np.flatnonzero(given == amount)
                lanes = some if which is None else which[some]
                self._aligned(site, source[some], size, lanes)
                unit = int(amount) & -int(amount)
                got = (
                    self._fetch_global(site, source[some], min(unit, 8), int(amount) // min(unit, 8), lanes)
                    if amount == size
                    else self._bytes(site, source[some], int(amount), lanes)
                )
                data[some, : int(amount)] = np.ascontiguousarray(got).view(np.uint8).reshape(some.size, -1)
        flat = self._shared_offsets(site, to, size, which)
        cells = self.shared.cells(flat, size)
        lanes, tags = (self.lanes, self.tags) if which is None else (self.lanes[which], self.tags[which])
        self._check(site, self.shared.write(cells, tags, True), which)
        self.copies.append((lanes, self.committed[lanes] + 1, flat, cells, data))

    def _bytes(self, site, address, amount, lanes) -> np.ndarray:
        columns = [self._fetch_global(site, address + n, 1, 1, lanes) for n in range(amount)]
        return np.concatenate(columns, 1)

    def commit(self) -> None:
        """cp.async.commit_group."""
        self.committed[self.lanes] += 1

    def wait(self, left: int | None) -> None:
        """cp.async.wait_group: all but the last `left` groups have landed; None: all copies."""
        here = np.zeros(self.count, bool)
        here[self.lanes] = True
        tags = np.zeros(self.count, np.int64)
        tags[self.lanes] = self.tags
        remaining = []
        for lanes, group, flat, cells, data in self.copies:
            done = here[lanes] & (True if left is None else group <= self.committed[lanes] - left)
            if done.any():
                size = data.shape[1]
                view = self.shared.view(min(size, 8))
                index = (flat[done] // min(size, 8))[:, None] + np.arange(size // min(size, 8))
                view[index] = data[done].view(view.dtype)
                self.shared.arrive(cells[done], tags[lanes[done]])
            if not done.all():
                keep = ~done
                remaining.append((lanes[keep], group[keep], flat[keep], cells[keep], data[keep]))
        self.copies = remaining

    # Threads together

    def barrier(self, site: int) -> None:
        """bar.sync: of all threads of each block that have not ended."""
        here = np.bincount(self.block, minlength=self.epoch.size)
        wrong = (here > 0) & (here != self.alive)
        if wrong.any():
            lane = int(np.flatnonzero(wrong[self.block])[0])
            count = f"{here[self.block[lane]]} of {self.alive[self.block[lane]]} threads"
            self.fail("divergence", site, lane, f"a barrier is reached by {count}")
        self.epoch[here > 0] += 1
        self._tag()

    def warp_barrier(self, site: int) -> None:
        """bar.warp.sync of a whole warp."""
        self.together(site)
        self.warp_epoch[np.unique(self.lanes >> 5)] += 1
        self._tag()

    def together(self, site: int) -> None:
        """Refuses an instruction of whole warps where some of their threads are elsewhere."""
        if not self.whole_warps:
            self.fail("divergence", site, 0, "threads of this warp are elsewhere")

    def shuffle(self, site: int, mode: str, value, lane, clamp, members) -> tuple:
        """shfl.sync among whole warps: (value of the source lane, whether it is inside)."""
        self.together(site)
        if not (members == 0xFFFFFFFF).all():
            raise NotImplementedError("ptxsim: shfl.sync of some lanes only")
        shape = (-1, 32)
        value = self.of_all(value).reshape(shape)
        b = self.of_all(lane).reshape(shape).astype(np.int64) & 31
        c = int(clamp[0])
        segment, bound = c >> 8 & 31, c & 31
        own = np.arange(32)
        lowest, most = own & segment, (own & segment) | (bound & ~segment)
        if mode == "up":
            source = own - b
            inside = source >= most
        elif mode == "down":
            source = own + b
            inside = source <= most
        elif mode == "bfly":
            source = own ^ b
            inside = source <= most
        else:
            source = lowest | (b & ~segment)
            inside = source <= most
        source = np.where(inside, source, own)
        result = np.take_along_axis(value, np.broadcast_to(source, value.shape), 1)
        return result.reshape(-1), np.broadcast_to(inside, value.shape).reshape(-1)

    def elect(self, site: int, members) -> np.ndarray:
        """elect.sync: true in the first lane."""
        self.together(site)
        return self.thread % 32 == 0

    def vote(self, site: int, kind: str, predicate) -> np.ndarray:
        """vote.sync among whole warps."""
        self.together(site)
        flags = self.of_all(predicate).reshape(-1, 32)
        if kind == "ballot":
            found = (flags.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
        else:
            found = flags.any(1) if kind == "any" else flags.all(1)
        return np.repeat(found, 32)

    def reduce(self, site: int, name: str, value, members) -> np.ndarray:
        """redux.sync among whole warps: every lane receives the sum, the largest, ... of all."""
        self.together(site)
        if not (members == 0xFFFFFFFF).all():
            raise NotImplementedError("ptxsim: redux.sync of some lanes only")
        value = self.of_all(value).reshape(-1, 32)
        return np.repeat(_REDUCTIONS[name].reduce(value, 1, value.dtype), 32)

    def trap(self, site: int) -> None:
        """trap: an assertion of the kernel failed."""
        self.fail("launch", site, 0, "the kernel trapped")


def _picked(which, part):
    if part is None:
        return which
    return part if which is None else which[part]


def launch(
    compiled: Compiled,
    grid,
    threads,
    shared: int,
    arguments: bytes,
    memory: Allocations,
    profile=None,
    machine=Machine,
) -> None:
    """Runs every block of the grid.

    grid, threads: three sizes each. shared: bytes of a block. arguments: packed as the kernel's parameters.
    machine: makes what runs a batch of blocks.
    Raises: SimulationError with the first finding.
    """
    blocks = grid[0] * grid[1] * grid[2]
    per_block = threads[0] * threads[1] * threads[2]
    batch = max(1, _LANES // per_block)
    with np.errstate(all="ignore"):
        for first in range(0, blocks, batch):
            count = min(batch, blocks - first)
            machine(compiled, grid, threads, shared, arguments, first, count, memory, profile).run()
