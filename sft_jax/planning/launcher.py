"""The flags of libtpu that the launchers of scripts/launch set, with which a step is planned as a launcher has it compiled.

libtpu reads them from LIBTPU_INIT_ARGS when it is loaded; as options of one compilation they do the same in a process that has
loaded it already (tests/planning/test_prefetch.py reads it from the schedule).
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path

# With which libtpu gathers the kernels of a layer while it computes the one before.
_GATHER_AHEAD = "xla_tpu_enable_ici_ag_pipelining"
_FILE = Path(__file__).with_name("tpu_flags.txt")  # scripts/launch/flags.sh reads it too


@functools.cache
def tpu_flags() -> dict[str, str]:
    """Returns the flags by name."""
    return dict(line.removeprefix("--").split("=", 1) for line in _FILE.read_text().split())


def compiler_flags(platform: str, plain: bool = False) -> dict[str, str]:
    """Returns the options with which a program for `platform` is compiled as a launcher would have it; `plain`: without any."""
    return {} if plain or platform != "tpu" else flags_beside(os.environ)


def gathers_ahead(flags: Mapping[str, str]) -> bool:
    """Returns whether layers are gathered before they are needed, which takes memory."""
    return flags.get(_GATHER_AHEAD) == "true"


def flags_beside(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns those that a launcher would set in an environment: what LIBTPU_INIT_ARGS names wins, SFT_JAX_OVERLAP=0 sets none."""
    if environment.get("SFT_JAX_OVERLAP") == "0":
        return {}
    named = {flag.removeprefix("--").partition("=")[0] for flag in environment.get("LIBTPU_INIT_ARGS", "").split()}
    return {name: value for name, value in tpu_flags().items() if name not in named}
