"""When a process counts as lost, by a clock of the test."""

import json
import subprocess
import sys

import pytest

from sft_jax.training.peers import Judge


def signs(**states) -> dict[str, str]:
    """Signs of life of processes p0, p1, ...: their counts, or (count, state)."""
    pairs = {name[1:]: value if isinstance(value, tuple) else (value, "") for name, value in states.items()}
    return {f"sft_jax/peers/{key}": json.dumps({"count": c, "state": s, "pid": 7, "host": "h"}) for key, (c, s) in pairs.items()}


def test_a_silent_process_is_lost_after_the_limit_and_not_before():
    judge = Judge(10)
    assert judge.lost(signs(p0=1, p10=1, p2=1), 100) is None
    assert judge.lost(signs(p0=2, p10=2, p2=1), 110) is None
    said = judge.lost(signs(p0=3, p10=3, p2=1), 110.5)
    assert said.startswith("Process 2 of the run (pid 7 on h) has given no sign of life for 10 s")


def test_a_process_that_was_slow_and_goes_on_lives():
    judge = Judge(10)
    judge.lost(signs(p1=1), 0)
    assert judge.lost(signs(p1=2), 500) is None and judge.lost(signs(p1=2), 509) is None


def test_a_process_that_failed_is_lost_at_once_with_its_reason():
    assert "failed (ValueError: x); its output says more" in Judge(10).lost(signs(p0=1, p1=(5, "failed (ValueError: x)")), 0)


def test_a_process_that_ended_is_lost_only_if_others_wait_for_it():
    judge = Judge(10)
    assert judge.lost(signs(p0=1, p1=(5, "has ended")), 0) is None and judge.lost(signs(p0=2, p1=(5, "has ended")), 9) is None
    assert "has ended, and this one waits for it" in judge.lost(signs(p0=3, p1=(5, "has ended")), 11)


@pytest.mark.parametrize("alive, code", [(False, 1), (True, -6)], ids=["the first process is gone", "another reason"])
def test_an_abort_of_the_runtime_is_told(alive, code):
    """`os.abort` is what the C++ runtime does to this process; Python's own handlers never see it."""
    program = (
        "import os, socket\nfrom types import SimpleNamespace\nfrom sft_jax.training import peers\n"
        "sock = socket.socket(); sock.bind(('127.0.0.1', 0))\n"
        f"sock.listen() if {alive} else None\n"
        "peers.distributed = SimpleNamespace(global_state=SimpleNamespace(coordinator_address=f'127.0.0.1:{sock.getsockname()[1]}'))\n"
        "peers._handle_abort(lambda: peers.Peers._on_abort(None))\nos.abort()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert ("error: Process 0 of the run" in result.stderr and "Start the same command again" in result.stderr) != alive
