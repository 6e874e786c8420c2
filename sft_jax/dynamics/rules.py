"""What the history of a document says about it. An entry of RULES is a function and a line.

A loss is an outlier where it lies more than DEVIATIONS robust standard deviations above the median of its contemporaries (2.5 as Leys
et al. 2013 have it, doi:10.1016/j.jesp.2013.03.013). An example is *learnt* at an exposure where every supervised token is the argmax, which
is the criterion of Toneva et al. 2019 (arXiv:1812.05159) for an answer of many tokens. Free text hardly ever is, so what is not learnt
is not a fault by itself: it takes an outlier too.

The first exposure comes before the example was trained on, so alone it says nothing about whether it can be learnt. That is also why
EL2N and GraNd (Paul et al. 2021, arXiv:2107.07075) are taken early on and averaged over runs; here one run is enough, since there are
later exposures.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sft_jax.dynamics.histories import SMALLEST_SPREAD, Histories
from sft_jax.dynamics.parts import Documents
from sft_jax.dynamics.trend import contemporaries

DEVIATIONS = 2.5


class Found(NamedTuple):
    """Documents with a fault."""

    places: np.ndarray  # int64 [found], places in the histories
    measure: np.ndarray  # float64 [found], the worse the higher


class Rule(NamedTuple):
    """A kind of finding."""

    about: str
    find: Callable[[Histories, Documents], Found]


def outlying(histories: Histories) -> np.ndarray:
    """Returns bool [exposures]: the loss is an outlier, and not every supervised token is the argmax."""
    return (histories.deviation > DEVIATIONS) & (histories.accuracy < 1)


def never_learnt(histories: Histories, documents: Documents) -> Found:
    """Every exposure after the first is an outlier, of at least one. "Hard to learn" in a data map (Swayamdipta et al. 2020,
    arXiv:2009.10795): low confidence that stays low; most of what is there is mislabelled."""
    later = histories.number() > 0
    hits = np.add.reduceat(outlying(histories) & later, histories.begins[:-1], dtype=np.int64)
    found = (histories.counts > 1) & (hits == histories.counts - 1) & ~_forgotten(histories)
    return _found(found, histories.score)


def forgotten(histories: Histories, documents: Documents) -> Found:
    """The last exposure is an outlier, an earlier one was none, and the loss has risen since by as much as makes an outlier. A
    forgetting event (Toneva et al. 2019) that lasts to the end; that the rest of the data has gone on does not count."""
    return _found(_forgotten(histories), histories.last(histories.loss) - _best(histories)[0])


def learnt_late(histories: Histories, documents: Documents) -> Found:
    """An outlier at every exposure after the first until later than the middle, two at least, and none from there on: learnt by
    heart in the end, where others like it were known from other examples."""
    outliers = outlying(histories) & (histories.number() > 0)
    hits = np.add.reduceat(outliers, histories.begins[:-1], dtype=np.int64)
    latest = np.maximum.reduceat(np.where(outliers, histories.number(), 0), histories.begins[:-1])  # 0 where there is none
    fine_from = latest + 2  # the number of the exposure, from 1 on, since which it is no outlier
    found = (hits == latest) & (hits > 1) & (fine_from <= histories.counts) & (fine_from > (histories.counts + 1) / 2)
    return _found(found, histories.score)


def length_outlier(histories: Histories, documents: Documents) -> Found:
    """The mean excess, after the first exposure where there are more, is an outlier among documents of the set that have about as
    many supervised tokens: short answers have higher and more different losses a token than long ones, so each is compared with its
    like."""
    numbers, only = histories.document, np.repeat(histories.counts == 1, histories.counts)
    counted = (histories.number() > 0) | only
    values = np.add.reduceat(np.where(counted, histories.excess, 0), histories.begins[:-1]) / np.maximum(histories.counts - 1, 1)
    median, spread = contemporaries(documents.supervised[numbers], documents.set[numbers], values)
    deviation = (values - median) / np.maximum(spread, SMALLEST_SPREAD)
    return _found((deviation > DEVIATIONS) & (histories.last(histories.accuracy) < 1), deviation)


RULES: dict[str, Rule] = {
    "never_learnt": Rule("the loss stayed an outlier at every exposure after the first", never_learnt),
    "forgotten": Rule("the loss was no outlier, has risen since and ends as one", forgotten),
    "learnt_late": Rule("the loss was an outlier until later than the middle of its exposures, and ends as none", learnt_late),
    "length_outlier": Rule("the loss is an outlier among examples with about as many supervised tokens", length_outlier),
}


def _best(histories: Histories) -> tuple[np.ndarray, np.ndarray]:
    """Returns [n] the least loss before the last exposure among those that are no outliers, and whether there is one."""
    last = histories.number() == np.repeat(histories.counts - 1, histories.counts)
    loss = np.where(last | outlying(histories), np.inf, histories.loss)
    best = histories.least(loss)
    return best, np.isfinite(best)


def _forgotten(histories: Histories) -> np.ndarray:
    best, known = _best(histories)
    rise = np.where(known, histories.last(histories.loss) - np.where(known, best, 0), 0)
    return known & histories.last(outlying(histories)) & (rise > DEVIATIONS * histories.last(histories.spread))


def _found(found: np.ndarray, measure: np.ndarray) -> Found:
    places = np.flatnonzero(found)
    return Found(places, measure[places])
