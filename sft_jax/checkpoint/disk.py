"""Turns what a full or unwritable disk raises, also in a background save, into one message for the user."""

import contextlib
import errno
import re

from sft_jax.checkpoint.storage import Place, reachable
from sft_jax.errors import UserError

_REASONS = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EROFS: "read-only file system",
    errno.EFBIG: "file too large",
    errno.ENOTDIR: "not a directory",
    errno.EISDIR: "is a directory",
    errno.EEXIST: "file exists",
    errno.ENOENT: "no such file or directory",
    errno.ENAMETOOLONG: "file name too long",
    errno.ELOOP: "too many levels of symbolic links",
    errno.ESTALE: "stale file handle",
    errno.EIO: "input/output error",
}

# TensorStore, which writes the arrays, puts the operating system's error into the text of a ValueError:
# "RESOURCE_EXHAUSTED: Error writing ...: No space left on device [os_error_code='28']".
_TENSORSTORE = re.compile(r"os_error_code='(\d+)'")


@contextlib.contextmanager
def explained(place: str | Place, what: str):
    """Raises UserError naming `place` where the disk refuses to store `what`; lets every other error through."""
    try:
        with reachable(place):
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
    """Returns why the disk refused, or None if it was not the disk.

    Looks at an error and at what it was raised from, not at errors that were merely being handled at the time: those
    may have nothing to do with it.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REASONS:
            return _REASONS[error.errno]
        found = _TENSORSTORE.search(str(error))
        if found and int(found[1]) in _REASONS:
            return _REASONS[int(found[1])]
        error = error.__cause__
    return None
