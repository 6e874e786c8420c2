"""Formats of stored kernels against a computation in numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from quantised_numbers import REFERENCES, THRESHOLDS

from sft_jax.model.quant import KERNEL_FORMATS, QuantisedKernel

# Largest error of a number as a share of the largest of its block: half of the widest gap, at the end of the range.
ERRORS = {"nf4": (1 - 0.6961928009986877) / 2, "int8": 0.5 / 127, "fp8": 16 / 448}


def quantised(kernel, name: str, axes=("embed", "mlp"), units={}) -> QuantisedKernel:
    return jax.jit(lambda kernel: QuantisedKernel(kernel, name, axes, units))(kernel)


def largest_of_block(kernel: np.ndarray, name: str) -> np.ndarray:
    size = kernel.shape[0] if name != "nf4" else 64
    rows = [np.abs(kernel[start : start + size]).max(axis=0) for start in range(0, len(kernel), size)]
    return np.repeat(np.stack(rows), size, axis=0)[: len(kernel)]


def test_every_format_has_a_reference():
    assert KERNEL_FORMATS.keys() == REFERENCES.keys() == ERRORS.keys()


@pytest.mark.parametrize("size", [128, 64, 100, 2, 65, 1])
@pytest.mark.parametrize("name", KERNEL_FORMATS)
def test_codes_scales_and_numbers(name, size):
    kernel = np.random.default_rng(size).normal(size=(size, 5), scale=0.03).astype(np.float32)
    kernel[:, 3] = 0
    found = quantised(kernel, name)
    codes, scales, numbers = REFERENCES[name](kernel)
    assert found.codes[...].dtype == codes.dtype and found.shape == kernel.shape
    np.testing.assert_array_equal(np.asarray(found.codes[...]), codes)
    np.testing.assert_array_equal(np.asarray(found.scales[...]), scales)
    np.testing.assert_array_equal(np.asarray(found.astype("float32")), numbers)
    rounded = found.astype("bfloat16")
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(rounded), numbers.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("name", KERNEL_FORMATS)
def test_stacks_are_their_kernels_side_by_side(name):
    stack = np.random.default_rng(0).normal(size=(2, 3, 70, 4)).astype(np.float32)
    found = quantised(stack, name, ("layers", "expert", "embed", "mlp"))
    assert found.shape == stack.shape
    for layer, experts in enumerate(stack):
        for expert, kernel in enumerate(experts):
            for part, expected in zip((found.codes, found.scales), REFERENCES[name](kernel), strict=False):
                np.testing.assert_array_equal(np.asarray(part[layer, expert]), expected)


def test_numbers_half_way_get_the_lower_value():
    kernel = np.zeros((64, 1), np.float32)
    kernel[:15, 0] = THRESHOLDS
    kernel[15, 0] = 1.0
    codes = np.asarray(quantised(kernel, "nf4").codes[...])[:8, 0]
    assert [nibble for byte in codes for nibble in (byte >> 4, byte & 15)] == [*range(15), 15]
    above = np.nextafter(kernel, np.float32(2))
    above[15, 0] = 1.0
    codes = np.asarray(quantised(above, "nf4").codes[...])[:8, 0]
    assert [nibble for byte in codes for nibble in (byte >> 4, byte & 15)] == [*range(1, 16), 15]


@settings(max_examples=30, deadline=None)
@given(
    kernel=hnp.arrays(np.float32, (96, 3), elements=st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)),
    name=st.sampled_from(sorted(KERNEL_FORMATS)),
)
def test_errors_stay_within_half_a_gap(kernel, name):
    found = quantised(kernel, name)
    again = found.astype("float32")
    largest = largest_of_block(kernel, name)
    assert np.all(np.abs(again - kernel) <= (ERRORS[name] + 1e-6) * largest)
    assert np.all(np.asarray(again)[kernel == 0] == 0)
    # What is representable is stored as it is.
    np.testing.assert_allclose(quantised(again, name).astype("float32"), again, rtol=1e-6)


@pytest.mark.parametrize("name", KERNEL_FORMATS)
def test_what_is_no_number_is_not_hidden(name):
    kernel = np.ones((128, 3), np.float32)
    kernel[70, 1], kernel[5, 2] = np.inf, np.nan
    numbers = np.asarray(quantised(kernel, name).astype("float32"))
    assert np.isfinite(numbers[:, 0]).all()
    assert not np.isfinite(numbers[70, 1]) and not np.isfinite(numbers[5, 2])


@pytest.mark.parametrize("size, own, pieces", [(256, None, 4), (512, 4, 4), (768, 8, 4), (192, 64, 1), (192, 3, 3), (100, None, 1), (65, 5, 1)])
def test_blocks_and_bytes_are_never_cut(size, own, pieces):
    """A piece of the inputs holds whole blocks, and whole units of the kernel, such as heads."""
    units = {} if own is None else {"heads": own, "mlp": 2}
    kernel = np.ones((size, 4), np.float32)
    nf4, int8 = (quantised(kernel, name, ("heads", "mlp"), units) for name in ("nf4", "int8"))
    assert nf4.codes.units["heads"] == nf4.scales.units["heads"] == pieces
    assert size % pieces == 0 and (pieces == 1 or size // pieces % 64 == 0 and (own or pieces) % pieces == 0)
    assert nf4.codes.units.get("mlp") == units.get("mlp")
    assert dict(int8.codes.units) == units


@pytest.mark.parametrize("name", KERNEL_FORMATS)
def test_pieces_are_dequantised_alone_where_it_is_said_that_they_can(name):
    """What a device makes of its piece of codes and scales is its piece of the numbers; of a short last block no piece is."""
    rng, cut = np.random.default_rng(0), set()
    for size in (48, 64, 96, 100, 128, 192, 256):
        kernel = quantised(rng.normal(size=(size, 3)).astype(np.float32), name)
        numbers = np.asarray(kernel.astype("float32"))
        for pieces in (2, 3, 4):
            if not kernel.divides(pieces):
                continue
            cut.add((size, pieces))
            whole = kernel.scales[...].shape[0] == 1
            parts = [
                KERNEL_FORMATS[name].dequantise(codes, kernel.scales[...] if whole else scales)
                for codes, scales in zip(
                    np.split(kernel.codes[...], pieces), [None] * pieces if whole else np.split(kernel.scales[...], pieces), strict=True
                )
            ]
            np.testing.assert_array_equal(np.concatenate(parts), numbers, err_msg=f"{size} in {pieces}")
    assert {(64, 2), (128, 2), (192, 3), (256, 4)} <= cut and (name != "nf4" or not {(96, 2), (192, 2), (100, 2)} & cut)
