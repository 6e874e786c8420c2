"""Decoding with a cache against the whole sequence at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_values import slow
from tiny_models import KINDS, abstract, random_decoder

from sft_jax.model.cache import slots_of
from sft_jax.model.options import Options

TOTAL, MAX_LENGTH = 32, 40  # four windows
PROMPTS = (4, 13, 9)  # below, above and next to the window of 8
TOKENS = np.random.default_rng(0).integers(0, 96, (3, TOTAL)).astype(np.int32)
logits = jax.jit(lambda decoder, *batch: decoder(*batch))


@jax.jit
def extend(decoder, tokens, positions, segments, cache):
    hidden, cache = decoder.extend(tokens, positions, segments, cache)
    return decoder.head(hidden), cache


def ragged(starts, counts, left=False):
    """The next `counts` tokens of every row from `starts` on, padded to one length with rubbish."""
    length = max(max(counts), 1)
    tokens = np.full((3, length), 7, np.int32)
    positions, segments = np.full((3, length), 3, np.int32), np.zeros((3, length), np.int32)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        here = slice(length - count, length) if left else slice(0, count)
        tokens[row, here] = TOKENS[row, start : start + count]
        positions[row, here] = np.arange(start, start + count)
        segments[row, here] = 1
    return tokens, positions, segments


QUICK = ("gemma3", "gpt2", "gpt_oss", "deepseek_v3")  # windows, learned positions, sinks and experts, latent attention


@pytest.mark.parametrize("name", [*QUICK, *slow(*(name for name in KINDS if name not in QUICK))])
def test_decoding_equals_the_whole_sequence(name):
    """Ragged prompts, single tokens past every window, a further turn of several tokens, and single tokens again."""
    decoder = random_decoder(name)
    expected = np.asarray(logits(decoder, TOKENS))
    cache, at = decoder.init_cache(3, MAX_LENGTH), np.zeros(3, int)
    calls = [(PROMPTS, False), *[((1, 1, 1), False)] * 4, ((1, 1, 0), False), ((13, 2, 0), True)]
    calls += [((1, 1, 1), False)] * 3
    checked = 0
    for counts, left in calls:
        batch = ragged(at, counts, left)
        out, cache = extend(decoder, *batch, cache)
        rows, columns = np.nonzero(batch[2])
        np.testing.assert_allclose(out[rows, columns], expected[rows, batch[1][rows, columns]], atol=1e-4)
        at, checked = at + np.asarray(counts), checked + len(rows)
    assert checked == sum(at) and max(at) > 24


def test_cache_of_bfloat16_and_blocked_prefill():
    """The dtype of the cache is its own, and the kernel may be any."""
    exact = random_decoder("gemma2")
    decoder = random_decoder("gemma2", Options(attention="blocked"))
    cache = decoder.init_cache(3, MAX_LENGTH, jnp.bfloat16)
    out, cache = extend(decoder, *ragged((0, 0, 0), PROMPTS), cache)
    out, _ = extend(decoder, *ragged(PROMPTS, (1, 1, 1)), cache)
    assert {leaf.dtype for leaf in jax.tree.leaves((cache.keys, cache.values))} == {jnp.dtype("bfloat16")}
    expected = np.asarray(logits(exact, TOKENS))[np.arange(3), PROMPTS]
    np.testing.assert_allclose(out[:, 0], expected, atol=0.05)
    assert np.abs(out[:, 0] - expected).max() > 0, "the cache was not in bfloat16"


def test_local_layers_keep_their_window_only():
    cache = abstract("gemma3").init_cache(3, MAX_LENGTH)
    assert [[stack.shape for stack in run] for run in cache.keys] == [
        [(2, 3, 8, 2, 16), (2, 3, 8, 2, 16), (2, 3, MAX_LENGTH, 2, 16)],
        [(1, 3, 8, 2, 16)],
    ]
    short = abstract("gemma3").init_cache(3, 5)
    assert set(short.positions) == {5}, "a ring is never larger than what may be read"


def test_rings_keep_the_newest():
    """Brute force: of the tokens of a call, a ring keeps the last ones, each in the slot of its position."""
    positions = np.array([[0, 1, 2, 3, 4, 5, 6], [9, 10, 11, 0, 0, 0, 0]])
    segments = np.array([[1] * 7, [1] * 3 + [0] * 4])
    np.testing.assert_array_equal(slots_of(positions, segments, 4), [[4, 4, 4, 3, 0, 1, 2], [1, 2, 3, 4, 4, 4, 4]])


def test_a_token_beyond_the_cache_is_not_a_number():
    decoder = random_decoder("llama")
    cache = decoder.init_cache(3, PROMPTS[1])
    out, cache = extend(decoder, *ragged((0, 0, 0), PROMPTS), cache)
    assert np.isfinite(out[1]).all()
    out, _ = extend(decoder, *ragged(PROMPTS, (1, 1, 1)), cache)
    assert np.isnan(out[1]).all() and np.isfinite(out[0]).all() and np.isfinite(out[2]).all()


def test_no_output_of_the_scan_holds_the_cache():
    """The cache is carried through the layers: as a scanned output it would be copied for every token."""
    decoder = abstract("gemma2")
    cache = jax.eval_shape(lambda: decoder.init_cache(3, MAX_LENGTH))
    one = np.zeros((3, 1), np.int32)
    jaxpr = jax.make_jaxpr(lambda d, c: d.extend(one, one, one, c))(decoder, cache)
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert len(scans) == len(decoder.runs)
    for scan in scans:  # a scanned output has a dimension more than what the body returns, a carry has not
        shapes = [[variable.aval.shape for variable in part.outvars] for part in (scan, scan.params["jaxpr"].jaxpr)]
        assert shapes[0] == shapes[1]


