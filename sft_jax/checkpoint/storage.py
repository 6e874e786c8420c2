"""Folders on a disk or in an object store (gs://, s3://), with what both can do.

An object store has no rename, no append and no lock, and a file appears whole when it has been written. What is kept there is
made of such files, one of which, written last, makes the others count.
"""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from etils import epath

from sft_jax.errors import Unreachable, UserError, reason_of

Place = Path | epath.Path
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED")  # statuses of TensorStore; those of a wrong URL or of rights do not pass
# Errors that say that the network or the store is at fault for now, by name since few runs import their libraries: those of Python,
# aiohttp, google.auth and botocore.
_PASSING_ERRORS = {"ConnectionError", "TimeoutError", "ClientConnectionError", "TransportError", "HTTPClientError"}
_STATUSES = (*_PASSING, "PERMISSION_DENIED", "NOT_FOUND", "UNAUTHENTICATED")
_DIGESTS = ("crc32c", "md5Hash", "ETag")  # what stores say of the content of a file, the first that there is


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is in an object store.

    >>> is_remote("gs://bucket/run"), is_remote("runs/first")
    (True, False)
    """
    return os.fspath(path).partition("://")[0] in _PACKAGES and "://" in os.fspath(path)


def storage_place(path: str | os.PathLike) -> Place:
    """Returns an absolute folder on this disk, or one in an object store.

    Raises UserError for other URLs, and where the package for a store is missing.
    """
    text = os.fspath(path)
    if not is_remote(text):
        if "://" in text:
            raise UserError(f"{text}: is neither a folder on a disk nor in gs:// or s3://.")
        return Path(text).absolute()
    scheme, _, rest = text.partition("://")
    if not rest.strip("/").partition("/")[2]:
        raise UserError(f"{text}: must name a folder in a bucket, such as {scheme}://BUCKET/runs/first.")
    _system(text)
    return epath.Path(text.rstrip("/"))


def _system(path: str | os.PathLike) -> Any:
    """Returns the file system of fsspec in which a remote folder lies."""
    import fsspec  # here: runs on a disk do not need it

    scheme = os.fspath(path).partition("://")[0]
    # Listings that are remembered would not show what TensorStore and other processes have written.
    for name in (scheme, "gcs") if scheme == "gs" else (scheme,):
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise UserError(f"{path}: a package for such URLs is missing; pip install 'sft_jax[remote]' ({_PACKAGES[scheme]}).") from error


@contextlib.contextmanager
def reachable(place: str | os.PathLike):
    """Raises UserError naming a remote `place` for what goes wrong between here and the store; lets errors elsewhere through.

    It is Unreachable, with which a launcher starts again, where time alone may mend it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(place) or not _of_store(error):
            raise
        kind = Unreachable if _passes(error) else UserError
        raise kind(
            f"{place}: the object store refuses or cannot be reached ({type(error).__name__}: {reason_of(error)}). Check the URL, "
            "the network and the rights of this machine on the bucket, and start the same command again."
        ) from error


def _of_store(error: BaseException) -> bool:
    """Whether an error is one of the libraries that talk to stores; TensorStore puts its own into a ValueError."""
    module = type(error).__module__.partition(".")[0]
    told = isinstance(error, ValueError) and str(error).startswith(_STATUSES)
    return told or isinstance(error, OSError) or module in ("gcsfs", "s3fs", "aiohttp", "google", "botocore")


def _passes(error: BaseException) -> bool:
    """Whether an error of a store is one of the network, of a busy or of a broken server, not of the URL or of rights."""
    code = getattr(error, "code", None)
    if isinstance(code, int):  # of HTTP
        return code == 429 or code >= 500
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(_PASSING_ERRORS & names) or isinstance(error, ValueError) and str(error).startswith(_PASSING)


def digests(folder: Place) -> dict[str, str]:
    """Returns a digest of every file in `folder`, by its name relative to it.

    On a disk that of the bytes, which are read again. In a store what the store says of the object that it holds (CRC-32C, MD5),
    which it checks whenever it moves bytes: reading a checkpoint back over the network would take longer than writing it.
    """
    if isinstance(folder, Path):
        return {str(path.relative_to(folder)): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    system = _system(folder)
    root = system._strip_protocol(str(folder))
    found = system.find(root, detail=True)
    return {name[len(root) + 1 :]: _store_digest(folder, info) for name, info in sorted(found.items())}


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _store_digest(folder: Place, info: dict[str, Any]) -> str:
    kind = next((name for name in _DIGESTS if info.get(name)), None)
    if kind is None:
        raise UserError(f"{folder}: the store tells no checksum of its files, so damage could not be noticed; use another.")
    return f"{kind}:{info[kind]}:{info['size']}"


def remove_tree(folder: Place) -> None:
    if isinstance(folder, Path):
        shutil.rmtree(folder)
    else:
        _system(folder).rm(str(folder), recursive=True)


def rename_tree(folder: Place, to: Place) -> None:
    """Renames a folder, which in a store copies every file and then removes it."""
    if isinstance(folder, Path):
        folder.rename(to)
    else:
        system = _system(folder)
        root, target = (system._strip_protocol(str(place)) for place in (folder, to))
        for name in system.find(root):
            system.cp_file(name, target + name[len(root) :])
        system.rm(root, recursive=True)


def download(folder: Place, target: Path, left_out: tuple[str, ...]) -> None:
    """Copies the files of a remote folder to `target`, but those in its parts `left_out`."""
    system = _system(folder)
    root = system._strip_protocol(str(folder))
    names = [name for name in system.find(root) if name[len(root) + 1 :].partition("/")[0] not in left_out]
    for name in names:
        to = target / name[len(root) + 1 :]
        to.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(name, str(to))


def upload(path: Path, to: Place) -> None:
    """Copies one file into the store, where it replaces the old one as a whole."""
    _system(to).put_file(str(path), str(to))
