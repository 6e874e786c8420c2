"""Texts that the configuration makes of several fields of a row: `data.columns.prompt="{{ context }}\\n\\n{{ question }}"`."""

import functools
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from sft_jax.config_checks import is_expression
from sft_jax.data.examples import RowError
from sft_jax.data.sources.json_rows import kind_of
from sft_jax.errors import UserError


def fields_of(column: str) -> frozenset[str]:
    """Returns the fields that a value of `data.columns` reads: the ones in the expression, or the one that it names."""
    return _compiled(column)[1] if is_expression(column) else frozenset([column])


def evaluate(column: str, row: Mapping[str, Any]) -> str:
    """Returns the text of an expression for a row. Raises RowError where it fails, or writes a field that is missing or null.

    A condition may ask for such a field: `{% if input %}{{ input }}{% endif %}`.
    """
    try:
        return _compiled(column)[0].render(_guarded(row))
    except MemoryError:
        raise
    except Exception as error:  # an expression can fail in every way that Python can
        raise RowError(f"the expression {column!r} fails: {error}; correct the row or the expression in data.columns.") from error


class _Missing(jinja2.StrictUndefined):
    """A field that the row has not: conditions take it for false, and writing it is an error."""

    def __bool__(self) -> bool:
        return False


class _List(list):
    """A list of a row, which is written as nothing but JSON."""

    def __str__(self) -> str:
        raise jinja2.UndefinedError("it writes a list; name what is in it, or use the filter tojson")


class _Object(dict):
    """An object of a row, which is written as nothing but JSON."""

    def __str__(self) -> str:
        raise jinja2.UndefinedError("it writes an object; name what is in it, or use the filter tojson")


def _guarded(value: Any) -> Any:
    """Returns a value of a row in which null is what is missing, so that "None" is never written, wherever it stands."""
    if value is None:
        return _Missing("it writes a field that is null")
    if isinstance(value, Mapping):
        return _Object({name: _guarded(inner) for name, inner in value.items()})
    if isinstance(value, list):
        return _List(map(_guarded, value))
    return value


def _written(value: Any) -> Any:
    if isinstance(value, (_List, _Object)):
        str(value)
    if not isinstance(value, jinja2.Undefined) and (value is None or callable(value)):
        raise jinja2.UndefinedError(f"it writes {kind_of(value)}")
    return value


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Computes nothing when it compiles, which is done where no watchdog is: an operator that is intercepted is no constant."""

    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)


_ENVIRONMENT = _Environment(undefined=_Missing, finalize=_written, keep_trailing_newline=True)
_ENVIRONMENT.globals = {name: _ENVIRONMENT.globals[name] for name in ("range", "namespace")}  # the rest would pass for fields
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"sort_keys": False, "ensure_ascii": False, "default": lambda missing: None}


@functools.lru_cache(maxsize=256)
def _compiled(column: str) -> tuple[jinja2.Template, frozenset[str]]:
    try:
        tree = _ENVIRONMENT.parse(column)
        return _ENVIRONMENT.from_string(column), frozenset(jinja2.meta.find_undeclared_variables(tree) - _ENVIRONMENT.globals.keys())
    except jinja2.TemplateError as error:
        raise UserError(f"data.columns: {column!r} is no valid expression ({error}); correct it.") from error
