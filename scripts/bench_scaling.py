"""Draws what a run costs against how much there is to do, and says of each relation whether it is as it should be.

    python scripts/bench_scaling.py                     # bars; minutes on two cores that do nothing else
    python scripts/bench_scaling.py --json              # a line for each point, then one for each verdict
    python scripts/bench_scaling.py --only memory --large 1000000

    step        seconds of a step are linear in its rows, at a fixed length
    start       seconds until the first step do not depend on the size of the data, once they are prepared
    resume      seconds until the first step of a run that goes on do not depend on the step
    memory      host memory does not depend on the size of the data: of a run, and of the one that prepares them
    accumulate  seconds of a step do not depend on how many micro-batches its rows are cut into, but for what each repeats

Every point is the real command in a process of its own (the quickstart's model and rows, repeated); of several --rounds the median
counts. Devices are those that JAX finds, so nothing is changed for an accelerator, where --model, --length and --batch make
the work large enough to be seen. Exit code 3 where a relation is off by more than --within.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STOPPED = 75  # exit code of train.stop_after_steps
_BAR = 40  # characters of the highest cost of a series


class Point(NamedTuple):
    """One measurement."""

    work: float  # rows, steps, micro-batches
    cost: float  # seconds or bytes


class Verdict(NamedTuple):
    """What a relation's points say."""

    holds: bool
    told: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models/nano"), help="directory with config.json and tokenizer; no weights needed")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="rows of a device in a step; of the largest point four times as many")
    parser.add_argument("--steps", type=int, default=12, help="steps of a measured run")
    parser.add_argument("--small", type=int, default=4_000, help="rows of the small data set")
    parser.add_argument("--large", type=int, default=40_000, help="rows of the large data set")
    parser.add_argument("--late", type=int, default=100, help="the later step that a run goes on from")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--within", type=float, default=0.15, help="how far a relation may be off")
    parser.add_argument("--only", choices=RELATIONS, action="append", help="these relations alone")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    held = True
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        for name in arguments.only or RELATIONS:
            relation = RELATIONS[name]
            rounds = [relation.measure(bench) for _ in range(arguments.rounds)]
            for series in rounds[0]:
                points = [
                    Point(same[0].work, statistics.median(point.cost for point in same))
                    for same in zip(*(found[series] for found in rounds), strict=True)
                ]
                verdict = relation.judge(points, arguments.within)
                held = held and verdict.holds
                show(series, relation, points, verdict, arguments.json)
    sys.exit(0 if held else 3)


class Bench:
    """Runs of the command on the quickstart's rows, all with the same caches."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.arguments, self._folder, self._runs = arguments, folder, itertools.count()

    def data(self, rows: int, name: str = "") -> Path:
        """Returns a file of so many rows, with other texts under another `name`."""
        path = self._folder / f"rows{rows}{name}.jsonl"
        if not path.is_file():
            lines = (ROOT / "data/quickstart/train.jsonl").read_text().splitlines()
            with open(path, "w") as file:
                # The number makes each row another one, as in real data: nothing may profit from their being equal.
                file.writelines(
                    line.replace('"content": "', f'"content": "{name} {number}: ', 1) + "\n"
                    for number, line in zip(range(rows), itertools.cycle(lines))
                )
        return path

    def run(self, data: Path, workdir: Path | None = None, stops: bool = False, **settings: Any) -> dict[str, Any]:
        """Trains and returns summary.json, with the `devices`; nothing of a run that stops before its end.

        Settings are keys with "__" in place of dots.
        """
        workdir = self.folder() if workdir is None else workdir
        usual = {
            "model__path": self.arguments.model, "model__init": "random", "data__train": data, "data__max_length": self.arguments.length,
            "data__overlength": "drop", "train__steps": self.arguments.steps, "train__batch_size": self.arguments.batch * devices(),
            "train__export": False, "checkpoint__every": 0, "checkpoint__save_last": False, "log__tensorboard": False,
            "log__every": 10**6,
        }  # fmt: skip
        flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in {**usual, **settings}.items()]
        command = [sys.executable, "-m", "sft_jax.train", f"--config={ROOT / 'configs/sft.py'}", f"--workdir={workdir}", *flags]
        environment = {**os.environ, "XDG_CACHE_HOME": str(self._folder / "cache")}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != (STOPPED if stops else 0):
            sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
        return {} if stops else json.loads((workdir / "summary.json").read_text())

    def folder(self) -> Path:
        return self._folder / f"run{next(self._runs)}"


def devices() -> int:
    """Returns how many devices a run has, told by a process of its own, since one that has seen them keeps them."""
    if not _DEVICES:
        count = "import jax; print(jax.device_count())"
        _DEVICES.append(int(subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True).stdout))
    return _DEVICES[0]


_DEVICES: list[int] = []

Series = dict[str, list[Point]]


def step(bench: Bench) -> Series:
    base, data = bench.arguments.batch * devices(), bench.data(bench.arguments.small)
    sizes = [base, 2 * base, 3 * base, 4 * base]
    return {"step": [Point(rows, bench.run(data, train__batch_size=rows)["seconds_per_step"]) for rows in sizes]}


def start(bench: Bench) -> Series:
    points = []
    for rows in (bench.arguments.small, bench.arguments.large):
        data = bench.data(rows)
        bench.run(data, train__steps=2)  # prepares and compiles
        points.append(Point(rows, bench.run(data, train__steps=2)["seconds_to_first_step"]))
    return {"start": points}


def resume(bench: Bench) -> Series:
    points, data = [], bench.data(bench.arguments.small)
    for stop in (4, bench.arguments.late):
        workdir, steps = bench.folder(), stop + 4
        bench.run(data, workdir, stops=True, train__steps=steps, train__stop_after_steps=stop)
        points.append(Point(stop, bench.run(data, workdir, train__steps=steps)["seconds_to_first_step"]))
    return {"resume": points}


def memory(bench: Bench) -> Series:
    found: Series = {"memory": [], "memory, preparing": []}
    for rows in (bench.arguments.small, bench.arguments.large):
        data = bench.data(rows, bench.folder().name)  # not prepared before
        for series in ("memory, preparing", "memory"):
            found[series].append(Point(rows, bench.run(data, train__steps=2)["peak_memory_bytes"]["host"]))
    return found


def accumulate(bench: Bench) -> Series:
    rows, data = 4 * bench.arguments.batch * devices(), bench.data(bench.arguments.small)
    points = []
    for micros in (1, 2, 4):
        found = bench.run(data, train__batch_size=rows, train__micro_batch_size=rows // micros)
        points.append(Point(micros, found["seconds_per_step"]))
    return {"accumulate": points}


def is_linear(points: list[Point], within: float) -> Verdict:
    """Judges the line of least squares: no point may lie further from it than a share `within`."""
    work, cost = (np.array(column) for column in zip(*points, strict=True))
    slope, fixed = np.polyfit(work, cost, 1)
    off = float(np.max(np.abs(slope * work + fixed - cost) / cost))
    told = f"{slope:.3g} for each and {fixed:.3g} at any rate, points at most {off:.1%} off; {fixed / cost[0]:.0%} of the first is fixed"
    return Verdict(bool(off <= within and slope > 0), told)


def is_constant(points: list[Point], within: float) -> Verdict:
    """Judges the last point by the first."""
    ratio, more = points[-1].cost / points[0].cost, points[-1].work / points[0].work
    return Verdict(ratio <= 1 + within, f"{ratio:.3f} times as much for {more:g} times the work")


class Relation(NamedTuple):
    measure: Callable[[Bench], Series]
    judge: Callable[[list[Point], float], Verdict]
    work: str
    cost: str


RELATIONS = {
    "step": Relation(step, is_linear, "rows of a step", "s a step"),
    "start": Relation(start, is_constant, "rows of data", "s to the first step"),
    "resume": Relation(resume, is_constant, "step gone on from", "s to the first step"),
    "memory": Relation(memory, is_constant, "rows of data", "bytes at the peak"),
    "accumulate": Relation(accumulate, is_constant, "micro-batches", "s a step"),
}


def show(series: str, relation: Relation, points: list[Point], verdict: Verdict, as_json: bool) -> None:
    """Prints the points of a series, and what they say."""
    if as_json:
        for point in points:
            print(json.dumps({"series": series, "work": point.work, "work_in": relation.work, "cost": point.cost, "cost_in": relation.cost}))
        print(json.dumps({"verdict": series, "holds": verdict.holds, "told": verdict.told}), flush=True)
        return
    print(f"{series}: {relation.cost} against {relation.work}")
    most = max(point.cost for point in points)
    for point in points:
        cost = f"{point.cost:.4g}" if point.cost < 1e6 else f"{point.cost:.0f}"
        print(f"  {point.work:>12,.0f}{cost:>16}  {'█' * round(_BAR * point.cost / most)}")
    print(f"  {'HOLDS' if verdict.holds else 'DOES NOT HOLD'}: {verdict.told}\n", flush=True)


if __name__ == "__main__":
    main()
