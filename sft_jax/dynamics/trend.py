"""What a loss is measured against: the documents of the same set that came up at about the same time.

A loss of 1 nat a token is high at the end of a run and low at its beginning, low in a set of poems and high in one of labels. So
each exposure is compared with its contemporaries, by statistics that a quarter of faulty documents does not move: the median, and
the median distance of those above it (the upper half of a "double MAD"). Losses are skewed: half of the examples are learnt to
almost nothing, and by the plain median absolute deviation (Rousseeuw & Croux 1993) a quarter of those that are merely harder
would be outliers.
"""

import numpy as np

LEAST = 128  # exposures that a median is taken over: it is known to a tenth of the spread then
NORMAL = 1.4826  # times the median distance from the median is the standard deviation, where values are normally distributed


def contemporaries(step: np.ndarray, group: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each exposure the median of `values` among its contemporaries, and their robust standard deviation upwards.

    Contemporaries are the exposures of a group in a stretch of whole steps, as few steps as hold LEAST of them; what is left at
    the end belongs to the last stretch. All arrays are [exposures], in any order; results are float64.
    """
    median, spread = np.zeros(len(values)), np.zeros(len(values))
    order = np.lexsort((step, group))
    bounds = stretches(step[order], group[order])
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        places = order[first:last]
        middle = np.median(values[places])
        median[places] = middle
        above = values[places][values[places] >= middle]
        spread[places] = NORMAL * np.median(above - middle)
    return median, spread


def stretches(step: np.ndarray, group: np.ndarray) -> list[int]:
    """Returns where stretches begin, and the end, of exposures that are sorted by group and then by step.

    >>> stretches(np.repeat(np.arange(4), 100), np.zeros(400, int))
    [0, 200, 400]
    """
    if not len(step):
        return [0]
    changes = np.flatnonzero((np.diff(step) != 0) | (np.diff(group) != 0)) + 1
    bounds, begins_group = [0], True
    for place in changes.tolist():
        if group[place] != group[place - 1]:
            if place - bounds[-1] < LEAST and not begins_group:
                bounds.pop()
            bounds.append(place)
            begins_group = True
        elif place - bounds[-1] >= LEAST:
            bounds.append(place)
            begins_group = False
    if len(step) - bounds[-1] < LEAST and not begins_group:
        bounds.pop()
    return [*bounds, len(step)]
