"""What slices of TPUs send each other over the network, read from the compiled program.

libtpu cuts a collective over several slices in two: one inside each slice, an instruction like any other, and one between devices of
the same place in each slice, which is a `send` to the host and a `recv` from it. Attributes name the collective, and who takes part:
`{1,2}x{0:3}` are slices 1 and 2, device by device, `{{100000,200000},...}` groups of devices, numbered from 100,000 on in slice 1.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

from sft_jax.planning.collectives import Collective
from sft_jax.planning.hlo import Instruction, Program, array_bytes, array_dtypes, array_elements, array_shapes

_NUMBERS_OF_A_SLICE = 100_000
_COMPUTES = ("fusion", "convolution", "dot", "custom-call", "while")  # what a transfer may be hidden behind


def between_slices(program: Program, times: Mapping[str, float]) -> Iterator[Collective]:
    """Yields the collectives between slices; `times` says how often each computation runs in a step."""
    everywhere = _answers(program.instructions())
    for lines in program.computations.values():
        answers = {**everywhere, **_answers(lines)}
        for line in lines:
            if line.opcode != "send" or not (kind := _text_of(line, "_xla_megascale_transfer_type")):
                continue
            kind, answer = kind.lower().replace("_", "-"), answers[_text_of(line, "_xla_host_transfer_rendezvous")]
            larger = max((line, answer), key=lambda one: max(array_bytes(one.result)))
            whole = max(array_bytes(larger.result))
            place = array_bytes(larger.result).index(whole)
            devices, slices = _group_of(line.text)
            yield Collective(
                kind, (2 if kind == "all-reduce" else 1) * whole * (devices - 1) / devices, times[line.computation],
                _is_hidden(lines, line, answer), devices, whole, array_elements(larger.result)[place], _operation(lines, line),
                array_dtypes(larger.result)[place], array_shapes(larger.result)[place], slices,
            )  # fmt: skip


def _answers(lines: Iterable[Instruction]) -> dict[str, Instruction]:
    """Returns what is received, by the name under which it is sent."""
    return {_text_of(line, "_xla_host_transfer_rendezvous"): line for line in lines if line.opcode == "recv"}


def _text_of(line: Instruction, attribute: str) -> str:
    found = re.search(rf'{attribute}="([^"]*)"', line.text)
    return found[1] if found else ""


def _group_of(text: str) -> tuple[int, int]:
    """Returns how many devices exchange something with each other, and in how many slices they are."""
    if found := re.search(r'_xla_megascale_target="\{([\d,:]+)\}x', text):
        slices = 0
        for part in found[1].split(","):
            first, _, last = part.partition(":")
            slices += int(last or first) - int(first) + 1
        return slices, slices
    group = [int(number) for number in re.search(r"_xla_megascale_target=\{\{([\d,]+)\}", text)[1].split(",")]
    return len(group), len({number // _NUMBERS_OF_A_SLICE for number in group})


def _is_hidden(lines: list[Instruction], sent: Instruction, received: Instruction) -> bool:
    """Returns whether anything is computed, by the compiler's schedule, between the last of the two and the arrival."""
    if received.computation != sent.computation:
        return True
    begun = max(lines.index(sent), lines.index(received))
    for line in lines[begun:]:
        if line.opcode == "recv-done" and f"(%{received.name})" in line.text:
            return False
        if line.opcode in _COMPUTES:
            return True
    return True  # it arrives in another pass of a loop


def _operation(lines: list[Instruction], sent: Instruction) -> str:
    """Returns the path of the operation that made what is sent, found behind casts, cuts and collectives of the compiler's own."""
    by_name, line = {one.name: one for one in lines}, sent
    while not line.op_name:
        operand = re.search(rf" {line.opcode}\(.*?%([\w.\-]+)", line.text)
        if operand is None or operand[1] not in by_name:
            return ""
        line = by_name[operand[1]]
    return line.op_name
