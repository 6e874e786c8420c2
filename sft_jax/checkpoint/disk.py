"""Turns what a full or unwritable disk raises, also in a background save, into one message for the user."""

import contextlib
import errno
from pathlib import Path

from sft_jax.errors import UserError

_REASONS = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EROFS: "read-only file system",
    errno.EFBIG: "file too large",
    errno.ENOTDIR: "not a directory",
    errno.EEXIST: "file exists",
    errno.EIO: "input/output error",
}


@contextlib.contextmanager
def explained(place: str | Path, what: str):
    """Raises UserError naming `place` where the disk refuses to store `what`; lets every other error through."""
    try:
        yield
    except Exception as error:
        reason = disk_reason(error)
        if reason is None:
            raise
        raise UserError(
            f"{place}: {what} could not be written ({reason}). What was saved before is sound: "
            "make room or name another folder, and start the same command again."
        ) from error


def disk_reason(error: BaseException | None) -> str | None:
    """Returns why the disk refused, looking through the causes of an error, or None if it was not the disk.

    TensorStore reports the operating system's error as text inside a ValueError, so the text is searched too.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _REASONS:
            return _REASONS[error.errno]
        text = str(error).lower()
        for reason in _REASONS.values():
            if reason in text:
                return reason
        error = error.__cause__ or error.__context__
    return None
