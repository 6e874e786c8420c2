"""What a report shows while it works: bars, one after the other, each gone before the next one begins."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

from sft_jax.evaluation.evals import Between

Bars = Callable[[], AbstractContextManager[Between]]  # of what is computed


def no_bars() -> AbstractContextManager[Between]:
    """Shows nothing."""
    return contextlib.nullcontext(lambda what, done, total: None)
