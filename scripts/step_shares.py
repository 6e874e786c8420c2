"""Says what the time of a traced step goes to: attention, matmuls, loss, optimizer, communication, the rest, and waiting.

    XLA_FLAGS="--xla_dump_to=DUMP --xla_dump_hlo_as_text --xla_dump_hlo_module_re=train_step" \
        python -m sft_jax.train ... --workdir RUN --config.train.profile=3       # and a compilation cache that is empty
    python scripts/step_shares.py --profile RUN/profile --program DUMP

Prints one JSON line: shares of the time between the first and the last operation, mean over devices. What an operation
is for is read from the compiled program, by the name of its scope and by what it computes; matmuls inside attention, loss and
optimizer count there. Where several run at once on a device the first kind of KINDS counts, so communication is only what nothing hides.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sft_jax.planning.hlo import Instruction, Program

SCOPES = {"loss": r"\bcross_entropy\b", "attention": r"\b(attend|attention)\b", "optimizer": r"\boptimizer\b"}  # of op_name
KINDS = ("attention", "matmul", "loss", "optimizer", "other", "communication")
_MATMULS = re.compile(r"\b(dot|convolution|ragged-dot)\(|custom_call_target=\"[^\"]*(gemm|matmul|cublas|cudnn\$conv)", re.I)
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_CONTROL = ("while", "conditional", "call", "async-start", "async-done")  # what runs inside them is in the trace, too

Spans = np.ndarray  # [N, 2]: begin and end in ns, in order and apart from each other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, required=True, help="the folder that train.profile has filled")
    parser.add_argument("--program", type=Path, required=True, help="the folder of --xla_dump_to, or the text of the optimised program")
    arguments = parser.parse_args()
    print(json.dumps(step_shares(arguments.profile, arguments.program)))


def step_shares(profile: Path, program: Path) -> dict[str, float]:
    """Returns the share of each of KINDS and of "idle"; they add up to 1. Ends the process where a file is missing."""
    kinds = kinds_of(Program(program_text(program).read_text()))
    shares = [device_shares(events, kinds) for events in read_trace(profile, set(kinds)).values()]
    if not shares:
        sys.exit(f"{profile}: no operation of {program} is in the trace; both must be of the same run.")
    return {kind: round(float(np.mean([one[kind] for one in shares])), 4) for kind in (*KINDS, "idle")}


def program_text(path: Path) -> Path:
    """Returns the file of the optimised train step: `path`, or the largest one in that folder."""
    files = [path] if path.is_file() else sorted(path.glob("*train_step*after_optimizations.txt"), key=lambda file: file.stat().st_size)
    if not files:
        sys.exit(f"{path}: holds no *train_step*after_optimizations.txt; empty the compilation cache and set XLA_FLAGS before the run.")
    return files[-1]


def kinds_of(program: Program) -> dict[str, str]:
    """Returns the kind of each instruction that takes time of its own, by name."""
    return {line.name: kind_of(line, program) for line in program.instructions() if line.opcode not in _CONTROL}


def kind_of(line: Instruction, program: Program) -> str:
    if any(line.opcode.startswith(name) for name in _COLLECTIVES):
        return "communication"
    for kind, pattern in SCOPES.items():
        if re.search(pattern, line.op_name):
            return kind
    inside = program.computations.get(line.attribute("calls"), ())
    return "matmul" if any(_MATMULS.search(other.text) for other in (line, *inside)) else "other"


def read_trace(folder: Path, names: set[str]) -> dict[str, list[tuple[str, float, float]]]:
    """Returns (instruction, begin, end) of every operation of `names`, in ns, by device."""
    import jax

    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        sys.exit(f"{folder}: holds no trace (*.xplane.pb); set train.profile to a number of steps.")
    found = defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats) if plane.name.startswith("/host:") or "Stream" in line.name else {}
                # GPUs and CPUs say which instruction an event is of; TPUs have its text as the name.
                name = str(stats.get("hlo_op") or event.name.partition(" = ")[0]).lstrip("%")
                if name in names and event.duration_ns:
                    device = f"{plane.name} {stats.get('device_ordinal', 0)}"
                    found[device].append((name, event.start_ns, event.start_ns + event.duration_ns))
    return found


def device_shares(events: Iterable[tuple[str, float, float]], kinds: dict[str, str]) -> dict[str, float]:
    """Returns the shares of one device."""
    spans = defaultdict(list)
    for name, begin, end in events:
        spans[kinds[name]].append((begin, end))
    whole = [max(end for of in spans.values() for _, end in of), min(begin for of in spans.values() for begin, _ in of)]
    total = whole[0] - whole[1]
    shares, taken = {}, []
    for kind in KINDS:
        before = length(union(taken))
        taken += spans[kind]
        shares[kind] = (length(union(taken)) - before) / total
    return shares | {"idle": 1.0 - length(union(taken)) / total}


def union(spans: list[tuple[float, float]]) -> Spans:
    """Returns the same times without overlaps."""
    merged: list[list[float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return np.array(merged).reshape(-1, 2)


def length(spans: Spans) -> float:
    return float((spans[:, 1] - spans[:, 0]).sum())


if __name__ == "__main__":
    main()
