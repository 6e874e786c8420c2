"""Runs: any list of layers is covered once, and the known families are as few stacks as they can be."""

from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CONFIGS

from sft_jax.model.families import spec_from_config
from sft_jax.model.runs import MAX_PERIOD, layer_places, plan_runs
from sft_jax.model.spec import LayerSpec, MlpSpec

LOCAL, WHOLE, OTHER = (LayerSpec(window, None, MlpSpec(8, True, "silu", False)) for window in (8, None, 16))


def shape(layers):
    return [(len(run.period), run.repeats) for run in plan_runs(tuple(layers))]


def test_known_patterns():
    assert shape([WHOLE] * 32) == [(1, 32)]  # Llama
    assert shape([LOCAL, WHOLE] * 13) == [(2, 13)]  # Gemma 2
    assert shape(([LOCAL] * 5 + [WHOLE]) * 4 + [LOCAL] * 2) == [(6, 4), (1, 2)]  # Gemma 3, 1B
    assert shape(([LOCAL] * 5 + [WHOLE]) * 3) == [(6, 3)]
    assert shape([OTHER] * 3 + [WHOLE] * 58) == [(1, 3), (1, 58)]  # a few layers of another kind first
    assert shape([OTHER] + [WHOLE] * 27) == [(1, 1), (1, 27)]


def least_cost(layers, start=0) -> int:
    """Blocks plus loops around them, by trying every run at every place."""
    if start == len(layers):
        return 0
    costs = []
    for size in range(1, MAX_PERIOD + 1):
        end = start
        while len(layers[end : end + size]) == size and layers[end : end + size] == layers[start : start + size]:
            end += size
            costs.append(size + 1 + least_cost(layers, end))
    return min(costs)


@given(st.lists(st.sampled_from([LOCAL, WHOLE]), min_size=1, max_size=9))
def test_as_little_to_compile_as_possible(layers):
    assert sum(len(run.period) + 1 for run in plan_runs(tuple(layers))) == least_cost(layers)


def test_very_many_layers():
    """A damaged config.json must lead to a message about its tensors, not to a RecursionError here."""
    assert shape([LOCAL, WHOLE] * 5000) == [(2, 5000)]


@given(st.lists(st.sampled_from([LOCAL, WHOLE, OTHER]), min_size=1, max_size=24))
def test_every_layer_has_one_place(layers):
    runs = plan_runs(tuple(layers))
    assert [layer for run in runs for _ in range(run.repeats) for layer in run.period] == layers
    assert all(1 <= len(run.period) <= MAX_PERIOD and run.repeats >= 1 for run in runs)
    spec = spec_from_config(CONFIGS["llama"])
    spec = type(spec)(**{**vars(spec), "layers": tuple(layers)})
    places = layer_places(spec)
    assert len(set(places)) == len(places) == len(layers)
    for layer, place in zip(layers, places, strict=True):
        assert runs[place.run].period[place.place] == layer and place.index < runs[place.run].repeats
