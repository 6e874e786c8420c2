"""What a process raises where another one has failed: its launcher acts on the exit code of any of them."""

import jax
import numpy as np
import pytest

from sft_jax.checkpoint import processes
from sft_jax.errors import Unreachable, UserError


@pytest.mark.parametrize(
    "others, kind",
    [((1,), RuntimeError), ((2,), UserError), ((3,), Unreachable), ((3, 2), UserError), ((3, 1), RuntimeError), ((2, 1), RuntimeError)],
)
def test_all_end_as_the_one_that_failed(monkeypatch, others, kind):
    states = []
    monkeypatch.setattr(jax, "process_count", lambda: 1 + len(others))

    def gathered(mine):
        states.append(mine)
        return np.array([mine, *[[state] for state in others]])

    monkeypatch.setattr(processes, "_of_all_processes", gathered)
    with pytest.raises(kind, match="Process 1 failed where this one did not") as raised:
        processes.agree(lambda: None)
    assert type(raised.value) is kind
    assert states == [[0]]


@pytest.mark.parametrize("state, failure", [(1, ValueError("a fault")), (2, UserError("wrong input")), (3, Unreachable("no answer"))])
def test_the_one_that_failed_says_why_and_tells_the_others(monkeypatch, state, failure):
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_of_all_processes", lambda mine: (told.append(mine), np.array([mine, [0]]))[1])

    def action():
        raise failure

    with pytest.raises(type(failure), match=str(failure)):
        processes.agree(action)
    assert told == [[state]]
