"""Several processes that do one thing together: all succeed, or all raise, and all have the same."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.errors import Unreachable, UserError

T = TypeVar("T")
_KINDS = (RuntimeError, UserError, Unreachable)  # of what an action raised, those first that are told where processes differ


def agree(action: Callable[[], T]) -> T:
    """Runs `action` on every process; where one of them raises, all of them raise, so that none waits for ever.

    What another process raised is one of _KINDS here: where it was a UserError, the input is at fault, and it is said once.
    """
    failure: Exception | None = None
    result = None
    try:
        result = action()
    except Exception as error:  # raised again below, once the others know of it
        failure = error
    if jax.process_count() > 1:
        states = _of_all_processes([_kind(failure)])[:, 0]
        failed = np.flatnonzero(states)
        if failure is None and len(failed):
            raise _KINDS[states[failed].min() - 1](f"Process {failed[0]} failed where this one did not; its output says why.")
    if failure is not None:
        raise failure
    return result


def _kind(failure: Exception | None) -> int:
    """Returns which of _KINDS an error is, from 1 on; 0 for none."""
    if failure is None:
        return 0
    return 3 if isinstance(failure, Unreachable) else 2 if isinstance(failure, UserError) else 1


def processes_where(flag: bool) -> list[int]:
    """Returns the processes in which `flag` is set; all processes must call this."""
    return np.flatnonzero(_of_all_processes([int(flag)])[:, 0]).tolist() if jax.process_count() > 1 else [0] * flag


def anywhere(flag: bool) -> bool:
    """Returns whether `flag` is set in any process; all processes must call this."""
    return bool(processes_where(flag))


def of_first_process(value: int) -> int:
    """Returns the value that the first process has; all processes must call this. `value` fits 31 bits."""
    return int(_of_all_processes([value])[0, 0]) if jax.process_count() > 1 else value


def _of_all_processes(values) -> np.ndarray:
    """Returns the values of every process, int32 [processes, n]; all processes must call this with as many values.

    Unlike `multihost_utils.process_allgather` it waits for every device of this process: on the CPU a collective that
    has ended on one device only can mix with the next program's.
    """
    mesh = Mesh(np.asarray(jax.devices()), ("devices",))
    mine = np.asarray(values, np.int32)[None]
    placed = jax.make_array_from_callback(
        (mesh.size, mine.shape[1]), NamedSharding(mesh, P("devices")), lambda index: mine
    )
    gathered = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(placed).block_until_ready()
    found = np.asarray(gathered.addressable_data(0))
    devices = [device.process_index for device in mesh.devices.flat]
    return found[[devices.index(process) for process in range(jax.process_count())]]
