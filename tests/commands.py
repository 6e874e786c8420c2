"""Commands of the package, each in a process of its own that begins where all libraries are imported already.

Most of the time of a command that has little to do is the import of JAX and transformers. A process that has made these imports,
and nothing else, is copied for every command; from there all is as `python -m sft_jax.NAME` has it. Tests of signals, of
terminals, of several processes, of memory and of the quickstart start Python itself.
"""

import contextlib
import fcntl
import functools
import multiprocessing
import os
import pty
import re
import runpy
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

_PRELOADED = ["transformers", "sft_jax.training.run", "sft_jax.hf.load"]
_HELD = "GLIBC_TUNABLES"  # where it is set, no command starts itself once more for large memory pages


@functools.cache
def _context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def run(
    name: str, *arguments, env: Mapping[str, str], cwd: Path | None = None, timeout: float = 600, terminal: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m sft_jax.NAME ARGUMENTS` to its end, with an empty standard input, and returns what it printed.

    With `terminal` its standard error is a terminal, and its standard output a file.
    """
    argv = [f"sft_jax.{name}", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        place = stack.enter_context(_terminal(errors)) if terminal else errors
        env = {**env, "TERM": "xterm"} if terminal else env
        process = _context().Process(target=_command, args=(argv, {_HELD: "", **env}, cwd, output, place))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(argv, timeout)
        stack.close()
        return subprocess.CompletedProcess(argv, process.exitcode, output.read_text(), errors.read_text())


def assert_bar(result: subprocess.CompletedProcess[str]) -> None:
    """Asserts that a command on a terminal has drawn a bar with a count there, and nothing of it into its file."""
    assert "\u2501" in result.stderr and re.search(r"\d+/\d+", result.stderr), result.stderr
    assert "\u2501" not in result.stdout and "\x1b" not in result.stdout, result.stdout


@contextlib.contextmanager
def _terminal(copy: Path) -> Iterator[str]:
    """Makes a terminal of 120 columns and gives its name; what is written there is in the file `copy` at the end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))

    def read() -> None:
        with open(copy, "wb") as file, contextlib.suppress(OSError):  # EIO: nobody has it open any more
            while part := os.read(ours, 65536):
                file.write(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield os.ttyname(theirs)
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)


def _command(argv: list[str], env: dict[str, str], cwd: Path | None, output: Path, errors: Path | str) -> None:
    for number, file in enumerate((open(os.devnull), open(output, "w"), open(errors, "w"))):
        os.dup2(file.fileno(), number)
    sys.stdin = open(0)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd or ".")
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
