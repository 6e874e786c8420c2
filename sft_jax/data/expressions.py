"""Texts that the configuration makes of several fields of a row: `data.columns.prompt="{{ context }}\\n\\n{{ question }}"`."""

import functools
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from sft_jax.config_checks import is_expression
from sft_jax.data.examples import RowError
from sft_jax.data.json_rows import kind_of
from sft_jax.errors import UserError


def fields_of(column: str) -> frozenset[str]:
    """Returns the fields that a value of `data.columns` reads: the ones in the expression, or the one that it names."""
    return _compiled(column)[1] if is_expression(column) else frozenset([column])


def evaluate(column: str, row: Mapping[str, Any]) -> str:
    """Returns the text of an expression for a row. Raises RowError where it fails, or writes a field that is missing or null.

    A condition may ask for such a field: `{% if input %}{{ input }}{% endif %}`.
    """
    try:
        return _compiled(column)[0].render(row)
    except MemoryError:
        raise
    except Exception as error:  # an expression can fail in every way that Python can
        raise RowError(f"the expression {column!r} fails: {error}; correct the row or the expression in data.columns.") from error


class _Missing(jinja2.StrictUndefined):
    """A field that the row has not: conditions take it for false, and writing it is an error."""

    def __bool__(self) -> bool:
        return False


def _written(value: Any) -> Any:
    if value is None:
        raise jinja2.UndefinedError("it writes a field that is null")
    if isinstance(value, (list, dict)):
        raise jinja2.UndefinedError(f"it writes {kind_of(value)}; name what is in it, or use the filter tojson")
    return value


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Computes nothing when it compiles, which is done where no watchdog is: an operator that is intercepted is no constant."""

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)


_ENVIRONMENT = _Environment(undefined=_Missing, finalize=_written, keep_trailing_newline=True)


@functools.lru_cache(maxsize=256)
def _compiled(column: str) -> tuple[jinja2.Template, frozenset[str]]:
    try:
        tree = _ENVIRONMENT.parse(column)
        return _ENVIRONMENT.from_string(column), frozenset(jinja2.meta.find_undeclared_variables(tree))
    except jinja2.TemplateError as error:
        raise UserError(f"data.columns: {column!r} is no valid expression ({error}); correct it.") from error
