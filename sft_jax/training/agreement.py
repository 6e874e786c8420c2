"""At the start all processes of a run must have the same configuration, code and data: what differs is named, with both values.

Processes that differ would hang in a collective that only some of them reach or, worse, train on something else than they say.
"""

import json
import os
import socket
from collections.abc import Mapping
from typing import Any

from sft_jax.config import Config, to_dict
from sft_jax.errors import UserError
from sft_jax.training.coordination import exchange
from sft_jax.training.resume import flat_keys
from sft_jax.training.revision import git_revision, source_hash, versions

_OWN_KEYS = ("data.cache_dir", "data.workers")  # of a host: where and how fast data are prepared there
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")  # change programs
_SHOWN = 200  # characters of a value


def check_start(config: Config) -> None:
    """Raises UserError in all processes where the configuration or the code of one differs from that of process 0.

    Args:
        config: as it was given, with paths as the user has written them.
    """
    keys = {key: value for key, value in flat_keys(to_dict(config)).items() if key not in _OWN_KEYS}
    # Whether a checkout has other files beside, such as a workdir, is no difference; changed sources are in the hash.
    code = {"the source of sft_jax": source_hash(), "the git revision": (git_revision() or "none").rstrip("+")}
    code |= {f"the version of {name}": version for name, version in versions().items()}
    code |= {f"the environment variable {name}": os.environ.get(name, "") for name in _FLAGS}
    check_same({**keys, **code}, "Give every process the same command, code and environment.")


def check_same(items: Mapping[str, Any], remedy: str) -> None:
    """Raises UserError, in all processes, naming the process and the first item in which one differs from process 0.

    Args:
        items: JSON values by name.
        remedy: a sentence.
    """
    mine = {name: json.dumps(value, sort_keys=True) for name, value in items.items()}
    texts = exchange(json.dumps({"host": socket.gethostname(), "items": mine}))
    first = json.loads(texts[0])
    for process, text in enumerate(texts):
        if text == texts[0]:
            continue
        other = json.loads(text)
        for name in first["items"] | other["items"]:
            values = [found["items"].get(name, "nothing") for found in (other, first)]
            if values[0] != values[1]:
                there, here = (value if len(value) <= _SHOWN else value[:_SHOWN] + " ..." for value in values)
                raise UserError(
                    f"{name}: process {process} (on {other['host']}) has {there}, and process 0 (on {first['host']}) has {here}. "
                    f"{remedy}"
                )
