"""The chat command as a user runs it."""

import os
import pty
import select
import subprocess
import sys
import time

import commands
import pytest
from xla_flags import xla_flags

# Gives a program the terminal on its standard input, as a shell does, so that Ctrl-C reaches it; also where the tests run in
# the background and ignore it.
TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(), "TERM": "dumb", "XDG_CACHE_HOME": str(cache)}


def command(*arguments):
    return [sys.executable, "-m", "sft_jax.chat", *map(str, arguments)]


@pytest.fixture(scope="module")
def model(assets):
    return assets / "models" / "stories260k"


def read_until(terminal: int, text: str, seconds: float = 240.0) -> str:
    """Returns what the terminal shows up to `text`."""
    shown, end = "", time.monotonic() + seconds
    while text not in shown:
        assert time.monotonic() < end, shown
        if select.select([terminal], [], [], 1.0)[0]:
            shown += os.read(terminal, 4096).decode()
    return shown


@pytest.mark.slow
def test_a_conversation_in_a_terminal(model, environment):
    """An answer is streamed; Ctrl-C ends an answer that is being given, and the chat while nothing is."""
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-c", TAKE_TERMINAL, *command("--model", model, "--max_new_tokens", 500)]
    process = subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    try:
        assert "no chat template" in read_until(ours, "> ")
        os.write(ours, b"Once upon a time\n")
        read_until(ours, ", there was")
        os.write(ours, b"\x03")
        read_until(ours, "> ")
        for _ in range(20):  # a key that comes between the prompt and the wait for one is only seen with the next
            os.write(ours, b"\x03")
            try:
                process.wait(20)  # longer than its end takes, in which another one would kill it
                break
            except subprocess.TimeoutExpired:
                pass
        assert process.poll() == 0, process.stderr.read()
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
        os.close(ours)


def test_one_prompt_from_a_script(model, environment):
    result = commands.run("chat", "--model", model, "--prompt", "Once upon a time", "--max_new_tokens", 500, env=environment)
    assert result.returncode == 0 and result.stdout.startswith(", there was a little girl named Lily.")
    assert "cut" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--model", "no/such/model"], "no/such/model"), (["--prompt", "a"], "--model"),
     (["--model", "m", "--top_p", "2"], "top_p"), (["--model", "m", "--chat_template_kwargs", "[1]"], "JSON object")],
    ids=["path", "missing", "range", "template arguments"],
)
def test_wrong_input_is_one_message_and_exit_code_2(arguments, message, environment):
    result = commands.run("chat", *arguments, env=environment)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr


@pytest.mark.slow
def test_without_standard_input_a_prompt_is_answered(model, environment):
    """A closed one, as `<&-` in a shell or some schedulers give it."""

    def run(*arguments):
        shell = ["sh", "-c", 'exec "$@" <&-', "sh", *command("--model", model, *arguments)]
        return subprocess.run(shell, capture_output=True, text=True, env=environment, timeout=240)

    result = run("--prompt", "Once upon a time", "--max_new_tokens", 4)
    assert result.returncode == 0 and result.stdout.startswith(", there was"), result.stderr
    result = run()
    assert result.returncode == 2 and result.stderr.startswith("error: standard input: is closed")
