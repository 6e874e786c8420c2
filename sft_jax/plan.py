"""Says before anything is rented what a run needs: python -m sft_jax.plan --config configs/NAME.py --topology v5p-16

Compiles the run's own training step, and its evaluation where there are held-out data, for TPUs that are not there
(pip install 'sft_jax[tpu]'; no TPU is needed): whether it fits and by how much, memory by what it is for, FLOPs, what devices
send each other, the roofline, and hours and price of the whole run. The model needs its config.json and no weights. Exit codes:
0 it fits; 3 it does not; 2 wrong input.
"""

import json
import os
import sys

from absl import flags

from sft_jax import cli
from sft_jax.errors import UserError

_CONFIG = cli.define_config_flag()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The machine: v5e-16 or v6e-8 (chips), v5p-16 (TensorCores, two a chip), v5p:2x2x2, 2xv5p-16 (slices), h100x8 (GPUs), cpu."
)
_MEMORY = flags.DEFINE_float("memory-gib", None, "Memory of --topology cpu, by default that of this host.")
_TOKENS = flags.DEFINE_float("tokens", None, "Real tokens of an epoch, in place of data.train.")
_PRICE = flags.DEFINE_float("price", None, "What a device costs an hour.")
_EFFICIENCY = flags.DEFINE_float("efficiency", 0.5, "Share of the roofline that the run is taken to reach, for hours and price.")
_ESTIMATE = flags.DEFINE_bool("estimate", False, "Estimate memory and collectives instead of compiling, as for GPUs.")
_PLAIN = flags.DEFINE_bool("plain", False, "Compile without the flags that the launchers set for TPUs (scripts/launch/flags.sh).")
_AUTO = flags.DEFINE_bool("auto", False, "Search mesh, remat and micro-batch for the fastest settings that fit.")
_JSON = flags.DEFINE_bool("json", False, "Write the plan as one JSON object to standard output.")


def main() -> None:
    config = cli.read_config(_CONFIG, needs_data=False)
    if not _TOPOLOGY.value:
        raise UserError("--topology: is missing; name the machine, such as --topology v5p-16, v5e-64, h100x8 or cpu.")
    if not 0 < _EFFICIENCY.value <= 1:
        raise UserError(f"--efficiency: must be above 0 and at most 1, not {_EFFICIENCY.value:g}.")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed

    from sft_jax.planning.machines import machine
    from sft_jax.planning.planner import base_of, make_plan
    from sft_jax.planning.remedies import remedies
    from sft_jax.planning.report import comparison, lines, to_dict
    from sft_jax.planning.search import overrides, search
    from sft_jax.training.resolved import resolved

    target, log = machine(_TOPOLOGY.value, _MEMORY.value), _say
    config, base = resolved(config), base_of(config)
    if _AUTO.value:
        plans = search(config, target, base, _TOKENS.value, _ESTIMATE.value, log, _PLAIN.value)
    else:
        plans = [make_plan(config, target, base, tokens=_TOKENS.value, estimated=_ESTIMATE.value, log=log, plain=_PLAIN.value)]
    plan = plans[0]
    found = remedies(plan, base)
    if _JSON.value:
        settings = {"settings": overrides(plan)} if _AUTO.value else {}
        print(json.dumps({**to_dict(plan, _EFFICIENCY.value, _PRICE.value, found), **settings}))
    else:
        table = comparison(plans, _EFFICIENCY.value) if _AUTO.value and plan.fits else []
        print("\n".join([*table, *lines(plan, _EFFICIENCY.value, _PRICE.value, found)]))
    if not plan.fits:
        sys.exit(cli.EXIT_FINDINGS)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, __doc__)
