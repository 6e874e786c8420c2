"""The chat command as a user runs it."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TERM": "dumb"}


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


def test_a_conversation_in_a_terminal(model):
    """An answer is streamed, Ctrl-C stops the next one and the one after that ends the chat."""
    ours, theirs = pty.openpty()
    arguments = command("--model", model, "--max_new_tokens", 500)
    process = subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=ENVIRONMENT, start_new_session=True,
                               preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0))  # fmt: skip
    os.close(theirs)
    try:
        assert "no chat template" in read_until(ours, "> ")
        os.write(ours, b"Once upon a time\n")
        read_until(ours, ", there was")
        os.write(ours, b"\x03")
        read_until(ours, "> ")
        os.write(ours, b"\x03")
        assert process.wait(60) == 0, process.stderr.read()
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
        os.close(ours)


def test_one_prompt_from_a_script(model):
    arguments = command("--model", model, "--prompt", "Once upon a time", "--max_new_tokens", 40)
    result = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert result.returncode == 0 and result.stdout.startswith(", there was a little girl named Lily.")
    assert "cut" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--model", "no/such/model"], "no/such/model"), (["--prompt", "a"], "--model"), (["--model", "m", "--top_p", "2"], "top_p")],
    ids=["path", "missing", "range"],
)
def test_wrong_input_is_one_message_and_exit_code_2(arguments, message):
    result = subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr
