"""What a compiled program sends between devices, and what it calls, read from its text."""

import re
from collections import Counter
from typing import NamedTuple

_OP = re.compile(
    r"= (?P<shape>\(.*?\)|\S+) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "f8e4m3fn": 8, "f8e5m2": 8}


class Collective(NamedTuple):
    """One exchange.

    Attributes:
        kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute.
        size: bytes of its result on one device; of an all-gather the gathered whole.
        group: devices that take part in one exchange.
        times: how often a step does it.
        name: of the operation in our program.
    """

    kind: str
    size: int
    group: int
    times: int
    name: str

    @property
    def sent(self) -> float:
        """Bytes that one device sends in a step, by the ring algorithms."""
        share = (self.group - 1) / self.group
        per_time = {
            "all-gather": self.size * share,
            "all-reduce": 2 * self.size * share,
            "reduce-scatter": self.size * (self.group - 1),
            "all-to-all": self.size * share,
            "collective-permute": float(self.size),
        }[self.kind]
        return per_time * self.times


def collectives(text: str, layers: int, devices: int, chunks: int = 1) -> list[Collective]:
    """The exchanges of a compiled step.

    Args:
        text: ``compiled.as_text()``.
        layers: turns of the scan over layers: an operation inside it (its name says so) is done that often.
        devices: of the whole mesh, for groups that the text leaves open.
        chunks: turns of the scan over the positions of the loss, likewise.
    """
    found: dict[str, Collective] = {}
    for number, line in enumerate(text.splitlines()):
        match = _OP.search(line)
        if match is None:
            continue
        name = re.search(r'op_name="([^"]*)"', line)
        where = name[1] if name else ""
        # An asynchronous exchange of a TPU program stands in several fused computations, with one channel.
        channel = re.search(r"channel_id=(\d+)", line)
        key = channel[1] if channel else f"line {number}"
        turns = chunks if "cross_entropy" in where else layers
        times = turns if "while/body" in where else 1
        found[key] = Collective(
            match["kind"],
            _bytes(match["shape"], "-start(" in line),
            _group(line, devices),
            times,
            where,
        )
    return [c for c in found.values() if c.group > 1]


def custom_calls(text: str) -> dict[str, int]:
    """How often a compiled program calls each kernel that is no part of it, as its text has it: a call inside a loop is one.

    Args:
        text: ``compiled.as_text()``.
    """
    return dict(sorted(Counter(re.findall(r'custom_call_target="([^"]+)"', text)).items()))


def _bytes(shape: str, started: bool) -> int:
    sizes = []
    for kind, dims in _SHAPE.findall(shape):
        count = 1
        for n in filter(None, dims.split(",")):
            count *= int(n)
        bits = _BITS.get(kind) or int(re.sub(r"\D", "", kind))
        sizes.append(count * bits // 8)
    # The result of a start is the pair of its operand and its outcome.
    return max(sizes) if started else sum(sizes)


def _group(line: str, devices: int) -> int:
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(tiled[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]* \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        group = 1
        for axis in re.findall(r"'(\w+)'", named[2]):
            group *= int(sizes[axis])
        return group
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return 2 if pairs[1] else 1
    return devices
