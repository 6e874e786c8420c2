"""A TensorBoard event file, written where it is called.

tensorboardX's own SummaryWriter writes in a thread of its own, which a full disk ends silently; the run then waits for
ever for room in its queue.
"""

import os
import time
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sft_jax.checkpoint.disk import explained

_FLUSH_SECONDS = 30.0


class EventFile:
    """One event file of a run; a run that was started several times has several, which TensorBoard reads as one."""

    def __init__(self, folder: Path, purge_step: int):
        """Begins a file. TensorBoard hides what earlier files say of steps from `purge_step` on."""
        self._folder = folder
        with explained(folder, "the TensorBoard log"):
            folder.mkdir(parents=True, exist_ok=True)
            # Two starts within a second would otherwise share a name, and the second would erase the first.
            self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}.{time.time_ns()}")
        self._flushed = time.monotonic()
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalar(self, name: str, value: float, step: int) -> None:
        self._write(Event(step=step, summary=summary.scalar(name, value)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with explained(self._folder, "the TensorBoard log"):
            self._file.write_event(event)
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        with explained(self._folder, "the TensorBoard log"):
            self._file.close()
