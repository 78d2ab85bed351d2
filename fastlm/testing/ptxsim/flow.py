"""In which order waiting threads run: by the program's paths, so that threads meet where paths join.

Not by its text: nvcc puts the side of a branch behind the place where both sides join again; a GPU's shuffles
wait there for all of their lanes, and so do threads here: a block comes after every block that leads to it
but for a loop's way back, and what follows a loop comes after the loop.
"""

from .parse import Program


def ranks(program: Program) -> list[int]:
    """The place of each basic block in that order."""
    following = [_following(program, n) for n in range(len(program.blocks))]
    _, back = _finished(following, lambda block, targets: targets)
    inside = _loops(following, back)

    def leaving_first(block: int, targets: list[int]) -> list[int]:
        return sorted(targets, key=lambda t: (len(inside[block] & inside[t]), -t))

    finished, _ = _finished(following, leaving_first)
    order = finished[::-1]
    order += sorted(set(range(len(following))) - set(order))
    found = [0] * len(order)
    for rank, block in enumerate(order):
        found[block] = rank
    return found


def _following(program: Program, number: int) -> list[int]:
    instructions = program.blocks[number].instructions
    last = instructions[-1] if instructions else None
    root = last.opcode.split(".")[0] if last else ""
    targets = [program.labels[last.operands[0].value]] if root == "bra" else []
    if root not in ("bra", "ret", "exit", "trap") or last.guard:
        targets.append(number + 1)
    return [t for t in targets if t < len(program.blocks)]


def _finished(following: list[list[int]], ordered) -> tuple[list[int], list[tuple[int, int]]]:
    """A depth-first walk: blocks as they are finished, and the edges back to blocks that are not."""
    seen, done, back, finished = {0}, set(), [], []
    path = [(0, iter(ordered(0, following[0])))] if following else []
    while path:
        block, targets = path[-1]
        target = next(targets, None)
        if target is None:
            path.pop()
            done.add(block)
            finished.append(block)
        elif target in seen:
            if target not in done:
                back.append((block, target))
        else:
            seen.add(target)
            path.append((target, iter(ordered(target, following[target]))))
    return finished, back


def _loops(following: list[list[int]], back: list[tuple[int, int]]) -> list[set[int]]:
    """The heads of the loops that each block is part of."""
    leading: list[list[int]] = [[] for _ in following]
    for block, targets in enumerate(following):
        for target in targets:
            leading[target].append(block)
    inside: list[set[int]] = [set() for _ in following]
    for end, head in back:
        inside[head].add(head)
        waiting = [end]
        while waiting:
            block = waiting.pop()
            if head not in inside[block]:
                inside[block].add(head)
                waiting += leading[block]
    return inside
