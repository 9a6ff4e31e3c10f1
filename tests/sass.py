"""Machine code of NVIDIA GPUs, as cuobjdump prints it: its loops, and what they do to memory."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

# They end a path, or go where only run time knows: out of any loop of ours.
_LEAVES = {"EXIT", "RET", "BRX", "JMX"}
_LOAD, _STORE = (re.compile(rf"{kind}\..*\b128\b.*") for kind in ("LDG", "STG"))  # of 128 bits


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def writes(self) -> set[int]:
        """The registers that a 128-bit load writes."""
        first = int(self.operands[1:].split(",")[0])
        return set(range(first, first + 4))

    @property
    def uses(self) -> set[int]:
        return {int(number) for number in re.findall(r"\bR(\d+)", self.operands)}


class Loop:
    """The instructions of a loop, by address."""

    def __init__(self, instructions: list[Instruction]) -> None:
        self.instructions = instructions

    @cached_property
    def vectors(self) -> tuple[int, int]:
        """How many loads and stores of 128 bits it makes."""
        loads = [i for i in self.instructions if _LOAD.fullmatch(i.opcode)]
        stores = [i for i in self.instructions if _STORE.fullmatch(i.opcode)]
        return len(loads), len(stores)

    @property
    def conditional_loads(self) -> int:
        """How many of its loads of 128 bits a predicate can turn off."""
        return sum(bool(i.predicate) for i in self.instructions if _LOAD.fullmatch(i.opcode))

    @cached_property
    def others(self) -> list[str]:
        """Its other accesses to memory that is not shared memory."""
        access = r"(LD|LDG|LDL|ST|STG|STL|ATOM|ATOMG|RED|LDGSTS)\b(?!.*\b128\b).*"
        return [i.opcode for i in self.instructions if re.fullmatch(access, i.opcode)]

    @cached_property
    def loads_in_flight(self) -> int:
        """How many loads of 128 bits are issued before one's result is needed, and before the
        first branch in a root or a division of what has been loaded before."""
        awaited: set[int] = set()
        count = 0
        has_begun = False
        for instruction in self.instructions:
            load = _LOAD.fullmatch(instruction.opcode)
            _, _, address = instruction.operands.partition(",")
            used = instruction._replace(operands=address).uses if load else instruction.uses
            if used & awaited or (has_begun and instruction.opcode.startswith("BRA")):
                break
            has_begun |= instruction.opcode.startswith("MUFU")
            if load:
                awaited |= instruction.writes
                count += 1
        return count


def instructions(code: str) -> list[Instruction]:
    line = r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ +)?(\S+) *(.*?) *;"
    return [
        Instruction(int(address, 16), predicate.strip(), opcode, operands)
        for address, predicate, opcode, operands in re.findall(line, code)
    ]


def vector_loops(code: str) -> list[Loop]:
    """The loops that make 128-bit accesses and have no other such loop inside."""
    listing = instructions(code)
    index = {instruction.address: i for i, instruction in enumerate(listing)}
    predecessors: dict[int, list[int]] = defaultdict(list)
    back_edges = []
    for i, (_, predicate, opcode, operands) in enumerate(listing):
        kind = opcode.split(".")[0]
        if kind == "BRA":
            *condition, target = operands.split(", ")
            to = index[int(target, 16)]
            predecessors[to].append(i)
            if to <= i:
                back_edges.append((i, to))
            if not predicate and not condition:
                continue
        elif kind in _LEAVES and not predicate:
            continue
        predecessors[i + 1].append(i)
    bodies = []
    for last, head in back_edges:
        body, todo = {head, last}, [last] * (last != head)
        while todo:  # what reaches the branch without passing the head
            new = [p for p in predecessors[todo.pop()] if p not in body]
            body.update(new)
            todo.extend(new)
        if head == 0 or 0 not in body:
            bodies.append(body)
    vectors = {
        i for i, x in enumerate(listing) if _LOAD.fullmatch(x.opcode) or _STORE.fullmatch(x.opcode)
    }
    found = {frozenset(body) for body in bodies if body & vectors}
    innermost = [b for b in found if not any(other < b for other in found)]
    return [Loop([listing[i] for i in sorted(body)]) for body in innermost]


def cuobjdump(path: str | Path, *arguments: str) -> str:
    """What Triton's copy of it says of a binary."""
    import triton

    command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", *arguments, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
