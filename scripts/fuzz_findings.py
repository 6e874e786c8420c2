"""What fuzzing finds, and the time that it gives to rows."""

import contextlib
import hashlib
import pickle
import re
import signal
import traceback
from collections import Counter
from pathlib import Path
from typing import Any


class TooLong(BaseException):
    """Some rows took longer than they may. No Exception, so that nothing takes it for an error of a template."""


@contextlib.contextmanager
def deadline(seconds: float):
    """Raises TooLong in what takes more of a processor, or a hundred times as long: a machine may have more to do than this."""

    def stop(number, _):
        if number == signal.SIGPROF:
            raise TooLong(f"took longer than {seconds:g} seconds")
        raise TooLong(f"did not end in {100 * seconds:g} seconds")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, 100 * seconds))
    for number, timer, limit in timers:
        signal.signal(number, stop)
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for _, timer, _ in timers:
            signal.setitimer(timer, 0)


class Findings:
    """What should not have come out, one file for each place in the code."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.counts: Counter[str] = Counter()

    def add(self, error: BaseException, data: Any) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "sft_jax" in frame.filename] or frames
        kind = f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}: {str(error)[:120]}"
        kind = re.sub(r"\[\d+\]|\d{3,}|'.*", "_", kind)
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(kind.encode(errors="replace")).hexdigest()[:12]
            (self.folder / f"{name}.pickle").write_bytes(pickle.dumps(data))  # JSON has no bytes, and no half of a pair in UTF-8
            text = "".join(traceback.format_exception(error))
            (self.folder / f"{name}.txt").write_text(f"{text}\n{data!r}\n", errors="backslashreplace")
