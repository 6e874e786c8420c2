"""The text of a compiled program: its computations, the loops around them, and how often each of these runs."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|(?:true|false)_computation|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[fsuc]\d+)\[([\d,]*)\]")
_BITS = {"pred": 8, "bf16": 16}


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    text: str  # what stands behind its name
    computation: str
    is_root: bool

    @cached_property
    def opcode(self) -> str:
        found = re.search(r"(?:^|[ )}])([a-z][\w\-]*)\(", self.text)
        return found[1] if found else ""

    @cached_property
    def result(self) -> str:
        """The text of the result's type."""
        return self.text.partition(f" {self.opcode}(")[0]

    @property
    def op_name(self) -> str:
        """The path of the operation in the program that was traced, such as jit(train_step)/while/body/dot_general."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return found[1] if found else ""


def array_bytes(text: str) -> list[int]:
    """Returns the bytes of every array in the text of a type.

    >>> array_bytes("(bf16[4,8]{1,0}, f32[])")
    [64, 4]
    """
    sizes = []
    for kind, shape in _ARRAY.findall(text):
        bits = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
        sizes.append(math.prod(int(n) for n in shape.split(",") if n) * max(bits // 8, 1))
    return sizes


def array_elements(text: str) -> list[int]:
    """Returns the numbers in every array in the text of a type."""
    return [math.prod(shape) for shape in array_shapes(text)]


def array_shapes(text: str) -> list[tuple[int, ...]]:
    """Returns the shape of every array in the text of a type."""
    return [tuple(int(n) for n in shape.split(",") if n) for _, shape in _ARRAY.findall(text)]


def array_dtypes(text: str) -> list[str]:
    """Returns the dtype of every array in the text of a type, as XLA writes it."""
    return [kind for kind, _ in _ARRAY.findall(text)]


class Program:
    """An optimised HLO module, parsed from its text."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        current = ""
        for line in text.splitlines():
            if not line.startswith(" ") and (found := _COMPUTATION.match(line)):
                current = found[2]
                self.computations[current] = []
                self.entry = current if found[1] else self.entry
            elif current and (found := _INSTRUCTION.match(line)):
                self.computations[current].append(Instruction(found[2], found[3], current, bool(found[1])))

    def instructions(self) -> Iterator[Instruction]:
        for lines in self.computations.values():
            yield from lines

    @cached_property
    def _fused_into(self) -> dict[str, str]:
        """Of each computation that a fusion calls the one that the fusion stands in."""
        return {line.attribute("calls"): line.computation for line in self.instructions() if line.opcode == "fusion"}

    def home(self, computation: str) -> str:
        """Returns the computation that runs as a whole, such as the body of a loop, of which `computation` is a part that was fused."""
        while computation in self._fused_into:
            computation = self._fused_into[computation]
        return computation

    def trip_count(self, loop: Instruction) -> int | None:
        """Returns how often a `while` runs where that is known when it is compiled, such as for `lax.scan`; else None."""
        if known := re.search(r'known_trip_count[^\d}]*"?(\d+)', loop.text):
            return int(known[1])
        lines = self.computations[loop.attribute("condition")]
        root = next(line for line in lines if line.is_root)
        by_name = {line.name: line for line in lines}
        if root.opcode == "fusion":
            operands = [by_name[name] for name in re.findall(r"%([\w.\-]+)", root.text.partition("fusion(")[2].partition(")")[0])]
        else:
            operands = [by_name[name] for name in re.findall(r"%([\w.\-]+)", root.text.partition("(")[2]) if name in by_name]
        constants = [int(found[1]) for line in operands if (found := re.search(r"constant\((\d+)\)", line.text))]
        return constants[0] if len(constants) == 1 else None

    def executions(self, trips_of: Callable[[Instruction], float]) -> dict[str, float]:
        """Returns how often each computation runs when the program runs once; `trips_of` says it for other loops.

        A branch of a conditional counts as if it were taken.
        """
        calls: dict[str, list[tuple[str, float]]] = {}
        for line in self.instructions():
            times = 1.0
            if line.opcode == "while":
                known = self.trip_count(line)
                times = float(known) if known is not None else trips_of(line)
            for group in _CALLED.findall(line.text):
                for name in re.findall(r"[\w.\-]+", group):
                    if name in self.computations:
                        calls.setdefault(name, []).append((line.computation, times))
        counts: dict[str, float] = {self.entry: 1.0}

        def count(name: str) -> float:
            if name not in counts:
                counts[name] = sum(count(caller) * times for caller, times in calls.get(name, ()))
            return counts[name]

        return {name: count(name) for name in self.computations}
