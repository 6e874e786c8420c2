"""The errors that a command turns into one message and an exit code."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is wrong: exit code 2.

    The message is all that the user sees, so it names the file and line, or the key, and the remedy.
    """

    def __init__(self, message: str):
        # A name from a damaged file may hold half a surrogate pair, which no terminal or log can encode.
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))


class Unreachable(UserError):
    """Another process of the run or a store cannot be reached for now: exit code 1, with which launchers start the same command again."""


class StoppedBySignal(Exception):
    """The run was asked to stop; what there was to save is saved: exit code 75, start the same command again."""


class StoppedAsConfigured(StoppedBySignal):
    """It was `train.stop_after_steps` that stopped the run, and no signal."""


def reason_of(error: Exception) -> str:
    """Returns the first line of what a library says, for messages.

    >>> reason_of(ValueError("no such thing\\nsee elsewhere"))
    'no such thing'
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown name: the nearest known one, then all of them.

    >>> did_you_mean("adamv", ["adamw", "adafactor"])
    "did you mean 'adamw'? Known: adafactor, adamw"
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    if near and len(known) > 24:  # all of them would hide the hint
        return f"{hint}It is one of {len(known)} that are known"
    return f"{hint}Known: {', '.join(known)}"
