import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.errors import UserError
from sft_jax.evaluation.sampling import choose, filter_logits, sampling

UNSEEN = jnp.zeros((1, 0), bool)  # without a penalty it is not looked at


def distribution(logits, temperature, top_k, top_p, min_p=0.0):
    """The distribution that is left, by its definition, in float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    order = order[: top_k or len(order)]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    kept, reached = [], 0.0
    for token, weight in zip(order, weights):
        if top_p < 1 and reached >= top_p and kept:
            break
        kept.append((token, weight))
        reached += weight
    kept = [(token, weight) for token, weight in kept if weight >= min_p * kept[0][1]]
    result = np.zeros(len(scaled))
    for token, weight in kept:
        result[token] = weight
    return result / result.sum()


def probabilities(logits, options):
    return np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(logits, jnp.float32), options), axis=-1))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 12, 50]),
    top_p=st.sampled_from([0.01, 0.45, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
)
def test_filtered_distribution_equals_its_definition(seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(size=12).astype(np.float32) * 3
    expected = distribution(logits, temperature, top_k, top_p, min_p)
    got = probabilities(logits, sampling(temperature, top_k, top_p, min_p))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_ties_at_the_edge_keep_the_smaller_id():
    got = probabilities([1.0, 3.0, 1.0, 1.0], sampling(1.0, top_k=2))
    assert (got > 0).tolist() == [True, True, False, False]


def test_greedy_takes_the_smallest_id_of_equal_logits():
    logits = jnp.asarray([[0.0, 2.0, 2.0], [5.0, 1.0, 5.0]])
    assert choose(logits, jax.random.split(jax.random.key(0), 2), sampling(), UNSEEN).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "tokens_left", "quantile"),
    [(0.8, 0, 1.0, 8, 24.32), (1.5, 5, 1.0, 5, 18.47), (1.0, 0, 0.8, 4, 16.27)],
)
def test_draws_follow_the_exact_distribution(temperature, top_k, top_p, tokens_left, quantile):
    """Pearson's chi-square at a fixed seed; the bound is the 0.999 quantile for tokens_left - 1 degrees of freedom."""
    logits = np.asarray([0.1, 2.0, -1.0, 1.3, 0.7, -3.0, 1.9, 0.0], np.float32)
    draws = 20_000
    expected = distribution(logits, temperature, top_k, top_p) * draws
    keys = jax.random.split(jax.random.key(3), draws)
    tokens = choose(jnp.broadcast_to(logits, (draws, 8)), keys, sampling(temperature, top_k, top_p), UNSEEN)
    counts = np.bincount(np.asarray(tokens), minlength=8)
    alive = expected > 0
    assert alive.sum() == tokens_left
    assert (counts[~alive] == 0).all()
    assert ((counts[alive] - expected[alive]) ** 2 / expected[alive]).sum() < quantile


def test_a_rows_draw_does_not_depend_on_the_rows_beside_it():
    keys = jax.random.split(jax.random.key(1), 6)
    logits = jax.random.normal(jax.random.key(2), (6, 30))
    together = choose(logits, keys, sampling(1.0, top_p=0.95), UNSEEN)
    alone = [int(choose(logits[i : i + 1], keys[i : i + 1], sampling(1.0, top_p=0.95), UNSEEN)[0]) for i in range(6)]
    assert together.tolist() == alone


def test_another_temperature_does_not_compile_again():
    traces = []

    @jax.jit
    def draw(logits, keys, options):
        traces.append(1)
        return choose(logits, keys, options, UNSEEN)

    logits, keys = jnp.zeros((2, 5)), jax.random.split(jax.random.key(0), 2)
    draw(logits, keys, sampling(0.5, top_p=0.9))
    draw(logits, keys, sampling(0.7, top_p=0.5))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("options", "key"),
    [({"temperature": -1.0}, "temperature"), ({"temperature": float("nan")}, "temperature"),
     ({"temperature": 1.0, "top_k": -2}, "top_k"), ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
     ({"temperature": 1.0, "top_p": 1.5}, "top_p"), ({"temperature": 1.0, "min_p": 1.01}, "min_p"), ({"min_p": -0.1}, "min_p"),
     ({"repetition_penalty": 0.0}, "repetition_penalty"), ({"repetition_penalty": float("inf")}, "repetition_penalty"),
     ({"repetition_penalty": float("nan")}, "repetition_penalty")],
)  # fmt: skip
def test_a_value_out_of_range_names_its_key(options, key):
    with pytest.raises(UserError, match=f"^{key}:"):
        sampling(**options)
