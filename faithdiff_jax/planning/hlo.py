"""What a compiled program does to memory and between devices, read from the text of its optimised HLO.

text --parse--> computations --walk, loops multiplied out--> bytes moved, collectives by kind and size
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Instructions that move nothing: names for what is there, and those whose work is in the computations they call.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "async-start", "async-update", "async-done", "copy-done", "send-done",
    "recv-done", "opt-barrier", "domain", "add-dependency", *(f"{name}-done" for name in COLLECTIVES),
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\{$")
_CALLED = re.compile(r"(calls|body|to_apply|branch_computations|called_computations)=\{?((?:%[^\s,}]+(?:, )?)+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: what it makes, of what, and the rest of the line."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self) -> Iterator[str]:
        """The computations that it runs."""
        for match in _CALLED.finditer(self.attributes):
            yield from re.findall(r"%([^\s,}]+)", match[2])


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of traffic between devices.

    Attributes:
        kind: "all-gather", for one.
        devices: how many take part in each group.
        size: bytes of the whole result on a device (for reduce-scatter, of its operand).
        count: how often in a run of the program.
    """

    kind: str
    devices: int
    size: int
    count: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all, by the ring algorithms: what no way of doing it can go below."""
        share = (self.devices - 1) / self.devices
        return self.count * self.size * {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a run of a program moves on each device.

    Attributes:
        memory_bytes: read from and written to the device's memory, not counting what stays in on-chip memory.
        collectives: traffic between devices, the largest first.
    """

    memory_bytes: float
    collectives: tuple[Collective, ...]


def traffic(text: str) -> Traffic:
    """Read the text of an optimised module, as `compiled.as_text()` gives it or XLA writes it down.

    Every instruction reads its operands and writes its result once; of a stack that is sliced, the slice counts, and of
    one that is updated, the update. A loop counts as often as the constant says that its counter is compared with, a
    collective that the compiler spread over several fusions once.
    """
    entry, computations = _parse(text)
    moved = 0.0
    seen: dict[tuple[int, str], Collective] = {}
    for name, times, fused in _executions(entry, computations):
        instructions = computations[name]
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                key = (times, _channel(instruction) or f"{name}.{instruction.name}")
                seen[key] = _collective(instruction, instructions, kind, times)
            if not fused and instruction.opcode not in _FREE:
                moved += times * _bytes_moved(instruction, instructions, computations)
    counts: collections.Counter[tuple[str, int, int]] = collections.Counter()
    for collective in seen.values():
        counts[collective.kind, collective.devices, collective.size] += collective.count
    found = [Collective(*key, count) for key, count in counts.items()]
    return Traffic(moved, tuple(sorted(found, key=lambda collective: -collective.sent)))


Computation = dict[str, Instruction]


def _parse(text: str) -> tuple[str, dict[str, Computation]]:
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    return entry, computations


def _instruction(line: str) -> Instruction | None:
    left, equals, rest = line.strip().partition(" = ")
    if not equals:
        return None
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.find("(")
    if start < 0:
        return None
    end = _closing(rest, start)
    operands = tuple(re.findall(r"%([^\s,()]+)", rest[start:end]))
    root = left.startswith("ROOT ")
    opcode, attributes = rest[:start], rest[end:]
    if opcode in ("constant", "parameter"):
        attributes = rest[start:]  # its value, or its number
    return Instruction(left.removeprefix("ROOT ").lstrip("%"), kind, opcode, operands, attributes, root)


def _closing(text: str, start: int) -> int:
    """Behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    return len(text)


def _executions(entry: str, computations: dict[str, Computation]) -> Iterator[tuple[str, int, bool]]:
    """Every computation that runs, how often, and whether it is the inside of a fusion."""

    def walk(name: str, times: int, fused: bool) -> Iterator[tuple[str, int, bool]]:
        if name not in computations:
            return
        yield name, times, fused
        for instruction in computations[name].values():
            if instruction.opcode in ("reduce", "reduce-window", "scatter", "sort", "map", "select-and-scatter"):
                continue  # a scalar function, whose work is the instruction's own
            if instruction.opcode.removesuffix("-start") in ("all-reduce", "reduce-scatter"):
                continue
            often = times * (_trips(instruction, computations) if instruction.opcode == "while" else 1)
            inside = fused or instruction.opcode in ("fusion", "custom-call")
            for called in instruction.called():
                yield from walk(called, often, inside)

    yield from walk(entry, 1, False)


def _trips(loop: Instruction, computations: dict[str, Computation]) -> int:
    """How often a loop runs: what the compiler noted, or the largest constant that its condition has."""
    if known := re.search(r'known_trip_count":\{"n":"([0-9]+)"', loop.attributes):
        return int(known[1])
    condition = re.search(r"condition=%([^\s,]+)", loop.attributes)
    inside = computations.get(condition[1], {}) if condition else {}
    called = [computations.get(name, {}) for instruction in inside.values() for name in instruction.called()]
    constants = [
        int(match[1])
        for computation in (inside, *called)
        for instruction in computation.values()
        if instruction.opcode == "constant" and (match := re.match(r"\(?([0-9]+)\)?", instruction.attributes or ""))
    ]
    return max(constants, default=1)


def _channel(instruction: Instruction) -> str | None:
    found = re.search(r"channel_id=([0-9]+)", instruction.attributes)
    return found[1] if found else None


def _collective(instruction: Instruction, instructions: Computation, kind: str, times: int) -> Collective:
    whole = _size(instruction.type, everywhere=True)
    given = sum(
        _size(instructions[name].type, everywhere=True) for name in instruction.operands if name in instructions
    )
    if kind == "reduce-scatter":
        size = max(given, whole)
    elif instruction.opcode.endswith("-start") and kind == "all-gather":
        size = max(whole - given, given)  # its result is (operand, gathered)
    else:
        size = whole
    return Collective(kind, _group(instruction.attributes), size, times)


def _group(attributes: str) -> int:
    """How many devices a group has, in any of the ways that XLA writes it."""
    if listed := re.search(r"replica_groups=\{\{([0-9,]+)\}", attributes):
        return listed[1].count(",") + 1
    if even := re.search(r"replica_groups=\[([0-9,]+)\]<=", attributes):
        return int(even[1].split(",")[-1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=([0-9]+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return pairs[1].count("{")
    return 1


def _bytes_moved(instruction: Instruction, instructions: Computation, computations: dict[str, Computation]) -> float:
    written = float(_size(instruction.type))
    read = [_size(instructions[name].type) if name in instructions else 0 for name in instruction.operands]
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * (read[1] if len(read) > 1 else written)
    if instruction.opcode in _SLICES:
        return 2 * written
    inside = next((computations[name] for name in instruction.called() if name in computations), None)
    if instruction.opcode == "fusion" and inside is not None:
        for index, size in enumerate(read):
            read[index] = min(size, _read_inside(index, inside, size))
        root = next((found for found in inside.values() if found.root), None)
        if root is not None and root.opcode == "dynamic-update-slice":
            update = _size(inside[root.operands[1]].type, everywhere=True) if root.operands[1] in inside else 0
            written = min(written, update)
    return written + sum(read)


def _read_inside(index: int, inside: Computation, size: int) -> int:
    """What a fusion reads of one operand: of one that it only slices, the slices; of one that it updates, nothing."""
    parameter = next(
        (i.name for i in inside.values() if i.opcode == "parameter" and _argument(i) == index),
        None,
    )
    users = [user for user in inside.values() if parameter in user.operands]
    if not users:
        return size
    read = 0
    for user in users:
        if user.opcode in _SLICES and user.operands[0] == parameter:
            read += _size(user.type, everywhere=True)
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == parameter):
            return size
    return read


def _argument(parameter: Instruction) -> int:
    found = re.match(r"\(?([0-9]+)\)?", parameter.attributes)
    return int(found[1]) if found else -1


def _size(kind: str, *, everywhere: bool = False) -> int:
    """Bytes of a type; only of what lies in the device's memory (space 0) unless `everywhere`."""
    size = 0
    for dtype, shape, layout in _ARRAY.findall(kind):
        if everywhere or not re.search(r"S\([1-9]", layout):
            size += math.prod(int(side) for side in shape.split(",") if side) * _bits(dtype) // 8
    return size


def _bits(dtype: str) -> int:
    """Of an element: what the name says, but for those whose name says none."""
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"[0-9]+", dtype)
    return int(digits[0]) if digits else 0
