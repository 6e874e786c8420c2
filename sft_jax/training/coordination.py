"""Texts that processes of a run give each other through the coordination service, before a device is touched.

The service is that of `jax.distributed`: a store of keys and values in the first process. JAX makes it public for nobody, and
Orbax uses it in the same way.
"""

import itertools

from jax._src import distributed  # global_state.client has no public equivalent

from sft_jax.errors import Unreachable

_calls = itertools.count()  # every process makes the same exchanges in the same order


def client():
    """Returns this process's connection to the service, or None in a run of one process."""
    state = distributed.global_state
    return state.client if state.num_processes > 1 else None


def exchange(text: str, seconds: float = 300.0) -> list[str]:
    """Returns the texts of all processes, by process; all processes must call this.

    Raises Unreachable where a process does not call it within `seconds`.
    """
    service = client()
    if service is None:
        return [text]
    prefix = f"sft_jax/exchange/{next(_calls)}/"
    service.key_value_set(f"{prefix}{distributed.global_state.process_id}", text)
    found = []
    for process in range(distributed.global_state.num_processes):
        try:
            found.append(service.blocking_key_value_get(f"{prefix}{process}", int(seconds * 1000)))
        except RuntimeError as error:
            raise Unreachable(
                f"Process {process} of the run did not follow the others within {seconds:g} s; its output says why."
            ) from error
    return found
