"""The flags of libtpu that the launchers of scripts/launch set, with which a step is planned as a launcher has it compiled.

libtpu reads them from LIBTPU_INIT_ARGS when it is loaded; as options of one compilation they do the same in a process that has
loaded it already (tests/planning/test_prefetch.py reads it from the schedule).
"""

import functools
from collections.abc import Mapping
from pathlib import Path

_FILE = Path(__file__).with_name("tpu_flags.txt")  # scripts/launch/flags.sh reads it too


@functools.cache
def tpu_flags() -> dict[str, str]:
    """Returns the flags by name."""
    return dict(line.removeprefix("--").split("=", 1) for line in _FILE.read_text().split())


def flags_beside(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns those that a launcher would set in an environment: what LIBTPU_INIT_ARGS names wins, SFT_JAX_OVERLAP=0 sets none."""
    if environment.get("SFT_JAX_OVERLAP") == "0":
        return {}
    named = {flag.removeprefix("--").partition("=")[0] for flag in environment.get("LIBTPU_INIT_ARGS", "").split()}
    return {name: value for name, value in tpu_flags().items() if name not in named}
