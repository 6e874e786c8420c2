"""Feeds the data path with broken rows and broken files: each has to become examples, or an error that says why.

    python scripts/fuzz_data.py --assets ../shared/assets --rows 1000000 --seed 1

Real rows are changed at random and go through every format, template and tokenizer that is here; now and then a file of
them is broken too and read, or rows go through worker processes under a template that loops for ever or eats memory.
Prints a line of JSON every ten seconds and a summary. What is neither an example nor an error of its row (another
exception, a row that takes too long, an example that cannot be trained on, a message that cannot be printed, memory that
grows over the second half of the rows) ends with exit code 1; what was found lies in --failures, one file for each kind.
"""

import argparse
import gc
import json
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from fuzz_files import KINDS, write
from fuzz_findings import Findings, TooLong, deadline
from fuzz_properties import Builder, builders, try_file, try_rows
from fuzz_rows import COLUMNS, mutate, seed_rows
from fuzz_workers import try_workers

from sft_jax.config import ColumnsConfig

KINDS_COUNTED = 300  # kinds of errors that are told apart
FILES_EVERY, WORKERS_EVERY, WORKERS_ROWS = 8, 500, 8  # turns, turns, rows


class Memory:
    """What the process takes as rows go by: some 64 samples at most, at even distances in rows, however many they will be."""

    def __init__(self):
        self.samples: list[int] = []  # MB
        self._every = self._next = 1
        self._process = psutil.Process()
        gc.freeze()  # what is there already need not be looked through for every sample

    def look(self, rows: int) -> None:
        """Takes a sample where it is time for one after so many rows."""
        if rows < self._next:
            return
        gc.collect()
        self.samples.append(self._process.memory_info().rss >> 20)
        if len(self.samples) == 64:
            self.samples, self._every = self.samples[1::2], 2 * self._every
        self._next = rows + self._every

    def grown(self) -> int:
        """Returns by how many MB it has grown over the second half of the rows: to the least of the last three samples."""
        half = self.samples[len(self.samples) // 2 :]
        return min(half[-3:]) - half[0] if len(half) > 5 else 0


def fuzz(args: argparse.Namespace) -> dict[str, Any]:
    """Runs and returns the summary."""
    seeds, ways = seed_rows(args.assets), builders(args.assets)
    findings, totals, memory = Findings(args.failures), Counter(), Memory()
    begun = told = time.monotonic()
    done, slowest = 0, 0.0
    folder = Path(tempfile.mkdtemp(prefix="fuzz_data_"))

    def attempt(rows: list, builder: Builder, columns: ColumnsConfig) -> None:
        nonlocal slowest
        before = time.process_time()
        try:
            with deadline(args.row_seconds * len(rows)):
                totals.update(try_rows(rows, builder, columns))
        except (Exception, TooLong) as error:
            if len(rows) > 1:
                for row in rows:
                    attempt([row], builder, columns)
            else:
                findings.add(error, {"row": rows[0], "builder": builder.name, "columns": columns})
        slowest = max(slowest, (time.process_time() - before) / len(rows))

    number = 0
    while done < args.rows and (not args.seconds or time.monotonic() - begun < args.seconds):
        choose = random.Random(f"{args.seed}/{number}")
        number += 1
        if number % WORKERS_EVERY == 1:
            rows = [mutate(choose.choice(seeds), choose) for _ in range(WORKERS_ROWS)]
            try:
                with deadline(args.row_seconds):
                    totals.update(try_workers(rows, args.assets / "models" / "stories260k", folder / "workers", choose))
            except (Exception, TooLong) as error:
                findings.add(error, {"rows": rows, "turn": f"{args.seed}/{number}"})
        elif number % FILES_EVERY == 0:
            kind = choose.choice(KINDS)
            rows = [mutate(choose.choice(seeds), choose) if choose.random() < 0.3 else choose.choice(seeds) for _ in range(choose.randrange(1, 12))]
            path = write(kind, rows, folder, choose if choose.random() < 0.9 else None)
            try:
                with deadline(args.row_seconds):
                    rows, outcomes = try_file(path)
            except (Exception, TooLong) as error:
                files = [path] if path.is_file() else path.iterdir()
                findings.add(error, {"kind": kind, "files": {file.name: file.read_bytes() for file in files}})
                continue
            totals.update(outcomes)
        else:
            rows = [mutate(choose.choice(seeds), choose) for _ in range(args.batch)]
        if rows:
            columns = COLUMNS[0] if choose.random() < 0.7 else choose.choice(COLUMNS)
            attempt(rows, choose.choice(ways), columns)
        done += len(rows)
        if len(totals) > KINDS_COUNTED:
            rare = sorted((name for name in totals if ": " in name), key=totals.__getitem__)[: len(totals) - KINDS_COUNTED]
            totals["errors of rare kinds"] += sum(totals.pop(name) for name in rare)
        memory.look(done)
        if time.monotonic() - told >= 10:
            told = time.monotonic()
            progress = {"rows": done, "seconds": round(told - begun), "examples": totals["examples"], "found": sum(findings.counts.values()), "memory_mb": memory.samples[-1]}
            print(json.dumps(progress), flush=True)
    grown = memory.grown()
    if grown > args.growth_mb:
        findings.counts[f"memory grew by {grown} MB over the second half"] += 1
    return {
        "rows": done, "seconds": round(time.monotonic() - begun), "seed": args.seed,
        "outcomes": dict(totals.most_common()), "slowest_row_cpu_seconds": round(slowest, 2),
        "peak_mb": max(memory.samples, default=0), "grown_mb": grown, "found": dict(findings.counts),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder with datasets, tokenizers and chat_templates")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long, 0 = after --rows")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="rows that are built at once")
    parser.add_argument("--row-seconds", type=float, default=5.0, help="what a row may take on average")
    parser.add_argument("--growth-mb", type=int, default=300, help="what memory may grow by over the second half")
    parser.add_argument("--failures", type=Path, default=Path("fuzz_failures"), help="folder for what was found")
    args = parser.parse_args()
    warnings.simplefilter("error", RuntimeWarning)  # numbers that overflow
    summary = fuzz(args)
    print(json.dumps(summary, indent=1))
    sys.exit(bool(summary["found"]))


if __name__ == "__main__":
    main()
