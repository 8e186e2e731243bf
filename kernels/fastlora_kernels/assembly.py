"""Read what the compiler made of a kernel: its main loop, instruction by instruction.

NVIDIA: the output of ``nvdisasm -c`` (machine code). AMD: the assembly that Triton keeps.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_NVIDIA_MATRIX = re.compile(r"^(HMMA|HGMMA|QGMMA|UTC\w*MMA|DMMA|IMMA)")
_AMD_MATRIX = re.compile(r"^v_(mfma|wmma|smfma)")
_LABEL = re.compile(r"^\s*(\.L\w+):")
_NVIDIA_CODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_AMD_CODE = re.compile(r"^\s+([sv]_\w.*|(?:ds|global|buffer|flat|scratch)_\w.*)$")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_BRANCH = re.compile(r"^(?:BRA\S*|s_c?branch\w*)\s.*?(\.L\w+)")
_NVIDIA_BYTES = (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2))
_AMD_BYTES = (("x4", 16), ("x3", 12), ("x2", 8), ("byte", 1), ("short", 2), ("d16", 2))


@dataclass(frozen=True)
class Loop:
    """The instructions of one thread's turn through a loop (of the whole code without one)."""

    instructions: tuple[str, ...]
    loops: bool

    @property
    def counts(self) -> Counter[str]:
        """How often each operation occurs, without modifiers."""
        return Counter(re.split(r"[ .]", line, maxsplit=1)[0] for line in self.instructions)

    @property
    def matrix(self) -> int:
        """Number of matrix instructions."""
        return sum(map(is_matrix, self.instructions))

    @property
    def global_bytes(self) -> int:
        """Bytes that one thread loads from global memory, copies into shared memory included."""
        return sum(map(_global_bytes, self.instructions))


def is_matrix(instruction: str) -> bool:
    """Return whether an instruction multiplies matrices."""
    return bool(_NVIDIA_MATRIX.match(instruction) or _AMD_MATRIX.match(instruction))


def _global_bytes(instruction: str) -> int:
    name = instruction.split()[0]
    if name.startswith(("LDG.", "LDGSTS", "LDG")):
        widths, parts = _NVIDIA_BYTES, name.split(".")
        return next((size for mark, size in widths if mark in parts), 4)
    if name.startswith(("global_load", "buffer_load")):
        return next((size for mark, size in _AMD_BYTES if mark in name), 4)
    return 0


@dataclass
class _Block:
    """Instructions without a jump but at the end, and the blocks that may follow."""

    instructions: list[str]
    next: set[int]


def _blocks(code: str) -> list[_Block]:
    """Return the basic blocks of a kernel in the order of the code."""
    blocks: list[_Block] = [_Block([], set())]
    starts: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    falls = True
    for line in code.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].instructions:
                if falls:
                    blocks[-1].next.add(len(blocks))
                blocks.append(_Block([], set()))
                falls = True
            starts[label[1]] = len(blocks) - 1
        elif found := _NVIDIA_CODE.match(line) or _AMD_CODE.match(line):
            text = found[1].split(" ;")[0].strip()
            bare = _PREDICATE.sub("", text)
            blocks[-1].instructions.append(bare)
            target = _BRANCH.match(bare.replace("`(", ""))
            if target:
                jumps.append((len(blocks) - 1, target[1]))
            always = bare == text and "UP" not in text
            falls = not (always and bare.startswith(("BRA", "EXIT", "RET", "s_branch", "s_endpgm")))
            if target or not falls:
                if falls:
                    blocks[-1].next.add(len(blocks))
                blocks.append(_Block([], set()))
                falls = True
    for block, label_name in jumps:
        if label_name in starts:
            blocks[block].next.add(starts[label_name])
    for block_ in blocks:
        block_.next = {i for i in block_.next if i < len(blocks)}
    return blocks


def _reachable(blocks: list[_Block], start: int, without: int) -> set[int]:
    """Return the blocks that can follow `start` on a way that avoids `without`."""
    found: set[int] = set()
    waiting = [start] if start != without else []
    while waiting:
        block = waiting.pop()
        if block not in found:
            found.add(block)
            waiting += [i for i in blocks[block].next if i != without]
    return found


def _loops(blocks: list[_Block]) -> list[Loop]:
    """Return the natural loops: those of jumps to a block that every way to the jump passes."""
    edges = [(end, head) for end, block in enumerate(blocks) for head in block.next if head <= end]
    alive, found = _reachable(blocks, 0, -1), []
    for end, head in edges:
        if end not in alive or end in _reachable(blocks, 0, head):
            continue
        inside = {head} | {
            i
            for i in _reachable(blocks, head, -1)
            if i == end or (i != head and end in _reachable(blocks, i, head))
        }
        lines = [line for i in sorted(inside) for line in blocks[i].instructions]
        found.append(Loop(tuple(lines), True))
    return found


def main_loop(code: str) -> Loop:
    """Return the longest loop, of those with matrix instructions where there are such.

    Code without a loop of more than eight instructions counts as one that is run once.
    """
    blocks = _blocks(code)
    loops = [loop for loop in _loops(blocks) if len(loop.instructions) > 8]
    if not loops:
        return Loop(tuple(line for block in blocks for line in block.instructions), False)
    return max(loops, key=lambda loop: (loop.matrix > 0, len(loop.instructions)))
