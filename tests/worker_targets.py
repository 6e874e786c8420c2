"""Functions that worker processes run in tests: each item is a command that a row could amount to."""

import os
import signal
import stat
import struct
import time

from sft_jax.errors import UserError


def make(setup):
    """A function over lists of items. A text item is a misdeed; a number is doubled."""

    def run(items):
        return [one(item) for item in items]

    def one(item):
        if item == "loop":
            while True:
                pass
        if item == "sleep":
            time.sleep(1000)
        if item == "eat":
            return len("a" * (4 << 30))
        if item == "eat slowly":
            parts = []
            while True:
                parts.append(bytearray(b"x" * (8 << 20)))
        if item == "a long answer":
            return b"x" * (60 << 20)
        if item == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "die while answering":
            handles = [number for number in range(3, 100) if os.path.exists(f"/dev/fd/{number}")]
            pipe = next(number for number in handles if stat.S_ISSOCK(os.fstat(number).st_mode))
            os.write(pipe, struct.pack("!i", 1000) + b"the beginning of an answer")
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "exit":
            print("last words", flush=True)
            os._exit(3)
        if item == "raise":
            raise KeyError("no such thing")
        if item == "refuse":
            raise UserError("this will not do")
        if item == "pid":
            return os.getpid()
        if item == "modules":
            import sys

            return sorted(sys.modules)
        if item == "print":
            print("noise")
            return "printed"
        return setup * item

    return run


def fail(setup):
    raise ValueError(f"cannot set up {setup}")


def die(setup):
    print("a linker error, say", flush=True)
    os._exit(127)
