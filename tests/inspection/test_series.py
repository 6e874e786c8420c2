"""Plots of measured numbers: everything is where its number says, and nothing of a name acts."""

import doctest
import re
from xml.etree import ElementTree

import numpy as np

from sft_jax.inspection import series
from sft_jax.inspection.series import Line, Measured, curve, intervals


def svg(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", figure).group())


def places(figure: str, kind: str) -> np.ndarray:
    return np.array([(float(c.get("cx")), float(c.get("cy"))) for c in svg(figure).iter("circle") if c.get("class") == kind])


def test_ticks_hold_all_values():
    assert not doctest.testmod(series).failed
    for low, high in ((0.0, 1.0), (-3.2, 17.0), (0.1234, 0.1235), (5.0, 5.0), (0.0, 0.0), (1e-7, 3e5)):
        ticks = series._ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 9, (low, high, ticks)


def test_means_and_runs_lie_on_one_scale_and_names_are_escaped():
    rows = [Measured("<b>one</b>", [1.0, 3.0], 2.0, 0.5, 3.5), Measured("two", [4.0], 4.0, None, None)]
    figure = intervals(rows, "title", "loss")
    means, runs = places(figure, "bar0"), places(figure, "ring")
    per_unit = (means[1, 0] - means[0, 0]) / 2
    np.testing.assert_allclose(runs[1, 0] - runs[0, 0], 2 * per_unit, atol=0.2)
    [bar] = [line for line in svg(figure).iter("line") if line.get("class") == "curve line0"]
    np.testing.assert_allclose(float(bar.get("x2")) - float(bar.get("x1")), 3 * per_unit, atol=0.2)
    assert "<b>" not in figure and "&lt;b&gt;" in figure


def test_a_curve_is_over_the_logarithm_and_a_wide_band_does_not_squash_it():
    line = Line([1.0, 4.0], [2.0, 1.0], [-50.0, -50.0], [50.0, 50.0])
    figure = curve([(1.0, 2.0), (2.0, 1.5), (4.0, 1.0)], "title", "rows", "loss", line=line, marker=(4.0, "all data"))
    at = places(figure, "ring")
    np.testing.assert_allclose(at[1, 0] - at[0, 0], at[2, 0] - at[1, 0], atol=0.2)
    assert at[2, 1] - at[0, 1] > 80 and "all data" in figure
    band = svg(figure).find(".//*[@class='band']").get("points").split()
    assert len(band) == 4


def test_equal_values_and_a_single_size_can_be_drawn():
    assert len(places(curve([(3.0, 1.0), (3.0, 1.0)], "t", "x", "y"), "ring")) == 2
    assert len(places(intervals([Measured("one", [0.0], 0.0, None, None)], "t", "x"), "bar0")) == 1
