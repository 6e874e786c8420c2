"""Stopping on a signal: SIGTERM (preemption, schedulers) and Ctrl-C ask the run to save and end; they never cut it."""

import signal
import threading

from sft_jax.errors import StoppedAsConfigured, StoppedBySignal

STOP_AFTER_STEPS = "stop_after_steps"  # the reason that is no signal


class StopSignal:
    """Notes SIGTERM and SIGINT while it is entered. A second Ctrl-C ends the process at once.

    Attributes:
        name: of the signal that asked the run to stop, or None.
        at_once: there is nothing to save, so a signal raises StoppedBySignal where the program stands.
        where: how far the run is, for the message.
    """

    def __init__(self):
        self.name: str | None = None
        self.at_once = True
        self.where = "before the first step of this start; there was nothing to save"
        self._interrupts = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.name and error[:1] == (None,):  # too late to act on here, so it is for what is to follow
            self._pass_on(signal.Signals[self.name])

    def _pass_on(self, number: int) -> None:
        """Tells the StopSignal outside of this one, where there is one, of a signal."""
        outside = getattr(self._before.get(number), "__self__", None)
        if isinstance(outside, StopSignal):
            outside._note(number, None)

    def _note(self, number: int, frame) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt("the same command continues from the newest checkpoint")
        first, self.name = self.name is None, self.name or signal.Signals(number).name
        if self.at_once and first:
            self.raise_stopped()

    def raise_stopped(self, by: str | None = None) -> None:
        """Raises StoppedBySignal; `by` is the reason, where it is not the signal that was noted.

        StoppedAsConfigured where it is "stop_after_steps" and no signal has come, not even while the state was saved.
        """
        if by == STOP_AFTER_STEPS:
            by = self.name or by
        kind = StoppedAsConfigured if by == STOP_AFTER_STEPS else StoppedBySignal
        raise kind(f"Stopped by {by or self.name or 'a signal to another process'} {self.where}. Start the same command again to continue.")
