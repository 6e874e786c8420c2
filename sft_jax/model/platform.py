"""For which platform a program is traced: this machine's, or that of a machine which is not there."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target platform", default=None)


def target_platform() -> str:
    """Returns "cpu", "gpu" or "tpu": the platform by which kernels and their block sizes are chosen."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
    """What is traced inside is for `platform`. Functions that were traced before keep what was chosen for them."""
    before = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(before)
