"""As a program: a sweep of two runs on one device. Prints of each run how many programs were compiled, and how many read from the cache."""

import contextlib
import json
import sys
from pathlib import Path

import jax

from sft_jax.experiments import engine
from sft_jax.experiments.sweep import plan_sweep, run_sweep

EVENTS = {"/jax/compilation_cache/cache_misses": "compiled", "/jax/compilation_cache/cache_hits": "read"}


def counted(recipe: dict, workdir: str) -> list[dict[str, int]]:
    """Returns the counts of each run of a sweep over learning rates."""
    counts: list[dict[str, int]] = []
    jax.monitoring.register_event_listener(lambda event, **_: event in EVENTS and bool(counts) and counts[-1].update({EVENTS[event]: counts[-1][EVENTS[event]] + 1}))
    fit = engine.fit

    def counting(config, folder):
        counts.append({"compiled": 0, "read": 0})
        return fit(config, folder)

    engine.fit = counting
    plan = plan_sweep(recipe, [{"optim.learning_rate": 1e-2}, {"optim.learning_rate": 1e-3}], [0, 1], None, lambda line: None)
    with contextlib.closing(engine.open_experiment(workdir)) as work:
        run_sweep(plan, work, False, lambda line: None)
    return counts


if __name__ == "__main__":
    found = counted(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
    print(json.dumps(found))
