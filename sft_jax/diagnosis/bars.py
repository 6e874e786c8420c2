"""What a report shows while it works: bars, one after the other, each gone before the next one begins."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

from sft_jax.evaluation.evals import Between
from sft_jax.hf.load import Progress

Bars = Callable[[], AbstractContextManager[Between]]  # of what is computed
Loading = Callable[[str], AbstractContextManager[Progress | None]]  # of the model that is named


def no_bars() -> AbstractContextManager[Between]:
    return contextlib.nullcontext(lambda what, done, total: None)


def silently(name: str) -> AbstractContextManager[None]:
    del name
    return contextlib.nullcontext()
