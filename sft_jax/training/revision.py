"""Which code a process runs: versions of libraries, the commit of a checkout, and a hash of the package's source."""

import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

_PACKAGES = ("sft_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers", "tokenizers")
_DEVICE_PACKAGES = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")  # where they are installed
_PACKAGE = Path(__file__).parents[1]


def versions() -> dict[str, str]:
    """Returns the versions of Python and of what computes, by package."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_DEVICE_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in _PACKAGES:
                found[name] = "not installed"
    return found


@functools.cache
def git_revision() -> str | None:
    """Returns the commit of the package's checkout, with a + where files were changed; None outside one."""
    try:
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=_PACKAGE, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=_PACKAGE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.strip() + ("+" if changed.stdout.strip() else "")


@functools.cache
def source_hash() -> str:
    """Returns the hash of all source files of the package, by name, which a commit alone does not tell of changed files."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
