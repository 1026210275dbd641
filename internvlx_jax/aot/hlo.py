"""What a compiled program moves, read from its HLO text (design: platform.md 2).

Collectives and traffic of main memory. XLA's `cost_analysis()` counts the body of a loop once; here
it counts as often as it runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

ITEM_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "f8e4m3fn": 8,
    "f8e5m2": 8,
    "s16": 16,
    "u16": 16,
    "f16": 16,
    "bf16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
NO_TRAFFIC = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "partition-id",
    "replica-id",
    "after-all",
    "iota",
    "opt-barrier",
}

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_REFERENCE = re.compile(r"%([\w.\-]+)")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? *"
    r"\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Describes one collective instruction.

    Attributes:
        kind: One of COLLECTIVES; the fused all-reduce and slice of TPUs is a reduce-scatter.
        received: Bytes that each device receives over the network in one run, by a ring.
        times: Runs per step.
        group: Numbers of the devices of one group, in the order of the mesh.
    """

    kind: str
    received: float
    times: int
    group: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Moved:
    """Holds what a step moves.

    Attributes:
        collectives: Its collectives.
        memory_bytes: Bytes that each device reads from and writes to main memory; VMEM does not
            count.
        unknown_loops: Loops whose length the text does not tell; their bodies count once.
    """

    collectives: tuple[Collective, ...]
    memory_bytes: float
    unknown_loops: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return _REFERENCE.findall(self.rest[: _closing(self.rest)])

    def attribute(self, name: str) -> str | None:
        """Returns the computation that an attribute names, if the instruction has it."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest[_closing(self.rest) :])
        return found and found.group(1)


def moved(text: str, devices: int) -> Moved:
    """Reads `compiled.as_text()` of a program for `devices` devices."""
    computations, entry = _parse(text)
    collectives: list[Collective] = []
    traffic, unknown = 0.0, 0
    shapes = {i.name: i.shape for body in computations.values() for i in body}
    for instruction, times, known in _executed(computations, entry):
        unknown += not known
        op = instruction.op.removesuffix("-start")
        if op in COLLECTIVES:
            collectives.append(_collective(instruction, op, times, devices, shapes))
        fused = computations.get(instruction.attribute("calls") or "", [])
        inner = next((i for i in fused if i.op == "all-reduce"), None)
        if instruction.op == "fusion" and inner is not None:  # how a TPU writes a reduce-scatter
            collectives.append(_collective(inner, "reduce-scatter", times, devices, shapes))
        traffic += times * _traffic(instruction, fused, shapes)
    return Moved(tuple(collectives), traffic, unknown)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, body = "", []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            body = computations[header.group(1)] = []
            if line.startswith("ENTRY"):
                entry = header.group(1)
        elif found := _INSTRUCTION.match(line):
            body.append(_Instruction(*found.groups()))
    return computations, entry


def _executed(
    computations: dict[str, list[_Instruction]], name: str, times: int = 1
) -> Iterator[tuple[_Instruction, int, bool]]:
    """Yields every instruction that runs, how often per step, and whether that is known."""
    for instruction in computations[name]:
        count = _trip_count(instruction, computations) if instruction.op == "while" else 1
        for callee in _callees(instruction):
            yield from _executed(computations, callee, times * (count or 1))
        yield instruction, times, count is not None


def _callees(instruction: _Instruction) -> list[str]:
    """Returns the computations that an instruction runs: a loop's body, a callee, branches."""
    if instruction.op == "while":
        return [instruction.attribute("body") or ""]
    if instruction.op in ("call", "async-start"):
        return [instruction.attribute("to_apply") or instruction.attribute("calls") or ""]
    return _branches(instruction) if instruction.op == "conditional" else []


def _branches(instruction: _Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    if listed:
        return _REFERENCE.findall(listed.group(1))
    names = ("true_computation", "false_computation")
    return [instruction.attribute(name) or "" for name in names]


def _trip_count(
    instruction: _Instruction, computations: dict[str, list[_Instruction]]
) -> int | None:
    """Returns what the compiler states, or the one integer that the condition compares with."""
    stated = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', instruction.rest)
    if stated:
        return int(stated.group(1))
    condition = computations[instruction.attribute("condition") or ""]
    limits = [i.rest for i in condition if i.op == "constant" and i.shape.startswith("s32[]")]
    return int(limits[0].split(")")[0]) if len(limits) == 1 else None


def _collective(
    instruction: _Instruction, kind: str, times: int, devices: int, shapes: dict[str, str]
) -> Collective:
    group = _first_group(instruction.rest, devices)
    sent = sum(_bytes(shapes.get(operand, "")) for operand in instruction.operands)
    others = max(len(group) - 1, 0)
    received = {
        "all-gather": others * sent,
        "all-reduce": 2 * sent * others / max(len(group), 1),
        "collective-permute": sent,
        "collective-broadcast": sent,
    }.get(kind, sent * others / max(len(group), 1))
    return Collective(kind, received, times, group)


def _first_group(rest: str, devices: int) -> tuple[int, ...]:
    """Returns the members of one group.

    HLO writes groups as lists, as `[4,64]<=[256]`, or as `mesh['x'=64,'y'=4] {'x'}`.
    """
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return int(pairs.group(1)), int(pairs.group(2))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return _integers(listed.group(1)) or ()
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        groups, dims, order = map(_integers, iota.groups())
        assert groups and dims
        numbers = np.arange(math.prod(dims)).reshape(dims)
        return tuple(numbers.transpose(order).reshape(groups)[0].tolist())
    if mesh := _MESH_GROUPS.search(rest):
        axes, dims, order, names = mesh.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        members = np.arange(math.prod(sizes.values()))
        if dims:
            members = members.reshape(_integers(dims)).transpose(_integers(order))
        members = members.reshape(tuple(sizes.values()))
        varied = re.findall(r"'(\w+)'", names)
        return tuple(
            members[tuple(slice(None) if name in varied else 0 for name in sizes)]
            .reshape(-1)
            .tolist()
        )
    return tuple(range(devices))


def _integers(text: str | None) -> tuple[int, ...] | None:
    return tuple(map(int, text.split(","))) if text else None


def _traffic(instruction: _Instruction, fused: list[_Instruction], shapes: dict[str, str]) -> float:
    """Returns the bytes that one run of an instruction reads and writes in main memory."""
    op, operands = instruction.op, instruction.operands
    if (
        op in NO_TRAFFIC
        or op in ("while", "call", "conditional", "async-start")
        or op.endswith("-done")
    ):
        return 0
    if op == "dynamic-update-slice":
        return 2 * _bytes(shapes.get(operands[1], ""))
    if op in ("dynamic-slice", "slice", "gather"):
        return 2 * _bytes(instruction.shape)
    written = _bytes(instruction.shape)
    read = [_bytes(shapes.get(operand, "")) for operand in operands]
    if op == "fusion":
        written, read = _fusion_traffic(written, read, fused, shapes)
    elif op.endswith("-start"):  # its result repeats its operands
        written = max(written - sum(read), 0)
    return written + sum(read)


def _fusion_traffic(
    written: float, read: list[float], fused: list[_Instruction], shapes: dict[str, str]
) -> tuple[float, list[float]]:
    """Corrects the traffic of a fusion, (bytes written, bytes read per operand).

    Operands that are only sliced are read where they are sliced; what is updated in place is
    written where it changes.
    """
    users: dict[str, list[_Instruction]] = {}
    for instruction in fused:
        for operand in instruction.operands:
            users.setdefault(operand, []).append(instruction)
    read = list(read)
    for parameter in (i for i in fused if i.op == "parameter"):
        number, used = int(parameter.rest.split(")")[0]), users.get(parameter.name, [])
        while len(used) == 1 and used[0].op == "bitcast":
            used = users.get(used[0].name, [])
        if number >= len(read) or not used:
            continue
        if all(user.op in ("dynamic-slice", "slice", "gather") for user in used):
            read[number] = min(read[number], sum(_bytes(user.shape) for user in used))
        elif all(user.op == "dynamic-update-slice" for user in used):
            whole, read[number] = read[number], 0
            changed = sum(_bytes(shapes.get(user.operands[1], "")) for user in used)
            written = max(written - whole, 0) + changed
    return written, read


def _bytes(shape: str) -> float:
    """Returns the bytes of a shape's arrays in main memory; `S(1)` and above are other memories."""
    total = 0.0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype in ITEM_BITS and not re.search(r"S\([1-9]", layout):
            total += ITEM_BITS[dtype] / 8 * math.prod(int(n) for n in dims.split(",") if n)
    return total


def _closing(rest: str) -> int:
    """Returns the position of the parenthesis that ends the operands."""
    depth = 1
    for position, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return position
    return len(rest)
