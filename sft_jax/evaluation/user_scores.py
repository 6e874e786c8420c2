"""Scorers that the user writes: path/to/file.py:function."""

import importlib.util
import inspect
import itertools
import math
from collections.abc import Callable
from pathlib import Path

from sft_jax.errors import UserError
from sft_jax.evaluation.scoring import Answer, Scorer

_numbers = itertools.count()


def is_user_scorer(spec: str) -> bool:
    """Returns whether a scorer is named by file and function."""
    return ".py:" in spec


def user_scorer(spec: str) -> Scorer:
    """Returns the scorer of `path/to/file.py:function`.

    The function is called as function(generation, reference), and where it takes three arguments as
    function(generation, reference, row) with the row of the data. It returns a number or a bool, or None for an answer that
    is not counted; the score is the mean.

        def within_ten(generation, reference):
            return abs(len(generation) - len(reference)) <= 10

    Raises UserError naming the file where there is no such function, and where it raises or returns anything else.
    """
    path, name = spec.rsplit(":", 1)
    function = _function(Path(path).expanduser(), name, spec)
    try:
        takes_row = len(inspect.signature(function).parameters) > 2
    except (TypeError, ValueError):  # of a callable without a signature
        takes_row = False

    def statistics(answer: Answer) -> tuple[float, float]:
        try:
            value = function(answer.generation, answer.reference, *((answer.row,) if takes_row else ()))
        except Exception as error:
            raise UserError(f"{spec}: raised {type(error).__name__}: {error} for the answer {answer.generation!r:.200}.") from error
        if value is None:
            return 0.0, 0.0
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{spec}: returned {value!r:.200}; return a number, True or False, or None for an answer that does not count.")
        return number, 1.0

    return Scorer(statistics, needs_row=takes_row)


def _function(path: Path, name: str, spec: str) -> Callable:
    if not path.is_file():
        raise UserError(f"{spec}: there is no file {path}; name one as path/to/file.py:function.")
    module_spec = importlib.util.spec_from_file_location(f"_sft_jax_user_scorer_{next(_numbers)}", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{spec}: {path} cannot be run ({type(error).__name__}: {error}).") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{spec}: {path} has no function {name!r}.")
    return function
