"""What a compiled program does, read from its text: operations, how often, and what each computes, moves and sends.

The text is XLA's after all of its passes (``compiled.as_text()``), of the CPU's, a GPU's or a TPU's compiler.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+\d\w*|pred)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.~-]+)(?: \(|\s*\{)")
_EXCHANGES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all", "collective-broadcast")
# They stand for arrays that are there, or for the end of something counted at its start.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id", "replica-id", "iota",
         "add-dependency", "domain"}  # fmt: skip
_MOVES = {"copy", "transpose", "copy-start", "slice", "dynamic-slice", "concatenate", "pad", "reshape", "broadcast", "bitcast-convert"}


class Operation(NamedTuple):
    """One operation of a program; figures are of one device and one time.

    Attributes:
        kind: ``matmul``, ``attention`` (a fused kernel), an exchange (``all-gather``, …), ``copy`` (nothing but moved) or ``other``.
        name: of the operation in our program: the path of its scopes.
        times: how often a step does it.
        flops: of matrix products; what is done to single elements counts as nothing.
        moved: bytes read from memory and written to it.
        result: bytes of what it makes; of an all-gather the gathered whole.
        group: devices that take part in an exchange; 1 for others.
        dtype: of a matrix product's operands; "" for others.
        waits: an exchange that nothing can overlap, since it is no start with an end of its own.
    """

    kind: str
    name: str
    times: int
    flops: float = 0.0
    moved: float = 0.0
    result: float = 0.0
    group: int = 1
    dtype: str = ""
    waits: bool = False

    @property
    def sent(self) -> float:
        """Bytes that one device sends in a step, by the ring algorithms."""
        share = (self.group - 1) / self.group
        per_time = {
            "all-gather": self.result * share,
            "all-reduce": 2 * self.result * share,
            "reduce-scatter": self.result * (self.group - 1),
        }.get(self.kind, self.result * share if self.kind == "all-to-all" else self.result)
        return per_time * self.times if self.kind in _EXCHANGES and self.group > 1 else 0.0


class _Instruction(NamedTuple):
    """A line of the text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inside: str  # the brackets of the operands, as they are
    rest: str


_Computations = dict[str, dict[str, _Instruction]]


def operations(text: str, devices: int) -> list[Operation]:
    """The operations of a program, those in loops as often as the loop turns (once, where that is not to be read).

    Args:
        text: ``compiled.as_text()``.
        devices: of the whole mesh, for groups that the text leaves open.
    """
    computations, entry = _parse(text)
    found: list[Operation] = []
    exchanged: set[str] = set()
    for body, instruction, times in _executed(computations, entry, 1):
        # An asynchronous exchange of a TPU program stands in several fused computations, with one channel.
        for inner in (instruction, *_inside(computations, instruction)):
            kind = inner.opcode.removesuffix("-start")
            if kind in _EXCHANGES:
                channel = re.search(r"channel_id=(\d+)", inner.rest)
                key = channel[1] if channel else inner.name
                if key not in exchanged:
                    exchanged.add(key)
                    found.append(_exchange(kind, inner, times, devices))
        if instruction.opcode.removesuffix("-start") not in _EXCHANGES:
            found.append(_of_one(computations, body, instruction, times))
    return found


def custom_calls(text: str) -> dict[str, int]:
    """How often a compiled program calls each kernel that is no part of it, as its text has it: a call inside a loop is one.

    Args:
        text: ``compiled.as_text()``.
    """
    return dict(sorted(Counter(re.findall(r'custom_call_target="([^"]+)"', text)).items()))


# ---- reading


def _parse(text: str) -> tuple[_Computations, str]:
    """The computations by name, and the name of the one that runs."""
    computations: _Computations = {}
    entry = name = ""
    for line in text.splitlines():
        if line[:1] not in ("", " ", "}"):
            head = _COMPUTATION.match(line)
            if head and line.rstrip().endswith("{"):
                name = head[2]
                computations[name] = {}
                entry = name if head[1] else entry
        elif name and " = " in line:
            read = _instruction(line)
            if read:
                computations[name][read.name] = read
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    name, _, after = line.strip().partition(" = ")
    end = _closing(after) + 1 if after.startswith("(") else after.find(" ")
    shape, after = after[:end], after[end:].lstrip()
    opcode, bracket, _ = after.partition("(")
    if not bracket or not re.fullmatch(r"[\w-]+", opcode):
        return None
    end = _closing(after, len(opcode))
    inside = after[len(opcode) + 1 : end]
    operands = tuple(re.findall(r"%([\w.~-]+)", inside))
    return _Instruction(name.removeprefix("ROOT ").lstrip("%"), shape, opcode, operands, inside, after[end + 1 :])


def _closing(text: str, start: int = 0) -> int:
    """Where the bracket that opens at ``start`` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)


def _executed(computations: _Computations, name: str, times: int) -> Iterator[tuple[dict[str, _Instruction], _Instruction, int]]:
    """Instructions that run, with the computation they stand in and how often; of a branching the longest branch."""
    body = computations.get(name, {})
    for instruction in body.values():
        called = _called(instruction)
        if instruction.opcode == "while":
            loop = re.search(r"body=%?([\w.~-]+)", instruction.rest)
            if loop:
                yield from _executed(computations, loop[1], times * _turns(computations, instruction))
        elif instruction.opcode == "conditional" and called:
            longest = max(called, key=lambda c: len(computations.get(c, {})))
            yield from _executed(computations, longest, times)
        elif instruction.opcode in ("call", "async-start"):
            for inner in called:
                yield from _executed(computations, inner, times)
        elif instruction.opcode not in _FREE and not instruction.opcode.endswith(("-done", "-update")):
            yield body, instruction, times


def _turns(computations: _Computations, loop: _Instruction) -> int:
    """How often a loop turns: as the text says, else what its condition compares the turn's number with; 1 where that is no constant."""
    known = re.search(r'"known_trip_count":\s*\{"n":\s*"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.~-]+)", loop.rest)
    body = computations.get(condition[1], {}) if condition else {}
    limits = [i for i in body.values() if i.opcode == "constant" and i.shape.startswith("s32[]") and i.inside.isdigit()]
    return max((int(i.inside) for i in limits), default=1)


def _called(instruction: _Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    if listed:
        return re.findall(r"%([\w.~-]+)", listed[1])
    return re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.~-]+)", instruction.rest)


def _inside(computations: _Computations, instruction: _Instruction) -> Iterator[_Instruction]:
    """What a fusion fuses, the fusions in it included."""
    if instruction.opcode != "fusion":
        return
    for name in _called(instruction):
        for inner in computations.get(name, {}).values():
            yield inner
            yield from _inside(computations, inner)


# ---- what one does


def _exchange(kind: str, instruction: _Instruction, times: int, devices: int) -> Operation:
    started = instruction.opcode.endswith("-start")
    result = _outcome(instruction.shape, kind) if started else sum(_sizes(instruction.shape))
    group = _group(instruction.rest, devices)
    return Operation(kind, _named(instruction), times, 0.0, 2 * result, result, group, waits=not started)


def _outcome(shape: str, kind: str) -> float:
    """Bytes of what a start makes. Its shape has the operands, as many outcomes and perhaps numbers of its own; an all-reduce's has
    outcomes alone.
    """
    if kind == "all-reduce":
        return sum(_sizes(shape))
    sizes = _sizes(re.sub(r"\bu32\[\]", "", shape))
    return sum(sizes[len(sizes) // 2 :])


def _of_one(computations: _Computations, body: dict[str, _Instruction], instruction: _Instruction, times: int) -> Operation:
    fused = [computations[name] for name in _called(instruction) if name in computations] if instruction.opcode == "fusion" else []
    products = [(body, instruction)] + [(inside, i) for inside in _nested(computations, fused) for i in inside.values()]
    flops, dtype = 0.0, ""
    for where, i in products:
        worth = _product(where, i)
        if worth:
            flops, dtype = flops + worth, dtype or _dtype(where, i)
    opcodes = {i.opcode for _, i in products[1:]} - _FREE if fused else {instruction.opcode}
    kind = "matmul" if flops else "copy" if opcodes <= _MOVES else "other"
    if "fmha" in instruction.rest or "splash" in _named(instruction):
        kind = "attention"
    moved = _moved(computations, body, instruction)
    return Operation(kind, _named(instruction), times, flops, moved, sum(_sizes(instruction.shape)), 1, dtype)


def _nested(computations: _Computations, bodies: Sequence[dict[str, _Instruction]]) -> Iterator[dict[str, _Instruction]]:
    for body in bodies:
        yield body
        for i in body.values():
            if i.opcode == "fusion":
                yield from _nested(computations, [computations[name] for name in _called(i) if name in computations])


def _product(body: dict[str, _Instruction], i: _Instruction) -> float:
    """Floating-point operations of a matrix product or of a fused attention; 0 for anything else."""
    shapes = [_dims(body[o].shape) if o in body else () for o in i.operands]
    if len(shapes) < 2:
        return 0.0
    if i.opcode == "dot" or "gemm_backend_config" in i.rest or (i.opcode == "custom-call" and "matmul" in i.rest):
        over = _numbers(i.rest, "lhs_contracting_dims") or _numbers(i.rest, "lhs_contracting_dimensions")
        first = _dims(i.shape)
        return 2.0 * _count(first) * _count(tuple(shapes[0][d] for d in over if d < len(shapes[0])))
    if i.opcode == "convolution":
        labels = re.search(r"dim_labels=\w+_(\w+)->", i.rest)
        kept = shapes[1][labels[1].index("o")] if labels and "o" in labels[1] else 1
        return 2.0 * _count(_dims(i.shape)) * _count(shapes[1]) / max(kept, 1)
    scores = re.search(r'"intermediate_tensor_shape".*?"dimensions":\s*\[([^\]]*)\]', i.rest)
    if "fmha" in i.rest and scores:  # two products forward; backward the scores again and four more; half of each below the diagonal
        share = 0.5 if re.search(r'"mask_type":\s*"\w*CAUSAL', i.rest) else 1.0
        products = 5 if "Backward" in i.rest else 2
        return 2.0 * share * products * _count(_numbers_of(scores[1].replace('"', ""))) * shapes[0][-1]
    return 0.0


def _moved(computations: _Computations, body: dict[str, _Instruction], instruction: _Instruction) -> float:
    """Bytes read and written; of an array that is only cut from, or only written into, what is cut or written."""
    fused = computations.get(_called(instruction)[0], {}) if instruction.opcode == "fusion" and _called(instruction) else {}
    sources = [sum(_sizes(body[o].shape)) if o in body else 0.0 for o in instruction.operands]
    if instruction.opcode == "dynamic-slice":
        return 2 * sum(_sizes(instruction.shape))
    if instruction.opcode == "dynamic-update-slice":
        return 2 * sources[1]
    if instruction.opcode == "gather":
        return 2 * sum(_sizes(instruction.shape))
    if not fused:
        return sum(sources) + sum(_sizes(instruction.shape))
    parameters = {int(i.inside): i.name for i in fused.values() if i.opcode == "parameter"}
    read = sum(_read(fused, parameters[k], size) if k in parameters else size for k, size in enumerate(sources))
    updates = [i for i in fused.values() if i.opcode == "dynamic-update-slice"]
    if updates:
        return read + sum(sum(_sizes(fused[i.operands[1]].shape)) for i in updates if i.operands[1] in fused)
    return read + sum(_sizes(instruction.shape))


def _read(fused: dict[str, _Instruction], name: str, size: float) -> float:
    users = [i for i in fused.values() if name in i.operands]
    through = [i for i in users if i.opcode == "bitcast"]
    if through and len(through) == len(users):
        return sum(_read(fused, i.name, size) for i in through)
    if users and all(i.opcode == "dynamic-slice" and i.operands[0] == name for i in users):
        return sum(sum(_sizes(i.shape)) for i in users)
    if users and all(i.opcode == "dynamic-update-slice" and i.operands[0] == name for i in users):
        return 0.0
    return size


# ---- shapes and names


def _sizes(shape: str) -> list[float]:
    """Bytes of each array of a shape."""
    found = []
    for kind, dims in _ARRAY.findall(shape):
        bits = _BITS.get(kind)
        if bits is None:
            bits = int((re.match(r"[a-z]+(\d+)", kind) or ["", "0"])[1])
        found.append(_count(_numbers_of(dims)) * bits / 8)
    return found


def _dims(shape: str) -> tuple[int, ...]:
    """Of the first array of a shape."""
    array = _ARRAY.search(shape)
    return _numbers_of(array[2]) if array else ()


def _dtype(body: dict[str, _Instruction], i: _Instruction) -> str:
    array = _ARRAY.search(body[i.operands[0]].shape) if i.operands and i.operands[0] in body else None
    return array[1] if array else ""


def _numbers_of(dims: str) -> tuple[int, ...]:
    return tuple(int(n) for n in dims.split(",") if n)


def _numbers(rest: str, key: str) -> list[int]:
    found = re.search(rf'"?{key}"?[=:][\[{{]([^\]}}]*)[\]}}]', rest)
    return [int(n) for n in re.findall(r"\d+", found[1])] if found else []


def _count(dims: Sequence[int]) -> float:
    total = 1.0
    for n in dims:
        total *= n
    return total


def _named(instruction: _Instruction) -> str:
    name = re.search(r'op_name="([^"]*)"', instruction.rest)
    return name[1] if name else ""


def _group(rest: str, devices: int) -> int:
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(tiled[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]* \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        group = 1
        for axis in re.findall(r"'(\w+)'", named[2]):
            group *= int(sizes[axis])
        return group
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return 2 if pairs[1] else 1
    return devices
