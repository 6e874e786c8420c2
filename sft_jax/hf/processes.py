"""Several processes that do one thing together: all succeed, or all raise."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sft_jax.errors import UserError

T = TypeVar("T")


def agree(action: Callable[[], T]) -> T:
    """Runs `action` on every process; where one of them raises, all of them raise, so that none waits for ever."""
    failure: Exception | None = None
    result = None
    try:
        result = action()
    except Exception as error:  # raised again below, once the others know of it
        failure = error
    if jax.process_count() > 1:
        failed = _processes_where(failure is not None)
        if failure is None and failed:
            raise UserError(f"Process {failed[0]} failed where this one did not; its output says why.")
    if failure is not None:
        raise failure
    return result


def anywhere(flag: bool) -> bool:
    """Returns whether `flag` is set in any process; all processes must call this."""
    return bool(_processes_where(flag)) if jax.process_count() > 1 else flag


def _processes_where(flag: bool) -> list[int]:
    """Returns the processes in which `flag` is set; all processes must call this.

    Unlike `multihost_utils.process_allgather` it waits for every device of this process: on the CPU a collective that
    has ended on one device only can mix with the next program's.
    """
    mesh = Mesh(np.asarray(jax.devices()), ("devices",))
    flags = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, P("devices")), lambda index: np.full(1, flag, np.int32)
    )
    gathered = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(flags).block_until_ready()
    return sorted({mesh.devices.flat[i].process_index for i in np.flatnonzero(gathered)})
