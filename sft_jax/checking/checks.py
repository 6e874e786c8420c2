"""The table of contracts, and what checks them one after the other."""

import dataclasses
import functools
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from sft_jax.checking import computing, running
from sft_jax.checking.outcome import Outcome
from sft_jax.checking.subject import Subject
from sft_jax.errors import StoppedBySignal, UserError, did_you_mean


class Bench:
    """A subject, and the short runs on disk that several contracts look at; made when the first one asks."""

    def __init__(self, subject: Subject, folder: Path):
        self.subject, self._folder = subject, folder

    @functools.cached_property
    def runs(self) -> running.Runs:
        return running.make_runs(self.subject, self._folder)


# In the order in which a fault is best found: what computes, then what is learned, then what is left on disk.
CONTRACTS: dict[str, Callable[[Bench], Outcome]] = {
    "isolation": lambda bench: computing.isolation(bench.subject),
    "packing": lambda bench: computing.packing(bench.subject),
    "chunking": lambda bench: computing.chunking(bench.subject),
    "accumulation": lambda bench: computing.accumulation(bench.subject),
    "layout": lambda bench: computing.layout(bench.subject),
    "evaluation": lambda bench: computing.evaluation(bench.subject),
    "adapters": lambda bench: computing.adapters(bench.subject),
    "merging": lambda bench: computing.merging(bench.subject),
    "overfitting": lambda bench: running.overfitting(bench.subject),
    "resume": lambda bench: running.resume(bench.runs),
    "integrity": lambda bench: running.integrity(bench.runs),
    "export": lambda bench: running.export(bench.subject, bench.runs),
}
STATEMENTS = {name: (getattr(computing, name, None) or getattr(running, name)).__doc__ for name in CONTRACTS}


def check_names(names: Collection[str]) -> None:
    """Raises UserError for a name that is no contract."""
    for name in names:
        if name not in CONTRACTS:
            raise UserError(f"--only: '{name}' is no contract; {did_you_mean(name, CONTRACTS)}.")


def check(
    subject: Subject, names: Collection[str] = (), folder: Path | None = None, begin: Callable[[str], None] = lambda name: None
) -> Iterator[Outcome]:
    """Yields what each contract in `names` (none: all) was found to be, as soon as it is known; `begin` is called before.

    Short runs are made in `folder`, which stays; without one in a temporary folder, which does not. Raises UserError
    for a name that is none, and StoppedBySignal where the user ends one of these runs.
    """
    check_names(names)
    place = Path(tempfile.mkdtemp(prefix="sft_jax_selfcheck_")) if folder is None else folder
    try:
        bench = Bench(subject, place)
        for name in CONTRACTS:
            if not names or name in names:
                begin(name)
                begun = time.monotonic()
                yield dataclasses.replace(CONTRACTS[name](bench), seconds=time.monotonic() - begun)
    except StoppedBySignal as stopped:
        if folder is not None:  # its runs go on
            raise
        raise StoppedBySignal("Stopped by a signal in the short runs, which are removed with their folder. Start the same command again.") from stopped
    finally:
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)
