import numpy as np

from sft_jax.data.randomness import derive_key, permutation, random_bits


def test_splitmix64_gives_the_published_outputs():
    # First outputs for the seed 1234567, as published with the reference C implementation (prng.di.unimi.it).
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert random_bits(1234567, 5).tolist() == expected


def test_splitmix64_equals_the_reference_algorithm_in_python_integers():
    state, mask = (1 << 64) - 3, (1 << 64) - 1  # near the top, so that the state wraps
    for got in random_bits(state, 100).tolist():
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        assert got == z ^ (z >> 31)


def test_permutation_is_one_and_differs_by_key():
    first, second = permutation(1, 1000), permutation(2, 1000)
    assert sorted(first) == list(range(1000)) == sorted(second)
    assert (first != second).any() and (first != np.arange(1000)).any()
    assert permutation(1, 0).tolist() == [] and permutation(1, 1).tolist() == [0]


def test_permutation_places_every_element_evenly():
    # Mean position of element 0 over 2000 keys: 49.5 with standard error 28.9 / sqrt(2000) = 0.65.
    places = [int(np.flatnonzero(permutation(derive_key(seed, "x"), 100) == 0)[0]) for seed in range(2000)]
    assert abs(np.mean(places) - 49.5) < 3.5


def test_keys_differ_by_every_part():
    keys = {
        derive_key(*parts)
        for parts in [(0, "a", 1), (0, "a", 11), (0, "a1", 1), (1, "a", 1), (0, "a", "1"), ("0", "a", 1)]
    }
    assert len(keys) == 6
