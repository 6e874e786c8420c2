"""Parameters of tests that only --slow runs."""

import pytest


def slow(*values):
    """Returns pytest parameters with the mark; a tuple is the values of several arguments."""
    return [pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow) for value in values]
