"""Which layers are stacked and scanned together, and where a layer of the checkpoint lies."""

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

    count = len(layers)
    # From the last layer to the first. `best[i]` is the cost of layers i and after, where the run that begins at i ends,
    # and the size of its period; `after[i, size]` is the best (cost, -end) at which repeats of layers[i : i + size] end.
    best: list[tuple[int, int, int]] = [(0, -count, 0)] * (count + 1)
    after: dict[tuple[int, int], tuple[int, int]] = {}
    for start in reversed(range(count)):
        for size in range(1, min(MAX_PERIOD, count - start) + 1):
            end = start + size
            after[start, size] = (best[end][0], -end)
            if layers[start:end] == layers[end : end + size]:
                after[start, size] = min(after[start, size], after[end, size])
        costs = [(after[start, size][0] + size + 1, after[start, size][1], size) for size in range(1, MAX_PERIOD + 1)
                 if (start, size) in after]  # fmt: skip
        best[start] = min(costs)
    runs, start = [], 0
    while start < count:
        _, end, size = best[start]
        runs.append(Run(layers[start : start + size], (-end - start) // size))
        start = -end
    return tuple(runs)


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
