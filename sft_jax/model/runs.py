"""Which layers are stacked and scanned together, and where a layer of the checkpoint lies."""

import functools
from typing import NamedTuple

from sft_jax.model.spec import DecoderSpec, LayerSpec

MAX_PERIOD = 6  # Gemma 3 repeats five local layers and a global one


class Run(NamedTuple):
    """`repeats` repetitions of a period of statically different layers; every place of the period is one stack."""

    period: tuple[LayerSpec, ...]
    repeats: int


class Place(NamedTuple):
    """Where a layer's parameters lie: `decoder.runs[run][place]`, index `index` of its stacked dimension."""

    run: int
    place: int
    index: int


def plan_runs(layers: tuple[LayerSpec, ...]) -> tuple[Run, ...]:
    """Returns the runs that make up `layers` with the least to compile: blocks plus loops around them.

    Llama is one run of period 1, Gemma 2 one of period 2; a remainder is a run of its own, after the others.
    """

    @functools.cache
    def best(start: int) -> tuple[int, tuple[Run, ...]]:
        if start == len(layers):
            return 0, ()
        options = []
        for size in range(1, min(MAX_PERIOD, len(layers) - start) + 1):
            period = layers[start : start + size]
            end, repeats = start, 0
            while layers[end : end + size] == period:
                end, repeats = end + size, repeats + 1
                cost, rest = best(end)
                options.append((cost + size + 1, -end, (Run(period, repeats), *rest)))
        cost, _, plan = min(options, key=lambda option: option[:2])
        return cost, plan

    return best(0)[1]


def layer_places(spec: DecoderSpec) -> list[Place]:
    """Returns for layer i of the checkpoint its place among the decoder's stacks.

    Names, adapters, the cache and everything else that speaks of a layer by number goes through this function.
    """
    return [
        Place(run, place, index)
        for run, (period, repeats) in enumerate(plan_runs(spec.layers))
        for index in range(repeats)
        for place in range(len(period))
    ]
