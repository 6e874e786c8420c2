"""Programs of a test module that are the same text are compiled once.

Tests start many runs of one small model, and compiling is most of what a run costs. The cache on disk cannot help: of several CPU
devices a program that was read from it may wait for ever (sft_jax.training.platform). Here the executable itself is used again, in
the process that compiled it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from jax._src import compiler


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Keeps what JAX compiles for CPUs meanwhile, and gives it where the same is to be compiled again."""
    compile_program, kept = compiler.compile_or_get_cached, {}

    def compile_or_reuse(backend, computation, devices, options, host_callbacks, *rest: Any, **more: Any):
        arguments = (backend, computation, devices, options, host_callbacks, *rest)
        if host_callbacks or backend.platform != "cpu":  # a callback is part of an executable, and no part of its text
            return compile_program(*arguments, **more)
        key = str(computation), tuple(device.id for device in devices.flat), options.SerializeAsString()
        if key not in kept:
            kept[key] = compile_program(*arguments, **more)
        return kept[key]

    compiler.compile_or_get_cached = compile_or_reuse
    try:
        yield
    finally:
        compiler.compile_or_get_cached = compile_program
