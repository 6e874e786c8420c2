"""Commands of the package, each in a process of its own that begins where all libraries are imported already.

Most of the time of a command that has little to do is the import of JAX and transformers. A process that has made these imports,
and nothing else, is copied for every command; from there all is as `python -m sft_jax.NAME` has it. Tests of signals, of
terminals, of several processes, of memory and of the quickstart start Python itself.
"""

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_PRELOADED = ["transformers", "sft_jax.training.run", "sft_jax.hf.load"]
_HELD = "GLIBC_TUNABLES"  # where it is set, no command starts itself once more for large memory pages


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def run(name: str, *arguments, env: Mapping[str, str], cwd: Path | None = None, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Runs `python -m sft_jax.NAME ARGUMENTS` to its end, with an empty standard input, and returns what it printed."""
    argv = [f"sft_jax.{name}", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = _context().Process(target=_command, args=(argv, {_HELD: "", **env}, cwd, output, errors))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(argv, timeout)
        return subprocess.CompletedProcess(argv, process.exitcode, output.read_text(), errors.read_text())


def _command(argv: list[str], env: dict[str, str], cwd: Path | None, output: Path, errors: Path) -> None:
    for number, file in enumerate((open(os.devnull), open(output, "w"), open(errors, "w"))):
        os.dup2(file.fileno(), number)
    sys.stdin = open(0)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd or ".")
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
