"""Files that are not on this disk: any URL that fsspec reads (gs://, s3://, ...), copied here before they are read."""

import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any

from sft_jax.data.sources.parts import Shared
from sft_jax.errors import UserError, reason_of

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# What an object store says of the content of a file; the name of each differs between stores.
_VERSIONS = (
    "etag", "ETag", "md5Hash", "crc32c", "generation", "content_md5", "checksum", "LastModified", "last_modified", "updated",
    "mtime", "created", "blob_id",
)  # fmt: skip


def is_url(path: str) -> bool:
    """Returns whether a path is a URL.

    >>> is_url("gs://bucket/rows.jsonl"), is_url("rows.jsonl")
    (True, False)
    """
    return bool(_URL.match(path))


def find(url: str, label: str) -> list[str]:
    """Returns the URLs of the files that a URL or a glob of them names, sorted. Raises UserError where there are none."""
    system, path = _system(url, label)
    info = _call(label, lambda: _info(system, path))
    if info and info["type"] == "file":
        return [url]
    if glob.has_magic(path):
        found = _call(label, lambda: system.glob(path, detail=True))
        names = sorted(system.unstrip_protocol(name) for name, each in found.items() if each["type"] == "file")
        if not names:
            raise UserError(f"{label}: matches no file; check the URL and the pattern.")
        return names
    if info:
        raise UserError(f"{label}: is a directory; name a file or a glob such as {url.rstrip('/')}/*.jsonl.")
    raise UserError(f"{label}: there is no such file; check the URL.")


def _info(system: Any, path: str) -> dict[str, Any] | None:
    """Returns what the store says of a path, None where there is nothing. (`isfile` would take every error for that.)"""
    try:
        return system.info(path)
    except FileNotFoundError:
        return None


def copy(url: str, label: str, shared: Shared) -> str:
    """Returns the path of a copy of the file on this disk, made if it is not there; the log says so. file:// needs none.

    The copy is found again by the URL and by what the store says of the file (etag, checksum, time): a file that has
    changed is copied anew. Where a store says nothing of that kind, it is copied every time.
    """
    from fsspec.implementations.local import LocalFileSystem

    system, path = _system(url, label)
    if isinstance(system, LocalFileSystem):
        return path
    info = _call(label, lambda: system.info(path))
    versions = {key: str(info[key]) for key in _VERSIONS if info.get(key)}
    state = json.dumps([url, info.get("size"), versions], sort_keys=True)
    folder = shared.cache / "remote" / hashlib.sha256(state.encode()).hexdigest()[:32]
    target = folder / os.path.basename(path)
    size = info.get("size")
    if versions and target.is_file() and size in (None, target.stat().st_size):
        return str(target)
    shared.log(f"{label}: copying {size or 0:,} bytes to {target}.")
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".copying-")
        os.close(handle)
        _call(label, lambda: system.get_file(path, temporary))
        copied = os.path.getsize(temporary)
        if size is not None and copied != size:
            raise UserError(f"{label}: {copied:,} of {size:,} bytes were copied; start again.")
        with open(temporary, "rb") as written:  # else a crash of the machine could leave a part of it under its name
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot hold a copy of {url} ({reason_of(error)}); free space there, or set data.cache_dir."
        ) from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
    return str(target)


def _system(url: str, label: str) -> tuple[Any, str]:
    """Returns the file system of a URL and the path in it."""
    import fsspec.core  # here: few runs need it

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}.get(url.partition("://")[0].lower())
        remedy = f"pip install {package}" if package else reason_of(error)
        raise UserError(f"{label}: a package for such URLs is missing ({remedy}).") from error
    except ValueError as error:
        raise UserError(f"{label}: is no URL that is read here ({reason_of(error)}); copy the data to a local disk.") from error
    except Exception as error:  # as in `_call`
        raise _unreachable(label, error) from error


def _call(label: str, action: Callable[[], Any]) -> Any:
    """Returns what `action` does. Raises UserError for what goes wrong between here and the store."""
    try:
        return action()
    except Exception as error:  # stores raise errors of many libraries, which have nothing in common
        raise _unreachable(label, error) from error


def _unreachable(label: str, error: Exception) -> UserError:
    return UserError(
        f"{label}: cannot be read from there ({type(error).__name__}: {reason_of(error)}); check the URL, the network and your "
        "credentials, or copy the data to a local disk."
    )
